"""From a request and a model to a GenerationSpec: defaults filled in, and all that depends on the model checked.

Where the client says nothing, the model's generation_config.json decides, then OpenAI's defaults. Knows no route.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmserve.api.protocol import GenerationRequest
from llmserve.api.settings import ApiSettings
from llmserve.backends.generation import GenerationSpec, TextGenerator
from llmserve.errors import InvalidRequestError
from llmserve.messages import SamplingParams
from llmserve.request_context import current_request

COMPLETION_MAX_TOKENS = 16  # of an answer that is no chat: OpenAI's default, and vLLM's
_GREEDY_BELOW = 1e-5  # logits divided by less would overflow; vLLM draws the line at the same place
_SEED_MASK = 2**63 - 1
_HOTTEST = 1e6  # beyond it every token is as likely as any other
_LEAST_TOP_P = 1e-6  # a share that float32 can tell from none


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What chat and completions name differently."""

    max_tokens: int | None  # None: the default
    max_tokens_param: str  # its name in the request, for messages
    default_max_tokens: int | None = None  # None: all that is left of the context
    logprobs: int | None = None
    logprobs_param: str = "logprobs"
    prompt_logprobs: int | None = None


def check_request(request: GenerationRequest, wanted: Wanted, generator: TextGenerator, settings: ApiSettings) -> None:
    """All that can be said before the prompt is tokenised. Raises InvalidRequestError."""
    if request.timeout is not None:
        current_request().limit_time(request.timeout)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("'stream_options' is for streams: set 'stream' to true.", "stream_options")
    if request.n is not None:
        _check_at_most(request.n, settings.max_n, "n")
    _check_strings(request.stop, settings.max_stop_strings, settings.max_stop_chars, "stop")
    _check_strings(request.bad_words, settings.max_bad_words, settings.max_stop_chars, "bad_words")
    _check_at_most(len(request.stop_token_ids or []), settings.max_stop_token_ids, "stop_token_ids", "entries")
    check_token_ids(request.stop_token_ids or [], generator, "stop_token_ids")
    check_token_ids(request.allowed_token_ids or [], generator, "allowed_token_ids")
    if request.priority and not generator.honours_priority:
        raise InvalidRequestError(
            "'priority' is honoured only where the server runs with --scheduling-policy priority.", "priority"
        )
    if request.logit_bias is not None:
        _check_at_most(len(request.logit_bias), settings.max_logit_bias, "logit_bias", "entries")
        check_token_ids(list(request.logit_bias), generator, "logit_bias")
    for value, param in ((wanted.logprobs, wanted.logprobs_param), (request.prompt_logprobs, "prompt_logprobs")):
        if value is not None:
            _check_at_most(value, generator.max_logprobs, param)
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequestError("'prompt_logprobs' is not available in streams.", "prompt_logprobs")


def check_token_ids(token_ids: Sequence[int], generator: TextGenerator, param: str) -> None:
    """Raises InvalidRequestError if an id is beyond the model's vocabulary, which may be less than its tokenizer's."""
    if token_ids and (largest := max(token_ids)) >= generator.vocab_size:
        raise InvalidRequestError(
            f"{param!r} has the token id {largest}, but the vocabulary ends at {generator.vocab_size - 1}.", param
        )


def build_spec(
    request: GenerationRequest,
    prompt_token_ids: list[int],
    bad_words: list[list[int]],
    wanted: Wanted,
    generator: TextGenerator,
    prompt_param: str,
) -> GenerationSpec:
    """The spec of one prompt. `prompt_param` names the prompt in messages. Raises InvalidRequestError."""
    max_tokens = _max_tokens(len(prompt_token_ids), wanted, generator, prompt_param)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' is {min_tokens}, but at most {max_tokens} tokens can be generated.", "min_tokens"
        )
    check_token_ids(prompt_token_ids, generator, prompt_param)
    stop_token_ids = _stop_token_ids(request, generator)
    if request.allowed_token_ids is not None and min_tokens and set(request.allowed_token_ids) <= set(stop_token_ids):
        raise InvalidRequestError("'allowed_token_ids' leaves nothing to say before 'min_tokens'.", "allowed_token_ids")
    return GenerationSpec(
        prompt_token_ids=prompt_token_ids,
        sampling=SamplingParams(
            max_tokens=max_tokens,
            seed=secrets.randbits(63) if request.seed is None else request.seed & _SEED_MASK,
            min_tokens=min_tokens,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=request.logit_bias or None,
            allowed_token_ids=request.allowed_token_ids,
            bad_words=bad_words or None,
            stop_token_ids=stop_token_ids,
            logprobs=wanted.logprobs,
            prompt_logprobs=_largest(wanted.prompt_logprobs, request.prompt_logprobs),
            **_filters(request, generator),
        ),
        n=request.n or 1,
        stop=tuple(request.stop or ()),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        ignore_eos=bool(request.ignore_eos),
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
    )


