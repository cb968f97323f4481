"""What a general model's request costs the CPU, from `GeneralModel.infer` to its response: no HTTP in it.

    python benchmarks/bench_general.py [--num-requests 20000] [--case identity] [--load-cycles 300]

CPU time of this process and of the model's, by the kernel's accounts, divided by the requests: it is steady on a busy
machine, where latency is not. Cases, each with the figure predicted from its parts beside the result:

* identity: a Triton Python model that returns its FP32[16], 8 requests at a time, each a batch of its own.
* identity-batch: the same with dynamic batching up to 32 rows, 32 at a time.
* mlp: an ONNX model (16 -> 64 -> 8), dynamic batching up to 32 rows, 32 at a time.
* stream: a decoupled Python model that streams 100 responses to each request; the figure is for one response.
* latency: a lone request on a model with a batch delay of 500 us and on one without, and how long a request with a
  queue time-out of 100 ms waits for its error behind one that takes 300 ms.
* tensor sizes: the identity again, by the tensor's bytes, each through the socket and through shared memory: where the
  lines cross is where `SHARED_MEMORY_BYTES` belongs.

`--load-cycles` loads and unloads a model so many times and says what memory and processes are left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from benchmarks.needs import psutil
from benchmarks.triton.model_files import IDENTITY
from llmserve.backends import transport
from llmserve.backends.general import GeneralModel
from llmserve.errors import DeadlineExceededError
from llmserve.inference import InferRequest, Tensor

STREAM = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            tensor = pb_utils.Tensor("OUTPUT0", pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy())
            for _ in range(100):
                sender.send(pb_utils.InferenceResponse([tensor]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
CONFIG = """
backend: "python"
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
BATCHING = "max_batch_size: 32 dynamic_batching { max_queue_delay_microseconds: 500 }"
NUM_STREAMED = 100

# Microseconds of both processes, from the parts: a request checked, queued, answered and counted 20, its part of a
# message 8 on each side, the model's own objects 6; a batch 15, its two messages 10 each to write, send and receive,
# a process that is woken 5.
REQUEST_US, BATCH_US = 20 + 2 * 8 + 6, 15 + 2 * 10 + 5
STREAMED_US = 25  # one message, and a response put into a queue and taken out


@dataclass(frozen=True)
class Case:
    """A model and how it is asked."""

    name: str
    files: dict[str, str]
    config: str
    concurrency: int
    rows: bool  # the model batches
    predicted_us: float
    responses: int = 1


def cases() -> list[Case]:
    """All but the tensor sizes."""
    batched_us = REQUEST_US + BATCH_US / 16
    return [
        Case("identity", {"model.py": IDENTITY}, CONFIG, 8, False, REQUEST_US + BATCH_US),
        Case("identity-batch", {"model.py": IDENTITY}, CONFIG + BATCHING, 32, True, batched_us),
        Case("mlp", {}, 'backend: "onnxruntime" ' + BATCHING, 32, True, batched_us),
        Case(
            "stream",
            {"model.py": STREAM},
            CONFIG + "model_transaction_policy { decoupled: true }",
            8,
            False,
            STREAMED_US,
            NUM_STREAMED,
        ),
    ]


