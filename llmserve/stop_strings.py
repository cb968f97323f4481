"""Finds stop strings in text that comes in pieces. Knows no tokens and no requests."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Lets text through up to the first stop string, and holds back only what may yet become one.

    The match is the stop string that is complete first; of several that end at the same character, the longest. So
    what is matched and what is emitted do not depend on how the text was cut into pieces.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        """`stop` holds no empty string. With `include_stop_str_in_output` the match is emitted too."""
        assert all(stop), "an empty stop string would match everywhere"
        self._stops = tuple(stop)
        self._include = include_stop_str_in_output
        self._held = ""  # always a proper beginning of a stop string

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece. Returns what may be shown now and the stop string found: after one, push no more."""
        if not self._stops:
            return text, None
        text = self._held + text
        if (match := self._find(text)) is not None:
            end, length, stop = match
            self._held = ""
            return text[: end if self._include else end - length], stop
        cut = len(text) - self._overlap(text)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What is held back, when the text has ended without becoming a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, int, str] | None:
        """(end, length, stop string) of the first match: the held part is too short to hold one, so all are new."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                end, length = start + len(stop), len(stop)
                if best is None or (end, -length) < (best[0], -best[1]):
                    best = (end, length, stop)
        return best

    def _overlap(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                    break
                start = text.find(stop[0], start + 1)
        return longest