def _filters(request: GenerationRequest, generator: TextGenerator) -> dict[str, Any]:
    """The parameters that generation_config.json may have a word on."""
    defaults = generator.sampling_defaults.values

    def resolve(name: str, value: float | None, fallback: float) -> float:
        if value is not None:
            return value
        default = defaults.get(name)
        return fallback if default is None else default

    temperature = resolve("temperature", request.temperature, 1.0)
    top_k = int(resolve("top_k", request.top_k, 0))
    return {
        "temperature": 0.0 if temperature < _GREEDY_BELOW else min(float(temperature), _HOTTEST),
        "top_p": max(float(resolve("top_p", request.top_p, 1.0)), _LEAST_TOP_P),
        "top_k": 0 if top_k <= 0 or top_k >= generator.vocab_size else top_k,
        "min_p": float(resolve("min_p", request.min_p, 0.0)),
        "repetition_penalty": float(resolve("repetition_penalty", request.repetition_penalty, 1.0)),
    }


def _max_tokens(num_prompt_tokens: int, wanted: Wanted, generator: TextGenerator, prompt_param: str) -> int:
    """At least 1: an engine that shall only score a prompt generates a token too (see PromptOnlyGeneration)."""
    limit = generator.max_model_len
    left = limit - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequestError(f"{prompt_param!r} has no tokens: there is nothing to go on from.", prompt_param)
    if left < 1:
        raise InvalidRequestError(
            f"{prompt_param!r} has {num_prompt_tokens} tokens, but the model's context is {limit} tokens and at least"
            " one must be left to generate. Shorten it.",
            prompt_param,
        )
    if wanted.max_tokens is not None:
        if wanted.max_tokens > left:
            raise InvalidRequestError(
                f"{wanted.max_tokens_param!r} is {wanted.max_tokens}, but the prompt has {num_prompt_tokens} of the"
                f" {limit} tokens of the model's context, which leaves {left}.",
                wanted.max_tokens_param,
            )
        return max(wanted.max_tokens, 1)
    model_limit = generator.sampling_defaults.values.get("max_new_tokens")
    candidates = [left, wanted.default_max_tokens, model_limit]
    return min(int(candidate) for candidate in candidates if candidate is not None)


def _stop_token_ids(request: GenerationRequest, generator: TextGenerator) -> list[int]:
    ends = () if request.ignore_eos else generator.tokenizer.eos_token_ids
    model_ends = [token_id for token_id in ends if token_id < generator.vocab_size]
    return list(dict.fromkeys([*model_ends, *(request.stop_token_ids or [])]))


async def tokenize_bad_words(request: GenerationRequest, generator: TextGenerator) -> list[list[int]]:
    """Each word as it stands at the start of a text and after a space: the two are different tokens. In a thread."""
    if not request.bad_words:
        return []
    texts = [text for word in request.bad_words for text in (word, " " + word.lstrip())]
    sequences = await asyncio.to_thread(generator.tokenizer.encode_batch, texts, add_special_tokens=False)
    unique = dict.fromkeys(tuple(sequence) for sequence in sequences if sequence)
    check_token_ids([token_id for sequence in unique for token_id in sequence], generator, "bad_words")
    return [list(sequence) for sequence in unique]


def _largest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _check_at_most(value: int, limit: int, param: str, unit: str = "") -> None:
    if value > limit:
        raise InvalidRequestError(f"{param!r} must be at most {limit}{unit and ' ' + unit}, not {value}.", param)


def _check_strings(strings: list[str] | None, max_count: int, max_chars: int, param: str) -> None:
    if strings is None:
        return
    _check_at_most(len(strings), max_count, param, "strings")
    for position, string in enumerate(strings):
        if len(string) > max_chars:
            raise InvalidRequestError(
                f"{param!r} has at {position} a string of {len(string)} characters; at most {max_chars} are allowed.",
                param,
            )
