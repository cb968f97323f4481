"""Log-probabilities in the three shapes that clients read: chat, completions, and vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from llmserve.messages import TokenLogprobs
from llmserve.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI writes for "very unlikely"; JSON has no infinity


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions. `bytes` are the token's own, also where they are half a character."""
    return {
        "content": [
            {
                **_chat_token(entry.token_id, entry.logprob, tokenizer),
                "top_logprobs": [_chat_token(token, logprob, tokenizer) for token, logprob in entry.top[:num_top]],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, _LEAST),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, num_top: int) -> list[Any]:
    """vLLM's `prompt_logprobs`: a dict by token id for each prompt token, its own first; null for the first token."""
    shown: list[Any] = []
    for entry in entries:
        if entry is None:
            shown.append(None)
            continue
        ranked = {str(token): (logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:num_top], 1)}
        ranked = {str(entry.token_id): (entry.logprob, entry.rank), **ranked}
        shown.append(
            {
                token: {
                    "logprob": max(logprob, _LEAST),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(int(token)),
                }
                for token, (logprob, rank) in ranked.items()
            }
        )
    return shown


class CompletionLogprobs:
    """Writes the `logprobs` of one choice of /v1/completions, chunk after chunk.

    `text_offset` counts the characters of the choice's text before a token. Bytes that are no whole character count as
    soon as the character is complete; a hidden special token has no width. Tokens that are not valid UTF-8 are named
    `bytes:\\xe2\\x80`, as OpenAI does it, so that no two share a key of `top_logprobs`.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """The next tokens with what is known of each; None for the first token of a prompt."""
        offsets: list[int] = []
        top_logprobs: list[dict[str, float] | None] = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            offsets.append(self._offset)
            if token_id not in self._hidden:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
            top_logprobs.append(None if entry is None else self._top(entry))
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else max(entry.logprob, _LEAST) for entry in entries],
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The `num_top` likeliest, and the chosen token if it is not among them."""
        top = {self._name(token): max(logprob, _LEAST) for token, logprob in entry.top[: self._num_top]}
        top.setdefault(self._name(entry.token_id), max(entry.logprob, _LEAST))
        return top

    def _name(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return self._tokenizer.token_text(token_id)
