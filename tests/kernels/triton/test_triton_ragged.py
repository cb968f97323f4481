"""Paged attention of any ragged batch, as hypothesis makes them up."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.kernels.ops import KVCacheSpec
from tests.kernels.cpu_cases import PagedBatch, relative_error
from tests.kernels.triton.triton_cases import DEVICE, REFERENCE, SmallTileOps


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_attention_of_any_ragged_batch(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 7))
    spec = KVCacheSpec(
        kv_heads, data.draw(st.sampled_from((16, 48))), data.draw(st.sampled_from((16, 64))), torch.float32
    )
    seq_lens = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    batch = PagedBatch.random(spec, kv_heads * group, seq_lens)
    cuts = [data.draw(st.integers(0, length - 1)) for length in seq_lens]
    first = [(seq, 0, cut) for seq, cut in enumerate(cuts) if cut]
    second = [(seq, cut, seq_lens[seq]) for seq, cut in enumerate(cuts)]
    steps = [step for step in (first, second) if step]
    window = data.draw(st.sampled_from((0, 1, 16, 20, 64, 65)))
    ops = SmallTileOps(split=data.draw(st.sampled_from((0, 16))))
    actual = batch.run(ops, steps, window=window, device=DEVICE)
    assert relative_error(actual, batch.run(REFERENCE, steps, window=window)) < 2e-5
