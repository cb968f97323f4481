"""Products with quantised weights and of mixtures of experts on this GPU: few rows against bandwidth, many in TFLOP/s.

The bytes of a decode are those of the weights that its rows touch, with their scales. Predictions were written before
the first run: with few rows a product is one wave of programs, whose start and end no load fills; with many, 4 bits are
unpacked once for each 64 rows, and fp8's sums leave the tensor cores every 128 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_timing import DEVICE, seconds, share
from benchmarks.row import Row
from llmserve.kernels.moe_ops import Routing
from llmserve.kernels.ops import LinearWeight
from llmserve.kernels.triton.fused_linear import add_rms_norm_quantize, gate_quantize
from llmserve.kernels.triton.moe import TritonMoE
from llmserve.kernels.triton.ops import TritonOps
from llmserve.kernels.triton.quantize import quantize
from llmserve.kernels.triton.weights import BYTE_DTYPES
from llmserve.kernels.weight_formats import FP8, FP8_G128, INT8, MXFP4, row_bytes

_UP, _DOWN = (28672, 4096), (4096, 14336)  # Llama-3.1-8B's
_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE = 128, 8, 2048, 768  # Qwen3-30B-A3B's
_W4 = "w4a16_g128"


def random_weight(ops: TritonOps, fmt: str, shape: tuple[int, int]) -> LinearWeight:
    """What it holds does not matter if it is finite: bytes of 17 are small scales, and a zero point of 17."""
    if fmt in (_W4, FP8_G128, MXFP4):
        raw = torch.full((shape[0], row_bytes(fmt, shape[1])), 17, dtype=torch.uint8, device=DEVICE)
        return ops.pack_quantized(raw, fmt)
    return ops.pack_linear(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16), None, fmt)


def linear_rows(ops: TritonOps, bandwidth: float) -> Iterator[Row]:
    """Decodes of 1 and 16 rows, and a prompt."""
    predictions = {  # 1 and 16 rows against bandwidth, 4096 rows in TFLOP/s
        (FP8, _UP): ("75%", "75%", "800 TFLOP/s"),
        (FP8, _DOWN): ("62%", "60%", "800 TFLOP/s"),
        (FP8_G128, _UP): ("72%", "72%", "650 TFLOP/s"),
        (INT8, _UP): ("75%", "75%", "800 TFLOP/s"),
        (_W4, _UP): ("55%", "55%", "250 TFLOP/s"),
        (_W4, _DOWN): ("45%", "45%", "250 TFLOP/s"),
    }
    for (fmt, shape), predicted in predictions.items():
        if fmt not in ops.weight_formats:
            continue
        weight, name = random_weight(ops, fmt, shape), f"product {fmt} {shape[0]} x {shape[1]}"
        for rows, expected in zip((1, 16), predicted[:2], strict=True):
            x = torch.randn(rows, shape[1], device=DEVICE, dtype=torch.bfloat16)
            took = seconds(lambda x=x, weight=weight: ops.linear(x, weight))
            yield share(f"{name}, {rows} rows", weight.nbytes, took, bandwidth, "", expected)
        x = torch.randn(4096, shape[1], device=DEVICE, dtype=torch.bfloat16)
        took = seconds(lambda x=x, weight=weight: ops.linear(x, weight))
        found = f"{2 * 4096 * shape[0] * shape[1] / took / 1e12:.0f} TFLOP/s"
        yield Row(f"{name}, 4096 rows", "operations", "", predicted[2], found)


def mixture_rows(ops: TritonOps, bandwidth: float) -> Iterator[Row]:
    """A layer's gates and ups for all experts: of 1 and 64 tokens, of a prompt; and what chooses and sorts."""
    moe, routing = TritonMoE(ops), Routing(_TOP_K, "softmax", True)
    shape = (2 * _INTERMEDIATE, _HIDDEN)
    for fmt, predicted in (
        ("dense", ("45%", "70%", "350 TFLOP/s")),
        (FP8, ("35%", "65%", "450 TFLOP/s")),
        (_W4, ("30%", "50%", "150 TFLOP/s")),
        (MXFP4, ("25%", "40%", "130 TFLOP/s")),
    ):
        if fmt not in ops.weight_formats:
            continue
        experts = moe.pack_experts((random_weight(ops, fmt, shape) for _ in range(_EXPERTS)), _EXPERTS)
        for tokens, expected in zip((1, 64, 4096), predicted, strict=True):
            rows = moe.route(torch.randn(tokens, _EXPERTS, device=DEVICE), routing)
            x = torch.randn(tokens * _TOP_K, _HIDDEN, device=DEVICE, dtype=torch.bfloat16)
            took = seconds(lambda x=x, rows=rows, experts=experts: moe.grouped_linear(x, experts, rows))
            name = f"experts {fmt}, {tokens} tokens"
            if tokens < 1000:
                touched = int((rows.offsets.diff() > 0).sum()) / _EXPERTS
                yield share(name, experts.nbytes * touched, took, bandwidth, "", expected)
            else:
                operations = 2 * tokens * _TOP_K * shape[0] * shape[1]
                yield Row(name, "operations", "", expected, f"{operations / took / 1e12:.0f} TFLOP/s")
    for tokens, expected in ((64, "10 us"), (8192, "90 us")):
        logits = torch.randn(tokens, _EXPERTS, device=DEVICE)
        took = seconds(lambda logits=logits: moe.route(logits, routing))
        yield Row(f"experts chosen and sorted, {tokens} tokens", "time", "", expected, f"{took * 1e6:.0f} us")


