"""KVCacheManager: block tables and shared prefixes, by example and against a model of every block's true content."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmserve.kv_cache.manager import KVCacheManager
from llmserve.kv_cache.prefix_cache import PrefixCache


def run_to_end(manager: KVCacheManager, request_id: str, token_ids: list[int], salt: str = "") -> list[int]:
    """A request that is admitted, computed and removed; returns the blocks it found."""
    manager.add(request_id, salt)
    found = manager.match_prefix(request_id, token_ids)
    assert manager.allocate(request_id, len(token_ids), found) is not None
    manager.commit(request_id, token_ids, len(token_ids))
    manager.remove(request_id)
    return found


def test_blocks_are_added_only_when_a_token_needs_one() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    manager.add("a")
    assert manager.allocate("a", 4) == [0]
    assert manager.allocate("a", 4) == []
    assert manager.allocate("a", 5) == [1]
    assert manager.block_ids("a") == [0, 1]


def test_allocation_fails_whole_or_not_at_all() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    manager.add("a")
    assert manager.allocate("a", 17) is None
    assert manager.allocate("a", 16, num_spare_blocks=1) is None
    assert manager.num_free_blocks == 4
    assert manager.block_ids("a") == []
    assert manager.allocate("a", 12, num_spare_blocks=1) == [0, 1, 2]


def test_the_next_request_finds_a_prefix_and_always_computes_its_last_token() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    run_to_end(manager, "a", list(range(12)))
    manager.add("b")
    assert manager.match_prefix("b", list(range(12))) == [0, 1]  # 8 tokens: the last block holds the last token
    assert manager.match_prefix("b", list(range(13))) == [0, 1, 2]
    assert manager.match_prefix("b", list(range(4))) == []
    assert manager.match_prefix("b", list(range(5))) == [0]


def test_a_prefix_ends_at_the_first_difference() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    run_to_end(manager, "a", list(range(12)))
    manager.add("b")
    assert manager.match_prefix("b", [0, 1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11, 12]) == [0]
    manager.add("c")
    assert manager.match_prefix("c", [99, *range(1, 13)]) == []


def test_salts_do_not_meet() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    run_to_end(manager, "a", list(range(9)), salt="x")
    assert run_to_end(manager, "b", list(range(9)), salt="y") == []
    assert len(run_to_end(manager, "c", list(range(9)), salt="x")) == 2


def test_what_is_not_computed_is_not_found() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    manager.add("a")
    manager.allocate("a", 12)
    manager.commit("a", list(range(12)), 7)
    manager.add("b")
    assert manager.match_prefix("b", list(range(12))) == [0]
    manager.commit("a", list(range(7)), 12)  # computed, but the values of the last tokens are not here yet
    assert manager.match_prefix("b", list(range(12))) == [0]
    manager.commit("a", list(range(12)), 12)
    assert manager.match_prefix("b", list(range(13))) == [0, 1, 2]


def test_the_tail_of_a_freed_request_is_reused_first() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    run_to_end(manager, "a", list(range(12)))
    manager.add("b")
    assert manager.allocate("b", 1) == [2]
    manager.add("c")
    assert manager.match_prefix("c", list(range(13))) == [0, 1]


def test_a_found_block_counts_as_taken_if_nobody_held_it() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    run_to_end(manager, "a", list(range(8)))
    manager.add("b")
    found = manager.match_prefix("b", list(range(9)))
    assert found == [0, 1]
    assert manager.allocate("b", 9, found, num_spare_blocks=1) is None
    assert manager.allocate("b", 9, found) == [2]
    assert manager.num_free_blocks == 0
    manager.add("c")
    found = manager.match_prefix("c", list(range(9)))  # these are held: sharing them takes nothing
    assert manager.allocate("c", 8, found) == []
    manager.remove("b")
    assert manager.num_free_blocks == 1
    manager.remove("c")
    assert manager.num_free_blocks == 3


def test_a_freed_request_finds_its_own_blocks_again() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    token_ids = list(range(10))
    manager.add("a")
    manager.allocate("a", 10)
    manager.commit("a", token_ids, 10)
    manager.free("a")
    assert manager.num_free_blocks == 4
    assert manager.block_ids("a") == []
    found = manager.match_prefix("a", token_ids)
    assert found == [0, 1]
    assert manager.allocate("a", 10, found) == [3]  # never used yet, so before block 2 in the order of reuse


def test_a_freed_request_that_lost_its_blocks_makes_new_ones_findable() -> None:
    manager = KVCacheManager(num_blocks=2, block_size=4)
    token_ids = list(range(8))
    manager.add("a")
    manager.allocate("a", 8)
    manager.commit("a", token_ids, 8)
    manager.free("a")
    manager.add("b")
    manager.allocate("b", 8)
    assert manager.num_cached_blocks == 0
    manager.remove("b")
    assert manager.match_prefix("a", token_ids) == []
    manager.allocate("a", 8)
    manager.commit("a", token_ids, 8)
    assert manager.num_cached_blocks == 2


def test_each_block_is_hashed_once_in_a_request_s_life(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []
    block_hash = PrefixCache.block_hash

    def counting(cache: PrefixCache, parent: bytes, token_ids: Sequence[int]) -> bytes:
        hashed.append(tuple(token_ids))
        return block_hash(cache, parent, token_ids)

    monkeypatch.setattr(PrefixCache, "block_hash", counting)
    manager = KVCacheManager(num_blocks=8, block_size=2)
    manager.add("a")
    token_ids = list(range(7))
    for _ in range(3):  # it waits, is admitted, preempted, admitted again
        found = manager.match_prefix("a", token_ids)
        manager.allocate("a", len(token_ids), found)
        manager.commit("a", token_ids, 4)
        manager.commit("a", token_ids, 7)
        manager.free("a")
    token_ids.append(7)
    manager.match_prefix("a", [*token_ids, 8])
    assert hashed == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4, enable_prefix_caching=False)
    assert run_to_end(manager, "a", list(range(9))) == []
    assert run_to_end(manager, "b", list(range(9))) == []


class _ModelRequest:
    def __init__(self, salt: str, token_ids: list[int]) -> None:
        self.salt = salt
        self.token_ids = token_ids
        self.block_ids: list[int] = []
        self.num_computed = 0
        self.num_named = 0  # blocks offered to the map


Content = tuple[str, tuple[int, ...]]  # a salt and every token up to and including a block's last


class KVCacheManagerMachine(RuleBasedStateMachine):
    """Against a model that knows what each block truly holds, who holds it and in what order the free ones stand.

    Two token values and blocks of two tokens make equal prefixes, copies and evictions common.
    """

    num_blocks = 6
    block_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.manager = KVCacheManager(self.num_blocks, self.block_size)
        self.requests: dict[str, _ModelRequest] = {}
        self.free = list(range(self.num_blocks))  # least recently used first
        self.ref_counts = [0] * self.num_blocks
        self.contents: list[Content | None] = [None] * self.num_blocks  # once all its tokens are computed
        self.names: dict[Content, int] = {}
        self.num_added = 0

    def pick(self, data: st.DataObject, holding: bool | None = None) -> tuple[str, _ModelRequest] | None:
        ids = [i for i, request in self.requests.items() if holding is None or bool(request.block_ids) == holding]
        if not ids:
            return None
        request_id = data.draw(st.sampled_from(ids))
        return request_id, self.requests[request_id]

    def content(self, request: _ModelRequest, index: int) -> Content:
        return request.salt, tuple(request.token_ids[: (index + 1) * self.block_size])

    def take(self, num_blocks: int) -> list[int]:
        taken, self.free = self.free[:num_blocks], self.free[num_blocks:]
        for block_id in taken:
            self.ref_counts[block_id] = 1
            self.contents[block_id] = None
        self.names = {content: block_id for content, block_id in self.names.items() if block_id not in taken}
        return taken

    @precondition(lambda self: len(self.requests) < 5)
    @rule(salt=st.sampled_from(["", "x"]), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def add(self, salt: str, token_ids: list[int]) -> None:
        request_id = str(self.num_added)
        self.num_added += 1
        self.manager.add(request_id, salt)
        self.requests[request_id] = _ModelRequest(salt, token_ids)

    @rule(data=st.data(), num_spare_blocks=st.integers(0, 2))
    def admit(self, data: st.DataObject, num_spare_blocks: int) -> None:
        if (picked := self.pick(data, holding=False)) is None:
            return
        request_id, request = picked
        found = self.manager.match_prefix(request_id, request.token_ids)
        for index, block_id in enumerate(found):
            assert self.contents[block_id] == self.content(request, index)
        expected = []
        for index in range((len(request.token_ids) - 1) // self.block_size):
            if (name := self.names.get(self.content(request, index))) is None:
                break
            expected.append(name)
        assert found == expected

        num_new = -(-len(request.token_ids) // self.block_size) - len(found)
        num_taken = num_new + sum(not self.ref_counts[block_id] for block_id in found)
        new = self.manager.allocate(request_id, len(request.token_ids), found, num_spare_blocks)
        if num_taken > len(self.free) - num_spare_blocks:
            assert new is None
            return
        for block_id in found:
            if not self.ref_counts[block_id]:
                self.free.remove(block_id)
            self.ref_counts[block_id] += 1
        assert new == self.take(num_new)
        request.block_ids = found + new
        request.num_named = len(found)
        request.num_computed = len(found) * self.block_size

    @rule(data=st.data(), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data: st.DataObject, token_ids: list[int]) -> None:
        if (picked := self.pick(data, holding=True)) is None:
            return
        request_id, request = picked
        num_tokens = len(request.token_ids) + len(token_ids)
        num_new = -(-num_tokens // self.block_size) - len(request.block_ids)
        new = self.manager.allocate(request_id, num_tokens)
        if num_new > len(self.free):
            assert new is None
            return
        assert new == self.take(num_new)
        request.block_ids += new
        request.token_ids += token_ids

    @rule(data=st.data())
    def compute_and_commit(self, data: st.DataObject) -> None:
        if (picked := self.pick(data, holding=True)) is None:
            return
        request_id, request = picked
        limit = min(len(request.token_ids), len(request.block_ids) * self.block_size)
        request.num_computed = data.draw(st.integers(request.num_computed, limit))
        for index in range(request.num_named, request.num_computed // self.block_size):
            content = self.content(request, index)
            self.contents[request.block_ids[index]] = content
            self.names.setdefault(content, request.block_ids[index])
            request.num_named = index + 1
        self.manager.commit(request_id, request.token_ids, request.num_computed)

    @rule(data=st.data(), for_good=st.booleans())
    def free_or_remove(self, data: st.DataObject, for_good: bool) -> None:
        if (picked := self.pick(data)) is None:
            return
        request_id, request = picked
        for block_id in reversed(request.block_ids):
            self.ref_counts[block_id] -= 1
            if not self.ref_counts[block_id]:
                self.free.append(block_id)
        if for_good:
            self.manager.remove(request_id)
            del self.requests[request_id]
        else:
            self.manager.free(request_id)
            request.block_ids = []
            request.num_computed = request.num_named = 0

    @invariant()
    def counts_and_tables_agree(self) -> None:
        assert self.manager.num_free_blocks == len(self.free)
        held = [block_id for request in self.requests.values() for block_id in request.block_ids]
        assert [held.count(block_id) for block_id in range(self.num_blocks)] == self.ref_counts
        for request_id, request in self.requests.items():
            assert self.manager.block_ids(request_id) == request.block_ids

    @invariant()
    def names_tell_the_truth(self) -> None:
        assert self.manager.num_cached_blocks == len(self.names)
        for content, block_id in self.names.items():
            assert self.contents[block_id] == content

    def teardown(self) -> None:
        for request_id in self.requests:
            self.manager.remove(request_id)
        assert self.manager.num_free_blocks == self.num_blocks


TestKVCacheManagerMachine = KVCacheManagerMachine.TestCase
TestKVCacheManagerMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
