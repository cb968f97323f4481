"""From a loaded model to an engine that launches its steps: what is built, noted, drained; and what a step may not
do."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from torch.utils._python_dispatch import TorchDispatchMode

from llmserve.engine.assembly import make_core
from llmserve.engine.core import EngineCore
from llmserve.engine.flight_recorder import FlightRecorder, make_recorder_fd
from llmserve.engine.loop import EngineLoop
from llmserve.engine.overlap import OverlappedCore
from llmserve.messages import EngineRequest, FromEngine, SamplingParams, Shutdown, StepOutputs
from llmserve.worker.device_rows import SamplingMode
from llmserve.worker.gpu_model_runner import SAMPLING_MODES, GPUModelRunner
from tests.engine.overlap_harness import Engines, Life
from tests.worker.fake_device import FakeDevice


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> Engines:
    return Engines.from_folder(tiny_llama)


@pytest.fixture
def recorder() -> Iterator[FlightRecorder]:
    fd = make_recorder_fd()
    recorder = FlightRecorder(fd)
    os.close(fd)
    yield recorder
    recorder.close()


def launching(engines: Engines, progress: Callable[[int, int], None] | None = None, **settings: Any) -> GPUModelRunner:
    """As on a GPU, but for the device."""
    prepared = replace(engines.prepared, config=replace(engines.prepared.config, **settings))
    device = FakeDevice(prepared.free_bytes)
    engines.device = device
    return prepared.launching_runner(engines.model, lambda: device, progress)


def request(name: str, num_prompt: int = 17, max_tokens: int = 20) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1)
    prompt = [(5 + 11 * i) % 317 + 3 for i in range(num_prompt)]
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, arrival_s=0.0)


def run(core: EngineCore, *requests: EngineRequest) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {one.request_id: [] for one in requests}
    for one in requests:
        core.add(one)
    while core.has_work():
        for output in core.step().outputs:
            said[output.request_id] += output.token_ids
    return said


def test_a_device_gets_the_engine_that_its_settings_ask_for(engines: Engines) -> None:
    """All say the same."""
    heard: list[tuple[int, int]] = []
    runner = launching(engines, lambda done, total: heard.append((done, total)))
    assert runner.num_graphs == runner.num_graph_keys > 0
    assert heard == [(done, runner.num_graphs) for done in range(1, runner.num_graphs + 1)]
    assert isinstance(make_core(engines.prepared.config, runner), OverlappedCore)
    expected = run(engines.plain(Life()), request("a"), request("b", 40))
    for settings in ({}, {"async_scheduling": False}, {"enforce_eager": True}, {"cuda_graph_capture": "lazy"}):
        runner = launching(engines, **settings)
        core = make_core(replace(engines.prepared.config, **settings), runner)
        assert type(core) is (EngineCore if settings.get("async_scheduling") is False else OverlappedCore)
        assert bool(runner.num_graphs) == ("cuda_graph_capture" not in settings and "enforce_eager" not in settings)
        assert run(core, request("a"), request("b", 40)) == expected
        assert bool(runner.num_graphs) != settings.get("enforce_eager", False)


def test_what_is_measured_is_what_the_cache_gets_less(engines: Engines) -> None:
    settings = {"kv_cache_memory": None, "max_model_len": None}
    before = engines.prepared.plan
    plan = launching(engines, **settings).plan
    assert plan.num_blocks > 0
    assert plan.kv_cache_bytes == plan.num_blocks * (before.kv_cache_bytes // before.num_blocks)


class NotingDraws(FakeDevice):
    """Notes what was drawn op by op, and of how many."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: set[tuple[int, SamplingMode]] = set()

    def submit(self, work: Callable[[], None]) -> None:
        if isinstance(work, partial) and work.func.__name__ == "_draw":
            self.drawn.add(work.args[0])
        super().submit(work)


@pytest.mark.parametrize("settings", [{"enforce_eager": True}, {"cuda_graph_capture": "lazy"}, {}])
def test_no_way_of_drawing_is_met_first_by_a_request(engines: Engines, settings: dict[str, Any]) -> None:
    """On a GPU each is a kernel to be compiled, and so is a step of one token."""
    prepared = replace(engines.prepared, config=replace(engines.prepared.config, **settings))
    device = NotingDraws()
    prepared.launching_runner(engines.model, lambda: device)
    assert {mode for _, mode in device.drawn} == set(SAMPLING_MODES)
    assert 1 in {num_draws for num_draws, _ in device.drawn}


def test_all_steps_on_their_way_are_noted(engines: Engines, recorder: FlightRecorder) -> None:
    """Who ended an engine that had two steps is in one of them."""
    runner = launching(engines)
    noted: list[list[str]] = []
    settle = runner.settle

    def watched(step: Any) -> Any:
        noted.append(recorder.executing())
        return settle(step)

    runner.settle = watched  # type: ignore[method-assign]
    core = make_core(engines.prepared.config, runner, recorder)
    core.add(request("a", max_tokens=12))
    core.step()
    core.add(request("b", max_tokens=20))
    while core.has_work():
        core.step()
    assert noted[0] == ["a"]
    assert ["a", "b"] in noted
    assert noted[-1] == ["b"]
    assert recorder.executing() == []


def test_the_loop_drains_what_is_in_flight(engines: Engines) -> None:
    core = make_core(engines.prepared.config, launching(engines))
    context = zmq.Context.instance()
    inbox, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.bind("inproc://overlap")
    sender.connect("inproc://overlap")
    sent: list[FromEngine] = []
    try:
        for message in (request("a", max_tokens=9), Shutdown(drain=True)):
            sender.send(msgspec.msgpack.encode(message))
        EngineLoop(core, inbox, sent.append, os.getppid()).run()
    finally:
        inbox.close(linger=0)
        sender.close(linger=0)
    steps = [message for message in sent if isinstance(message, StepOutputs)]
    assert [step.step for step in steps] == list(range(1, 10))
    assert sum(len(output.token_ids) for step in steps for output in step.outputs) == 9
    assert not core.has_work()


class Watch(TorchDispatchMode):
    """Counts torch's ops, those of the device's work and those the host runs beside it apart."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device
        self.on_device: Counter[str] = Counter()
        self.by_host: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (self.on_device if self._device.is_working else self.by_host)[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_allocates_nothing_beside_its_graphs(engines: Engines) -> None:
    """The host makes views of what was there before the first request, and the copy out fills what was there."""
    core = make_core(engines.prepared.config, launching(engines))
    for name in "abc":
        core.add(request(name, max_tokens=60))
    for _ in range(6):
        core.step()
    counts = engines.fake.counts
    before = counts["submits"]
    with Watch(engines.fake) as watch:
        for _ in range(8):  # none needs a new block
            core.step()
    assert counts["submits"] == before
    as_numpy = {"detach", "to", "resolve_conj", "resolve_neg"}  # of a buffer of the host: nothing is copied
    kinds = {name.split(".")[1] for name in watch.by_host}
    assert kinds <= {"slice", "fill_", *as_numpy}, watch.by_host
    assert sum(watch.by_host.values()) <= 8 * 15


def test_graphs_are_at_fixed_addresses(engines: Engines) -> None:
    """What a graph was captured with is what later steps are written to."""
    runner = launching(engines)
    addresses = [tensor.data_ptr() for tensor in (runner._rows.rows, runner._rows._staged, runner._drawn)]
    run(make_core(engines.prepared.config, runner), request("a"), request("b", 50))
    assert [t.data_ptr() for t in (runner._rows.rows, runner._rows._staged, runner._drawn)] == addresses
    assert isinstance(runner._rows.rows, torch.Tensor)
