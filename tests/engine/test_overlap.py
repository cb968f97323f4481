"""An engine that is a step ahead says what the plain one says, and asks little of its device.

The faults planted at the end are those this kind of engine has: each must be seen by the random lives above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.engine.overlap import OverlappedCore
from llmserve.kernels.step_ops import ReferenceStepOps
from llmserve.messages import EngineRequest, FinishReason, SamplingParams
from llmserve.scheduler.drafts import Drafter
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.device_rows import DeviceRows
from llmserve.worker.gpu_model_runner import GPUModelRunner, GraphSettings, LaunchedStep
from llmserve.worker.input_batch import Draws, InputBatch, IntArray
from tests.engine.overlap_harness import (
    MAX_LEN,
    MAX_SEQS,
    Engines,
    Life,
    Said,
    adaptive_drafter,
    fixed_drafter,
    live,
    random_life,
)
from tests.worker.fake_device import FakeEvent

NO_GRAPHS = GraphSettings(max_size=0)
LAZY = GraphSettings(lazily=True)


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> Engines:
    return Engines.from_folder(tiny_llama)


def request(name: str, num_prompt: int, max_tokens: int, **params: object) -> EngineRequest:
    prompt = [(3 + 7 * i + len(name)) % 317 + 3 for i in range(num_prompt)]
    values = {"temperature": 0.0, "seed": 1} | params
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, **values),  # type: ignore[arg-type]
        arrival_s=0.0,
    )


def assert_all_is_free(engines: Engines) -> None:
    assert engines.manager.num_free_blocks == engines.manager.num_blocks
    batch = engines.runner.batch
    assert len(batch.row_of) <= MAX_SEQS  # those whose end the worker has not been told of


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_have_the_plain_engines_words(engines: Engines, seed: int) -> None:
    """Chunked prompts, prefixes in the cache, preemptions, stop tokens at any step, penalties and log-probabilities."""
    life = random_life(seed)
    expected = live(engines.plain(life), life)
    graphs = (GraphSettings(), NO_GRAPHS, LAZY)[seed % 3]
    found = live(engines.overlapped(life, graphs=graphs), life)
    assert {name: said.token_ids for name, said in found.items()} == {n: s.token_ids for n, s in expected.items()}
    assert {name: (s.logprobs, s.prompt_logprobs) for name, s in found.items()} == {
        name: (s.logprobs, s.prompt_logprobs) for name, s in expected.items()
    }
    assert [said.finish_reason for said in found.values()] == [said.finish_reason for said in expected.values()]
    assert_all_is_free(engines)


def test_the_lives_contain_what_they_are_for(engines: Engines) -> None:
    said: list[Said] = []
    for seed in range(12):
        life = random_life(seed)
        said += live(engines.plain(life), life).values()
    assert sum(one.num_preemptions for one in said) > 10
    assert sum(one.finish_reason is FinishReason.STOP for one in said) > 20
    assert sum(one.finish_reason is FinishReason.LENGTH for one in said) > 20


@pytest.mark.parametrize("make_drafter", [fixed_drafter, adaptive_drafter])
@pytest.mark.parametrize("seed", range(4))
def test_drafts_change_when_tokens_come_never_which(
    engines: Engines, seed: int, make_drafter: Callable[..., Drafter]
) -> None:
    life = random_life(100 + seed)
    expected = live(engines.plain(life), life)
    core = engines.overlapped(life, make_drafter(expected, seed))
    found = live(core, life)
    assert {name: said.token_ids for name, said in found.items()} == {n: s.token_ids for n, s in expected.items()}
    assert_all_is_free(engines)


def test_drafts_are_verified_and_steps_without_them_overlap(engines: Engines) -> None:
    life = Life(arrivals=[(0, request("a", 20, 120))])
    expected = live(engines.plain(life), life)
    core = engines.overlapped(life, fixed_drafter(expected, 5))
    core.add(life.arrivals[0][1])
    num_drafts = num_accepted = num_steps = 0
    engines.fake.num_behind.clear()
    while core.has_work():
        step = core.step()
        num_steps += 1
        num_drafts += step.stats.num_draft_tokens
        num_accepted += step.stats.num_accepted_tokens
    assert 20 < num_accepted <= num_drafts
    assert num_steps == 120 - num_accepted
    assert len(engines.fake.num_behind) == num_steps
    assert 0 < sum(behind > 0 for behind in engines.fake.num_behind) < num_steps


@pytest.mark.parametrize("seed", range(8))
def test_requests_taken_back_in_mid_flight_disturb_nobody(engines: Engines, seed: int) -> None:
    life = random_life(200 + seed, aborts=True)
    undisturbed = replace(life, num_blocks=400, aborts=[])
    expected = live(engines.plain(undisturbed), undisturbed)
    found = live(engines.overlapped(life, fixed_drafter(expected, seed) if seed % 2 else None), life)
    gone = {name for _, name in life.aborts}
    assert gone
    for name, said in found.items():
        whole = expected[name].token_ids
        assert said.token_ids == (whole[: len(said.token_ids)] if name in gone else whole)
    assert_all_is_free(engines)


def test_an_id_may_be_used_again_while_its_old_step_is_in_flight(engines: Engines) -> None:
    life = Life()
    core = engines.overlapped(life)
    core.add(request("same", 20, 30))
    for _ in range(5):
        core.step()
    core.abort(["same"])
    again = request("same", 33, 9, temperature=1.0, seed=9)
    core.add(again)
    said = Said()
    while core.has_work():
        for output in core.step().outputs:
            said.add(output)
    alone = Life(arrivals=[(0, again)])
    assert said.token_ids == live(engines.plain(alone), alone)["same"].token_ids


def test_the_longest_context_is_filled_to_its_last_token(engines: Engines) -> None:
    life = Life(arrivals=[(0, request("long", 40, 1000)), (0, request("short", MAX_LEN - 1, 1000))])
    found = live(engines.overlapped(life), life)
    assert found["long"].token_ids == live(engines.plain(life), life)["long"].token_ids
    assert (len(found["long"].token_ids), len(found["short"].token_ids)) == (MAX_LEN - 40, 1)


def decoding(engines: Engines, num_seqs: int, **params: object) -> OverlappedCore:
    """An engine in the middle of decoding: prompts are done, a step is in flight, no block is about to fill."""
    core = engines.overlapped(Life())
    for index in range(num_seqs):
        core.add(request(f"r{index}", 17, 100, **params))
    for _ in range(num_seqs + 3):
        core.step()
    engines.fake.counts.clear()
    return core


@pytest.mark.parametrize("num_seqs", [1, 3, 8])
def test_a_decode_is_one_copy_in_two_graphs_and_one_copy_out(engines: Engines, num_seqs: int) -> None:
    core = decoding(engines, num_seqs)
    core.step()
    padded = {1: 4, 3: 4, 8: 8}[num_seqs]
    counts = dict(engines.fake.counts)
    staged = 6 * padded + {1: 0, 3: 4, 8: 4}[num_seqs]  # of the starts there is one more
    assert counts == {"copies_in": 1, "copied_in": staged, "replays": 2, "copies_out": 1, "events": 1, "waits": 1}


def test_a_step_is_launched_while_the_one_before_it_runs(engines: Engines) -> None:
    """The device is never out of work: when the host waits for a step, the next is queued behind it."""
    core = decoding(engines, 2)
    device = engines.fake
    device.num_behind.clear()
    for _ in range(20):
        core.step()
    assert len(device.num_behind) == 20
    assert all(device.num_behind)
    assert device.counts["synchronisations"] == 0
    assert 1 <= device.counts["submits"] <= 2  # both requests begin new blocks together


def test_nothing_is_computed_behind_a_token_that_is_sure_to_be_the_last(engines: Engines) -> None:
    core = engines.overlapped(Life())
    core.add(request("a", 17, 5))
    num_tokens = 0
    while core.has_work():
        num_tokens += core.step().stats.num_step_tokens
    assert num_tokens == 17 + 4


@pytest.mark.parametrize("graphs", [GraphSettings(), NO_GRAPHS, LAZY])
def test_penalties_and_biases_are_the_device_s_own_affair(engines: Engines, graphs: GraphSettings) -> None:
    """Their draws overlap, and are those of the plain engine: what was drawn counts for the next step at once."""
    asked: list[dict[str, object]] = [
        {"presence_penalty": 2.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.4, "temperature": 0.9, "top_p": 0.8},
        {"logit_bias": {5: 9.0, 70: 8.5}, "min_tokens": 12, "stop_token_ids": [5]},
        {"allowed_token_ids": [4, 31, 32, 33, 64, 300], "temperature": 1.5, "frequency_penalty": 1.0},
        {},
        {"bad_words": [[7]], "presence_penalty": -1.0},
    ]
    life = Life(arrivals=[(i, request(f"p{i}", 9 + 5 * i, 40, **params)) for i, params in enumerate(asked)])
    expected = live(engines.plain(life), life)
    core = engines.overlapped(life, graphs=graphs)
    engines.device.num_behind.clear()
    found = live(core, life)
    assert {name: said.token_ids for name, said in found.items()} == {n: s.token_ids for n, s in expected.items()}
    assert sum(map(bool, engines.device.num_behind)) > 30
    assert set(found["p3"].token_ids) <= {4, 31, 32, 33, 64, 300}


@pytest.mark.parametrize("params", [{"logprobs": 1}, {"bad_words": [[1, 2]]}])
def test_a_step_that_the_host_has_a_part_in_is_waited_for(engines: Engines, params: dict[str, Any]) -> None:
    core = decoding(engines, 2, **params)
    engines.fake.num_behind.clear()
    for _ in range(5):
        core.step()
    assert engines.fake.num_behind == [0] * 5


def test_all_graphs_are_captured_at_the_start_or_none(engines: Engines) -> None:
    engines.overlapped(Life())
    assert engines.runner.num_graphs == engines.runner.num_graph_keys > 0
    engines.overlapped(Life(), graphs=NO_GRAPHS)
    assert engines.runner.num_graphs == 0
    core = engines.overlapped(Life(), graphs=LAZY)
    assert engines.runner.num_graphs == 0
    core.add(request("a", 5, 5))
    while core.has_work():
        core.step()
    assert 0 < engines.runner.num_graphs < engines.runner.num_graph_keys


def dont_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "wait", lambda event: None)


def stage_in_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is written over the one that is still to be copied."""
    stage = DeviceRows.stage

    def staged(rows: DeviceRows, *step: Any) -> Any:
        rows._turn = 0
        return stage(rows, *step)

    monkeypatch.setattr(DeviceRows, "stage", staged)


