"""Picks who implements the ops for a model on a device."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

import torch

from llmserve.kernels.block_copier import BlockCopier, ReferenceBlockCopier
from llmserve.kernels.cpu.kv_cache import DTYPES, MAX_HEAD_DIM
from llmserve.kernels.cpu.ops import create_cpu_ops
from llmserve.kernels.fused_linear import FusedLinear, UnfusedLinear
from llmserve.kernels.moe_ops import MoEOps
from llmserve.kernels.ops import Ops
from llmserve.kernels.reference import ReferenceOps
from llmserve.kernels.reference_moe import ReferenceMoE
from llmserve.kernels.step_ops import ReferenceStepOps, StepOps

logger = logging.getLogger(__name__)


def select_ops(device: torch.device, dtype: torch.dtype, head_dim: int, num_threads: int | None = None) -> Ops:
    """The fastest implementation that runs here: on a CPU the C kernels, on a GPU Triton's, else plain torch.

    `num_threads` is for a CPU; None takes the cores this process may use. What is lost is said in the log.
    """
    if device.type == "cuda":
        return _select_gpu_ops(device, dtype, head_dim)
    if device.type != "cpu":
        return ReferenceOps()
    if dtype not in DTYPES or head_dim % 16 or head_dim > MAX_HEAD_DIM:
        logger.warning("No CPU kernels for %s with head size %d: plain torch runs, much slower.", dtype, head_dim)
        return ReferenceOps()
    return create_cpu_ops(num_threads) or ReferenceOps()


def _select_gpu_ops(device: torch.device, dtype: torch.dtype, head_dim: int) -> Ops:
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed: plain torch runs, much slower. Run: pip install triton")
        return ReferenceOps()
    from llmserve.kernels.triton import kv_cache, ops  # only here: the rest of llmserve does without Triton

    if dtype not in ops.SUPPORTED_DTYPES or head_dim % 16 or head_dim > kv_cache.MAX_HEAD_DIM:
        logger.warning("No Triton kernels for %s with head size %d: plain torch runs, slower.", dtype, head_dim)
        return ReferenceOps()
    return ops.create_triton_ops(device)


def select_fused_linear(ops: Ops) -> FusedLinear:
    """What runs products together with what stands before them, beside `ops`."""
    if ops.name != "triton":
        return UnfusedLinear(ops)
    from llmserve.kernels.triton.fused_linear import TritonFusedLinear
    from llmserve.kernels.triton.ops import TritonOps

    assert isinstance(ops, TritonOps)
    return TritonFusedLinear(ops)


def select_moe(ops: Ops) -> MoEOps:
    """What runs mixtures of experts beside `ops`."""
    if ops.name != "triton":
        return ReferenceMoE(ops)
    from llmserve.kernels.triton.moe import TritonMoE
    from llmserve.kernels.triton.ops import TritonOps

    assert isinstance(ops, TritonOps)
    return TritonMoE(ops)


def select_step_ops(ops: Ops) -> StepOps:
    """What makes a step's inputs on the device of `ops`."""
    if ops.name != "triton":
        return ReferenceStepOps()
    from llmserve.kernels.triton.step_inputs import TritonStepOps

    return TritonStepOps()


def select_block_copier(
    ops: Ops, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], device: torch.device
) -> BlockCopier:
    """What copies whole blocks from one memory to another on the device of `ops`."""
    if ops.name != "triton":
        return ReferenceBlockCopier(sources, targets)
    from llmserve.kernels.triton.block_copier import TritonBlockCopier

    return TritonBlockCopier(sources, targets, device)
