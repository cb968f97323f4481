"""Frames over a Unix stream socket: a message, and its tensors beside it uncoded. Knows no model and no event loop.

A frame is a prefix (lengths), the message in MessagePack and, if they are small, the tensors' bytes; large tensors
stand in shared memory. All parts begin at multiples of 16 bytes, so that arrays are aligned. The socket is one end of
a pair made before the child is started: it has no name, and its end is the peer's death.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from typing import NamedTuple

import msgspec

from llmserve.backends.shared_memory import Buffer, SegmentMap, SegmentPool

# Bytes of tensors above which shared memory costs less CPU than the socket's two copies (benchmarks/bench_general.py).
SHARED_MEMORY_BYTES = 32 * 1024

# bytes of the message, kind of the frame, bytes of the payload, its segment (0: the payload follows the message)
_PREFIX = struct.Struct("<IIQQ8x")
_MESSAGE, _NEW_SEGMENT, _RELEASED, _RETIRED = range(4)
_ALIGNMENT = 16
_PADDING = bytes(_ALIGNMENT)
_RECEIVE_BYTES = 256 * 1024
_MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_MAX_FDS = 16  # descriptors in one receive
_FDS_SPACE = socket.CMSG_SPACE(_MAX_FDS * 4)
_EMPTY = memoryview(b"")


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to where the next part may begin."""
    return (num_bytes + _ALIGNMENT - 1) & -_ALIGNMENT


class Payload:
    """The tensors of one message. Buffers added without `align` between them are one tensor."""

    __slots__ = ("buffers", "num_bytes")

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.num_bytes = 0

    def align(self) -> None:
        """The next buffer begins a tensor."""
        if rest := self.num_bytes & (_ALIGNMENT - 1):
            self.buffers.append(_PADDING[rest:])
            self.num_bytes += _ALIGNMENT - rest

    def add(self, buffer: Buffer) -> None:
        """Appends bytes, uncopied."""
        self.buffers.append(buffer)
        self.num_bytes += len(buffer)


class PayloadReader:
    """Cuts a payload into the tensors it was made of, in their order, uncopied."""

    __slots__ = ("_payload", "_position")

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._position = 0

    def take(self, num_bytes: int) -> memoryview:
        """The next tensor. Raises ValueError if the payload is shorter than its message says."""
        end = self._position + num_bytes
        if end > len(self._payload):
            raise ValueError(f"A frame's tensors end at byte {len(self._payload)} of {end}.")
        tensor = self._payload[self._position : end]
        self._position = padded(end)
        return tensor


class Frame(NamedTuple):
    """A message, still encoded, and the bytes of its tensors."""

    message: memoryview
    payload: memoryview


