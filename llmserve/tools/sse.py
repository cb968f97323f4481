"""Reads server-sent events from bytes as they arrive, however they were cut. Knows no HTTP and no JSON.

Source: the event-stream interpretation in the WHATWG HTML standard, section 9.2.6 ("Interpreting an event stream").
Events are bytes, not text: whoever reads JSON from them needs no decoded copy.
"""

from __future__ import annotations

from typing import NamedTuple


class ServerSentEvent(NamedTuple):
    """One dispatched event. Several `data` lines are joined by a newline."""

    data: bytes
    event: bytes = b"message"


class SseDecoder:
    """An incremental decoder. Lines end with LF, CR or CRLF; comments, `id` and `retry` are skipped."""

    def __init__(self) -> None:
        self._tail = b""  # the line that has not ended yet
        self._skip_lf = False  # the last line ended with a CR: an LF that comes next belongs to it
        self._at_start = True
        self._data: list[bytes] = []
        self._event = b""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Returns the events that `chunk` completes. An event that the stream leaves unfinished is never returned."""
        if self._skip_lf and chunk:
            self._skip_lf = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        buffer = self._tail + chunk
        if self._at_start:
            if b"\xef\xbb\xbf".startswith(buffer):  # not yet known whether it is a byte order mark
                self._tail = buffer
                return []
            self._at_start = False
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
        lines = buffer.splitlines()
        self._tail = b""
        if buffer.endswith(b"\r"):
            self._skip_lf = True
        elif lines and not buffer.endswith(b"\n"):
            self._tail = lines.pop()
        events: list[ServerSentEvent] = []
        for line in lines:
            self._take_line(line, events)
        return events

    def _take_line(self, line: bytes, events: list[ServerSentEvent]) -> None:
        if not line:
            if self._data:
                events.append(ServerSentEvent(b"\n".join(self._data), self._event or b"message"))
            self._data = []
            self._event = b""
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name == b"event":
            self._event = value.removeprefix(b" ")