async def main(arguments: argparse.Namespace) -> None:
    """Runs what is asked for and prints a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        print(
            f"{'case':<16}{'predicted us':>14}{'CPU us':>10}{'server':>10}{'model':>10}{'mean batch':>12}{'req/s':>10}"
        )
        for case in cases():
            if arguments.case in (None, case.name):
                await run_case(case, Path(folder), arguments.num_requests)
        if arguments.case in (None, "latency"):
            await latency(Path(folder))
        if arguments.case in (None, "sizes"):
            await tensor_sizes(Path(folder))
        if arguments.load_cycles:
            await load_cycles(Path(folder), arguments.load_cycles)


async def run_case(case: Case, folder: Path, num_requests: int) -> None:
    """Loads the model, warms it up, measures."""
    model = await open_model(case, folder)
    num_requests = max(case.concurrency, num_requests // case.responses)
    shape = (1, 16) if case.rows else (16,)
    ask = asker(model, shape)
    await flood(ask, case.concurrency, num_requests // 10)
    executed = model.statistics().execution_count
    started, before = time.perf_counter(), cpu_seconds(model)
    await flood(ask, case.concurrency, num_requests)
    wall_s = time.perf_counter() - started
    server, child = (
        1e6 * (b - a) / (num_requests * case.responses) for a, b in zip(before, cpu_seconds(model), strict=True)
    )
    batch = num_requests / (model.statistics().execution_count - executed)
    print(
        f"{case.name:<16}{case.predicted_us:>14.0f}{server + child:>10.1f}{server:>10.1f}{child:>10.1f}{batch:>12.1f}"
        f"{num_requests * case.responses / wall_s:>10.0f}"
    )
    await model.stop()


async def latency(folder: Path) -> None:
    """Who waits, and for how long."""
    print()
    for what, batching in (("no delay", "max_batch_size: 32 dynamic_batching { }"), ("delay of 500 us", BATCHING)):
        model = await open_model(Case("lone", {"model.py": IDENTITY}, CONFIG + batching, 1, True, 0), folder)
        ask = asker(model, (1, 16))
        waits = sorted([await timed(ask) for _ in range(2000)])
        print(f"lone request, {what:<16} p50 {waits[1000] * 1e6:>6.0f} us   p99 {waits[1980] * 1e6:>6.0f} us")
        await model.stop()
    policy = "dynamic_batching { default_queue_policy { default_timeout_microseconds: 100000 } }"
    slow = IDENTITY.replace("responses = []", "import time; time.sleep(0.3); responses = []")
    model = await open_model(Case("slow", {"model.py": slow}, CONFIG + policy, 1, False, 0), folder)
    ask = asker(model, (16,))
    first = asyncio.create_task(timed(ask))
    await asyncio.sleep(0.01)
    waits = await asyncio.gather(*(timed(ask) for _ in range(50)))
    await first
    print(f"queue time-out of 100 ms answered after {min(waits) * 1e3:.1f} to {max(waits) * 1e3:.1f} ms")
    await model.stop()


async def timed(ask: Callable[[], Awaitable[None]]) -> float:
    """Seconds until the answer, or the error of a time-out."""
    started = time.perf_counter()
    with contextlib.suppress(DeadlineExceededError):
        await ask()
    return time.perf_counter() - started


async def tensor_sizes(folder: Path) -> None:
    """The identity by size and way."""
    print(f"\n{'tensor bytes':<16}{'socket us':>14}{'shared us':>14}")
    limit = transport.SHARED_MEMORY_BYTES
    for num_bytes in (1 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20):
        costs = []
        for threshold in (1 << 30, 0):
            transport.SHARED_MEMORY_BYTES = threshold
            source = f"from llmserve.backends import transport\ntransport.SHARED_MEMORY_BYTES = {threshold}\n"
            case = Case("sizes", {"model.py": source + IDENTITY}, CONFIG, 1, False, 0)
            model = await open_model(case, folder)
            ask = asker(model, (num_bytes // 4,))
            await flood(ask, 4, 100)
            before = sum(cpu_seconds(model))
            await flood(ask, 4, 2000)
            costs.append(1e6 * (sum(cpu_seconds(model)) - before) / 2000)
            await model.stop()
        transport.SHARED_MEMORY_BYTES = limit
        print(f"{num_bytes:<16}{costs[0]:>14.0f}{costs[1]:>14.0f}")


async def load_cycles(folder: Path, num_cycles: int) -> None:
    """Load, one request, unload; what grows is a leak."""
    here = psutil.Process()
    case = cases()[0]
    for cycle in range(num_cycles + 1):
        model = await open_model(case, folder)
        await flood(asker(model, (16,)), 1, 1)
        await model.stop()
        if cycle % max(1, num_cycles // 6) == 0:
            print(
                f"load cycle {cycle:>4}: {here.memory_info().rss >> 10} KiB, {here.num_fds()} descriptors, "
                f"{len(here.children(recursive=True))} processes"
            )


async def open_model(case: Case, folder: Path) -> GeneralModel:
    """Writes the files and loads them."""
    version = folder / case.name / "1"
    version.mkdir(parents=True, exist_ok=True)
    for name, text in case.files.items():
        (version / name).write_text(text)
    if case.name == "mlp":
        write_mlp(version / "model.onnx")
    config = text_format.Parse(case.config, ModelConfig())
    model = GeneralModel(case.name, "1", version, version.parent, config)
    await model.start()
    return model


def asker(model: GeneralModel, shape: tuple[int, ...]) -> Callable[[], Awaitable[None]]:
    """One request and all of its responses."""
    data = np.random.default_rng(0).random(shape, np.float32).tobytes()
    name = model.config.input[0].name

    async def ask() -> None:
        async for _ in model.infer(InferRequest(model.name, [Tensor(name, "FP32", shape, data)])):
            pass

    return ask


async def flood(ask: Callable[[], Awaitable[None]], concurrency: int, num_requests: int) -> None:
    """Closed loop: each of `concurrency` clients asks again when it has its answer."""

    async def client(count: int) -> None:
        for _ in range(count):
            await ask()

    await asyncio.gather(*(client(max(1, num_requests // concurrency)) for _ in range(concurrency)))


def cpu_seconds(model: GeneralModel) -> tuple[float, float]:
    """Of this process, and of the model's."""
    own = time.process_time()
    times = [psutil.Process(pid).cpu_times() for pid in model.pids]
    return own, sum(t.user + t.system for t in times)


def write_mlp(path: Path) -> None:
    """16 -> 64 -> 8 with a ReLU, random weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((16, 64), np.float32), "w1"),
        numpy_helper.from_array(random.standard_normal((64, 8), np.float32), "w2"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(nodes, "mlp", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=20_000)
    parser.add_argument("--case", choices=["identity", "identity-batch", "mlp", "stream", "latency", "sizes"])
    parser.add_argument("--load-cycles", type=int, default=0)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(parser.parse_args()))
