"""The event-stream decoder, against the rules of the WHATWG standard and against every way of cutting the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.tools.sse import ServerSentEvent, SseDecoder


def decode(*chunks: bytes) -> list[ServerSentEvent]:
    decoder = SseDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: a\n\n", [(b"a", b"message")]),
        (b"data:a\n\ndata: b\n\n", [(b"a", b"message"), (b"b", b"message")]),
        (b"data:  two spaces\n\n", [(b" two spaces", b"message")]),
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [(b"YHOO\n+2\n10", b"message")]),
        (b": comment\n\ndata: a\n: in between\ndata: b\n\n", [(b"a\nb", b"message")]),
        (b"event: error\ndata: {}\n\ndata: x\n\n", [(b"{}", b"error"), (b"x", b"message")]),
        (b"event: nothing follows\n\ndata: x\n\n", [(b"x", b"message")]),
        (b"data\n\ndata\ndata\n\ndata:", [(b"", b"message"), (b"\n", b"message")]),
        (b"id: 1\nretry: 10\nunknown: y\ndata: a\n\n", [(b"a", b"message")]),
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\r", [(b"a", b"message"), (b"b", b"message"), (b"c", b"message")]),
        (b"data: a\r\ndata: b\r\n\r\n", [(b"a\nb", b"message")]),
        (b"\xef\xbb\xbfdata: a\n\n", [(b"a", b"message")]),
        (b"data: unfinished\n", []),
        ('data: {"a": "\u2028 \x85 \x0b"}\n\n'.encode(), [('{"a": "\u2028 \x85 \x0b"}'.encode(), b"message")]),
    ],
)
def test_rules_of_the_standard_hold_however_the_bytes_are_cut(
    stream: bytes, expected: list[tuple[bytes, bytes]]
) -> None:
    assert decode(stream) == expected
    assert decode(*(bytes([byte]) for byte in stream)) == expected
    for cut in range(len(stream) + 1):
        assert decode(stream[:cut], b"", stream[cut:]) == expected


def test_an_event_is_given_out_as_soon_as_it_is_complete() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\n") == [(b"a", b"message")]
    assert decoder.feed(b"data: b\r") == []
    assert decoder.feed(b"\r") == [(b"b", b"message")]  # not held back for an LF that may or may not come
    assert decoder.feed(b"\ndata: c\n\n") == [(b"c", b"message")]


@given(
    st.lists(st.lists(st.binary(min_size=1).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), min_size=1)),
    st.sampled_from([b"\n", b"\r", b"\r\n"]),
    st.data(),
)
def test_random_events_survive_random_cuts(events: list[list[bytes]], newline: bytes, data: st.DataObject) -> None:
    stream = b"".join(b"".join(b"data: " + line + newline for line in lines) + newline for lines in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [event.data for event in decode(*chunks)] == [b"\n".join(lines) for lines in events]