def draw_into_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = GPUModelRunner._launch_draws

    def launched(runner: GPUModelRunner, *step: Any) -> Any:
        runner._drawn_on_host.reverse()
        return launch(runner, *step)

    monkeypatch.setattr(GPUModelRunner, "_launch_draws", launched)


def pad_with_a_live_block(monkeypatch: pytest.MonkeyPatch) -> None:
    init = DeviceRows.__init__

    def made(rows: DeviceRows, *shape: Any, null_block: int) -> None:
        init(rows, *shape, null_block=0)

    monkeypatch.setattr(DeviceRows, "__init__", made)


def leave_rows_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes back finds the table of whoever had its row."""
    changes = DeviceRows._changes

    def changed(rows: DeviceRows, output: SchedulerOutput) -> Any:
        return changes(rows, replace(output, resumed_requests={}))

    monkeypatch.setattr(DeviceRows, "_changes", changed)


def forget_new_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = DeviceRows._changes
    monkeypatch.setattr(DeviceRows, "_changes", lambda rows, output: changes(rows, replace(output, new_block_ids={})))


def forget_last_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceRows, "keep_last_tokens", lambda rows, draw_rows, token_ids: None)


def trust_rows_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn is written to the row it was drawn for, whoever has it now."""

    def fulfil(batch: InputBatch, draws: Draws, sampled: IntArray) -> None:
        batch.token_ids[draws.rows, draws.positions] = sampled

    monkeypatch.setattr(InputBatch, "fulfil", fulfil)


