"""Norm and quantise, gate and quantise in one launch: what two launches give, and so many fewer of them.

To the bit, but for a norm on a device: there squares may be added in another order, and a few numbers round otherwise.
"""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.fused_linear import FusedLinear, Gate, UnfusedLinear
from llmserve.kernels.moe_ops import Routing
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec, LinearWeight
from llmserve.kernels.select import select_fused_linear
from llmserve.kernels.triton.fused_linear import TritonFusedLinear, add_rms_norm_quantize, gate_quantize
from llmserve.kernels.triton.moe import TritonMoE
from llmserve.kernels.triton.quantize import QuantizedRows, quantize
from llmserve.kernels.weight_formats import row_bytes
from llmserve.models.layers import MLP, Attention, DecoderLayer, DecoderLayers, FeedForward, MoE
from tests.kernels.cpu_cases import relative_error
from tests.kernels.triton.interpreter import CheckedExecutor
from tests.kernels.triton.triton_cases import DEVICE, DTYPES, IS_INTERPRETED, REFERENCE, triton_ops

OPS = triton_ops()
BYTES = [torch.int8] + [torch.float8_e4m3fn] * OPS.caches_fp8
FORMATS = [fmt for fmt in ("int8", "fp8", "fp8_g128", "dense", "w4a16_g32") if fmt in OPS.weight_formats]
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 128, 256, 4, 32


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def is_same(found: QuantizedRows, expected: QuantizedRows) -> bool:
    """To the bit; a scale that is no number is one like another."""
    return torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8)) and torch.equal(
        found.scales.nan_to_num(-1.0), expected.scales.nan_to_num(-1.0)
    )


def is_alike(found: QuantizedRows, expected: QuantizedRows) -> bool:
    """Of a norm: the same, or on a device nearly all the same numbers."""
    if IS_INTERPRETED:
        return is_same(found, expected)
    other = found.values.view(torch.uint8) != expected.values.view(torch.uint8)
    near = torch.isclose(found.scales, expected.scales, rtol=0.01, atol=0.0, equal_nan=True)
    return bool(near.all()) and other.sum().item() <= 0.01 * other.numel()