def quantize_rows(ops: TritonOps, bandwidth: float) -> Iterator[Row]:
    """A product's 8-bit inputs from a norm and from a gate: of one token against two launches, of 8k against bandwidth.

    Predicted for one token: a launch and its wait, 2 us of 5, are gone; the gate is left to one multiprocessor, which
    quantises its row anyway."""
    dtype = BYTE_DTYPES[FP8 if FP8 in ops.weight_formats else INT8]
    hidden, intermediate = _UP[1], _DOWN[1]
    norm = torch.ones(hidden, device=DEVICE)
    for tokens, predicted in ((1, ("60%", "65%")), (8192, ("85%", "80%"))):
        x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
        residual = torch.randn(tokens, hidden, device=DEVICE)
        gate_up = torch.randn(tokens, 2 * intermediate, device=DEVICE, dtype=torch.bfloat16)
        normed = seconds(lambda x=x, residual=residual: add_rms_norm_quantize(x, residual, norm, 1e-5, dtype))
        gated = seconds(lambda gate_up=gate_up: gate_quantize(gate_up, "silu", dtype))
        names = f"residual + RMSNorm + quantise, {tokens} tokens", f"SiLU * mul + quantise, {tokens} tokens"
        if tokens > 1:
            yield share(names[0], x.numel() * (2 + 4 + 4 + 1), normed, bandwidth, "80%", predicted[0])
            yield share(names[1], gate_up.numel() // 2 * (2 + 2 + 1), gated, bandwidth, "80%", predicted[1])
            continue
        apart = seconds(
            lambda x=x, residual=residual: quantize(ops.add_rms_norm(x, residual, norm, 1e-5), dtype),
        )
        yield Row(names[0], "of two launches", "", predicted[0], f"{normed / apart:.0%} ({normed * 1e6:.1f} us)")
        apart = seconds(lambda gate_up=gate_up: quantize(ops.silu_and_mul(gate_up), dtype))
        yield Row(names[1], "of two launches", "", predicted[1], f"{gated / apart:.0%} ({gated * 1e6:.1f} us)")


def product_rows(ops: TritonOps, bandwidth: float) -> Iterator[Row]:
    """All of them."""
    yield from linear_rows(ops, bandwidth)
    yield from quantize_rows(ops, bandwidth)
    yield from mixture_rows(ops, bandwidth)
