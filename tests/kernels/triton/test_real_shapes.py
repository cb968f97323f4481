"""On a GPU: the kernels in the shapes of real models against float64, and the invariance only hardware can show."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.moe_ops import Routing
from llmserve.kernels.ops import KVCacheSpec
from llmserve.kernels.triton.moe import TritonMoE
from llmserve.kernels.triton.tables import attention_tiles
from tests.kernels.cpu_cases import PagedBatch
from tests.kernels.triton.test_triton_gemm import random_mxfp4, random_rows, random_tiles
from tests.kernels.triton.triton_cases import DEVICE, IS_INTERPRETED, SmallTileOps, triton_ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU")]


def exact_attention(batch: PagedBatch, seq: int, window: int) -> torch.Tensor:
    """float64 [length, h * d] of one sequence, from its rows of qkv."""
    first, length = sum(batch.seq_lens[:seq]), batch.seq_lens[seq]
    kv_heads, head_dim = batch.spec.num_kv_heads, batch.spec.head_dim
    heads = batch.qkv[first : first + length].to(DEVICE).double().unflatten(1, (-1, head_dim)).transpose(0, 1)
    cos, sin = batch.cos_sin[:length].to(DEVICE).double().chunk(2, dim=-1)
    low, high = heads[: batch.num_heads + kv_heads].chunk(2, dim=-1)
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    group = batch.num_heads // kv_heads
    q, k = rotated[: batch.num_heads], rotated[batch.num_heads :].repeat_interleave(group, 0)
    v = heads[batch.num_heads + kv_heads :].repeat_interleave(group, 0)
    at = torch.arange(length, device=DEVICE)
    visible = at <= at[:, None]
    if window:
        visible &= at > at[:, None] - window
    scores = (q @ k.transpose(1, 2) * head_dim**-0.5).masked_fill_(~visible, -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1).cpu()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [(32, 8, 128, 0), (9, 3, 64, 0), (32, 32, 80, 0), (32, 32, 96, 0), (8, 4, 256, 300), (16, 1, 64, 0)],
)
def test_attention_against_float64(heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    """And bit by bit: split or not, in chunks or whole, alone or not."""
    lengths = [1500, 1, 700, 64]
    batch = PagedBatch.random(KVCacheSpec(kv_heads, head_dim, 16, torch.bfloat16), heads, lengths)
    tiles = attention_tiles(triton_ops().architecture, head_dim, 2)
    whole = [[(seq, 0, length) for seq, length in enumerate(lengths)]]
    chunks = [[(0, 0, 512), (2, 0, 699)], [(0, 512, 1499), (1, 0, 1), (3, 0, 64)], [(0, 1499, 1500), (2, 699, 700)]]
    results = [
        batch.run(SmallTileOps(split=split, programs=programs, tiles=tiles), steps, window=window, device=DEVICE)
        for split, programs in ((0, 0), (10**9, 264), (10**9, 10**9))
        for steps in (whole, chunks)
    ]
    for seq in (0, 2):
        first = sum(lengths[:seq])
        expected = exact_attention(batch, seq, window)
        error = (results[0][first : first + lengths[seq]].double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-2
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_sampling_a_real_vocabulary() -> None:
    from tests.kernels.triton.test_triton_sampling import REFERENCE, draw, sampling_tensors

    logits = torch.randn(64, 128256, generator=torch.Generator().manual_seed(0)) * 3
    for parameters in ({"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.05}):
        sampling = sampling_tensors(64, **parameters)  # type: ignore[arg-type]
        same = draw(logits, sampling) == REFERENCE.sample(logits, sampling)
        assert same.sum() >= 63, parameters  # another order of sums may move a token over a threshold


def test_sampling_a_real_vocabulary_with_adjustments_and_scores() -> None:
    from tests.kernels.adjustment_cases import random_adjustments, with_adjustments
    from tests.kernels.triton.test_triton_sampling import REFERENCE, sampling_tensors

    vocab, made = 128256, random_adjustments(128256)
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(1)) * 3
    sampling = sampling_tensors(8, temperature=0.8, top_k=50, top_p=0.9)
    here, there = (with_adjustments(sampling, made, device) for device in (torch.device("cpu"), DEVICE))
    expected, found = logits.clone(), logits.to(DEVICE)
    same = REFERENCE.sample(expected, here) == triton_ops().sample(found, there).cpu()
    assert same.sum() >= 7
    assert torch.allclose(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    ids = logits.argmin(dim=1)
    scores, exact = triton_ops().token_logprobs(found, ids.to(DEVICE), 20), expected.double().log_softmax(dim=1)
    assert torch.allclose(scores.top_logprobs.cpu().double(), exact.topk(20).values, atol=1e-4)
    assert torch.allclose(scores.logprobs.cpu().double(), exact.gather(1, ids[:, None])[:, 0], atol=1e-4, rtol=1e-5)


def test_sampling_is_the_same_from_a_graph() -> None:
    """With filters and penalties: no launch needs what another one computed to be known to the host."""
    from tests.kernels.adjustment_cases import random_adjustments, with_adjustments
    from tests.kernels.triton.test_triton_sampling import sampling_tensors

    made, ops = random_adjustments(5003), triton_ops()
    logits = torch.randn(8, 5003, device=DEVICE) * 3
    drawing = with_adjustments(sampling_tensors(8, temperature=0.8, top_k=50, top_p=0.9), made, DEVICE)
    expected = ops.sample(logits.clone(), with_adjustments(drawing, made, DEVICE))
    static = logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = ops.sample(static, drawing)
    assert drawing.adjustments is not None
    drawing.adjustments.token_counts.copy_(made.token_counts)
    static.copy_(logits)
    graph.replay()
    assert torch.equal(drawn, expected)


def test_products_keep_float32_sums() -> None:
    ops = triton_ops()
    x, weight = torch.randn(5, 4096, device=DEVICE), torch.randn(300, 4096, device=DEVICE)
    packed = ops.pack_linear(weight.bfloat16())
    wide = ops.linear(x.bfloat16(), packed, torch.float32)
    expected = x.bfloat16().double() @ weight.bfloat16().double().T
    assert wide.dtype is torch.float32
    assert (wide.double() - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("fmt", ["int8", "fp8", "fp8_g128", "mxfp4", "w4a16_g128", "w4a16_g32"])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (1000, 4096)])
def test_products_with_few_bits(fmt: str, n: int, k: int) -> None:
    """Against float64, and bit by bit: every tile, split or not, with descriptors or without, alone or in a batch."""
    ops = triton_ops()
    if fmt not in ops.weight_formats:
        pytest.skip("this GPU has no fp8")
    x = torch.randn(300, k, device=DEVICE, dtype=torch.bfloat16)
    if fmt.startswith("w4"):
        raw, meaning = random_rows(fmt, n, k)
        weight, meaning, tolerance = ops.pack_quantized(raw, fmt), meaning.to(DEVICE), 1e-5
    elif fmt in ("fp8_g128", "mxfp4"):
        raw, meaning = random_tiles(n, k) if fmt == "fp8_g128" else random_mxfp4(n, k)
        weight, meaning = ops.pack_quantized(raw, fmt), meaning.to(DEVICE)
        tolerance = 5e-2 if fmt == "fp8_g128" else 1e-5
    else:
        dense = torch.randn(n, k, device=DEVICE)
        weight, meaning, tolerance = ops.pack_linear(dense, None, fmt), dense.double(), 5e-2
    whole = ops.linear(x, weight, torch.float32)
    expected = x.double() @ meaning.T
    assert (whole.double() - expected).norm() / expected.norm() < tolerance
    for first, end in ((0, 1), (7, 23), (100, 150), (0, 129)):
        assert torch.equal(ops.linear(x[first:end].clone(), weight, torch.float32), whole[first:end]), (first, end)


@pytest.mark.parametrize("fmt", ["dense", "fp8"])
def test_a_mixture_in_a_real_shape(fmt: str) -> None:
    """Qwen3-30B-A3B's gates and ups: against float64; a token alone has the bits it has among 700; no wait."""
    ops, experts, routing = triton_ops(), 128, Routing(8, "softmax", True)
    if fmt not in ops.weight_formats:
        pytest.skip("this GPU has no fp8")
    moe = TritonMoE(ops)
    dense = [torch.randn(1536, 2048, device=DEVICE, dtype=torch.bfloat16) for _ in range(experts)]
    weights = moe.pack_experts((ops.pack_linear(matrix, None, fmt) for matrix in dense), experts)
    x, logits = torch.randn(700, 2048, device=DEVICE, dtype=torch.bfloat16), torch.randn(700, experts, device=DEVICE)

    def run(part: slice) -> torch.Tensor:
        rows = moe.route(logits[part], routing)
        y = moe.grouped_linear(x[part][rows.source_rows], weights, rows)
        return moe.combine_experts(y, rows, torch.bfloat16)

    whole = run(slice(0, 700))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first, end in ((0, 1), (5, 21), (300, 500)):
            some = run(slice(first, end))
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(some, whole[first:end]), (first, end)
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scores, chosen = logits[:40].double().softmax(-1).topk(8)
    scores = scores / scores.sum(-1, keepdim=True)
    for row in range(0, 40, 13):
        answers = torch.stack([x[row].double() @ dense[expert].double().T for expert in chosen[row].tolist()])
        expected = (answers * scores[row][:, None]).sum(0)
        assert (whole[row].double() - expected).norm() / expected.norm() < (1e-2 if fmt == "dense" else 6e-2)
