"""From an EngineConfig to a loaded ModelRunner: chooses device, dtype and ops, plans memory, loads weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmserve.config import EngineConfig
from llmserve.errors import ConfigError
from llmserve.kernels.cpu.ops import CPUOps, usable_cores
from llmserve.kernels.ops import Ops
from llmserve.kernels.select import select_ops, select_step_ops
from llmserve.messages import MemoryPlan
from llmserve.models.config import ModelConfig, read_model_config
from llmserve.models.llama import LlamaModel
from llmserve.models.loader import load_model
from llmserve.models.parameters import LinearParameter, linear_parameters, weight_bytes
from llmserve.models.quantization import choose_formats, describe_formats, resolve_quantization
from llmserve.models.weights import WeightSource, open_weights
from llmserve.worker.device import CudaDevice, Device
from llmserve.worker.gpu_model_runner import GPUModelRunner, GraphSettings
from llmserve.worker.memory import WeightPlan, available_bytes, cache_dtype, plan_memory, total_bytes, usable_bytes
from llmserve.worker.memory_profile import measure_memory
from llmserve.worker.model_runner import ModelRunner

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
Progress = Callable[[int, int], None]  # how much is done, and how much there is


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Everything decided, nothing loaded: `plan` can be shown, `load` can no longer run out of memory."""

    config: EngineConfig
    model_config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    ops: Ops
    source: WeightSource
    formats: dict[str, str]  # of each matrix, by name
    free_bytes: int  # on the device
    plan: MemoryPlan

    def load(
        self, progress: Progress | None = None, capture_progress: Progress | None = None
    ) -> ModelRunner | GPUModelRunner:
        """Reads the weights and allocates the KV cache; on a GPU what is left for it is measured, so that the runner's
        plan is not quite this one. `progress` gets bytes done and bytes in all, `capture_progress` the same of CUDA
        graphs."""
        model = self.load_weights(progress)
        if isinstance(self.ops, CPUOps):
            torch.set_num_threads(1)  # loading is done: OpenMP's threads, which spin, would take the kernels' cores
        if self.device.type == "cuda" and self.ops.name == "triton":
            return self.launching_runner(model, lambda: CudaDevice(self.device), capture_progress)
        return ModelRunner(model, self.ops, self.plan, cache_dtype(self.plan), self.device)

    def launching_runner(
        self, model: LlamaModel, open_device: Callable[[], Device], capture_progress: Progress | None = None
    ) -> GPUModelRunner:
        """The runner of a device that is not waited for, warm. `open_device` is called once for the runner by which
        memory is measured, and once for that which stays: their graphs share nothing."""
        settings = GraphSettings.of(self.config)
        step_ops = select_step_ops(self.ops)

        def make(plan: MemoryPlan, device: Device) -> GPUModelRunner:
            return GPUModelRunner(model, self.ops, step_ops, plan, cache_dtype(plan), device, settings)

        measured = measure_memory(open_device(), make, self.plan, self.free_bytes)
        weights = WeightPlan(self.plan.weight_format, measured.weights)
        usable = self.plan.available_bytes
        plan = plan_memory(self.config, self.model_config, weights, self.dtype, self.device, self.ops, usable, measured)
        runner = make(plan, open_device())
        runner.warm_up(capture_progress)
        return runner

    def load_weights(self, progress: Progress | None = None) -> LlamaModel:
        """The model without a runner."""
        return load_model(
            self.source,
            self.model_config,
            self.dtype,
            self.device,
            self.ops,
            self.formats,
            max_model_len=self.plan.max_model_len,
            progress=progress,
        )


def prepare_model(config: EngineConfig) -> PreparedModel:
    """Reads the model's description and plans. Raises ConfigError, ModelLoadError, InsufficientMemoryError."""
    device = choose_device(config.device)
    if device.type == "cpu":
        if config.gpu_memory is not None:
            raise ConfigError(
                "gpu_memory is a GPU's, and this model runs on the CPU. Leave --gpu-memory out; --kv-cache-memory says "
                "how much the KV cache may take."
            )
        torch.set_num_threads(config.num_threads or usable_cores())
    path = Path(config.model)
    model_config = read_model_config(path)
    dtype = _choose_dtype(config.dtype, model_config.dtype, device)
    ops = select_ops(device, dtype, model_config.head_dim, config.num_threads)
    source = open_weights(path, model_config, ops.weight_formats)
    formats = _choose_formats(config, model_config, source, ops)
    weights = _plan_weights(model_config, formats, dtype, ops)
    free = available_bytes(device)
    usable = usable_bytes(config.gpu_memory, device, free, total_bytes(device))
    plan = plan_memory(config, model_config, weights, dtype, device, ops, usable)
    return PreparedModel(config, model_config, device, dtype, ops, source, formats, free, plan)


def _choose_formats(config: EngineConfig, model: ModelConfig, source: WeightSource, ops: Ops) -> dict[str, str]:
    types = {source.types[f"{part}.weight"] for matrix in linear_parameters(model) for part in matrix.parts}
    quantization = resolve_quantization(
        config.quantization, source.where, types, ops.weight_formats, dtype_is_auto=config.dtype == "auto"
    )
    return choose_formats(model, source.types, quantization, ops.weight_formats)


def _plan_weights(model: ModelConfig, formats: dict[str, str], dtype: torch.dtype, ops: Ops) -> WeightPlan:
    def linear_bytes(matrix: LinearParameter) -> int:
        return ops.linear_bytes(formats[matrix.name], matrix.out_features, matrix.in_features, dtype, matrix.has_bias)

    return WeightPlan(describe_formats(model, formats), weight_bytes(model, dtype.itemsize, linear_bytes))


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is any. Raises ConfigError where it is asked for and missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', but torch finds no CUDA device. Use cpu, or install a CUDA build of torch."
        )
    return torch.device(name)


def _choose_dtype(name: str, model_dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own type, where the device computes in it; a CPU without bf16 computes in fp32."""
    if name != "auto":
        return _DTYPES[name]
    dtype = _DTYPES.get(model_dtype, torch.float32)
    if device.type == "cpu" and dtype != torch.float32:
        return torch.bfloat16 if cpu_computes_bf16() else torch.float32
    return dtype


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported()) if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False
