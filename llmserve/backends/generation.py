"""What the API asks of a text-generating model and what comes back. Knows no HTTP, no engine, no process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self

from llmserve.messages import FinishReason, SamplingParams, TokenLogprobs
from llmserve.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """One prompt, `n` sequences. `sampling.seed` is that of sequence 0; the others' are derived from it."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False  # the model's end tokens are neither hidden nor a stop
    priority: int = 0
    cache_salt: str = ""
    deadline_s: float | None = None  # when nobody wants the answer any more: seconds of time.monotonic()

    def until(self, deadline_s: float | None) -> GenerationSpec:
        """The same; of two deadlines the first counts."""
        if deadline_s is None or (self.deadline_s is not None and self.deadline_s <= deadline_s):
            return self
        return replace(self, deadline_s=deadline_s)


@dataclass(slots=True)
class GenerationDelta:
    """News of one sequence: whole characters only, never a part of a stop string that may still be held back."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string, or the id of a stop token other than the model's own end
    num_cached_tokens: int = 0


class Generation(Protocol):
    """A running request. Leaving the context, by whatever way, aborts what is not finished."""

    request_id: str

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        """Yields all deltas that are ready together; ends when every sequence has finished.

        Raises EngineDeadError (or what the engine said) if the request cannot go on.
        """
        ...


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What `generation_config.json` says, where the client says nothing."""

    values: dict[str, Any] = field(default_factory=dict)


class TextGenerator(Protocol):
    """A served LLM as the API sees it."""

    name: str
    root: str  # where it came from: a path or a hub name
    created: int  # seconds since the epoch
    max_model_len: int
    max_logprobs: int
    vocab_size: int  # token ids a request may name are below it
    honours_priority: bool  # the scheduling policy in force looks at `priority`
    tokenizer: Tokenizer
    sampling_defaults: SamplingDefaults

    def is_ready(self) -> bool:
        """Loaded, and running requests."""
        ...

    def is_live(self) -> bool:
        """False if it runs no requests, and nothing is being done about it."""
        ...

    def takes_requests(self) -> bool:
        """Ready, or about to be again: requests wait for it."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        ...

    def generate(self, request_id: str, spec: GenerationSpec) -> Generation:
        """Starts the request. Raises NotReadyError, QueueFullError, InvalidRequestError."""
        ...