def is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Of what follows from a norm: the same, or on a device nearly."""
    if IS_INTERPRETED or not found.numel():
        return torch.equal(found, expected)
    return relative_error(found, expected) < 0.02


def packed(fmt: str, outputs: int, inputs: int) -> LinearWeight:
    if fmt == "fp8_g128":
        scales = torch.rand(outputs, inputs // 128) * 0.01
        numbers = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
        return OPS.pack_quantized(torch.cat((scales.view(torch.uint8), numbers.view(torch.uint8)), 1).to(DEVICE), fmt)
    if fmt.startswith("w4"):
        return OPS.pack_quantized(torch.full((outputs, row_bytes(fmt, inputs)), 17, dtype=torch.uint8).to(DEVICE), fmt)
    weight, bias = torch.randn(outputs, inputs) * 0.1, torch.randn(outputs)
    return OPS.pack_linear(weight.to(DEVICE, torch.bfloat16), bias.to(DEVICE, torch.bfloat16), fmt)


@pytest.mark.parametrize("target", BYTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 576), (5, 577), (2, 2048), (0, 64)])
def test_quantised_at_once_as_by_two_launches(rows: int, width: int, dtype: torch.dtype, target: torch.dtype) -> None:
    x, residual = torch.randn(rows, width).to(DEVICE, dtype), torch.randn(rows, width).to(DEVICE)
    norm, gate_up = torch.randn(width).to(DEVICE), (torch.randn(rows, 2 * width) * 4).to(DEVICE, dtype)
    fused, plain, reference = residual.clone(), residual.clone(), residual.clone()
    found = add_rms_norm_quantize(x, fused, norm, 1e-5, target)
    normed = OPS.add_rms_norm(x, plain, norm, 1e-5)
    assert torch.equal(fused, plain)
    assert is_alike(found, quantize(normed, target))
    gates: list[Gate] = ["silu", "gelu_tanh"]
    for gate in gates:
        gated = OPS.silu_and_mul(gate_up) if gate == "silu" else OPS.gelu_and_mul(gate_up)
        assert is_same(gate_quantize(gate_up, gate, target), quantize(gated, target))
    if rows:  # half a step of the largest value, and what the types round
        numbers = found.values.float() * found.scales[:, None]
        expected = REFERENCE.add_rms_norm(x, reference, norm, 1e-5)
        assert relative_error(numbers, expected.float()) < (0.07 if target != torch.int8 else 0.02)


def test_numbers_are_rounded_to_their_type_before_they_are_quantised() -> None:
    """That a kernel which forgot it would be seen: on the same numbers, kept in float32, the bits are others."""
    x, norm = torch.randn(4, 577).to(DEVICE, torch.bfloat16), torch.randn(577).to(DEVICE)
    gate_up = torch.randn(4, 1154).to(DEVICE, torch.bfloat16)
    residual = torch.zeros(4, 577, device=DEVICE)
    rounded = add_rms_norm_quantize(x, residual.clone(), norm, 1e-5, torch.int8)
    assert not is_same(rounded, add_rms_norm_quantize(x.float(), residual, norm, 1e-5, torch.int8))
    assert not is_same(gate_quantize(gate_up, "silu", torch.int8), gate_quantize(gate_up.float(), "silu", torch.int8))


@pytest.mark.parametrize("target", BYTES)
def test_extreme_values_stay_in_their_row(target: torch.dtype) -> None:
    x = torch.randn(6, 96)
    x[1, 5], x[2, 17], x[3], x[4] = float("nan"), float("inf"), 0.0, 1e-40
    x, norm = x.to(DEVICE), torch.randn(48).to(DEVICE)
    half = x[:, :48].contiguous()
    found = add_rms_norm_quantize(half, torch.zeros_like(half), norm, 1e-5, target)
    assert is_alike(found, quantize(OPS.add_rms_norm(half, torch.zeros_like(half), norm, 1e-5), target))
    gated = gate_quantize(x, "silu", target)
    assert is_same(gated, quantize(OPS.silu_and_mul(x), target))
    for rows in (found, gated):
        assert rows.scales.isnan().tolist() == [False, True, True, False, False, False]
    alone = add_rms_norm_quantize(half[5:].clone(), torch.zeros_like(half[5:]), norm, 1e-5, target)
    assert is_same(alone, QuantizedRows(found.values[5:], found.scales[5:]))


@pytest.mark.parametrize("fmt", FORMATS)
def test_products_are_those_of_one_op_after_another(fmt: str) -> None:
    fused, unfused = select_fused_linear(OPS), UnfusedLinear(OPS)
    assert isinstance(fused, TritonFusedLinear)
    weight, norm = packed(fmt, 96, 384), torch.randn(384).to(DEVICE)
    for rows in (0, 1, 3):
        x, gate_up = (torch.randn(rows, width).to(DEVICE, torch.bfloat16) for width in (384, 768))
        mine, theirs = (torch.ones(rows, 384, device=DEVICE) for _ in range(2))
        found = fused.add_rms_norm_linear(x, mine, norm, 1e-5, weight)
        expected = unfused.add_rms_norm_linear(x, theirs, norm, 1e-5, weight)
        assert found.dtype == expected.dtype == torch.bfloat16
        assert found.shape == (rows, 96)
        assert is_near(found, expected)
        assert torch.equal(mine, theirs)
        for gate in ("silu", "gelu_tanh"):
            assert torch.equal(fused.gate_linear(gate_up, gate, weight), unfused.gate_linear(gate_up, gate, weight))


def decoder(fmt: str, fused: FusedLinear, *, mixture: bool = False) -> DecoderLayers:
    """Two layers of random weights, the same for the same seed."""
    torch.manual_seed(1)
    vector = torch.rand(HIDDEN).to(DEVICE) + 0.5
    mlp = MLP(
        ops=OPS,
        fused=fused,
        gate_up=packed(fmt, 2 * INTERMEDIATE, HIDDEN),
        down=packed(fmt, HIDDEN, INTERMEDIATE),
        gate="silu",
    )
    half: FeedForward = mlp
    if mixture:
        moe = TritonMoE(OPS)
        half = MoE(
            ops=OPS,
            moe_ops=moe,
            router=packed("dense", 4, HIDDEN),
            routing=Routing(2, "softmax", True),
            correction_bias=None,
            gate_up=moe.pack_experts((packed(fmt, 2 * INTERMEDIATE, HIDDEN) for _ in range(4)), 4),
            down=moe.pack_experts((packed(fmt, HIDDEN, INTERMEDIATE) for _ in range(4)), 4),
            activation_and_mul=OPS.silu_and_mul,
            shared=mlp,
            shared_gate=packed("dense", 1, HIDDEN),
        )
    attention = Attention(
        ops=OPS,
        num_heads=HEADS,
        qkv=packed(fmt, 3 * HEADS * HEAD_DIM, HIDDEN),
        o=packed(fmt, HIDDEN, HEADS * HEAD_DIM),
        q_norm=None,
        k_norm=None,
        eps=1e-5,
        cos_sin=torch.randn(8, HEAD_DIM).to(DEVICE),
        scale=0.2,
        sliding_window=0,
        soft_cap=0.0,
        sinks=None,
    )
    layer = DecoderLayer(
        ops=OPS,
        fused=fused,
        attention=attention,
        mlp=half,
        attention_norm=vector,
        mlp_norm=vector,
        post_attention_norm=None,
        post_mlp_norm=None,
        eps=1e-5,
    )
    return DecoderLayers(OPS, [layer, layer], vector, 1e-5)


def forward(layers: DecoderLayers) -> torch.Tensor:
    """Hidden states of a prompt of three tokens."""
    torch.manual_seed(2)
    caches = [OPS.allocate_kv_cache(KVCacheSpec(HEADS, HEAD_DIM, 16, torch.bfloat16), 2, DEVICE) for _ in range(2)]
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, 3], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([3], dtype=torch.int32, device=DEVICE),
        block_table=torch.tensor([[1]], dtype=torch.int32, device=DEVICE),
        slot_mapping=torch.arange(16, 19, device=DEVICE),
        positions=torch.arange(3, device=DEVICE),
        max_seq_len=3,
    )
    return layers.forward(torch.randn(3, HIDDEN).to(DEVICE, torch.bfloat16), meta, caches)


@pytest.mark.parametrize("fmt", FORMATS[:2])
@pytest.mark.parametrize("mixture", [False, True])
def test_layers_say_the_same_whoever_quantises(fmt: str, mixture: bool) -> None:
    """In a mixture the norm's answer goes to the router, the experts and the shared expert."""
    found = forward(decoder(fmt, select_fused_linear(OPS), mixture=mixture))
    assert found.isfinite().all()
    assert is_near(found, forward(decoder(fmt, UnfusedLinear(OPS), mixture=mixture)))


@pytest.mark.skipif(not IS_INTERPRETED, reason="the interpreter counts launches")
@pytest.mark.parametrize("fmt", FORMATS[:2])
def test_a_layer_quantises_alone_before_its_output_projection_only(fmt: str) -> None:
    def launches(fused: FusedLinear) -> list[str]:
        layers = decoder(fmt, fused)
        CheckedExecutor.launches.clear()
        forward(layers)
        # How many programs share a product or an attention out is not what is counted here.
        split = ("add_parts_kernel", "merge_kernel")
        return [name.removesuffix("_kernel") for name in CheckedExecutor.launches if name not in split]

    one_layer = [
        *("add_rms_norm_quantize", "gemm", "rotary", "attention", "quantize", "gemm"),
        *("add_rms_norm_quantize", "gemm", "gate_quantize", "gemm"),
    ]
    assert launches(select_fused_linear(OPS)) == [*one_layer, *one_layer, "rms_norm"]
    apart = launches(UnfusedLinear(OPS))
    assert apart.count("quantize") == 8
    assert len(apart) == 2 * (len(one_layer) + 3) + 1
