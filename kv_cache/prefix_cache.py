"""Which block holds which tokens: chained keyed hashes of full blocks. Knows neither requests nor who uses a block."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_BYTES = 16


class PrefixCache:
    """A map from the hash of a full block to the block that holds its keys and values.

    A block's hash covers its own tokens and, through its parent's hash, every token before them and the cache salt:
    two blocks have one hash only if their keys and values are equal. The hash is keyed with random bytes of this
    process, so that nobody outside can construct two prompts that collide, nor probe for a hash across restarts.

    Two requests may have computed the same block; the first one committed holds the name, the other is an anonymous
    copy. So a hash names at most one block and a block has at most one hash, and evicting the copy touches nothing.
    """

    __slots__ = ("_block_hashes", "_block_ids", "_keyed")

    def __init__(self, num_blocks: int) -> None:
        self._block_ids: dict[bytes, int] = {}
        self._block_hashes: list[bytes | None] = [None] * num_blocks  # by block id; None: not findable
        self._keyed = blake2b(key=os.urandom(32), digest_size=_DIGEST_BYTES)

    def __len__(self) -> int:
        """How many blocks can be found."""
        return len(self._block_ids)

    def root(self, cache_salt: str) -> bytes:
        """The parent hash of a first block: requests of different salts share nothing."""
        state = self._keyed.copy()
        state.update(cache_salt.encode())
        return state.digest()

    def block_hash(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """The hash of a full block after `parent` (a root, or the hash of the block before). Ids are below 2**32."""
        state = self._keyed.copy()  # copying saves the compression of the key: a quarter of the time
        state.update(parent + array("I", token_ids).tobytes())
        return state.digest()

    def get(self, block_hash: bytes) -> int | None:
        """The block that holds this content, in use or free."""
        return self._block_ids.get(block_hash)

    def hash_of(self, block_id: int) -> bytes | None:
        """Of the content by which the block is found, if it is."""
        return self._block_hashes[block_id]

    def insert(self, block_hash: bytes, block_id: int) -> None:
        """Makes a block findable, unless another holds this content already."""
        assert self._block_hashes[block_id] is None, f"block {block_id} has a hash already"
        if self._block_ids.setdefault(block_hash, block_id) == block_id:
            self._block_hashes[block_id] = block_hash

    def evict(self, block_ids: Iterable[int]) -> None:
        """The blocks are about to be overwritten: they can no longer be found."""
        block_hashes = self._block_hashes
        for block_id in block_ids:
            block_hash = block_hashes[block_id]
            if block_hash is not None:
                del self._block_ids[block_hash]
                block_hashes[block_id] = None
