"""Stop strings: found wherever the text is cut, held back as little as possible, never leaked."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.stop_strings import StopStringMatcher

texts = st.text(alphabet="ab\n", max_size=24)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def first_match(text: str, stop: list[str]) -> tuple[int, str] | None:
    """The definition, naively: at the first position where some stop string ends, the longest that ends there."""
    for end in range(len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return end, longest
    return None


def run(pieces: list[str], stop: list[str], include: bool) -> tuple[list[str], str | None]:
    """What was shown after each piece, the flush included; and the match."""
    matcher = StopStringMatcher(stop, include)
    shown = []
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown.append(text)
        if matched is not None:
            return shown, matched
    return [*shown, matcher.flush()], None


@given(texts, stops, st.lists(st.integers(0, 24), max_size=8), st.booleans())
@settings(max_examples=1000, deadline=None)
def test_cut_anywhere_it_means_the_same(text: str, stop: list[str], cuts: list[int], include: bool) -> None:
    edges = sorted({0, len(text), *(position for position in cuts if position < len(text))})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    shown, matched = run(pieces, stop, include)
    expected = first_match(text, stop)
    if expected is None:
        assert (matched, "".join(shown)) == (None, text)
    else:
        end, string = expected
        assert matched == string
        assert "".join(shown) == (text[:end] if include else text[: end - len(string)])


@given(texts, stops)
@settings(max_examples=500, deadline=None)
def test_holds_back_no_more_than_it_must(text: str, stop: list[str]) -> None:
    """After each character, exactly the longest end that begins a stop string is missing."""
    matcher = StopStringMatcher(stop)
    shown = ""
    for position, character in enumerate(text, 1):
        emitted, matched = matcher.push(character)
        if matched is not None:
            return
        shown += emitted
        so_far = text[:position]
        beginnings = [string[:length] for string in stop for length in range(1, len(string))]
        held = max((len(part) for part in beginnings if so_far.endswith(part)), default=0)
        assert shown == so_far[: len(so_far) - held]


@pytest.mark.parametrize("position", range(1, 12))
def test_split_at_every_position(position: int) -> None:
    text = "Yes.\n\nUser: more"
    shown, matched = run([text[:position], text[position:]], ["\n\nUser:"], include=False)
    assert ("".join(shown), matched) == ("Yes.", "\n\nUser:")


def test_no_stop_strings_hold_nothing_back() -> None:
    matcher = StopStringMatcher([])
    assert matcher.push("abc") == ("abc", None)
    assert matcher.flush() == ""


def test_the_string_that_is_complete_first_wins() -> None:
    assert run(["xabcd"], ["abcd", "bc"], include=False) == (["xa"], "bc")
    assert run(["xabc"], ["bc", "abc"], include=False) == (["x"], "abc")
    assert run(["xabc"], ["bc", "abc"], include=True) == (["xabc"], "abc")
