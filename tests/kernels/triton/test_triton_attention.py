"""Paged attention against plain torch: ragged batches, types, groups, windows, soft caps; and what may not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmserve.kernels.ops import KVCacheSpec
from llmserve.kernels.triton.tables import AttentionTiles, attention_tiles
from tests.kernels.cpu_cases import PagedBatch, relative_error, to_device
from tests.kernels.triton.triton_cases import DEVICE, REFERENCE, SMALL, Fp8ReferenceOps, SmallTileOps, tolerance

STEPS = [[(0, 0, 1), (1, 0, 30), (2, 0, 71)], [(0, 0, 1), (1, 30, 37), (2, 71, 72)]]  # prompts, then a mixed batch
SEQ_LENS = [1, 37, 72]


@pytest.mark.parametrize(
    ("dtype", "window", "soft_cap", "with_norm"),
    [
        (torch.float32, 0, 0.0, True),
        (torch.float32, 65, 20.0, False),
        (torch.bfloat16, 0, 0.0, False),
        (torch.bfloat16, 37, 0.0, True),
        (torch.float16, 1, 5.0, False),
    ],
)
def test_attention(dtype: torch.dtype, window: int, soft_cap: float, with_norm: bool) -> None:
    batch = PagedBatch.random(KVCacheSpec(2, 32, 16, dtype), 6, SEQ_LENS)
    norm = torch.rand(32) + 0.5 if with_norm else None
    run = {"window": window, "soft_cap": soft_cap, "norm": norm}
    actual = batch.run(SmallTileOps(), STEPS, **run, device=DEVICE)  # type: ignore[arg-type]
    split = batch.run(SmallTileOps(split=16), STEPS, **run, device=DEVICE)  # type: ignore[arg-type]
    expected = batch.run(REFERENCE, STEPS, **run)  # type: ignore[arg-type]
    assert actual.isfinite().all()
    roundings = 2 if with_norm else 1  # the reference rounds normed heads once more than the kernel
    assert relative_error(actual, expected) < roundings * tolerance(dtype)
    assert torch.equal(actual, split)  # the number of splits is not in the result


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "dtype", "fp8"),
    [
        (3, 3, 64, 16, torch.bfloat16, False),
        (7, 1, 64, 16, torch.float16, True),
        (4, 4, 80, 16, torch.float16, False),
        (2, 1, 96, 32, torch.bfloat16, False),
        (8, 2, 96, 16, torch.bfloat16, True),
        (16, 1, 128, 16, torch.float16, False),
        (12, 1, 128, 16, torch.bfloat16, True),
        (5, 1, 256, 48, torch.bfloat16, False),
        (2, 1, 256, 16, torch.float16, True),
        (9, 3, 16, 64, torch.bfloat16, False),
    ],
)
def test_heads_groups_and_blocks(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, fp8: bool
) -> None:
    """Both forms of the kernel."""
    batch = PagedBatch.random(KVCacheSpec(kv_heads, head_dim, block_size, dtype), heads, [5, 70])
    steps = [[(0, 0, 4), (1, 0, 69)], [(0, 4, 5), (1, 69, 70)]]
    actual = batch.run(SmallTileOps(fp8=fp8), steps, device=DEVICE)
    expected = batch.run(Fp8ReferenceOps() if fp8 else REFERENCE, steps)
    assert relative_error(actual, expected) < (1 + fp8) * tolerance(dtype)
    assert torch.equal(actual, batch.run(SmallTileOps(split=2, fp8=fp8), steps, device=DEVICE))


@pytest.mark.parametrize(("dtype", "window", "soft_cap"), [(torch.float32, 0, 0.0), (torch.bfloat16, 37, 20.0)])
def test_sinks(dtype: torch.dtype, window: int, soft_cap: float) -> None:
    """gpt-oss' key without a value: absent (-inf), of small weight, and so heavy that nothing else counts."""
    batch = PagedBatch.random(KVCacheSpec(2, 32, 16, dtype), 6, SEQ_LENS)
    sinks = torch.tensor([-torch.inf, 0.0, 1.5, 4.0, -3.0, 500.0])
    run = {"window": window, "soft_cap": soft_cap, "sinks": sinks}
    actual = batch.run(SmallTileOps(), STEPS, **run, device=DEVICE)  # type: ignore[arg-type]
    split = batch.run(SmallTileOps(split=16), STEPS, **run, device=DEVICE)  # type: ignore[arg-type]
    expected = batch.run(REFERENCE, STEPS, **run)  # type: ignore[arg-type]
    assert relative_error(actual, expected) < tolerance(dtype)
    assert torch.equal(actual, split)
    without = batch.run(SmallTileOps(), STEPS, window=window, soft_cap=soft_cap, device=DEVICE)
    assert torch.equal(actual[:, :32], without[:, :32])  # the head whose sink is -inf
    assert (actual[:, 32:160] != without[:, 32:160]).any(dim=1).all()
    assert not actual[:, 160:].any()


