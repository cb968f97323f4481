"""Picks who implements the ops for a model on a device."""

from __future__ import annotations

import logging

import torch

from llmserve.kernels.cpu.kv_cache import DTYPES, MAX_HEAD_DIM
from llmserve.kernels.cpu.ops import create_cpu_ops
from llmserve.kernels.moe_ops import MoEOps
from llmserve.kernels.ops import Ops
from llmserve.kernels.reference import ReferenceOps
from llmserve.kernels.reference_moe import ReferenceMoE

logger = logging.getLogger(__name__)


def select_ops(device: torch.device, dtype: torch.dtype, head_dim: int, num_threads: int | None = None) -> Ops:
    """The fastest implementation that runs here: on a CPU the C kernels, else plain torch.

    `num_threads` is for a CPU; None takes the cores this process may use. What is lost is said in the log.
    """
    if device.type != "cpu":
        return ReferenceOps()
    if dtype not in DTYPES or head_dim % 16 or head_dim > MAX_HEAD_DIM:
        logger.warning("No CPU kernels for %s with head size %d: plain torch runs, much slower.", dtype, head_dim)
        return ReferenceOps()
    return create_cpu_ops(num_threads) or ReferenceOps()


def select_moe(ops: Ops) -> MoEOps:
    """What runs mixtures of experts beside `ops`."""
    return ReferenceMoE(ops)