class FrameLink:
    """One side of a connection: encodes what is to be sent, reads what comes, keeps the shared memory of both."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._pool = SegmentPool()  # written here
        self._map = SegmentMap()  # written by the other side
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._filled = 0
        self._fds: deque[int] = deque()

    def encode(self, message: msgspec.Struct, payload: Payload | None) -> tuple[bytearray, int | None]:
        """The bytes to send and the descriptor to send with their first, if any: the sender closes it.

        Raises OSError where there is no memory for a large payload.
        """
        out = bytearray()
        if self._map.released:
            _control(out, _RELEASED, [self._map.released.popleft() for _ in range(len(self._map.released))])
        if self._pool.retired:
            _control(out, _RETIRED, self._pool.retired)
            self._pool.retired = []
        start = len(out)
        out += bytes(_PREFIX.size)
        self._encoder.encode_into(message, out, start + _PREFIX.size)
        message_bytes = len(out) - start - _PREFIX.size
        out += _PADDING[: -message_bytes % _ALIGNMENT]
        num_bytes = payload.num_bytes if payload is not None else 0
        if payload is None or num_bytes <= SHARED_MEMORY_BYTES:
            _PREFIX.pack_into(out, start, message_bytes, _MESSAGE, num_bytes, 0)
            if payload is not None:
                for buffer in payload.buffers:
                    out += buffer
                out += _PADDING[: -num_bytes % _ALIGNMENT]
            return out, None
        segment = self._pool.write(payload.buffers, num_bytes)
        fd, segment.fd = segment.fd, None
        kind = _MESSAGE if fd is None else _NEW_SEGMENT
        _PREFIX.pack_into(out, start, message_bytes, kind, num_bytes, segment.id)
        return out, fd

    def read(self, flags: int = 0) -> list[Frame] | None:
        """The frames that one receive completes, maybe none; None when the peer has closed.

        Raises BlockingIOError if nothing is there and the socket (or `flags`) does not wait; ValueError for a frame
        that cannot be true.
        """
        with memoryview(self._buffer) as view:
            try:
                received, ancillary, _, _ = self._connection.recvmsg_into([view[self._filled :]], _FDS_SPACE, flags)
            except ConnectionError:
                return None
        if not received:
            return None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(array.array("i", data[: len(data) // 4 * 4]))
        self._filled += received
        return self._split()

    def close(self) -> None:
        """Unmaps and closes; what still looks into a message keeps its memory."""
        while self._fds:
            os.close(self._fds.popleft())
        self._pool.close()
        self._map.close()

    def _split(self) -> list[Frame]:
        """Cuts the buffer into frames and moves what is left to its beginning."""
        frames: list[Frame] = []
        position = 0
        with memoryview(self._buffer) as view:
            while self._filled - position >= _PREFIX.size:
                message_bytes, kind, payload_bytes, segment = _PREFIX.unpack_from(view, position)
                inline_bytes = 0 if segment else payload_bytes
                if message_bytes > _MAX_MESSAGE_BYTES or inline_bytes > _MAX_MESSAGE_BYTES:
                    raise ValueError(f"A frame announces {message_bytes} + {payload_bytes} bytes.")
                size = _PREFIX.size + padded(message_bytes) + padded(inline_bytes)
                if self._filled - position < size:
                    if size > len(view):
                        return self._grow(frames, view, position, size)
                    break
                # a fresh copy: arrays will look into it for as long as they like
                body = memoryview(bytearray(view[position + _PREFIX.size : position + size]))
                position += size
                if kind in (_RELEASED, _RETIRED):
                    self._obey(kind, body[:message_bytes])
                    continue
                if kind == _NEW_SEGMENT:
                    self._add_segment(segment)
                payload = _EMPTY
                if segment:
                    payload = self._map.look(segment, payload_bytes)
                elif payload_bytes:
                    payload = body[padded(message_bytes) : padded(message_bytes) + payload_bytes]
                frames.append(Frame(body[:message_bytes], payload))
            if position:
                view[: self._filled - position] = view[position : self._filled]
                self._filled -= position
        return frames

    def _grow(self, frames: list[Frame], view: memoryview, position: int, size: int) -> list[Frame]:
        """A larger buffer, for a message that does not fit the one there is."""
        buffer = bytearray(size)
        self._filled -= position
        buffer[: self._filled] = view[position : position + self._filled]
        self._buffer = buffer
        return frames

    def _add_segment(self, segment: int) -> None:
        if not self._fds:
            raise ValueError("A frame announces shared memory that did not come with it.")
        self._map.add(segment, self._fds.popleft())

    def _obey(self, kind: int, ids: memoryview) -> None:
        numbers = ids.cast("Q")
        if kind == _RELEASED:
            self._pool.release(numbers)
        else:
            self._map.forget(numbers)


def _control(out: bytearray, kind: int, ids: list[int]) -> None:
    """Appends a frame that is for the other side's `FrameLink` alone."""
    message = array.array("Q", ids).tobytes()
    out += _PREFIX.pack(len(message), kind, 0, 0)
    out += message
    out += _PADDING[: -len(message) % _ALIGNMENT]


def send_frame(connection: socket.socket, frame: bytearray, fd: int | None) -> None:
    """Sends all of a frame over a blocking socket and closes the descriptor. Raises ConnectionError."""
    if fd is None:
        connection.sendall(frame)
        return
    try:
        sent = socket.send_fds(connection, [frame], [fd])
    finally:
        os.close(fd)
    if sent < len(frame):
        connection.sendall(memoryview(frame)[sent:])
