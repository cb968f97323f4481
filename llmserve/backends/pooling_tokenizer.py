"""From texts and pairs of texts to what a pooling model reads, cut to a length if that is asked for. Imports no torch.

The tokens are those of the model's own files, special tokens included; encoding releases the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmserve.errors import InvalidRequestError
from llmserve.pooling_config import PoolingConfig
from llmserve.tokenizer_files import read_tokenizer_files

TokenIds = npt.NDArray[np.int32]
Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query and a document, to be judged together. `max_second` cuts the document to so many tokens first."""

    first: str
    second: str
    instruction: str | None = None  # to a decoder that judges
    max_second: int | None = None


PoolingInput = str | TextPair | list[int]


@dataclass(frozen=True, slots=True)
class Truncation:
    """What becomes of a text that is too long."""

    max_tokens: int | None = None  # None: the model's own limit
    allowed: bool = False  # False: it is refused
    side: Side = "right"  # which end is cut off


NEVER = Truncation()


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One text as the model reads it."""

    token_ids: TokenIds
    token_type_ids: npt.NDArray[np.uint8] | None = None  # None: all 0

    @property
    def key(self) -> tuple[bytes, bytes]:
        """Equal for texts that the model cannot tell apart."""
        types = self.token_type_ids
        return self.token_ids.tobytes(), b"" if types is None else types.tobytes()


class PoolingTokenizer:
    """Safe to use from several threads."""

    def __init__(self, folder: Path, config: PoolingConfig) -> None:
        """Reads the tokenizer of a Hugging Face folder. Raises ModelLoadError."""
        backend = read_tokenizer_files(folder).backend
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config = config
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.max_model_len = config.max_model_len

    def encode(
        self,
        inputs: Sequence[PoolingInput],
        truncation: Truncation,
        places: Sequence[str],
        *,
        add_special_tokens: bool = True,
    ) -> list[EncodedText]:
        """`places` are what messages call the inputs. Raises InvalidRequestError."""
        limit = self.limit(truncation)
        encodings = iter(self._encode_all([text for text in inputs if not isinstance(text, list)], add_special_tokens))
        encoded = []
        for text, place in zip(inputs, places, strict=True):
            if isinstance(text, list):
                encoded.append(self._given(text, limit, truncation, place))
            elif isinstance(text, TextPair):
                encoded.append(self._pair(text, next(encodings), limit, truncation, place))
            else:
                encoded.append(_single(next(encodings), limit, truncation, place))
        return encoded

    def limit(self, truncation: Truncation) -> int:
        """The longest a text may be. Raises InvalidRequestError if that is beyond the model."""
        if truncation.max_tokens is None:
            return self.max_model_len
        if truncation.max_tokens > self.max_model_len:
            raise InvalidRequestError(
                f"The texts are to be cut to {truncation.max_tokens} tokens, but the model reads at most "
                f"{self.max_model_len}.",
                "truncate_prompt_tokens",
            )
        return truncation.max_tokens

    def _encode_all(self, texts: list[str | TextPair], add_special_tokens: bool) -> list[Any]:
        prompt = self._config.pair_prompt
        rows: list[Any] = []
        if self._config.do_lower_case:
            texts = [_lower(text) for text in texts]
        for text in texts:
            if isinstance(text, str):
                rows.append(text)
            elif prompt is None:
                rows.append((text.first, text.second))
            else:
                rows.append(prompt.render_body(text.first, text.second, text.instruction))
        judged = prompt is not None and any(isinstance(text, TextPair) for text in texts)
        try:
            # the batched form releases the GIL, even for a batch of one
            encodings: list[Any] = self._backend.encode_batch_fast(
                rows, add_special_tokens=add_special_tokens and not judged
            )
        except TypeError:
            raise InvalidRequestError("A text is not valid Unicode: it holds a lone surrogate.") from None
        return encodings

    def _pair(self, pair: TextPair, encoding: Any, limit: int, truncation: Truncation, place: str) -> EncodedText:
        prompt = self._config.pair_prompt
        if prompt is not None:
            prefix, suffix = (
                encoded.ids
                for encoded in self._backend.encode_batch_fast([prompt.prefix, prompt.suffix], add_special_tokens=False)
            )
            room = limit - len(prefix) - len(suffix)
            body = encoding.ids
            if len(body) > room:
                _require_allowed(len(body) + len(prefix) + len(suffix), limit, truncation, place)
                body = body[:room]
            return EncodedText(np.array([*prefix, *body, *suffix], np.int32))
        ids = np.array(encoding.ids, np.int32)
        types = np.array(encoding.type_ids, np.uint8)
        cut_second = pair.max_second is not None and _count(encoding, 1) > pair.max_second
        if len(ids) > limit or cut_second:
            if not cut_second:
                _require_allowed(len(ids), limit, truncation, place)
            kept = _kept_of_pair(encoding, limit, pair.max_second, truncation, place)
            ids, types = ids[kept], types[kept]
        return EncodedText(ids, types if self._config.num_token_types > 1 else None)

    def _given(self, token_ids: list[int], limit: int, truncation: Truncation, place: str) -> EncodedText:
        """Token ids are taken as they come: no special tokens are added."""
        if not token_ids:
            raise InvalidRequestError(f"{place!r} must not be empty.", place)
        if max(token_ids) >= self.vocab_size:
            raise InvalidRequestError(
                f"{place!r} has the token id {max(token_ids)}, but the vocabulary ends at {self.vocab_size - 1}.", place
            )
        if len(token_ids) > limit:
            _require_allowed(len(token_ids), limit, truncation, place)
            token_ids = token_ids[:limit] if truncation.side == "right" else token_ids[-limit:]
        return EncodedText(np.array(token_ids, np.int32))


def num_chars(inputs: Sequence[PoolingInput]) -> int:
    """How much there is to tokenise."""
    return sum(
        len(text) if isinstance(text, str) else len(text.first) + len(text.second)
        for text in inputs
        if not isinstance(text, list)
    )


def _lower(text: str | TextPair) -> str | TextPair:
    if isinstance(text, str):
        return text.lower()
    return replace(text, first=text.first.lower(), second=text.second.lower())


def _single(encoding: Any, limit: int, truncation: Truncation, place: str) -> EncodedText:
    ids = encoding.ids
    if not ids:
        raise InvalidRequestError(f"{place!r} has no tokens.", place)
    if len(ids) > limit:
        _require_allowed(len(ids), limit, truncation, place)
        special = encoding.special_tokens_mask
        room = _room(limit, sum(special), place)
        kept = _ends([i for i, is_special in enumerate(special) if not is_special], room, truncation.side)
        ids = [token for i, token in enumerate(ids) if special[i] or i in kept]
    return EncodedText(np.array(ids, np.int32))


def _kept_of_pair(
    encoding: Any, limit: int, max_second: int | None, truncation: Truncation, place: str
) -> npt.NDArray[np.bool_]:
    """Which tokens stay when the longer text is cut first, as transformers' `longest_first` does it: [tokens]."""
    sequences = encoding.sequence_ids
    positions = [[i for i, sequence in enumerate(sequences) if sequence == which] for which in (0, 1)]
    if max_second is not None:
        positions[1] = _ends_list(positions[1], max_second, truncation.side)
    num_special = sum(sequence is None for sequence in sequences)
    room = _room(limit, num_special, place)
    lengths = [len(positions[0]), len(positions[1])]
    if sum(lengths) > room:
        _require_allowed(sum(lengths) + num_special, limit, truncation, place)
        shorter, longer = (0, 1) if lengths[0] <= lengths[1] else (1, 0)
        lengths[longer] = max(room - lengths[shorter], (room + 1) // 2)
        lengths[shorter] = min(lengths[shorter], room - lengths[longer])
    kept = {i for which in (0, 1) for i in _ends_list(positions[which], lengths[which], truncation.side)}
    return np.array([sequence is None or i in kept for i, sequence in enumerate(sequences)], np.bool_)


def _count(encoding: Any, sequence: int) -> int:
    count: int = encoding.sequence_ids.count(sequence)
    return count


def _ends_list(positions: list[int], room: int, side: Side) -> list[int]:
    if side == "right":
        return positions[:room]
    return positions[len(positions) - room :] if room < len(positions) else positions


def _ends(positions: list[int], room: int, side: Side) -> frozenset[int]:
    return frozenset(_ends_list(positions, room, side))


def _room(limit: int, num_special: int, place: str) -> int:
    if limit <= num_special:
        raise InvalidRequestError(
            f"{place!r} cannot be cut to {limit} tokens: the model adds {num_special} special ones.", place
        )
    return limit - num_special


def _require_allowed(length: int, limit: int, truncation: Truncation, place: str) -> None:
    if not truncation.allowed:
        raise InvalidRequestError(
            f"{place!r} has {length} tokens, but at most {limit} are read. Send a shorter text, or ask for it to be "
            "cut ('truncate_prompt_tokens': -1, or 'truncate': true).",
            place,
        )
