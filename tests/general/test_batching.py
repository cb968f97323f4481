"""The dynamic batcher at work: what reaches the model together, who waits, who is turned away, who leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from pathlib import Path

import numpy as np
import pytest

from llmserve.backends.general import GeneralModel
from llmserve.errors import DeadlineExceededError, ModelLoadError, QueueFullError
from llmserve.general_metrics import FailureReason
from tests.general.general_models import (
    FP32_IO,
    IDENTITY,
    PYTHON,
    Array,
    arrays,
    fp32,
    infer,
    infer_all,
    request,
    running,
)

# answers with the number of requests it was run with, after as many milliseconds as its first input says
COUNTING = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        arrays = [request.inputs()[0].as_numpy() for request in requests]
        time.sleep(float(arrays[0].flat[0]) / 1000)
        counts = [np.full((len(array), 1), len(requests), np.float32) for array in arrays]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", count)]) for count in counts]
"""
BATCHED = PYTHON + "max_batch_size: 8\n"


async def count(model: GeneralModel, sleep_ms: float = 0.0, width: int = 1, rows: int = 1, **fields: int) -> int:
    """How many requests the model was run with when this one was in."""
    asked = request({"INPUT0": np.full((rows, width), sleep_ms, np.float32)}, **fields)
    (response,) = await infer_all(model, asked)
    assert arrays(response)["OUTPUT0"].shape == (rows, 1)
    return int(arrays(response)["OUTPUT0"][0, 0])


def test_requests_that_wait_run_together_and_say_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": COUNTING}, BATCHED + "dynamic_batching { }") as model:
            first = asyncio.create_task(count(model, 80))
            await asyncio.sleep(0.02)
            counts = await asyncio.gather(*(count(model) for _ in range(10)), count(model, width=3))
            assert counts == [8] * 8 + [2] * 2 + [1]
            assert await first == 1
            explained = model.explain()
            assert [(b["rows"], b["reason"]) for b in reversed(explained["batches"])] == [
                (1, "an instance was idle: the request did not wait"),
                (8, "max_batch_size is reached"),
                (2, "the requests still waiting have other shapes"),
                (1, "nothing else was waiting"),
            ]
            assert explained["batches"][2]["waited_ms"] > 40
            assert json.loads(json.dumps(explained)) == explained
            statistics = model.statistics()
            assert statistics.inference_count == 12
            assert statistics.execution_count == 4
            assert statistics.success.count == 12
            assert sorted(statistics.batches) == [1, 2, 8]
            assert statistics.batches[1].compute_infer.count == 2
            assert statistics.compute_infer.ns > 80e6
            assert statistics.queue.ns > 10 * 40e6
            assert abs(statistics.last_inference_ms - time.time() * 1000) < 5000

    asyncio.run(scenario())


def test_without_dynamic_batching_nothing_is_put_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": COUNTING}, BATCHED) as model:
            assert await asyncio.gather(*(count(model, rows=2, timeout_us=1) for _ in range(4))) == [1] * 4
            assert sorted(model.statistics().batches) == [2]

    asyncio.run(scenario())


def test_a_lone_request_does_not_pay_the_delay(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = BATCHED + "dynamic_batching { max_queue_delay_microseconds: 30000000 }"
        async with running(tmp_path, {"model.py": COUNTING}, config) as model:
            async with asyncio.timeout(10):
                assert [await count(model) for _ in range(5)] == [1] * 5

    asyncio.run(scenario())


def test_time_outs_fire_when_they_are_due_and_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    policy = "default_timeout_microseconds: 100000 allow_timeout_override: true max_queue_size: 3"

    async def scenario() -> None:
        config = BATCHED + f"dynamic_batching {{ default_queue_policy {{ {policy} }} }}"
        async with running(tmp_path, {"model.py": COUNTING}, config) as model:
            busy = asyncio.create_task(count(model, 500))
            await asyncio.sleep(0.02)
            started = time.monotonic()

            async def late(**fields: int) -> float:
                with pytest.raises(DeadlineExceededError, match="Request timeout expired"):
                    await count(model, **fields)
                return time.monotonic() - started

            waits = asyncio.gather(late(), late(timeout_us=30_000), late(timeout_us=2_000_000))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="Exceeds maximum queue size"):
                await count(model)
            first, shorter, longer = await waits
            assert 0.03 <= shorter < 0.1 <= first < 0.4
            assert 0.1 <= longer < 0.4  # a request cannot lengthen it
            assert await busy == 1
            assert model.statistics().failures[FailureReason.REJECTED] == 4

    asyncio.run(scenario())


