"""Token ids to text as they come: whole characters only, O(1) a token. Knows no stop strings and no requests."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer(Protocol):
    """What was pushed and flushed, joined, is what `Tokenizer.decode` makes of all the ids."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete. The beginning of a character is held back until its end comes."""
        ...

    def flush(self) -> str:
        """What is held back, at the end of a sequence: an unfinished character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For tokenizers whose tokens are bytes: a table and an incremental UTF-8 decoder. The server's hot path."""

    __slots__ = ("_pending", "_strip", "_table")

    def __init__(self, table: list[bytes], strip_first_space: bool) -> None:
        self._table = table
        self._strip = strip_first_space
        self._pending = b""  # at most 3 bytes: the beginning of one character

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        try:
            data = self._pending + b"".join([table[token_id] for token_id in token_ids])
        except IndexError:  # a model with padded embedding rows may sample an id no token has
            size = len(table)
            data = self._pending + b"".join([table[token_id] for token_id in token_ids if token_id < size])
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        text, consumed = utf_8_decode(data, "replace", False)
        self._pending = data[consumed:]
        return text

    def flush(self) -> str:
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text


class WindowDetokenizer:
    """For any other decoder: decodes the last few tokens again with each new one, and shows what is new.

    A decoder may treat a text's first token in its own way, so the window begins a few tokens before the new ones;
    tokens leave it only when the text so far is whole.
    """

    _NUM_CONTEXT_TOKENS = 6

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-self._NUM_CONTEXT_TOKENS :])
        self._shown = decode(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        self._window.extend(token_ids)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) < len(self._shown):
            return ""
        new = text[len(self._shown) :]
        if len(self._window) > 2 * self._NUM_CONTEXT_TOKENS:
            del self._window[: -self._NUM_CONTEXT_TOKENS]
            text = self._decode(self._window)
        self._shown = text
        return new

    def flush(self) -> str:
        text = self._decode(self._window)
        new, self._shown = text[len(self._shown) :], text
        return new
