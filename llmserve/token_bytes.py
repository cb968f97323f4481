"""Which bytes each token id stands for. Knows the two decoders that write bytes, and no stream.

Byte-level BPE (GPT-2) writes each byte as a printable character; SentencePiece writes U+2581 for a space and `<0x0A>`
for a byte. Both then are a table from id to bytes, and decoding is a join: no other decoder needs to be run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteTable:
    """`all[id]` are the bytes of a token, `visible[id]` the same with special tokens silent. Unused ids are b""."""

    all: list[bytes]
    visible: list[bytes]
    strips_first_space: bool  # SentencePiece's dummy prefix: a text's first space is not shown

    def select(self, skip_special_tokens: bool) -> list[bytes]:
        return self.visible if skip_special_tokens else self.all

    def join(self, token_ids: list[int], skip_special_tokens: bool) -> bytes:
        """The bytes of a text. Ids outside the vocabulary (a model's padded rows) say nothing."""
        table = self.select(skip_special_tokens)
        size = len(table)
        data = b"".join([table[token_id] for token_id in token_ids if 0 <= token_id < size])
        return data[1:] if self.strips_first_space and data.startswith(b" ") else data


def build_byte_table(backend: Backend, special_token_ids: frozenset[int]) -> ByteTable | None:
    """The table, or None if the tokenizer's decoder is of another kind (WordPiece, CTC, ...)."""
    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        translate = _byte_level
    elif steps and _is_sentencepiece(steps):
        translate = _sentencepiece if "ByteFallback" in kinds else _spaces_only
    else:
        return None
    tokens = {token_id: text for text, token_id in backend.get_vocab(with_added_tokens=True).items()}
    tokens.update((token_id, token.content) for token_id, token in backend.get_added_tokens_decoder().items())
    every = [b""] * (max(tokens, default=-1) + 1)
    for token_id, text in tokens.items():
        every[token_id] = translate(text)
    visible = every.copy()
    for token_id in special_token_ids:
        visible[token_id] = b""
    return ByteTable(every, visible, strips_first_space=kinds[-1] == "Strip")


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    """The decoder's parts as its serialised form names them."""
    if backend.decoder is None:
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _is_sentencepiece(steps: list[dict[str, Any]]) -> bool:
    """Replace U+2581 by a space, then optionally byte tokens, joining, and dropping one leading space."""
    expected = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    positions = [expected.index(step) if step in expected else -1 for step in steps]
    in_order = positions == sorted(set(positions)) and positions[0] == 0
    joined_before_strip = 3 not in positions or 2 in positions
    return in_order and joined_before_strip


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte, as GPT-2 chose them: printable bytes stand for themselves, the rest lie from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(rest)}


_CODE_POINT_TO_BYTE = _byte_alphabet()


def _byte_level(text: str) -> bytes:
    """A token with a character outside the alphabet (an added token, with a space say) is its own text."""
    try:
        return bytes([_CODE_POINT_TO_BYTE[ord(character)] for character in text])
    except KeyError:
        return text.encode()


def _sentencepiece(text: str) -> bytes:
    if (match := _BYTE_TOKEN.fullmatch(text)) is not None:
        return bytes.fromhex(match[1])
    return _spaces_only(text)


def _spaces_only(text: str) -> bytes:
    return text.replace("▁", " ").encode()
