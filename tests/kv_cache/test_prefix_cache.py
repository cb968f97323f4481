"""PrefixCache: what a block's hash covers, and which block holds a name."""

from __future__ import annotations

import pytest

from llmserve.kv_cache.prefix_cache import PrefixCache


def test_a_hash_covers_tokens_parent_and_salt() -> None:
    cache = PrefixCache(1)
    root = cache.root("")
    first = cache.block_hash(root, [1, 2])
    assert first == cache.block_hash(root, [1, 2])
    others = [
        cache.block_hash(root, [2, 1]),
        cache.block_hash(root, [1, 3]),
        cache.block_hash(first, [1, 2]),
        cache.block_hash(cache.root("tenant"), [1, 2]),
    ]
    assert len({first, *others}) == 5


def test_large_token_ids_do_not_run_together() -> None:
    cache = PrefixCache(1)
    root = cache.root("")
    assert cache.block_hash(root, [256, 0]) != cache.block_hash(root, [0, 256])
    assert cache.block_hash(root, [2**32 - 1]) != cache.block_hash(root, [2**31 - 1])


def test_hashes_are_keyed_anew_for_every_cache() -> None:
    assert PrefixCache(1).root("") != PrefixCache(1).root("")


def test_a_block_is_found_until_it_is_evicted() -> None:
    cache = PrefixCache(2)
    cache.insert(b"a", 0)
    assert cache.get(b"a") == 0
    cache.evict([0, 1])
    assert cache.get(b"a") is None
    assert len(cache) == 0
    cache.insert(b"b", 0)
    assert cache.get(b"b") == 0


@pytest.mark.parametrize(("evicted", "found"), [(1, 0), (0, None)])
def test_a_copy_never_takes_the_name_with_it(evicted: int, found: int | None) -> None:
    cache = PrefixCache(2)
    cache.insert(b"a", 0)
    cache.insert(b"a", 1)  # another request computed the same block
    cache.evict([evicted])
    assert cache.get(b"a") == found
    cache.evict([0, 1])
    assert cache.get(b"a") is None


def test_a_block_has_one_name() -> None:
    cache = PrefixCache(1)
    cache.insert(b"a", 0)
    with pytest.raises(AssertionError):
        cache.insert(b"b", 0)
