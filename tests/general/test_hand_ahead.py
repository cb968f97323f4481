"""Busy instances that are given requests ahead of their time: who gets them, what is counted, what a death costs."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llmserve.backends.general import GeneralModel
from llmserve.backends.instance_loads import InstanceLoads
from llmserve.backends.model_messages import Results
from llmserve.errors import ModelExecutionError
from llmserve.scheduler.dynamic_batcher import Batch, BatchReason, DynamicBatcher
from llmserve.scheduler.priority_level import QueuedRequest
from llmserve.scheduler.queue_policy import BatcherConfig
from tests.general.general_models import IDENTITY, MOODY, PYTHON, fp32, infer, running

KILL = 4
MS = 1_000_000


def batch(number: int) -> Batch:
    return Batch([QueuedRequest(number)], 1, BatchReason.NOT_BATCHED)


def loads_of(*names: str, executed_ns: int | None) -> InstanceLoads:
    """Instances of which the first has executed something, in so much time."""
    loads = InstanceLoads()
    loads.hands_ahead = True
    for name in names:
        loads.add(name)  # type: ignore[arg-type]  # any object will do
    if executed_ns is not None:
        instance: Any = loads.next()
        for number in range(-20, 0):
            loads.begin(instance, number, batch(number), 0)
            assert loads.end(instance, Results([], number, 0, executed_ns), executed_ns) is not None
    return loads


def give(loads: InstanceLoads, count: int) -> list[Any]:
    """Who gets the next batches, as long as anybody does."""
    got = []
    for number in range(1, count + 1):
        if (instance := loads.next()) is None:
            break
        loads.begin(instance, number, batch(number), 0)
        got.append(instance)
    return got


def test_one_instance_is_given_more_than_each_of_several() -> None:
    """What stands behind an execution that turns out long could run on another."""
    assert len(give(loads_of("a", executed_ns=MS // 10), 100)) == 16


@pytest.mark.parametrize(("executed_ns", "expected"), [(None, 2), (2 * MS, 2), (MS // 10, 4)])
def test_only_short_executions_are_handed_ahead(executed_ns: int | None, expected: int) -> None:
    got = give(loads_of("a", "b", executed_ns=executed_ns), 100)
    assert len(got) == expected
    assert got.count("a") == got.count("b") == expected // 2
    assert set(got[:2]) == {"a", "b"}  # nobody waits behind another while an instance is idle


def test_one_long_execution_ends_it() -> None:
    loads = loads_of("a", executed_ns=MS // 10)
    assert len(give(loads, 3)) == 3
    loads.end("a", Results([], 1, 0, 20 * MS), 20 * MS)  # type: ignore[arg-type]
    assert loads.next() is None


def test_models_with_a_queue_policy_keep_their_queue() -> None:
    loads = loads_of("a", executed_ns=MS // 10)
    loads.hands_ahead = False
    assert len(give(loads, 3)) == 1


def test_waiting_behind_another_batch_is_not_the_models_time() -> None:
    loads = loads_of("a", executed_ns=MS // 10)
    assert len(give(loads, 2)) == 2
    instance: Any = "a"
    loads.end(instance, Results([], 1, 5, 100), 110)
    ended = loads.end(instance, Results([], 2, 107, 200), 230)
    assert ended is not None
    second, times = ended
    assert second.begun_ns == 100
    assert dataclasses.astuple(times) == (7, 93, 30)


def test_the_dead_began_their_first_batch_only() -> None:
    loads = loads_of("a", executed_ns=MS // 10)
    give(loads, 4)
    loads.end("a", Results([], 1, 0, 10), 10)  # type: ignore[arg-type]
    assert [given.requests[0].id for given in loads.remove("a")] == [3, 4]  # type: ignore[arg-type]
    assert loads.next() is None


def test_requests_that_were_put_back_come_first_in_their_order() -> None:
    batcher = DynamicBatcher(BatcherConfig())
    first, second, third = (QueuedRequest(number) for number in (1, 2, 3))
    for request in (first, second, third):
        batcher.add(request, 0.0, False)
    assert batcher.next_batch(0.0) is not None
    assert batcher.next_batch(0.0) is not None
    batcher.put_back([first, second])
    order = [given.requests[0].id for _ in range(3) if (given := batcher.next_batch(0.0))]
    assert order == [1, 2, 3]


async def outcomes(model: GeneralModel, moods: list[int]) -> list[Any]:
    """The answers to requests that were made at once, or their errors."""
    await infer(model, INPUT0=fp32(0))  # now it is known to be quick
    tasks = [asyncio.create_task(infer(model, INPUT0=fp32(mood, number))) for number, mood in enumerate(moods)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result if isinstance(result, BaseException) else float(result["OUTPUT0"][1]) for result in results]


@pytest.mark.parametrize("count", [1, 2])
def test_a_dying_process_fails_only_what_it_had_begun(tmp_path: Path, count: int) -> None:
    async def scenario() -> None:
        config = PYTHON + f"instance_group [ {{ count: {count} kind: KIND_CPU }} ]"
        async with running(tmp_path, {"model.py": MOODY}, config) as model:
            pids = model.pids
            found = await outcomes(model, [0] * 5 + [KILL] + [0] * 20)
            assert isinstance(found[5], ModelExecutionError)
            assert found[:5] + found[6:] == [0, 1, 2, 3, 4, *range(6, 26)]
            assert model.statistics().fail.count == 1
            assert model.statistics().pending == 0
            assert model.pids != pids

    asyncio.run(scenario())


def test_who_has_gone_is_not_put_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}) as model:
            await infer(model, INPUT0=fp32(0))
            dying = asyncio.create_task(infer(model, INPUT0=fp32(KILL)))
            behind = [asyncio.create_task(infer(model, INPUT0=fp32(0))) for _ in range(3)]
            await asyncio.sleep(0)
            behind[1].cancel()
            found = await asyncio.gather(dying, *behind, return_exceptions=True)
            assert [type(item) for item in found] == [ModelExecutionError, dict, asyncio.CancelledError, dict]
            assert model.statistics().pending == 0
            assert model.explain()["in_flight"] == 0

    asyncio.run(scenario())


def test_a_burst_is_answered_in_its_order_and_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}) as model:
            assert await outcomes(model, [0] * 100) == list(range(100))
            statistics = model.statistics()
            assert (statistics.success.count, statistics.execution_count, statistics.pending) == (101, 101, 0)
            assert statistics.queue.ns > statistics.compute_input.ns  # they waited for each other, not for the model

    asyncio.run(scenario())


@pytest.mark.parametrize("config", [PYTHON, PYTHON + "dynamic_batching { }"])
def test_a_queue_has_its_rules_without_batches_too(tmp_path: Path, config: str) -> None:
    """Priorities, time-outs and sizes are of requests that wait here, not of those an instance has."""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": WRITES_DOWN}, config) as model:
            model._loads._mean_ns = 0.0  # it is known to be quick, however slow this machine is
            tasks = [asyncio.create_task(infer(model, INPUT0=fp32(0))) for _ in range(9)]
            await asyncio.sleep(0)
            assert sum(model.explain()["queued_by_priority"]) == (8 if "dynamic" in config else 0)
            await asyncio.gather(*tasks)

    asyncio.run(scenario())


WRITES_DOWN = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.file = args["model_repository"] + "/begun"

    def execute(self, requests):
        responses = []
        for request in requests:
            array = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            with open(self.file, "a") as file:
                file.write(f"{int(array[-1])} ")
            time.sleep(float(array[0]))
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", array)]))
        return responses
"""


def test_who_has_gone_is_not_begun_with(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": WRITES_DOWN}) as model:
            model._loads._mean_ns = 0.0
            tasks = [asyncio.create_task(infer(model, INPUT0=fp32(0.3, number))) for number in range(5)]
            await asyncio.sleep(0.1)
            assert not any(model.explain()["queued_by_priority"])  # the process has them all
            for task in tasks[1:4]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(item, dict) for item in found] == [True, False, False, False, True]
            assert (tmp_path / "m" / "begun").read_text() == "0 4 "
            assert model.statistics().pending == 0
            assert model.explain()["in_flight"] == 0

    asyncio.run(scenario())
