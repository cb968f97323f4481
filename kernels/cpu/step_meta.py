"""A step's metadata as the struct that C reads. Knows no op."""

from __future__ import annotations

import ctypes

import torch

from llmserve.kernels.cpu.library import StepMetaStruct
from llmserve.kernels.ops import AttentionMetadata


class StepMeta:
    """Filled once a step: its layers share one struct."""

    def __init__(self) -> None:
        self._meta: AttentionMetadata | None = None
        self._struct = StepMetaStruct()

    def pointer(self, meta: AttentionMetadata) -> int:
        """Of the struct, holding `meta` until the next call."""
        if meta is not self._meta:
            self._meta = meta
            struct = self._struct
            struct.query_start_loc = _data(meta.query_start_loc)
            struct.seq_lens = _data(meta.seq_lens)
            assert meta.block_table.stride(1) == 1 or meta.block_table.shape[1] == 1
            struct.block_table = meta.block_table.data_ptr()
            struct.slot_mapping = _data(meta.slot_mapping)
            struct.positions = _data(meta.positions)
            struct.block_table_stride = meta.block_table.stride(0)
            struct.num_seqs = meta.seq_lens.shape[0]
            struct.num_tokens = meta.positions.shape[0]
        return ctypes.addressof(self._struct)


def _data(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
