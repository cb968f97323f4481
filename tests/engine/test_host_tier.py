"""A host tier behind a cache that is too small: the words are the same, and prompts that come again are not computed.

On the fake device, which does everything as late as it may. The faults planted at the end are those that copies beside
a step in flight can have: each must be seen by the lives above.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.messages import EngineRequest, SamplingParams
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.host_blocks import HostBlocks
from tests.engine.overlap_harness import Engines, Life, Said, adaptive_drafter, live, random_life

SEEDS = range(6)


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> Engines:
    return Engines.from_folder(tiny_llama)


def returning_life(seed: int, num_host_blocks: int) -> Life:
    """Conversations that take turns, each going on where it stood: together three times what the device holds."""
    source = random.Random(seed)
    life = Life(num_blocks=16, num_host_blocks=num_host_blocks, budget=source.choice([24, 64]))
    talks = [[source.randrange(3, 320) for _ in range(source.randint(50, 90))] for _ in range(6)]
    at = 0
    for turn in range(3):
        for number, talk in enumerate(talks):
            params = SamplingParams(max_tokens=source.randint(1, 20), seed=number, temperature=0.7)
            name = f"{number}.{turn}"
            life.arrivals.append(
                (at, EngineRequest(request_id=name, prompt_token_ids=talk.copy(), params=params, arrival_s=float(at)))
            )
            talk += [source.randrange(3, 320) for _ in range(12)]
            at += source.choice([0, 3, 12])
    return life


def words(said: dict[str, Said]) -> dict[str, list[int]]:
    return {name: one.token_ids for name, one in said.items()}


def plain_words(engines: Engines, life: Life) -> dict[str, list[int]]:
    """With room for all, and so without evictions."""
    roomy = replace(life, num_blocks=400)
    return words(live(engines.plain(roomy), roomy))


@pytest.mark.parametrize("num_host_blocks", [3, 200])
@pytest.mark.parametrize("seed", SEEDS)
def test_conversations_that_return_say_the_same(engines: Engines, seed: int, num_host_blocks: int) -> None:
    life = returning_life(seed, num_host_blocks)
    core = engines.overlapped(life)
    assert words(live(core, life)) == plain_words(engines, life)
    assert engines.manager.num_free_blocks == engines.manager.num_blocks


@pytest.mark.parametrize("seed", SEEDS)
def test_random_lives_say_the_same_with_drafts_and_aborts(engines: Engines, seed: int) -> None:
    life = replace(random_life(seed, aborts=seed % 2 == 1), num_blocks=14, num_host_blocks=30)
    expected = live(engines.plain(life), life)
    found = words(live(engines.overlapped(life, adaptive_drafter(expected, seed)), life))
    if not life.aborts:
        assert found == words(expected)
    for name, token_ids in words(expected).items():  # one taken back may have said more, or less
        shorter = min(len(token_ids), len(found[name]))
        assert found[name][:shorter] == token_ids[:shorter]


def num_computed(engines: Engines, life: Life) -> tuple[int, int]:
    """Tokens computed in a life, and tokens restored."""
    core = engines.overlapped(life)
    arrivals = list(life.arrivals)
    computed = restored = 0
    for _, request in arrivals:  # one after another
        core.add(request)
        while core.has_work():
            stats = core.step().stats
            computed += stats.num_step_tokens
            restored += stats.host_cache_hits
    return computed, restored


def test_what_the_host_keeps_is_not_computed_again_and_is_counted(engines: Engines) -> None:
    with_tier = returning_life(1, 200)
    without = replace(with_tier, num_host_blocks=0)
    computed, restored = num_computed(engines, with_tier)
    computed_without, restored_without = num_computed(engines, without)
    assert restored_without == 0
    assert restored > 400
    # What was restored, and what was found on the device either way, is what was not computed.
    assert computed < computed_without - 0.8 * restored


def test_without_pairs_the_device_is_asked_for_nothing(engines: Engines) -> None:
    life = replace(returning_life(2, 5), num_blocks=400)
    live(engines.overlapped(life), life)
    with_tier = engines.fake.counts.copy()
    bare = replace(life, num_host_blocks=0)
    live(engines.overlapped(bare), bare)
    assert engines.fake.counts == with_tier


Plant = Callable[[pytest.MonkeyPatch], None]


def offload_after_the_overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step late."""
    copy = HostBlocks.copy
    late: list[tuple[int, int]] = []

    def copied(blocks: HostBlocks, output: SchedulerOutput) -> None:
        offloads = late.copy()
        late[:] = output.offloads
        copy(blocks, replace(output, offloads=offloads))

    monkeypatch.setattr(HostBlocks, "copy", copied)


def restore_after_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = HostBlocks.copy
    late: list[tuple[int, int]] = []

    def copied(blocks: HostBlocks, output: SchedulerOutput) -> None:
        restores = late.copy()
        late[:] = output.restores
        copy(blocks, replace(output, restores=restores))

    monkeypatch.setattr(HostBlocks, "copy", copied)


def restore_before_the_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves in a step and comes back in it is not there yet."""
    copy = HostBlocks.copy

    def copied(blocks: HostBlocks, output: SchedulerOutput) -> None:
        copy(blocks, replace(output, offloads=[]))
        copy(blocks, replace(output, restores=[]))

    monkeypatch.setattr(HostBlocks, "copy", copied)


def copy_without_waiting_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a thread of the host: beside the step in flight, not behind it."""

    def copied(blocks: HostBlocks, output: SchedulerOutput) -> None:
        for copier, pairs in ((blocks._offloader, output.offloads), (blocks._restorer, output.restores)):
            if pairs:
                blocks._staged[: len(pairs)] = blocks._staged.new_tensor(pairs)
                copier.copy(blocks._staged[: len(pairs)])

    monkeypatch.setattr(HostBlocks, "copy", copied)


def fault_lives() -> Iterator[Life]:
    for seed in SEEDS:
        yield returning_life(seed, 200)
        yield returning_life(seed, 20)
    for seed in range(30):
        yield replace(random_life(seed), num_blocks=14, num_host_blocks=30)


def goes_wrong(engines: Engines) -> bool:
    """Whether the lives above show a fault."""
    for life in fault_lives():
        expected = plain_words(engines, life)
        try:
            if words(live(engines.overlapped(life), life)) != expected:
                return True
        except (AssertionError, IndexError, KeyError, ValueError, RuntimeError):
            return True
    return False


@pytest.mark.parametrize(
    "plant",
    [
        offload_after_the_overwrite,
        restore_after_the_read,
        restore_before_the_offload,
        copy_without_waiting_for_the_step,
    ],
)
def test_a_planted_fault_is_seen(engines: Engines, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert goes_wrong(engines)
