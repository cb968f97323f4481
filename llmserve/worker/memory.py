"""Works out what a model will occupy on its device before anything is loaded, so that it never runs out after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llmserve.config import EngineConfig, format_bytes
from llmserve.errors import ConfigError, InsufficientMemoryError
from llmserve.kernels.ops import FP8_KV, KVCacheSpec, Ops
from llmserve.messages import MemoryPlan
from llmserve.models.config import ModelConfig
from llmserve.scheduler.drafts import MAX_STEP_DRAFTS
from llmserve.worker.logits_processors import table_bytes

_CACHE_SHARE = {"cpu": 0.4, "cuda": 1.0}  # of what is left after weights and activations
_GPU_SHARE = 0.9  # of what is free, for a model that was given no share
_CACHE_LIMIT = {"cpu": 4 * 2**30, "cuda": 2**62}  # a CPU's memory is other programs' too: more only if asked for
_DEFAULT_SEQS = {"cpu": 64, "cuda": 256}
_DEFAULT_BUDGET = {"cpu": 1024, "cuda": 8192}
_LOGITS_COPIES = 4  # raw, processed, and what sampling makes of them


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """What a device was seen to take, beside the KV cache. Bytes."""

    weights: int  # and all that came with them: the context, compiled kernels
    activations: int  # of the largest step, and the buffers that stay
    graphs: int


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What the weights will take in the chosen format."""

    format: str
    num_bytes: int


def available_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated on a device: on a CPU, what the kernel and the container's limits leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_meminfo_available(), _cgroup_available())