def test_a_delayed_time_out_is_served_last(tmp_path: Path) -> None:
    policy = "timeout_action: DELAY default_timeout_microseconds: 200000"

    async def scenario() -> None:
        config = PYTHON + f"max_batch_size: 1 dynamic_batching {{ default_queue_policy {{ {policy} }} }}"
        async with running(tmp_path, {"model.py": COUNTING}, config) as model:
            order: list[str] = []

            async def named(name: str, sleep_ms: float = 0) -> None:
                await count(model, sleep_ms)
                order.append(name)

            tasks = [asyncio.create_task(named("busy", 600))]
            await asyncio.sleep(0.02)
            tasks.append(asyncio.create_task(named("early")))
            await asyncio.sleep(0.48)
            tasks.append(asyncio.create_task(named("late")))
            await asyncio.gather(*tasks)
            assert order == ["busy", "late", "early"]

    asyncio.run(scenario())


def test_priorities_are_served_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = PYTHON + "max_batch_size: 1 dynamic_batching { priority_levels: 3 default_priority_level: 2 }"
        async with running(tmp_path, {"model.py": COUNTING}, config) as model:
            order: list[int] = []

            async def ranked(priority: int, sleep_ms: float = 0) -> None:
                await count(model, sleep_ms, priority=priority)
                order.append(priority)

            tasks = [asyncio.create_task(ranked(1, 80))]
            await asyncio.sleep(0.02)
            await asyncio.gather(*tasks, *(ranked(p) for p in (3, 0, 9, 1)))
            assert order == [1, 1, 0, 9, 3]

    asyncio.run(scenario())


def test_answers_keep_the_order_of_requests_if_asked(tmp_path: Path) -> None:
    async def scenario(preserve: str) -> list[int]:
        config = BATCHED + f"dynamic_batching {{ preserve_ordering: {preserve} }} instance_group [ {{ count: 2 }} ]"
        async with running(tmp_path, {"model.py": COUNTING}, config) as model:
            order: list[int] = []

            async def numbered(number: int, sleep_ms: float) -> None:
                await count(model, sleep_ms)
                order.append(number)

            await asyncio.gather(numbered(0, 150), numbered(1, 0))
            return order

    assert asyncio.run(scenario("true")) == [0, 1]
    assert asyncio.run(scenario("false")) == [1, 0]


def test_preserve_ordering_does_not_wait_for_who_has_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = BATCHED + "dynamic_batching { preserve_ordering: true } instance_group [ { count: 2 } ]"
        async with running(tmp_path, {"model.py": COUNTING}, config) as model:
            slow = asyncio.create_task(count(model, 1000))
            await asyncio.sleep(0)
            quick = asyncio.create_task(count(model))
            await asyncio.sleep(0.1)
            assert not quick.done()
            slow.cancel()
            assert await asyncio.wait_for(quick, 0.8) == 1

    asyncio.run(scenario())


