"""On a GPU: the kernels in the shapes of real models against float64, and the invariance only hardware can show."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.ops import KVCacheSpec
from llmserve.kernels.triton.tables import attention_tiles
from tests.kernels.cpu_cases import PagedBatch
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
        batch.run(SmallTileOps(split=split, tiles=tiles), steps, window=window, device=DEVICE)
        for split in (0, 10**9)
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
