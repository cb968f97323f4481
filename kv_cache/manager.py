"""The block table of every live request, and the prefixes they share. Ids and counts: it never sees a tensor.

Life of a request: `add`, then `match_prefix`, `allocate`, `restore`, `commit` as it grows, `free` when it is preempted
(after which it may match and allocate again), `remove` when it is over.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.kv_cache.block_pool import BlockPool
from llmserve.kv_cache.host_tier import BlockPairs, HostTier
from llmserve.kv_cache.prefix_cache import PrefixCache


class _RequestBlocks:
    """What the manager knows of one request."""

    __slots__ = ("block_ids", "hashes", "num_committed_blocks", "root")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.block_ids: list[int] = []
        self.hashes: list[bytes] = []  # of its full blocks, as far as known; outlives a preemption
        self.num_committed_blocks = 0  # of block_ids, from the front


class KVCacheManager:
    """Gives blocks to requests and takes them back; a freed block can be found by its content until it is reused."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        host_tier: HostTier | None = None,
    ) -> None:
        """`block_size` is in tokens. Without prefix caching nothing is hashed and nothing is ever found. With a
        `host_tier` what the device reuses can still be found there."""
        assert block_size > 0
        assert enable_prefix_caching or host_tier is None
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(num_blocks)
        self._host_tier = host_tier
        self._requests: dict[str, _RequestBlocks] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks no live request holds, cached ones included."""
        return self._pool.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found by their content, held or free."""
        return len(self._cache)

    def block_ids(self, request_id: str) -> list[int]:
        """The request's block table, as a copy."""
        return self._requests[request_id].block_ids.copy()

    def add(self, request_id: str, cache_salt: str = "") -> None:
        """Introduces a request; it holds no blocks yet. It finds only blocks of its own salt."""
        assert request_id not in self._requests
        self._requests[request_id] = _RequestBlocks(self._cache.root(cache_salt))

    def match_prefix(self, request_id: str, token_ids: Sequence[int]) -> list[int]:
        """The cached blocks that hold the longest known prefix of `token_ids`, never all of its tokens.

        At least the last token is left to compute, because its logits are wanted. Nothing is reserved: hand the
        blocks to `allocate` before anything else is allocated. Hashes are computed up to the first miss. What the host
        keeps beyond is not returned, only pinned there: see `restore`.
        """
        if not self.enable_prefix_caching:
            return []
        request = self._requests[request_id]
        found: list[int] = []
        for index in range((len(token_ids) - 1) // self.block_size):
            block_id = self._cache.get(self._hash(request, index, token_ids))
            if block_id is None:
                break
            found.append(block_id)
        if self._host_tier is not None:
            for index in range(len(found), (len(token_ids) - 1) // self.block_size):
                if not self._host_tier.pin(self._hash(request, index, token_ids)):
                    break
        return found

    def allocate(
        self, request_id: str, num_tokens: int, cached_block_ids: Sequence[int] = (), num_spare_blocks: int = 0
    ) -> list[int] | None:
        """Makes the request's block table long enough for `num_tokens`; returns the new blocks in table order.

        `cached_block_ids`, from `match_prefix`, become the front of a table that was empty. Returns None, and changes
        nothing, if fewer than `num_spare_blocks` would stay free.
        """
        request = self._requests[request_id]
        pool = self._pool
        num_held = len(request.block_ids) + len(cached_block_ids)
        num_new = max(0, -(-num_tokens // self.block_size) - num_held)
        num_taken = num_new  # cached blocks that nobody holds leave the free list too
        for block_id in cached_block_ids:
            if not pool.ref_count(block_id):
                num_taken += 1
        if num_taken > pool.num_free_blocks - num_spare_blocks:
            return None
        if cached_block_ids:
            assert not request.block_ids
            pool.acquire(cached_block_ids)  # before allocating, or their content might be reused
            request.block_ids.extend(cached_block_ids)
            request.num_committed_blocks = len(cached_block_ids)
        block_ids = pool.allocate(num_new)
        if self._host_tier is not None:
            self._offload(self._host_tier, block_ids)
        self._cache.evict(block_ids)
        request.block_ids += block_ids
        return block_ids

    def restore(self, request_id: str, token_ids: Sequence[int]) -> int:
        """After a request that matched was given blocks for all its tokens: those behind the cached ones get what the
        host keeps of them, and can be found at once, for they are filled before the step reads any. Returns how many
        tokens are computed now, cached ones included."""
        request, tier = self._requests[request_id], self._host_tier
        if tier is not None:
            for index in range(request.num_committed_blocks, (len(token_ids) - 1) // self.block_size):
                block_hash, block_id = self._hash(request, index, token_ids), request.block_ids[index]
                if not tier.restore(block_hash, block_id):
                    break
                self._cache.insert(block_hash, block_id)
                request.num_committed_blocks = index + 1
        return request.num_committed_blocks * self.block_size

    def take_pairs(self) -> tuple[BlockPairs, BlockPairs]:
        """What the step just scheduled is to offload and to restore, see `HostTier`."""
        return ([], []) if self._host_tier is None else self._host_tier.take_pairs()

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Makes the request's full blocks findable, as far as their keys and values are computed.

        The caller may count tokens of a step that has yet to run, if that step is certain to run before any that reads
        what is found here, or is the same one (see `Scheduler`). Each block is hashed once in the request's life.
        """
        if not self.enable_prefix_caching:
            return
        request = self._requests[request_id]
        num_full = min(num_computed_tokens, len(token_ids)) // self.block_size
        for index in range(request.num_committed_blocks, num_full):
            self._cache.insert(self._hash(request, index, token_ids), request.block_ids[index])
            request.num_committed_blocks = index + 1

    def free(self, request_id: str) -> None:
        """Gives the request's blocks back, its last first, so that a prefix outlives what was built on it."""
        request = self._requests[request_id]
        self._pool.release(reversed(request.block_ids))
        request.block_ids = []
        request.num_committed_blocks = 0

    def remove(self, request_id: str) -> None:
        """Gives the request's blocks back and forgets it. What it committed can still be found."""
        self.free(request_id)
        del self._requests[request_id]

    def _offload(self, tier: HostTier, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            block_hash = self._cache.hash_of(block_id)
            if block_hash is not None:
                tier.offload(block_hash, block_id)

    def _hash(self, request: _RequestBlocks, index: int, token_ids: Sequence[int]) -> bytes:
        """The hash of the request's full block `index`; those before it are known."""
        hashes = request.hashes
        if index < len(hashes):
            return hashes[index]
        assert index == len(hashes)
        start = index * self.block_size
        parent = hashes[-1] if hashes else request.root
        hashes.append(self._cache.block_hash(parent, token_ids[start : start + self.block_size]))
        return hashes[-1]
