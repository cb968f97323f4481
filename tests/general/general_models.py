"""Models to load and requests to send, for the tests of the general backends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.general import GeneralModel
from llmserve.backends.instance import InstanceSettings
from llmserve.backends.tensors import to_array, to_wire
from llmserve.inference import InferRequest, InferResponse, RequestedOutput, Tensor

FP32_IO = """
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
PYTHON = 'backend: "python"\n' + FP32_IO

IDENTITY = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            tensors = [pb_utils.Tensor(t.name().replace("INPUT", "OUTPUT"), t.as_numpy()) for t in request.inputs()]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""

# does what its input's first element says, for tests of what goes wrong
MOODY = """
import os, signal, sys, threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            array = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            mood = int(array.flat[0])
            if mood == 1: raise RuntimeError("bad mood")
            if mood == 2: os._exit(7)
            if mood == 3: sys.exit(8)
            if mood == 4: os.kill(os.getpid(), signal.SIGKILL)
            if mood == 5: threading.Event().wait()
            if mood == 6: os.write(int(sys.argv[1]), b"nonsense" * 100)
            if mood == 7: array = np.array(os.getpid(), np.float32).reshape(1)
            if mood == 8: os.close(int(sys.argv[1])); threading.Event().wait()
            if mood == 9: bytearray(1 << 60)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", array)]))
        return responses
"""

Array = NDArray[Any]
Files = dict[str, str | bytes]


def write_model(folder: Path, files: Files, name: str = "m") -> Path:
    """`<folder>/<name>/1/...`; returns the version's folder."""
    version = folder / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        path = version / file
        if isinstance(content, str):
            path.write_text(content)
        else:
            path.write_bytes(content)
    return version


@asynccontextmanager
async def running(
    folder: Path, files: Files, config: str = PYTHON, inline: bool = False, **settings: Any
) -> AsyncIterator[GeneralModel]:
    """A loaded model; afterwards none of its processes is left."""
    version = write_model(folder, files)
    model = GeneralModel(
        "m",
        "1",
        version,
        version.parent,
        text_format.Parse(config, ModelConfig()),
        InstanceSettings(**{"unload_timeout_s": 5.0, **settings}),
        inline,
    )
    await model.start()
    try:
        yield model
    finally:
        pids = model.pids
        await model.stop()
        assert [pid for pid in pids if is_alive(pid)] == []


def request(inputs: dict[str, Array], outputs: tuple[str, ...] = (), **fields: Any) -> InferRequest:
    """Arrays as a request."""
    tensors = []
    for name, array in inputs.items():
        datatype, data = to_wire(array)
        tensors.append(Tensor(name, datatype, array.shape, data))
    return InferRequest("m", tensors, outputs=[RequestedOutput(name) for name in outputs], **fields)


def arrays(response: InferResponse) -> dict[str, Array]:
    """A response's outputs as arrays."""
    return {t.name: to_array(t.datatype, t.shape, memoryview(t.data)) for t in response.outputs}


async def infer_all(model: GeneralModel, asked: InferRequest) -> list[InferResponse]:
    """Every response."""
    return [response async for response in model.infer(asked)]


async def infer(model: GeneralModel, **inputs: Array) -> dict[str, Array]:
    """The outputs of the one response."""
    (response,) = await infer_all(model, request(inputs))
    return arrays(response)


def fp32(*values: float) -> Array:
    """A vector."""
    return np.array(values, np.float32)


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits for something another process does; tests have no other way to see it."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (there is no event to wait on)
            await asyncio.sleep(0.01)


def open_descriptors() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))