def leave_parked_tokens_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    def fulfil(batch: InputBatch, draws: Draws, sampled: IntArray) -> None:
        held = batch.stays[draws.rows] == draws.stays
        batch.token_ids[draws.rows[held], draws.positions[held]] = sampled[held]

    monkeypatch.setattr(InputBatch, "fulfil", fulfil)


def schedule_beyond_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchedStep, "holds_up_next", False)


def read_the_position_before(monkeypatch: pytest.MonkeyPatch) -> None:
    expand = ReferenceStepOps.expand

    def expanded(ops: ReferenceStepOps, rows: torch.Tensor, staged: Any, block_size: int) -> Any:
        step = expand(ops, rows, staged, block_size)
        return replace(step, positions=(step.positions - 1).clamp(min=0))

    monkeypatch.setattr(ReferenceStepOps, "expand", expanded)


FAULTS = (
    dont_wait,
    stage_in_one_buffer,
    draw_into_one_buffer,
    pad_with_a_live_block,
    leave_rows_stale,
    forget_new_blocks,
    forget_last_tokens,
    trust_rows_to_stay,
    leave_parked_tokens_pending,
    schedule_beyond_the_host,
    read_the_position_before,
)


def goes_wrong(engines: Engines) -> bool:
    """Whether the lives above show a fault."""
    for seed in range(12):
        life = random_life(seed)
        expected = live(engines.plain(life), life)
        try:
            found = live(engines.overlapped(life), life)
        except (AssertionError, IndexError, KeyError, ValueError, RuntimeError):
            return True
        if found != expected:
            return True
    return False


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_seen(
    engines: Engines, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert goes_wrong(engines)