@pytest.mark.parametrize(("dtype", "head_dim", "window"), [(torch.bfloat16, 64, 0), (torch.float16, 80, 37)])
def test_keys_and_values_in_8_bits(dtype: torch.dtype, head_dim: int, window: int) -> None:
    batch = PagedBatch.random(KVCacheSpec(2, head_dim, 16, dtype), 4, SEQ_LENS)
    batch.qkv[3] = 0  # a token whose keys and values are zero has a scale too
    batch.qkv[5, 6 * head_dim :] *= 900  # values beyond e4m3's largest number
    actual = batch.run(SmallTileOps(fp8=True), STEPS, window=window, device=DEVICE)
    assert actual.isfinite().all()
    assert torch.equal(actual, batch.run(SmallTileOps(split=16, fp8=True), STEPS, window=window, device=DEVICE))
    expected = batch.run(Fp8ReferenceOps(), STEPS, window=window)
    assert relative_error(actual, expected) < 2 * tolerance(dtype)
    assert relative_error(expected, batch.run(REFERENCE, STEPS, window=window)) < 0.06  # 3 bits of mantissa


def test_neither_chunks_nor_neighbours_nor_splits_show() -> None:
    """Sequence 0 is the one that is looked at; it is longer than a partition."""
    length = 80
    batch = PagedBatch.random(KVCacheSpec(1, 32, 16, torch.bfloat16), 3, [length, 9])
    stranger = (1, 0, 9)

    def run(split: int, *steps: list[tuple[int, int, int]]) -> torch.Tensor:
        ops = SmallTileOps(split=split)
        return batch.run(ops, list(steps), window=70, soft_cap=10.0, device=DEVICE)[:length]

    whole = run(0, [(0, 0, length)])
    assert torch.equal(run(0, [stranger, (0, 0, length)]), whole)
    assert torch.equal(run(0, [(0, 0, 33)], [(0, 33, 40)], [(0, 40, 79)], [(0, 79, 80)]), whole)
    assert torch.equal(run(16, [(0, 0, 7)], [(0, 7, 74)], [(0, 74, 79)], [stranger, (0, 79, 80)]), whole)


@pytest.mark.parametrize("window", [0, 100])
def test_how_many_programs_share_a_context_does_not_show(window: int) -> None:
    """Four partitions: of a program each, of fewer programs than that, and of one; beside a short sequence."""
    batch = PagedBatch.random(KVCacheSpec(1, 32, 16, torch.float32), 3, [200, 9])
    steps = [[(0, 0, 199), (1, 0, 8)], [(0, 199, 200), (1, 8, 9)]]

    def run(split: int, programs: int) -> torch.Tensor:
        return batch.run(SmallTileOps(split=split, programs=programs), steps, window=window, device=DEVICE)

    alone = run(0, 0)
    assert relative_error(alone, batch.run(REFERENCE, steps, window=window)) < tolerance(torch.float32)
    for programs in (3, 5, 7, 10**9):  # in two tiles: 2, 3, 4 and 4 share
        assert torch.equal(run(16, programs), alone), programs


def test_sequences_that_only_fill_a_batch_up_do_no_harm() -> None:
    """A captured graph has rows for more sequences and tokens than there are: without queries, and of length 0."""
    batch = PagedBatch.random(KVCacheSpec(1, 32, 16, torch.float32), 2, [20, 9])
    ops, (meta, rows) = SmallTileOps(), batch.metadata([(0, 0, 20), (1, 0, 9)])
    filled = replace(
        meta,
        query_start_loc=torch.cat((meta.query_start_loc, torch.full((3,), 29, dtype=torch.int32))),
        seq_lens=torch.cat((meta.seq_lens, torch.zeros(3, dtype=torch.int32))),
        block_table=torch.cat((meta.block_table, torch.zeros((3, meta.block_table.shape[1]), dtype=torch.int32))),
        slot_mapping=torch.cat((meta.slot_mapping, torch.full((3,), -1))),
        positions=torch.cat((meta.positions, torch.zeros(3, dtype=torch.int64))),
    )
    results = []
    for at, qkv in ((meta, batch.qkv[rows]), (filled, torch.cat((batch.qkv[rows], batch.qkv[:3])))):
        at = to_device(at, DEVICE)
        cache = ops.allocate_kv_cache(batch.spec, batch.num_blocks, DEVICE)
        q = ops.rotary_and_cache(qkv.to(DEVICE), batch.cos_sin.to(DEVICE), cache, at, 2, None, None, 1e-6)
        results.append(ops.paged_attention(q, cache, at, 0.2)[:29])
    assert torch.equal(*results)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_every_architecture_and_head_size_has_tiles(architecture: str) -> None:
    for head_dim in (16, 64, 80, 96, 128, 256):
        for cache_bytes in (1, 2, 4):
            tiles = attention_tiles(architecture, head_dim, cache_bytes)
            assert isinstance(tiles, AttentionTiles)
            assert tiles.rows >= 16  # GQA up to 16
            assert tiles.partition % tiles.keys == 0
    assert SMALL.partition % SMALL.keys == 0
