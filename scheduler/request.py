"""One sequence inside the scheduler: how far it is computed and when it ends. Knows no queue, block or batch."""

from __future__ import annotations

import enum

from llmserve.errors import InvalidRequestError
from llmserve.messages import EngineRequest, FinishReason, SamplingParams
from llmserve.scheduler.output import NewRequestData

PENDING = -1  # stands for a token that is still being drawn: see `lookahead`


class RequestStatus(enum.Enum):
    """Where a request stands in its life."""

    WAITING = enum.auto()  # never scheduled: the worker does not know it
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()  # waiting again; the worker has kept its tokens


class Request:
    """A request's tokens and counts. `num_computed_tokens` chases `num_tokens`; there are no phases.

    `num_computed_tokens` counts tokens whose keys and values are in the cache, those of the step in flight included.
    `num_slots` is how many tokens its blocks have room for. `key` orders requests: the smaller is served first.
    """

    __slots__ = (
        "finish_reason",
        "first_scheduled_s",
        "key",
        "max_num_tokens",
        "min_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_slots",
        "params",
        "prompt_token_ids",
        "request_id",
        "status",
        "stop_token_id",
        "stop_token_ids",
        "takes_drafts",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, key: tuple[float, float, int], max_model_len: int) -> None:
        """`key` is (the policy's rank, arrival, order of adding); `max_model_len` limits prompt and output together."""
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.params = request.params
        self.key = key
        self.token_ids = request.prompt_token_ids + request.output_token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.min_num_tokens = self.num_prompt_tokens + request.params.min_tokens
        self.max_num_tokens = min(self.num_prompt_tokens + request.params.max_tokens, max_model_len)
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self.takes_drafts = not _depends_on_output(request.params)
        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.num_slots = 0
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when first scheduled
        self.num_preemptions = 0
        self.first_scheduled_s = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """What was generated so far, as a copy."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def max_drafts(self) -> int:
        """How many drafts may be verified behind its last token: none before that is scheduled, or while `min_tokens`
        masks its stop tokens; and with those that are accepted comes one token more."""
        num_tokens = len(self.token_ids)
        if not self.takes_drafts or self.num_computed_tokens != num_tokens or num_tokens < self.min_num_tokens:
            return 0
        return self.max_num_tokens - num_tokens - 1

    def as_new(self, block_ids: list[int]) -> NewRequestData:
        """What the worker has to know of it before its first step."""
        return NewRequestData(
            self.request_id,
            self.prompt_token_ids,
            self.params,
            block_ids,
            self.num_computed_tokens,
            self.output_token_ids,
        )

    def append(self, token_id: int) -> bool:
        """Adds a sampled token; returns whether it ends the request, and then sets `finish_reason`.

        A stop token counts only after `min_tokens` others. `max_tokens` and the model's length end the request with
        LENGTH; a stop token in the last place still says STOP.
        """
        token_ids = self.token_ids
        token_ids.append(token_id)
        num_tokens = len(token_ids)
        if token_id in self.stop_token_ids and num_tokens > self.min_num_tokens:
            self.finish_reason = FinishReason.STOP
            self.stop_token_id = token_id
            return True
        if num_tokens >= self.max_num_tokens:
            self.finish_reason = FinishReason.LENGTH
            return True
        return False


def check_prompt(num_prompt_tokens: int, num_pool_tokens: int, max_model_len: int) -> None:
    """Raises InvalidRequestError for a prompt that could never run: empty, or beyond the KV cache or the context."""
    if not num_prompt_tokens:
        raise InvalidRequestError("The prompt is empty: give at least one token.", "prompt")
    if num_prompt_tokens >= num_pool_tokens:
        raise InvalidRequestError(
            f"The prompt has {num_prompt_tokens} tokens, but the KV cache holds {num_pool_tokens} in all, "
            "one of them for the answer. Shorten the prompt, or give the server more --kv-cache-memory.",
            "prompt",
        )
    if num_prompt_tokens >= max_model_len:
        raise InvalidRequestError(
            f"The prompt has {num_prompt_tokens} tokens, but the context is {max_model_len} tokens, one of "
            "them for the answer. Shorten the prompt.",
            "prompt",
        )


def is_penalised(params: SamplingParams) -> bool:
    """Whether tokens seen before are made less, or more, likely."""
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _depends_on_output(params: SamplingParams) -> bool:
    """Whether the choice of a token depends on those generated before it by more than the model's logits.

    Rows that verify drafts are sampled side by side, with one history: what is in doubt stays out of the penalties.
    (`min_tokens` looks only at their number: see `Request.min_num_tokens`.)
    """
    return is_penalised(params) or bool(params.bad_words)