def total_bytes(device: torch.device) -> int:
    """Of a GPU, whoever uses them; of a CPU no more is known than `available_bytes`."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else available_bytes(device)


def usable_bytes(gpu_memory: float | None, device: torch.device, free: int, total: int) -> int:
    """Bytes one model may take in all, by `EngineConfig.gpu_memory`, of a device's `free` and `total`; a CPU's are all.
    Raises InsufficientMemoryError if that much is not free: others on the device have taken it."""
    if device.type == "cpu":
        return free
    if gpu_memory is None:
        return int(free * _GPU_SHARE)
    wanted = int(gpu_memory * total) if gpu_memory <= 1 else int(gpu_memory)
    if wanted > free:
        raise InsufficientMemoryError(
            f"gpu_memory asks for {format_bytes(wanted)} of the device's {format_bytes(total)}, but only "
            f"{format_bytes(free)} are free: other models or programs have the rest. Give each model a share, so that "
            "together they fit, or stop what else runs there."
        )
    return wanted


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # no /proc (macOS): half of what is built in


def _cgroup_available() -> int:
    """cgroup v2's memory.max less memory.current; unlimited where there is none."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else int(limit) - used


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    weights: WeightPlan,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    free_bytes: int,
    measured: MeasuredMemory | None = None,
) -> MemoryPlan:
    """Resolves every limit that was left open, by what the model may take in all (`free_bytes`). What is `measured`
    takes the place of what is worked out. Raises InsufficientMemoryError if the model cannot run."""
    max_model_len = model.context_length(config.max_model_len)
    max_num_seqs = config.max_num_seqs or _DEFAULT_SEQS[device.type]
    budget = config.max_num_batched_tokens or max(_DEFAULT_BUDGET[device.type], max_num_seqs)
    num_sampled = max_num_seqs + (0 if config.speculation == "off" else MAX_STEP_DRAFTS)
    if measured is None:
        activations = _activation_bytes(model, budget, num_sampled, dtype) + table_bytes(max_num_seqs, model.vocab_size)
        measured = MeasuredMemory(weights.num_bytes, activations, 0)
    kv_dtype = _kv_cache_dtype(config.kv_cache_dtype, dtype, ops)
    spec = KVCacheSpec(model.num_kv_heads, model.head_dim, config.block_size, kv_dtype)
    block_bytes = ops.kv_cache_bytes_per_block(spec) * model.num_layers
    left = free_bytes - measured.weights - measured.activations - measured.graphs
    num_blocks = _num_blocks(
        config, max_num_seqs * -(-max_model_len // config.block_size), block_bytes, left, device.type
    )
    fitting = num_blocks * config.block_size
    if max_model_len > fitting:
        if config.max_model_len is not None or fitting < config.block_size:
            raise _too_small(config, measured, max_model_len, block_bytes, left, free_bytes)
        max_model_len = fitting
    return MemoryPlan(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        weight_format=weights.format,
        weight_bytes=measured.weights,
        activation_bytes=measured.activations,
        graph_bytes=measured.graphs,
        kv_cache_bytes=num_blocks * block_bytes,
        kv_cache_dtype=str(kv_dtype).removeprefix("torch."),
        available_bytes=free_bytes,
        block_size=config.block_size,
        num_blocks=num_blocks,
        num_host_blocks=_num_host_blocks(config.kv_cache_host_memory, block_bytes, ops),
        num_tokens=fitting,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        vocab_size=model.vocab_size,
    )


def cache_dtype(plan: MemoryPlan) -> torch.dtype:
    """Of the KV cache that was planned."""
    dtype: torch.dtype = getattr(torch, plan.kv_cache_dtype or plan.dtype)
    return dtype


def _kv_cache_dtype(name: str, dtype: torch.dtype, ops: Ops) -> torch.dtype:
    """Raises ConfigError for what the kernels do not keep."""
    if name == "auto":
        return dtype
    if not ops.caches_fp8:
        raise ConfigError(
            f"kv_cache_dtype is {name!r}, but the {ops.name} kernels of this device keep keys and values as they are "
            "computed. Leave --kv-cache-dtype at auto, or use an NVIDIA GPU of compute capability 8.9 or later."
        )
    return FP8_KV


def _num_blocks(config: EngineConfig, most_useful: int, block_bytes: int, left: int, device_type: str) -> int:
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory > left:
            raise InsufficientMemoryError(
                f"kv_cache_memory asks for {format_bytes(config.kv_cache_memory)}, but only "
                f"{format_bytes(max(left, 0))} are free beside weights and activations. Ask for less, or leave it out."
            )
        return config.kv_cache_memory // block_bytes
    most_bytes = min(int(left * _CACHE_SHARE[device_type]), _CACHE_LIMIT[device_type])
    return max(min(most_bytes // block_bytes, most_useful), 0)


def _num_host_blocks(wanted: int, block_bytes: int, ops: Ops) -> int:
    """Raises ConfigError where steps are not launched on a device with memory of its own, InsufficientMemoryError for
    more than the host has."""
    if not wanted:
        return 0
    if ops.name != "triton":
        raise ConfigError(
            f"kv_cache_host_memory keeps blocks for a GPU, and here the {ops.name} kernels run. Leave "
            "--kv-cache-host-memory out; on a CPU give the cache more of the same memory by --kv-cache-memory."
        )
    left = min(_meminfo_available(), _cgroup_available())
    if wanted > left:
        raise InsufficientMemoryError(
            f"kv_cache_host_memory asks for {format_bytes(wanted)} of the host's memory, but only {format_bytes(left)} "
            "are free there. Ask for less."
        )
    if wanted < block_bytes:
        raise ConfigError(
            f"kv_cache_host_memory is {format_bytes(wanted)}, less than one block of {format_bytes(block_bytes)}. Give "
            "it more, or leave it out."
        )
    return wanted // block_bytes


def _activation_bytes(model: ModelConfig, budget: int, num_sampled: int, dtype: torch.dtype) -> int:
    """The widest moment of a layer for a full step, and the logits of a full batch with what sampling makes of them."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    width = 4 * model.hidden_size + 2 * heads + max(3 * model.intermediate_size, _mixture_width(model))
    logits = _LOGITS_COPIES * num_sampled * model.vocab_size * 4
    return budget * width * dtype.itemsize + logits


def _mixture_width(model: ModelConfig) -> int:
    """A token's numbers in a mixture: a copy of it for each of its experts, what they make of it, and their sum."""
    moe = model.moe
    if moe is None:
        return 0
    routed = moe.num_experts_per_token * (3 * model.hidden_size + 3 * moe.intermediate_size) + 2 * model.hidden_size
    return routed + 3 * moe.shared_intermediate_size + 4 * moe.num_experts


def _too_small(
    config: EngineConfig,
    measured: MeasuredMemory,
    max_model_len: int,
    block_bytes: int,
    left: int,
    free: int,
) -> InsufficientMemoryError:
    needed = -(-max_model_len // config.block_size) * block_bytes
    beside = format_bytes(measured.activations + measured.graphs)
    return InsufficientMemoryError(
        f"The model does not fit: weights {format_bytes(measured.weights)}, activations {beside}, and a KV cache of "
        f"{format_bytes(needed)} for one sequence of {max_model_len} tokens, but {format_bytes(free)} are free "
        f"({format_bytes(max(left, 0))} for the cache). Lower max_model_len or max_num_batched_tokens, raise "
        "kv_cache_memory or gpu_memory, choose a smaller format with quantization, or free memory."
    )
