"""GGUF's block formats computed as they lie, against the `gguf` package's own dequantisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from llmserve.kernels.weight_formats import GGUF_FORMATS
from tests.kernels.cpu_cases import ISA_NAMES, cpu_ops, needs_compiler, relative_error

pytestmark = needs_compiler


def _q4_k_rows(rows: int, super_blocks: int) -> np.ndarray:
    """Random valid Q4_K rows: any bytes are, if the two fp16 factors are finite."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (rows, super_blocks, 144), dtype=np.uint8)
    factors = generator.uniform(0.001, 0.01, (rows, super_blocks, 2)).astype(np.float16)
    blocks[:, :, :4] = factors.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_blocks_equal_their_dequantised_weights(isa: str, name: str) -> None:
    ops, ggml_type = cpu_ops(isa), GGMLQuantizationType[name]
    n, k = 75, 768
    dense = np.random.default_rng(1).standard_normal((n, k), dtype=np.float32)
    raw = _q4_k_rows(n, k // 256) if name == "Q4_K" else quants.quantize(dense, ggml_type)
    weight = torch.from_numpy(quants.dequantize(raw, ggml_type).astype(np.float32))
    bias = torch.randn(n)
    packed = ops.pack_quantized(torch.from_numpy(raw), name, bias)
    assert (packed.format, packed.out_features, packed.in_features) == (name.lower(), n, k)
    for m in (1, 2, 7, 40):
        # Integers with the extreme in every block are their own 8-bit activations: only fp32 rounding is left
        # (and, of Q4_K, the rounding of d * scale to fp16).
        x = torch.randint(-126, 127, (m, k)).float()
        x[:, ::32] = 127
        error = relative_error(ops.linear(x, packed), x.double() @ weight.double().T + bias.double())
        assert error < (1e-3 if name == "Q4_K" else 1e-5)
        x = torch.randn(m, k).bfloat16()
        assert relative_error(ops.linear(x, packed), x.double() @ weight.double().T + bias.double()) < 2e-2


def test_weights_stay_at_their_size() -> None:
    ops = cpu_ops(ISA_NAMES[0])
    for name, bits in (("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_1", 5.0)):
        raw = torch.from_numpy(quants.quantize(np.ones((64, 256), np.float32), GGMLQuantizationType[name]))
        assert ops.pack_quantized(raw, name).nbytes == 64 * 256 * bits / 8


def test_what_cannot_be_packed_is_refused() -> None:
    ops = cpu_ops(ISA_NAMES[0])
    with pytest.raises(ValueError, match="Q6_K"):
        ops.pack_quantized(torch.zeros(4, 210, dtype=torch.uint8), "Q6_K")
    with pytest.raises(ValueError, match="34 bytes"):
        ops.pack_quantized(torch.zeros(4, 33, dtype=torch.uint8), "Q8_0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_weights_become_q8_0_as_ggml_makes_it(dtype: torch.dtype) -> None:
    """The blocks hold what the `gguf` package's do, up to the rounding of a tie."""
    ops = cpu_ops(ISA_NAMES[0])
    weight, bias = torch.randn(1000, 1088).to(dtype), torch.randn(1000)
    weight[3] = 0
    packed = ops.pack_linear(weight, bias, "q8_0")
    raw = torch.from_numpy(quants.quantize(weight.float().numpy(), GGMLQuantizationType.Q8_0))
    expected = ops.pack_quantized(raw, "q8_0", bias)
    x = torch.randn(5, 1088)
    assert (packed.format, packed.nbytes) == ("q8_0", expected.nbytes)
    assert relative_error(ops.linear(x, packed), ops.linear(x, expected)) < 4e-3
    assert relative_error(ops.linear(x, packed), x @ weight.float().T + bias) < 2e-2


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 32"):
        cpu_ops(ISA_NAMES[0]).pack_linear(torch.zeros(4, 100), None, "q8_0")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("out_features", [16, 75, 1000])
def test_bytes_are_known_before_packing(out_features: int, has_bias: bool) -> None:
    ops = cpu_ops(ISA_NAMES[0])
    bias = torch.zeros(out_features) if has_bias else None
    for in_features, dtype in ((256, torch.float32), (1280, torch.bfloat16)):
        for fmt in ops.weight_formats:
            if fmt in ("dense", "int8"):
                packed = ops.pack_linear(torch.zeros(out_features, in_features, dtype=dtype), bias, fmt)
            else:
                weights, block_bytes = GGUF_FORMATS[fmt]
                raw = torch.zeros(out_features, in_features // weights * block_bytes, dtype=torch.uint8)
                packed = ops.pack_quantized(raw, fmt, bias)
            assert ops.linear_bytes(fmt, out_features, in_features, dtype, has_bias) == packed.nbytes
    for columns, dtype in ((33, torch.bfloat16), (34, torch.float32)):
        for fmt in ("dense", "int8"):
            packed = ops.pack_linear(torch.zeros(out_features, columns, dtype=dtype), bias, fmt)
            assert ops.linear_bytes(fmt, out_features, columns, dtype, has_bias) == packed.nbytes
