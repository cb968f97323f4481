"""Encodes a generation as OpenAI's stream chunks. The token path: per token, one JSON string is encoded, nothing else.

Everything around a delta's text is the same in every chunk of a stream and index, so it is encoded once and cut at the
text. The rare chunks (the last of a sequence, log-probabilities, running usage) are encoded whole, by the same code
that made the pieces, so that there is one shape only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from llmserve.api.generations import raise_if_failed
from llmserve.backends.generation import GenerationDelta

_encode_json = msgspec.json.Encoder().encode
_TEXT = msgspec.Raw(b"\x00")  # where the text goes; an encoder escapes this byte wherever else it could stand
_DONE = b"data: [DONE]\n\n"
NO_IDS: Iterator[bytes] = itertools.repeat(b"")


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int
    n: int  # sequences a prompt has
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)  # by the index of a prompt's first sequence

    def add(self, delta: GenerationDelta) -> None:
        """Counts a delta. Cached tokens are those of a prompt's first sequence: the others find the first one's."""
        self.completion_tokens += len(delta.token_ids)
        if delta.num_cached_tokens and delta.index % self.n == 0:
            self.cached_tokens[delta.index] = delta.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


class ChoiceShape(Protocol):
    """What differs between the chunks of chat and of completions."""

    object_name: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the chunk before the first token; None if there is none."""
        ...

    def plain(self, index: int, text: str | msgspec.Raw) -> dict[str, Any]:
        """A choice that has text and nothing else."""
        ...

    def is_plain(self, delta: GenerationDelta) -> bool:
        """Whether `plain` says all there is of this delta, which has not finished."""
        ...

    def full(self, delta: GenerationDelta) -> dict[str, Any] | None:
        """A choice with all there is to say; None if that is nothing."""
        ...


class ChunkEncoder:
    """Frames the chunks of one response. `envelope` holds id, created and model."""

    def __init__(
        self,
        envelope: dict[str, Any],
        shape: ChoiceShape,
        usage: Usage,
        num_choices: int,
        *,
        include_usage: bool,
        continuous_usage: bool,
        ids: Iterator[bytes] = NO_IDS,
    ) -> None:
        """`ids` gives what stands before each event: `id: 1` and so on, or nothing."""
        self._envelope = envelope
        self._shape = shape
        self._usage = usage
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._ids = ids
        self._pieces = [self._chunk(shape.plain(index, _TEXT)).split(b"\x00") for index in range(num_choices)]

    def opening(self) -> bytes:
        """The role chunks of chat."""
        choices = [self._shape.opening(index) for index in range(self._num_choices)]
        return b"".join(next(self._ids) + self._chunk(choice) for choice in choices if choice is not None)

    def encode(self, deltas: list[GenerationDelta]) -> bytes:
        """Raises LLMServeError if a sequence has failed."""
        chunks: list[bytes] = []
        ids = self._ids
        for delta in deltas:
            self._usage.add(delta)
            if delta.finish_reason is None and not self._continuous_usage and self._shape.is_plain(delta):
                if delta.text:  # else the token has not completed a character yet
                    before, after = self._pieces[delta.index]
                    chunks += next(ids), before, _encode_json(delta.text), after
                continue
            raise_if_failed(delta)
            choice = self._shape.full(delta)
            if choice is not None:
                chunks += next(ids), self._chunk(choice)
        return b"".join(chunks)

    def closing(self) -> bytes:
        """The usage chunk if it was asked for, and [DONE]."""
        if not self._include_usage:
            return next(self._ids) + _DONE
        chunk = {**self._envelope, "object": self._shape.object_name, "choices": [], "usage": self._usage.as_dict()}
        return next(self._ids) + b"data: " + _encode_json(chunk) + b"\n\n" + next(self._ids) + _DONE

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk = {**self._envelope, "object": self._shape.object_name, "choices": [choice]}
        if self._continuous_usage:
            chunk["usage"] = self._usage.as_dict()
        elif self._include_usage:
            chunk["usage"] = None
        return b"data: " + _encode_json(chunk) + b"\n\n"
