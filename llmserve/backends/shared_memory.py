"""Memory for large tensors that two processes map. It has no name: nothing is left behind, whichever of them dies.

A sender copies its buffers into a segment (the one copy); the receiver looks into the same pages (no copy). When
nothing of it looks there any more it gives the segment back, and the next message of that size finds pages that are
already there: fresh ones would cost more than the copy. A segment's descriptor goes over once, by SCM_RIGHTS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Buffer = bytes | bytearray | memoryview

# Of the segments that wait to be used again. What is larger, or beyond, is given back to the system after its message.
MAX_KEPT_BYTES = 64 * 1024 * 1024

_MIN_SEGMENT_BYTES = 64 * 1024
_HAS_MEMFD = hasattr(os, "memfd_create")  # Linux; elsewhere the file is on disk, unlinked, and cannot be sealed


@dataclass(slots=True)
class Segment:
    """Memory that belongs to this side until it is sent, and again once the other side has given it back."""

    id: int
    capacity: int
    memory: mmap.mmap
    fd: int | None  # to be sent with the first message


class SegmentPool:
    """The segments that one side writes."""

    def __init__(self) -> None:
        self.retired: list[int] = []  # the other side may unmap these
        self._free: defaultdict[int, list[Segment]] = defaultdict(list)  # by capacity
        self._sent: dict[int, Segment] = {}
        self._kept_bytes = 0
        self._num_made = 0

    def write(self, buffers: Sequence[Buffer], num_bytes: int) -> Segment:
        """A segment with the buffers in it, one after the other. Raises OSError where there is no memory."""
        capacity = max(_MIN_SEGMENT_BYTES, 1 << (num_bytes - 1).bit_length())
        if self._free[capacity]:
            segment = self._free[capacity].pop()
            self._kept_bytes -= capacity
        else:
            segment = self._make(capacity)
        position = 0
        with memoryview(segment.memory) as memory:
            for buffer in buffers:
                end = position + len(buffer)
                memory[position:end] = buffer
                position = end
        self._sent[segment.id] = segment
        return segment

    def release(self, ids: Iterable[int]) -> None:
        """The other side looks into these no more. Raises ValueError for what it does not have."""
        for id_ in ids:
            segment = self._sent.pop(id_, None)
            if segment is None:
                raise ValueError(f"Shared memory segment {id_} was given back and is not there.")
            if self._kept_bytes + segment.capacity > MAX_KEPT_BYTES:
                segment.memory.close()
                self.retired.append(id_)
            else:
                self._free[segment.capacity].append(segment)
                self._kept_bytes += segment.capacity

    def close(self) -> None:
        """Unmaps all."""
        for segment in (*self._sent.values(), *(segment for free in self._free.values() for segment in free)):
            segment.memory.close()
            if segment.fd is not None:
                os.close(segment.fd)
        self._sent.clear()
        self._free.clear()

    def _make(self, capacity: int) -> Segment:
        fd = _anonymous_file()
        try:
            os.ftruncate(fd, capacity)
            if _HAS_MEMFD:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(fd, capacity)
        except BaseException:
            os.close(fd)
            raise
        self._num_made += 1
        return Segment(self._num_made, capacity, memory, fd)


class SegmentMap:
    """The segments that the other side writes."""

    def __init__(self) -> None:
        self.released: deque[int] = deque()  # nothing looks into these any more; from any thread
        self._memories: dict[int, mmap.mmap] = {}
        self._in_use: dict[int, weakref.ref[object]] = {}

    def add(self, id_: int, fd: int) -> None:
        """Maps a new segment and closes its descriptor. Raises ValueError if it could still shrink: reading beyond
        its end would kill this process.
        """
        try:
            if _HAS_MEMFD and not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ValueError(f"Shared memory segment {id_} is not sealed against shrinking.")
            self._memories[id_] = mmap.mmap(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def look(self, id_: int, num_bytes: int) -> memoryview:
        """The message's bytes, writable; the segment is given back when nothing refers to them. Raises ValueError."""
        memory = self._memories.get(id_)
        if memory is None or len(memory) < num_bytes or id_ in self._in_use:
            raise ValueError(f"Shared memory segment {id_} cannot hold a message of {num_bytes} bytes.")
        array = np.frombuffer(memory, np.uint8, num_bytes)  # an object of its own, which tells when it goes
        self._in_use[id_] = weakref.ref(array, lambda _: self._drop(id_))
        return array.data

    def forget(self, ids: Iterable[int]) -> None:
        """The other side has retired these."""
        for id_ in ids:
            self._memories.pop(id_, None)

    def close(self) -> None:
        """Unmaps what nothing looks into; the rest when nothing does any more."""
        self._memories.clear()

    def _drop(self, id_: int) -> None:
        del self._in_use[id_]
        self.released.append(id_)


def _anonymous_file() -> int:
    if _HAS_MEMFD:
        return os.memfd_create("llmserve-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd, path = tempfile.mkstemp(prefix="llmserve-tensors-")
    os.unlink(path)
    return fd
