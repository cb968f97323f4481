"""The same row gives the same bits: alone, among strangers, in chunks, and on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from llmserve.kernels.cpu.ops import CPUOps
from llmserve.kernels.ops import KVCacheSpec, LinearWeight
from tests.kernels.cpu_cases import DTYPES, ISA_NAMES, PagedBatch, cpu_ops, needs_compiler

pytestmark = needs_compiler


def _weights(ops: CPUOps, n: int, k: int, dtype: torch.dtype) -> list[LinearWeight]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    packed = [ops.pack_linear(weight.to(dtype), None, fmt) for fmt in ("dense", "int8")]
    for ggml_type in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1):
        raw = torch.from_numpy(np.ascontiguousarray(quants.quantize(weight.numpy(), ggml_type)))
        packed.append(ops.pack_quantized(raw, ggml_type.name))
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_rows_of_a_product_do_not_depend_on_the_batch(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(130, 576).to(dtype)
    for one, two in zip(
        _weights(cpu_ops(isa, 1), 200, 576, dtype), _weights(cpu_ops(isa, 2), 200, 576, dtype), strict=True
    ):
        whole = cpu_ops(isa, 1).linear(x, one)
        assert torch.equal(whole, cpu_ops(isa, 2).linear(x, two))
        for m in (*range(1, 15), 32, 97):
            assert torch.equal(cpu_ops(isa, 2).linear(x[3 : 3 + m], two), whole[3 : 3 + m]), (one.format, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_rows_of_elementwise_ops_do_not_depend_on_the_batch(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 1154).to(dtype), torch.randn(1154)
    one, two = cpu_ops(isa, 1), cpu_ops(isa, 2)
    computations: list[Callable[[CPUOps, torch.Tensor], torch.Tensor]] = [
        lambda ops, rows: ops.rms_norm(rows, weight, 1e-5),
        lambda ops, rows: ops.add_rms_norm(rows, rows.to(torch.float32, copy=True), weight, 1e-5),
        lambda ops, rows: ops.silu_and_mul(rows),
    ]
    for compute in computations:
        whole = compute(two, x)
        for row in (0, 31, 63):
            assert torch.equal(compute(one, x[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (70, 0.0), (600, 10.0)])
def test_attention_does_not_depend_on_chunks_neighbours_or_threads(
    isa: str, dtype: torch.dtype, window: int, soft_cap: float
) -> None:
    """Sequence 0, longer than one partition of keys, is the one that is looked at."""
    length = 1061
    spec = KVCacheSpec(3, 64, 16, dtype)
    batch = PagedBatch.random(spec, 9, [length, *range(20, 144, 4)])
    strangers = [(seq, 0, batch.seq_lens[seq]) for seq in range(1, len(batch.seq_lens))]

    def run(num_threads: int, *steps: list[tuple[int, int, int]]) -> torch.Tensor:
        return batch.run(cpu_ops(isa, num_threads), list(steps), window=window, soft_cap=soft_cap)[:length]

    whole = run(2, [(0, 0, length)])
    assert torch.equal(run(1, [(0, 0, length)]), whole)
    assert torch.equal(run(2, [(0, 0, length), *strangers]), whole)
    assert torch.equal(run(2, *([(0, p, min(p + 7, length))] for p in range(0, length, 7))), whole)
    prefill, tail = [(0, 0, length - 40)], range(length - 40, length)  # then decode steps
    for num_threads in (1, 2):
        assert torch.equal(run(num_threads, prefill, *([(0, p, p + 1)] for p in tail)), whole)
    crowded = run(2, prefill, *([*strangers, (0, p, p + 1)] for p in tail))
    assert torch.equal(crowded, whole)