def test_preserve_ordering_forgets_an_answer_nobody_takes(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = BATCHED + "dynamic_batching { preserve_ordering: true } instance_group [ { count: 2 } ]"
        async with running(tmp_path, {"model.py": COUNTING}, config) as model:
            slow = asyncio.create_task(count(model, 300))
            await asyncio.sleep(0)
            held = asyncio.create_task(count(model))
            await asyncio.sleep(0.15)
            held.cancel()
            assert await slow == 1
            assert model.statistics().pending == 0
            assert model.statistics().fail.count == 0

    asyncio.run(scenario())


def test_a_client_that_goes_leaves_the_queue(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": COUNTING}, BATCHED + "dynamic_batching { }") as model:
            busy = asyncio.create_task(count(model, 100))
            await asyncio.sleep(0.02)
            waiting = [asyncio.create_task(count(model)) for _ in range(4)]
            await asyncio.sleep(0.02)
            waiting[1].cancel()
            stream = model.infer(request({"INPUT0": np.zeros((1, 1), np.float32)}))
            going = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            assert model.explain()["queued_by_priority"] == [3]
            going.cancel()
            assert [await task for i, task in enumerate(waiting) if i != 1] == [3, 3, 3]
            assert await busy == 1
            assert model.statistics().failures[FailureReason.CANCELED] == 2
            assert model.statistics().pending == 0

    asyncio.run(scenario())


def test_a_running_model_sees_that_its_client_has_gone(tmp_path: Path) -> None:
    source = f"""
import time
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            tensor = pb_utils.Tensor("OUTPUT0", request.inputs()[0].as_numpy())
            sender.send(pb_utils.InferenceResponse([tensor]))
            while not (request.is_cancelled() and sender.is_cancelled()):
                time.sleep(0.001)
            open({str(tmp_path / "seen")!r}, "w").close()
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

    async def scenario() -> None:
        async with running(
            tmp_path, {"model.py": source}, PYTHON + "model_transaction_policy {decoupled: true}"
        ) as model:
            stream = model.infer(request({"INPUT0": fp32(1)}))
            await anext(stream)
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            second = model.infer(request({"INPUT0": fp32(1)}))  # served once the first has been given up
            await asyncio.wait_for(anext(second), 5)
            assert (tmp_path / "seen").exists()
            await second.aclose()

    asyncio.run(scenario())


def test_ragged_requests_share_a_batch_and_are_described(tmp_path: Path) -> None:
    kinds = {
        "COUNT": "BATCH_ELEMENT_COUNT",
        "ENDS": "BATCH_ACCUMULATED_ELEMENT_COUNT",
        "OFFSETS": "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
        "LONGEST": "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE",
        "SHAPES": "BATCH_ITEM_SHAPE",
        "FLAT": "BATCH_ITEM_SHAPE_FLATTEN",
    }
    config = """
backend: "python" max_batch_size: 8 dynamic_batching { }
input [ { name: "X" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ]
output [ { name: "SEEN" data_type: TYPE_STRING dims: [ 1 ] }, { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] } ]
batch_output [ { target_name: "Y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "X" } ]
""" + "".join(
        f'batch_input [ {{ kind: {kind} target_name: "{name}" data_type: TYPE_INT32 source_input: "X" }} ]\n'
        for name, kind in kinds.items()
    )
    source = """
import json, time
class Model:
    batched = True
    def predict(self, **arrays):
        x = arrays.pop("X")
        if x.flat[0] < 0: time.sleep(0.08)
        seen = {name: array.tolist() for name, array in arrays.items()}
        rows = len(arrays["COUNT"])
        return {"SEEN": [[json.dumps(seen)]] * rows, "Y": x * 2}
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, config) as model:
            busy = asyncio.create_task(infer(model, X=fp32(-1)[None]))
            await asyncio.sleep(0.02)
            got = await asyncio.gather(*(infer(model, X=np.full((1, n), n, np.float32)) for n in (3, 4, 5)))
            await busy
            for n, outputs in zip((3, 4, 5), got, strict=True):
                np.testing.assert_array_equal(outputs["Y"], np.full((1, n), 2 * n, np.float32))
            assert json.loads(got[0]["SEEN"][0, 0]) == {
                "COUNT": [3, 4, 5],
                "ENDS": [3, 7, 12],
                "OFFSETS": [0, 3, 7, 12],
                "LONGEST": [0] * 5,
                "SHAPES": [[3], [4], [5]],
                "FLAT": [3, 4, 5],
            }

    asyncio.run(scenario())


def test_lengths_of_one_bucket_are_padded_and_share_a_batch(tmp_path: Path) -> None:
    config = """
backend: "python" max_batch_size: 8 dynamic_batching { }
input [ { name: "X" data_type: TYPE_FP32 dims: [ -1, 2 ] }, { name: "WORDS" data_type: TYPE_STRING dims: [ -1 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1, 2 ] }, { name: "SHAPE" data_type: TYPE_INT64 dims: [ 3 ] } ]
parameters { key: "length_buckets" value { string_value: "8, 4" } }
parameters { key: "max_batch_tokens" value { string_value: "16" } }
"""
    source = """
import time
import numpy as np
class Model:
    batched = True
    def predict(self, X, WORDS):
        if X.flat[0] < 0: time.sleep(0.08)
        assert all(not word for row, x in zip(WORDS, X) for word, e in zip(row, x) if not e.any())
        return {"Y": X * 2, "SHAPE": np.tile(np.array(X.shape), (len(X), 1))}
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, config) as model:

            def ask(length: int, value: float = 1.0) -> Coroutine[None, None, dict[str, Array]]:
                words = np.full((1, length), b"w", object)
                return infer(model, X=np.full((1, length, 2), value, np.float32), WORDS=words)

            busy = asyncio.create_task(ask(4, -1))
            await asyncio.sleep(0.02)
            lengths = (3, 7, 4, 2, 8, 9)
            got = await asyncio.gather(*(ask(length) for length in lengths))
            await busy
            for length, outputs in zip(lengths, got, strict=True):
                np.testing.assert_array_equal(outputs["Y"], np.full((1, length, 2), 2, np.float32))
            assert [outputs["SHAPE"][0].tolist() for outputs in got] == [
                [3, 4, 2], [2, 8, 2], [3, 4, 2], [3, 4, 2], [2, 8, 2], [1, 9, 2],
            ]  # fmt: skip
            assert model.statistics().histograms.padding_waste.total == pytest.approx(3 / 12 + 1 / 16)

    asyncio.run(scenario())


@pytest.mark.parametrize("text", ["4,x", "0", ""])
def test_buckets_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    config = BATCHED + f'parameters {{ key: "length_buckets" value {{ string_value: "{text}" }} }}'

    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match=r"parameters\.length_buckets"):
            async with running(tmp_path, {"model.py": IDENTITY}, config):
                pass

    asyncio.run(scenario())


def test_optional_inputs_split_batches(tmp_path: Path) -> None:
    config = """
backend: "python" max_batch_size: 8 dynamic_batching { }
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] optional: true } ]
input [ { name: "INPUT1" data_type: TYPE_FP32 dims: [ 1 ] optional: true } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1 ] }, { name: "OUTPUT1" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}, config) as model:
            one = np.ones((1, 1), np.float32)
            busy = [infer(model, INPUT0=one)]
            got = await asyncio.gather(
                *busy, infer(model, INPUT0=one), infer(model, INPUT1=one), infer(model, INPUT1=one, INPUT0=one)
            )
            assert [sorted(outputs) for outputs in got] == [
                ["OUTPUT0"],
                ["OUTPUT0"],
                ["OUTPUT1"],
                ["OUTPUT0", "OUTPUT1"],
            ]

    asyncio.run(scenario())


def test_reshape_hides_a_dimension_from_the_model(tmp_path: Path) -> None:
    config = """
backend: "python" max_batch_size: 4
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } } ]
"""
    source = IDENTITY.replace("tensors = [", "assert request.inputs()[0].shape() == [3]; tensors = [")

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, config) as model:
            assert (await infer(model, INPUT0=np.ones((3, 1), np.float32)))["OUTPUT0"].shape == (3, 1)

    asyncio.run(scenario())


def test_ordering_of_a_decoupled_model_is_refused(tmp_path: Path) -> None:
    config = BATCHED + "dynamic_batching { preserve_ordering: true } model_transaction_policy { decoupled: true }"

    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match="preserve_ordering"):
            async with running(tmp_path, {"model.py": IDENTITY}, config):
                pass

    asyncio.run(scenario())


def test_an_unknown_backend_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(
            ModelLoadError, match=r"'fortran', which is not installed. Known: onnxruntime, pooling, python, pytorch"
        ):
            async with running(tmp_path, {"model.py": IDENTITY}, 'backend: "fortran"' + FP32_IO):
                pass

    asyncio.run(scenario())
