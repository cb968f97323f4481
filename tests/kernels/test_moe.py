"""Mixture of experts: choice, products and sum against formulas written out by row, and their invariance to the bit."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.cpu.build import find_compiler
from llmserve.kernels.cpu.ops import create_cpu_ops
from llmserve.kernels.moe_ops import Routing
from llmserve.kernels.ops import KVCacheSpec, Ops
from llmserve.kernels.reference import ReferenceOps
from llmserve.kernels.reference_moe import ReferenceMoE
from tests.kernels.cpu_cases import PagedBatch

IMPLEMENTATIONS = ["reference", *(["cpu"] if find_compiler() is not None else [])]
ROUTINGS = [Routing(2, "softmax", False), Routing(3, "softmax", True, 1.5), Routing(4, "sigmoid", True, 2.5)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Ops:
    implementation = ReferenceOps() if request.param == "reference" else create_cpu_ops(2)
    assert implementation is not None
    return implementation


def assignments(ops: Ops, logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None):
    """Each row's (expert, weight)s, read back from what `route` returns."""
    rows = ReferenceMoE(ops).route(logits, routing, bias)
    found: list[list[tuple[int, float]]] = [[] for _ in logits]
    offsets = rows.offsets.tolist()
    for expert in range(logits.shape[1]):
        for place in range(offsets[expert], offsets[expert + 1]):
            row, choice = divmod(int(rows.order[place]), routing.top_k)
            assert int(rows.source_rows[place]) == row
            found[row].append((choice, expert, float(rows.weights[row, choice])))
    return [[pair[1:] for pair in sorted(row)] for row in found]


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_each_row_goes_to_its_best_experts(ops: Ops, routing: Routing, has_bias: bool) -> None:
    logits, bias = randn(9, 7, seed=1), randn(7, seed=2) if has_bias else None
    for row, found in zip(logits.double(), assignments(ops, logits, routing, bias), strict=True):
        scores = row.softmax(0) if routing.scoring == "softmax" else row.sigmoid()
        best = (scores if bias is None else scores + bias).argsort(descending=True)[: routing.top_k]
        weights = scores[best] / (scores[best].sum() if routing.renormalize else 1) * routing.scale
        assert [expert for expert, _ in found] == best.tolist()
        assert [weight for _, weight in found] == pytest.approx(weights.tolist(), rel=1e-5)


def test_equal_scores_go_to_the_smaller_id(ops: Ops) -> None:
    found = assignments(ops, torch.tensor([[0.0] * 9, [1.0, 2.0, 2.0] * 3]), Routing(3, "softmax", True))
    assert [[expert for expert, _ in row] for row in found] == [[0, 1, 2], [1, 2, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["dense", "q8_0"])
@pytest.mark.parametrize("routing", ROUTINGS[1:], ids=str)
def test_a_row_is_the_same_bits_whoever_shares_its_experts(ops: Ops, routing: Routing, fmt: str, dtype) -> None:
    """And they are those of its experts' products alone, added in the order of preference."""
    if fmt not in ops.weight_formats:
        pytest.skip(f"no {fmt} here")
    experts = [ops.pack_linear(randn(48, 64, seed=expert).to(dtype), None, fmt) for expert in range(7)]
    x, logits, gate = randn(301, 64, seed=20).to(dtype), randn(301, 7, seed=21), randn(301, 1, seed=22)
    shared = randn(301, 48, seed=23).to(dtype)

    def run(part: slice) -> torch.Tensor:
        rows = ReferenceMoE(ops).route(logits[part], routing, None)
        packed = ReferenceMoE(ops).pack_experts(experts, len(experts))
        y = ReferenceMoE(ops).grouped_linear(x[part][rows.source_rows], packed, rows)
        return ReferenceMoE(ops).combine_experts(y, rows, dtype, shared[part], gate[part])

    whole = run(slice(0, 301))
    for start, stop in [(0, 1), (5, 6), (300, 301), (3, 10), (17, 250), (100, 301)]:
        assert torch.equal(run(slice(start, stop)), whole[start:stop]), (start, stop)
    for row, chosen in list(enumerate(assignments(ops, logits, routing)))[::23]:
        answers = [weight * ops.linear(x[row : row + 1], experts[expert]).float() for expert, weight in chosen]
        expected = sum(answers) + gate[row].sigmoid() * shared[row : row + 1].float()
        torch.testing.assert_close(
            whole[row : row + 1].float(), expected, atol=0, rtol=2e-2 if dtype != torch.float32 else 1e-5
        )


def test_no_rows(ops: Ops) -> None:
    experts = ReferenceMoE(ops).pack_experts((ops.pack_linear(randn(16, 32, seed=expert)) for expert in range(3)), 3)
    rows = ReferenceMoE(ops).route(randn(0, 3), Routing(2, "softmax", True))
    y = ReferenceMoE(ops).grouped_linear(randn(0, 32), experts, rows)
    assert ReferenceMoE(ops).combine_experts(y, rows, torch.float32).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamped_swiglu(ops: Ops, dtype: torch.dtype) -> None:
    gate_up = (4 * randn(130, 96)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    found = ReferenceMoE(ops).clamped_swiglu(gate_up, 1.7, 2.0)
    expected = (up + 1) * gate * torch.sigmoid(1.7 * gate)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-2 if dtype != torch.float32 else 1e-5)
    assert torch.equal(ReferenceMoE(ops).clamped_swiglu(gate_up[57:64], 1.7, 2.0), found[57:64])


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("sinks", [[-200.0, -2.0, 0.5, 3.0, 8.0, 300.0], [0.0] * 6])
def test_attention_sinks_take_weight_and_give_nothing(ops: Ops, sinks: list[float], window: int) -> None:
    """Softmax over the scores and the sink, in float64; long enough for more than one partition of keys."""
    spec, num_heads, length = KVCacheSpec(3, 16, 16, torch.float32), 6, 530
    batch = PagedBatch.random(spec, num_heads, [length, 5])
    cache = ops.allocate_kv_cache(spec, batch.num_blocks, torch.device("cpu"))
    meta, rows = batch.metadata([(0, 0, length), (1, 0, 5)])
    q = ops.rotary_and_cache(batch.qkv[rows], batch.cos_sin, cache, meta, num_heads, None, None, 1e-6)
    found = ops.paged_attention(q, cache, meta, 0.25, window, 0.0, torch.tensor(sinks)).view(-1, num_heads, 16)

    heads = batch.qkv[:length].view(length, num_heads + 6, 16)
    cos, sin = batch.cos_sin[:length, None].chunk(2, dim=-1)
    k1, k2 = heads[:, 6:9].chunk(2, dim=-1)
    k = torch.cat((k1 * cos - k2 * sin, k2 * cos + k1 * sin), dim=-1).double()
    for position in (0, 1, 36, 63, 64, 511, 512, 529):
        first = max(0, position - window + 1) if window else 0
        for head in range(num_heads):
            scores = 0.25 * k[first : position + 1, head // 2] @ q[position, head].double()
            weights = torch.cat((scores, torch.tensor(sinks[head : head + 1]).double())).softmax(0)[:-1]
            expected = weights @ heads[first : position + 1, 9 + head // 2].double()
            torch.testing.assert_close(found[position, head].double(), expected, atol=2e-5, rtol=2e-4)
