"""The model repository that both servers serve, unchanged: Triton's layout, Python models, nothing of ours in it."""

from __future__ import annotations

from pathlib import Path

NUM_STREAMED = 100
QUEUE_TIMEOUT_MS = 100
SLOW_S = 0.3

IDENTITY = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            tensor = pb_utils.get_input_tensor_by_name(request, "INPUT0")
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", tensor.as_numpy())]))
        return responses
"""
_SLOW = IDENTITY.replace("responses = []", f"import time; time.sleep({SLOW_S}); responses = []")
_MLP = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        random = np.random.default_rng(0)
        self.first = random.standard_normal((16, 64), np.float32)
        self.second = random.standard_normal((64, 16), np.float32)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy() for request in requests]
        outputs = np.maximum(np.concatenate(inputs) @ self.first, 0) @ self.second
        ends = np.cumsum([len(rows) for rows in inputs])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", rows)]) for rows in np.split(outputs, ends)
        ]
"""
_STREAM = f"""
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            values = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            for _ in range({NUM_STREAMED}):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", values)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
_SIGNATURE = """
backend: "python"
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ %s ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ %s ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
_VECTOR = _SIGNATURE % ("16", "16")
_TOKEN = _SIGNATURE % ("1", "1")
_BATCHES = "max_batch_size: 32\n"
_TIMEOUT = f"default_timeout_microseconds: {QUEUE_TIMEOUT_MS * 1000}"

_MODELS = {
    "identity": (IDENTITY, _VECTOR),
    "mlp": (_MLP, _VECTOR + _BATCHES + "dynamic_batching { }"),
    "stream": (_STREAM, _TOKEN + "model_transaction_policy { decoupled: true }"),
    "slow": (_SLOW, _VECTOR + f"dynamic_batching {{ default_queue_policy {{ {_TIMEOUT} }} }}"),
    "no_delay": (IDENTITY, _VECTOR + _BATCHES + "dynamic_batching { }"),
    "delay": (IDENTITY, _VECTOR + _BATCHES + "dynamic_batching { max_queue_delay_microseconds: 500 }"),
}


def write_repository(folder: Path) -> None:
    """Every model of the benchmark."""
    for name, (source, config) in _MODELS.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(source)
        (folder / name / "config.pbtxt").write_text(config)
