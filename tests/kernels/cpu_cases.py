"""What the tests of the C kernels share: every instruction set this machine runs, and ragged paged batches."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace

import pytest
import torch

from llmserve.kernels.cpu.build import find_compiler, host_isas
from llmserve.kernels.cpu.ops import CPUOps, create_cpu_ops
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec, Ops

ISA_NAMES = [isa.name for isa in host_isas()]
DTYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
CPU = torch.device("cpu")


@functools.cache
def cpu_ops(isa: str, num_threads: int = 2) -> CPUOps:
    """The kernels built for `isa`; one pool for all tests."""
    ops = create_cpu_ops(num_threads, isa)
    assert ops is not None
    assert ops.isa == isa
    return ops


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-6))


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 1.6e-2


def to_device(meta: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    """The same on another device; the tensors themselves where it is the one they are on."""
    tensors = {f.name: getattr(meta, f.name) for f in fields(meta)}
    moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return replace(meta, **moved)


@dataclass
class PagedBatch:
    """Sequences with shuffled blocks in one cache, whose unused slots hold NaN."""

    spec: KVCacheSpec
    num_heads: int
    seq_lens: list[int]
    block_table: torch.Tensor
    num_blocks: int
    qkv: torch.Tensor
    cos_sin: torch.Tensor

    @classmethod
    def random(cls, spec: KVCacheSpec, num_heads: int, seq_lens: list[int], seed: int = 0) -> PagedBatch:
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-length // spec.block_size) for length in seq_lens]
        num_blocks = sum(needed) + 3
        free = torch.randperm(num_blocks, generator=generator).int()
        table = torch.full((len(seq_lens), max(needed) + 2), 10**6, dtype=torch.int32)  # entries past the end: garbage
        used = 0
        for row, count in enumerate(needed):
            table[row, :count] = free[used : used + count]
            used += count
        width = (num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        qkv = torch.randn(sum(seq_lens), width, generator=generator).to(spec.dtype)
        cos_sin = torch.randn(max(seq_lens), spec.head_dim, generator=generator)
        return cls(spec, num_heads, seq_lens, table, num_blocks, qkv, cos_sin)

    def metadata(self, steps: list[tuple[int, int, int]]) -> tuple[AttentionMetadata, torch.Tensor]:
        """A step of (sequence, first position, end position)s, and the rows of `qkv` it takes."""
        firsts = [sum(self.seq_lens[:seq]) for seq in range(len(self.seq_lens))]
        rows = torch.cat([torch.arange(firsts[seq] + first, firsts[seq] + end) for seq, first, end in steps])
        positions = torch.cat([torch.arange(first, end) for _, first, end in steps])
        lengths = [end - first for _, first, end in steps]
        size = self.spec.block_size
        slots = [
            self.block_table[seq].long()[torch.arange(first, end) // size] * size + torch.arange(first, end) % size
            for seq, first, end in steps
        ]
        meta = AttentionMetadata(
            query_start_loc=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
            seq_lens=torch.tensor([end for _, _, end in steps], dtype=torch.int32),
            block_table=self.block_table[[seq for seq, _, _ in steps]],
            slot_mapping=torch.cat(slots),
            positions=positions,
            max_seq_len=max(end for _, _, end in steps),
        )
        return meta, rows

    def run(
        self,
        ops: Ops,
        steps: list[list[tuple[int, int, int]]],
        *,
        window: int = 0,
        soft_cap: float = 0.0,
        norm: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        device: torch.device = CPU,
    ) -> torch.Tensor:
        """Rotary and attention over the steps in turn -> [rows of qkv, heads * head_dim]; rows not computed are NaN."""
        spec = self.spec
        norm = None if norm is None else norm.to(device)
        sinks = None if sinks is None else sinks.to(device)
        qkv, cos_sin = self.qkv.to(device), self.cos_sin.to(device)
        cache = ops.allocate_kv_cache(spec, self.num_blocks, device)
        for tensor in vars(cache).values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(float("nan"))
        out = torch.full((len(self.qkv), self.num_heads * spec.head_dim), float("nan"), dtype=spec.dtype)
        for step in steps:
            meta, rows = self.metadata(step)
            meta = to_device(meta, device)
            q = ops.rotary_and_cache(qkv[rows.to(device)], cos_sin, cache, meta, self.num_heads, norm, norm, 1e-6)
            out[rows] = ops.paged_attention(q, cache, meta, spec.head_dim**-0.5, window, soft_cap, sinks).cpu()
        return out
