"""What the host keeps: what was evicted, least recently used first out, and nothing that a step needs."""

from __future__ import annotations

from llmserve.kv_cache.host_tier import HostTier
from llmserve.kv_cache.manager import KVCacheManager


def name(number: int) -> bytes:
    return number.to_bytes(2)


def test_the_least_recently_used_goes() -> None:
    tier = HostTier(2)
    tier.offload(name(1), 11)
    tier.offload(name(2), 12)
    assert tier.take_pairs() == ([(11, 0), (12, 1)], [])
    assert tier.pin(name(1))
    tier.take_pairs()
    tier.offload(name(3), 13)
    assert tier.take_pairs() == ([(13, 1)], [])
    assert not tier.restore(name(2), 5)
    assert tier.restore(name(1), 5)
    assert tier.restore(name(3), 6)
    assert tier.take_pairs() == ([], [(0, 5), (1, 6)])


def test_what_is_kept_already_is_not_copied_again() -> None:
    tier = HostTier(2)
    tier.offload(name(1), 11)
    tier.take_pairs()
    assert tier.restore(name(1), 4)
    tier.take_pairs()
    tier.offload(name(1), 4)
    assert tier.take_pairs() == ([], [])
    assert len(tier) == 1


def test_a_slot_of_this_step_is_not_used_again_in_it() -> None:
    tier = HostTier(2)
    tier.offload(name(1), 11)
    tier.take_pairs()
    assert tier.restore(name(1), 5)
    for number in range(2, 6):
        tier.offload(name(number), 10 + number)
    assert tier.take_pairs() == ([(12, 1)], [(0, 5)])
    tier.offload(name(9), 19)  # the next step may
    assert tier.take_pairs() == ([(19, 0)], [])


def compute(manager: KVCacheManager, request_id: str, token_ids: list[int]) -> int:
    """One request from its first step to its last; how many of its tokens were found."""
    manager.add(request_id)
    found = manager.match_prefix(request_id, token_ids)
    assert manager.allocate(request_id, len(token_ids), found) is not None
    num_computed = manager.restore(request_id, token_ids)
    manager.commit(request_id, token_ids, len(token_ids))
    manager.remove(request_id)
    return num_computed


def test_a_prefix_goes_on_in_the_host() -> None:
    manager = KVCacheManager(4, 4, host_tier=HostTier(8))
    first = list(range(16))
    assert compute(manager, "a", first) == 0
    assert compute(manager, "b", list(range(50, 58))) == 0  # takes the last two blocks
    assert manager.take_pairs() == ([(3, 0), (2, 1)], [])
    assert compute(manager, "c", [*first[:12], 99]) == 12  # two on the device, one in the host
    offloads, restores = manager.take_pairs()
    assert len(offloads) == 2  # of b
    assert [slot for slot, _ in restores] == [1]


def test_what_was_found_survives_the_evictions_that_make_room_for_it() -> None:
    manager = KVCacheManager(4, 4, host_tier=HostTier(4))
    first, second = list(range(16)), list(range(50, 66))
    compute(manager, "a", first)
    compute(manager, "b", second)
    manager.take_pairs()  # the host is full of a, the device of b
    assert compute(manager, "c", first) == 12
    offloads, restores = manager.take_pairs()
    assert not {slot for _, slot in offloads} & {slot for slot, _ in restores}
    assert len(offloads) == 1  # in place of a's last block, which c computes itself


def test_without_a_tier_nothing_is_asked_of_anyone() -> None:
    manager = KVCacheManager(2, 4)
    compute(manager, "a", list(range(8)))
    compute(manager, "b", list(range(8, 16)))
    assert manager.take_pairs() == ([], [])
    assert compute(manager, "c", [*range(8)]) == 0
