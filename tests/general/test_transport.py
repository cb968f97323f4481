"""Frames between two ends of a socket pair: sizes, memory, and what must not be believed."""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from llmserve.backends import shared_memory
from llmserve.backends.model_messages import CancelRequests
from llmserve.backends.shared_memory import SegmentMap, SegmentPool
from llmserve.backends.transport import SHARED_MEMORY_BYTES, Frame, FrameLink, Payload, PayloadReader, send_frame


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    theirs.settimeout(5)
    yield ours, theirs
    ours.close()
    theirs.close()


def payload_of(*tensors: bytes) -> Payload:
    payload = Payload()
    for tensor in tensors:
        payload.align()
        payload.add(tensor)
    return payload


def transfer(sender: FrameLink, out: socket.socket, receiver: FrameLink, payload: Payload | None) -> Frame:
    send_frame(out, *sender.encode(CancelRequests([1, 2]), payload))
    frames: list[Frame] = []
    while not frames:
        frames = receiver.read() or []
    (frame,) = frames
    return frame


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, SHARED_MEMORY_BYTES, SHARED_MEMORY_BYTES + 1, 3_000_000])
def test_tensors_arrive_as_they_were_aligned_and_writable(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    first, second = os.urandom(3), os.urandom(size)
    receiver = FrameLink(pair[1])
    frame = transfer(FrameLink(pair[0]), pair[0], receiver, payload_of(first, second))
    assert msgspec.msgpack.decode(frame.message, type=CancelRequests) == CancelRequests([1, 2])
    reader = PayloadReader(frame.payload)
    assert bytes(reader.take(3)) == first
    tensor = reader.take(size)
    assert bytes(tensor) == second
    assert not tensor.readonly
    if size:
        assert np.frombuffer(tensor, np.uint8).ctypes.data % 16 == 0


def test_frames_may_come_in_any_pieces_and_several_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = FrameLink(pair[0]), FrameLink(pair[1])
    stream = b"".join(bytes(sender.encode(CancelRequests([i]), payload_of(bytes([i]) * i))[0]) for i in range(1, 40))
    frames: list[Frame] = []
    for start in range(0, len(stream), 97):
        pair[0].sendall(stream[start : start + 97])
        frames += receiver.read() or []
    assert [bytes(frame.payload) for frame in frames] == [bytes([i]) * i for i in range(1, 40)]


def test_a_message_larger_than_the_buffer_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = FrameLink(pair[0]), FrameLink(pair[1])
    ids = list(range(400_000))
    frame, _ = sender.encode(CancelRequests(ids), None)
    pair[0].setblocking(False)
    sent, frames = 0, []
    while not frames:
        if sent < len(frame):
            sent += pair[0].send(memoryview(frame)[sent : sent + 100_000])
        frames = receiver.read() or []
    assert msgspec.msgpack.decode(frames[0].message, type=CancelRequests).ids == ids


def test_a_segment_is_used_again_once_nothing_looks_into_it(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = FrameLink(pair[0]), FrameLink(pair[1])
    kept = transfer(sender, pair[0], receiver, payload_of(b"a" * 100_000)).payload
    part = kept[5:10]
    del kept
    transfer(receiver, pair[1], sender, None)
    other = transfer(sender, pair[0], receiver, payload_of(b"b" * 100_000)).payload
    assert bytes(part) == b"aaaaa"  # not overwritten: a slice still looks there
    assert sender._pool._num_made == 2
    del part, other
    gc.collect()
    transfer(receiver, pair[1], sender, None)  # tells that both are free
    for _ in range(5):
        assert bytes(transfer(sender, pair[0], receiver, payload_of(b"c" * 100_000)).payload[:2]) == b"cc"
        transfer(receiver, pair[1], sender, None)
    assert sender._pool._num_made == 2


def test_no_descriptor_is_left_open(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sender, receiver = FrameLink(pair[0]), FrameLink(pair[1])
    frames = [transfer(sender, pair[0], receiver, payload_of(b"x" * 200_000)) for _ in range(10)]
    sender.close()
    receiver.close()
    assert bytes(frames[3].payload[:1]) == b"x"  # what was received outlives the link
    del frames, sender, receiver
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_beyond_the_limit_goes_back_to_the_system(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "MAX_KEPT_BYTES", 1 << 20)
    sender, receiver = FrameLink(pair[0]), FrameLink(pair[1])
    for size in (100_000, 3_000_000, 100_000, 3_000_000):
        transfer(sender, pair[0], receiver, payload_of(b"x" * size))
        gc.collect()
        transfer(receiver, pair[1], sender, None)
    transfer(sender, pair[0], receiver, None)  # carries what is retired
    assert sender._pool._kept_bytes <= 1 << 20
    assert len(receiver._map._memories) == 1


def test_the_end_of_the_peer_is_seen(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert FrameLink(pair[1]).read() is None


@pytest.mark.parametrize(
    "prefix",
    [
        struct.pack("<IIQQ8x", 1 << 31, 0, 0, 0),  # an endless message
        struct.pack("<IIQQ8x", 0, 0, 1 << 40, 0),  # an endless payload
        struct.pack("<IIQQ8x", 0, 1, 100, 3),  # a new segment without its descriptor
        struct.pack("<IIQQ8x", 0, 0, 100, 3),  # a segment that is not there
        struct.pack("<IIQQ8xQ8x", 8, 2, 0, 0, 99),  # one given back that was never lent
    ],
)
def test_a_frame_that_cannot_be_true_is_refused(pair: tuple[socket.socket, socket.socket], prefix: bytes) -> None:
    pair[0].sendall(prefix)
    with pytest.raises(ValueError, match=r"frame|segment"):
        FrameLink(pair[1]).read()


def test_memory_that_could_shrink_is_not_mapped() -> None:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="not sealed"):
        SegmentMap().add(1, fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_message_never_reads_beyond_its_segment() -> None:
    pool, segments = SegmentPool(), SegmentMap()
    segment = pool.write([b"x" * 100], 100)
    assert segment.fd is not None
    segments.add(segment.id, segment.fd)
    with pytest.raises(ValueError, match="cannot hold"):
        segments.look(segment.id, segment.capacity + 1)
    segment.fd = None
    pool.close()


def test_a_payload_shorter_than_its_message_says_is_refused() -> None:
    with pytest.raises(ValueError, match="end at byte 4 of 8"):
        PayloadReader(memoryview(b"1234")).take(8)
