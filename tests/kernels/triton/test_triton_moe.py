"""Mixtures of experts by the Triton kernels: choice, order, products, sum against plain torch; their invariance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

from llmserve.kernels.moe_ops import Routing
from llmserve.kernels.ops import Ops
from llmserve.kernels.reference_moe import ReferenceMoE
from llmserve.kernels.select import select_moe
from llmserve.kernels.triton.moe import TritonMoE
from tests.kernels.cpu_cases import relative_error
from tests.kernels.triton.test_triton_quantized import run
from tests.kernels.triton.triton_cases import DEVICE, DTYPES, REFERENCE, tolerance, triton_ops
from tests.models import checkpoint_packers as packers

ROUTINGS = [
    Routing(1, "softmax", False),
    Routing(2, "softmax", False),
    Routing(3, "softmax", True, 1.5),
    Routing(7, "sigmoid", True, 2.5),
]
THEIRS = ReferenceMoE(REFERENCE)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mine() -> TritonMoE:
    return TritonMoE(triton_ops())


class TestRouting:
    @pytest.mark.parametrize("routing", ROUTINGS, ids=str)
    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize(("rows", "experts"), [(0, 8), (1, 8), (37, 7), (9, 130)])
    def test_as_in_plain_torch(
        self, mine: TritonMoE, routing: Routing, has_bias: bool, rows: int, experts: int
    ) -> None:
        logits, bias = randn(rows, experts, seed=1), randn(experts, seed=2) if has_bias else None
        found = mine.route(logits.to(DEVICE), routing, None if bias is None else bias.to(DEVICE))
        expected = THEIRS.route(logits, routing, bias)
        for name in ("order", "source_rows", "places", "offsets"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
        torch.testing.assert_close(found.weights.cpu(), expected.weights, atol=0, rtol=2e-6)

    def test_more_assignments_than_a_block(self, mine: TritonMoE) -> None:
        logits = randn(300, 5, seed=3)
        found, expected = (moe.route(logits.to(DEVICE), Routing(4, "softmax", True)) for moe in (mine, THEIRS))
        assert torch.equal(found.order, expected.order)
        assert torch.equal(found.offsets, expected.offsets)

    def test_equal_scores_go_to_the_smaller_id(self, mine: TritonMoE) -> None:
        logits = torch.tensor([[0.0] * 9, [1.0, 2.0, 2.0] * 3]).to(DEVICE)
        rows = mine.route(logits, Routing(3, "softmax", True))
        chosen = [[] for _ in logits]
        for expert in range(9):
            for place in range(int(rows.offsets[expert]), int(rows.offsets[expert + 1])):
                chosen[int(rows.source_rows[place])].append(expert)
        assert chosen == [[0, 1, 2], [1, 2, 4]]

    def test_extremes_choose_something_and_stay_in_their_row(self, mine: TritonMoE) -> None:
        logits = randn(6, 5, seed=4)
        logits[1], logits[2, 3], logits[3], logits[4] = math.nan, math.nan, -math.inf, 1e30
        rows = mine.route(logits.to(DEVICE), Routing(2, "sigmoid", False))
        assert sorted(rows.order.tolist()) == list(range(12))
        assert int(rows.offsets[-1]) == 12
        assert rows.weights[[0, 2, 3, 4, 5]].isfinite().all()  # the NaN of row 2 was not chosen
        assert rows.weights[1].isnan().all()


@pytest.mark.parametrize(
    ("fmt", "dtype"), [*(("dense", dtype) for dtype in DTYPES), ("int8", torch.bfloat16), ("fp8", torch.float16)]
)
def test_a_layer_of_experts(mine: TritonMoE, fmt: str, dtype: torch.dtype) -> None:
    """Products and their sum against float64; and a row is the same bits whoever shares its experts."""
    ops, routing, experts = triton_ops(), Routing(3, "softmax", True), 6
    if fmt not in ops.weight_formats:
        pytest.skip(f"no {fmt} here")
    dense = [randn(48, 128, seed=expert).to(dtype) for expert in range(experts)]
    biases = [randn(48, seed=30 + expert).to(dtype) for expert in range(experts)]
    packed = (ops.pack_linear(w.to(DEVICE), b.to(DEVICE), fmt) for w, b in zip(dense, biases, strict=True))
    weights = mine.pack_experts(packed, experts)
    assert weights.nbytes == experts * ops.linear_bytes(fmt, 48, 128, dtype, True)
    x, logits, gate = randn(41, 128, seed=20).to(dtype), randn(41, experts, seed=21), randn(41, 1, seed=22)
    shared = randn(41, 48, seed=23).to(dtype)

    def run_layer(part: slice) -> torch.Tensor:
        rows = mine.route(logits[part].to(DEVICE), routing)
        y = mine.grouped_linear(x[part].to(DEVICE)[rows.source_rows], weights, rows)
        return mine.combine_experts(y, rows, dtype, shared[part].to(DEVICE), gate[part].to(DEVICE)).cpu()

    whole = run_layer(slice(0, 41))
    for start, stop in [(0, 1), (40, 41), (3, 10)]:
        assert torch.equal(run_layer(slice(start, stop)), whole[start:stop]), (start, stop)
    rows = THEIRS.route(logits, routing)
    answers = torch.stack([x.double() @ w.double().T + b.double() for w, b in zip(dense, biases, strict=True)], 1)
    chosen = torch.searchsorted(rows.offsets, rows.places, right=True).view(41, 3) - 1
    expected = (answers.gather(1, chosen[..., None].expand(-1, -1, 48)) * rows.weights[..., None].double()).sum(1)
    expected += gate.double().sigmoid() * shared.double()
    assert relative_error(whole, expected) < (tolerance(dtype) if fmt == "dense" else 4e-2)


def test_experts_of_gpt_oss(mine: TritonMoE) -> None:
    """In mxfp4 with biases, and the clamped gate between two products; stacked and apart."""
    ops, experts, routing = triton_ops(), 3, Routing(2, "softmax", True)
    packed = [packers.mxfp4((64, 64), expert) for expert in range(experts)]
    biases = [randn(64, seed=40 + expert) for expert in range(experts)]
    raw = [torch.cat((blocks.flatten(1), exponents), dim=1) for blocks, exponents, _ in packed]
    pairs = list(zip(raw, biases, strict=True))
    weights = mine.pack_experts((ops.pack_quantized(r.to(DEVICE), "mxfp4", b.to(DEVICE)) for r, b in pairs), experts)
    assert weights.nbytes == experts * ops.linear_bytes("mxfp4", 64, 64, torch.float32, True)
    x, logits = randn(9, 64, seed=5), randn(9, experts, seed=6)
    rows = mine.route(logits.to(DEVICE), routing)
    gated = mine.clamped_swiglu(mine.grouped_linear(x.to(DEVICE)[rows.source_rows], weights, rows), 1.702, 7.0)
    found = mine.combine_experts(gated, rows, torch.float32).cpu()
    dense = THEIRS.pack_experts(
        (REFERENCE.pack_linear(p[2].float(), b) for p, b in zip(packed, biases, strict=True)), experts
    )
    rows = THEIRS.route(logits, routing)
    gated = THEIRS.clamped_swiglu(THEIRS.grouped_linear(x[rows.source_rows], dense, rows), 1.702, 7.0)
    assert relative_error(found, THEIRS.combine_experts(gated, rows, torch.float32)) < 1e-5


def test_no_rows(mine: TritonMoE) -> None:
    ops = triton_ops()
    weights = mine.pack_experts((ops.pack_linear(randn(16, 32).to(DEVICE)) for _ in range(3)), 3)
    rows = mine.route(randn(0, 3).to(DEVICE), Routing(2, "softmax", True))
    y = mine.grouped_linear(randn(0, 32).to(DEVICE), weights, rows)
    assert mine.combine_experts(y, rows, torch.float32).shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_swiglu(mine: TritonMoE, dtype: torch.dtype) -> None:
    gate_up = (4 * randn(5, 2 * 1100)).to(dtype)
    gate_up[1, 3] = math.nan
    found, expected = (moe.clamped_swiglu(gate_up.to(DEVICE), 1.7, 2.0).cpu() for moe in (mine, THEIRS))
    assert found[1, 3].isnan()
    gate_up[1, 3] = found[1, 3] = expected[1, 3] = 0
    assert relative_error(found, expected) < tolerance(dtype)


FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    "Qwen2Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 32
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_whole_mixtures_agree_with_plain_torch(family: str, quantization: str, tmp_path: Path) -> None:
    ops: Ops = triton_ops()
    if quantization != "none" and quantization not in ops.weight_formats:
        pytest.skip("this GPU has no fp8")
    assert isinstance(select_moe(ops), TritonMoE)
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, **FAMILIES[family],
    )  # fmt: skip
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    found, taken, planned, _ = run(tmp_path, ops, DEVICE, quantization)
    expected, *_ = run(tmp_path, REFERENCE, torch.device("cpu"), "none")
    assert taken == planned
    assert (found - expected).norm() / expected.norm() < (1e-4 if quantization == "none" else 0.1)
