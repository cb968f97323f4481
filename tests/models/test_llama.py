"""The decoder against transformers on the same weights, and its invariance to how a batch is cut."""

from __future__ import annotations

import random

import pytest
import torch


def test_greedy_tokens_and_logprobs_equal_transformers(tiny, load, driver_class, prompt):
    _, theirs, folder = tiny
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, use_cache=True)[0].tolist()
    with torch.inference_mode():
        expected_logits = theirs(torch.tensor([expected[:-1]])).logits[0]

    ids, logits = driver_class(load(folder)).generate(prompt, 24)

    assert ids == expected
    assert len(set(ids[24:])) > 1  # a model that repeats one token would prove little
    torch.testing.assert_close(logits.log_softmax(-1), expected_logits.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_alone_chunked_and_among_strangers(tiny, load, driver_class, prompt, dtype):
    _, _, folder = tiny
    model = load(folder, dtype)
    prompt = (prompt * 6)[:140]  # longer than a tile of keys
    ids, alone = driver_class(model).generate(prompt, 6)

    chunked = driver_class(model)
    rows = [chunked.step({"a": ids[start : start + 7]})["a"] for start in range(0, len(ids) - 1, 7)]
    assert torch.equal(torch.cat(rows)[: len(alone)], alone)

    crowd = driver_class(model, block_size=16)
    rng = random.Random(1)
    strangers = {n: [rng.randrange(101) for _ in range(rng.choice([1, 3, 30, 150]))] for n in range(9)}
    crowd.step(dict(list(strangers.items())[:5]))
    rows = [crowd.step({0: [1], 1: [2], "a": prompt[:60], **dict(list(strangers.items())[5:])})["a"]]
    rows.append(crowd.step({2: [3], "a": prompt[60:], 3: [4, 5]})["a"])
    for token in ids[140:-1]:
        rows.append(crowd.step({4: [6], "a": [token], 7: [7], 8: [8]})["a"])
    assert torch.equal(torch.cat(rows), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(tiny, load, driver_class, prompt, dtype):
    _, _, folder = tiny
    exact = driver_class(load(folder)).step({0: prompt})[0].log_softmax(-1)
    rounded = driver_class(load(folder, dtype)).step({0: prompt})[0]
    assert rounded.dtype == torch.float32
    assert (rounded.log_softmax(-1) - exact).abs().mean() < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_nan_in_a_strangers_block_does_not_leak(tiny, load, driver_class, prompt):
    _, _, folder = tiny
    model = load(folder)
    clean = driver_class(model).step({0: prompt})[0]
    dirty = driver_class(model)
    for cache in dirty.caches:
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
    assert torch.equal(dirty.step({0: prompt})[0], clean)


def test_kv_cache_spec(tiny, load):
    _, theirs, folder = tiny
    model = load(folder)
    spec = model.kv_cache_spec(16, torch.bfloat16)
    assert spec.num_kv_heads == theirs.config.num_key_value_heads
    assert spec.head_dim == theirs.model.layers[0].self_attn.head_dim
    assert (spec.block_size, spec.dtype, model.num_layers) == (16, torch.bfloat16, 3)
