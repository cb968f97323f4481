"""POST /v1/completions: one or several prompts, as text or token ids. Translates and decides nothing."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.chunks import Usage
from llmserve.api.context import ApiContext, json_response
from llmserve.api.generations import MergedGeneration, PromptOnlyGeneration
from llmserve.api.logprobs import CompletionLogprobs, prompt_logprobs
from llmserve.api.protocol import CompletionRequest
from llmserve.api.sampling import (
    COMPLETION_MAX_TOKENS,
    Wanted,
    build_spec,
    check_request,
    check_token_ids,
    tokenize_bad_words,
)
from llmserve.api.serving import run_stream, run_whole
from llmserve.backends.generation import Generation, GenerationDelta, GenerationSpec, TextGenerator
from llmserve.errors import InvalidRequestError
from llmserve.messages import TokenLogprobs
from llmserve.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, tokenised. `text` is what `echo` shows."""

    token_ids: list[int]
    text: str


async def completions(http_request: Request, context: ApiContext) -> Response:
    """Answers one request, as a stream if it asks for one."""
    request = await context.read_request(http_request, CompletionRequest)
    generator = context.ready_generator(request.model)
    wanted = _wanted(request)
    check_request(request, wanted, generator, context.settings)
    if len(request.prompt) > context.settings.max_prompts:
        raise InvalidRequestError(f"'prompt' holds more than {context.settings.max_prompts} prompts.", "prompt")
    if len(request.prompt) * (request.n or 1) > context.settings.max_sequences:
        raise InvalidRequestError(f"'n' times the prompts is more than {context.settings.max_sequences}.", "n")
    prompts = await _tokenize_all(request, generator, context)
    bad_words = await tokenize_bad_words(request, generator)
    specs = [build_spec(request, prompt.token_ids, bad_words, wanted, generator, "prompt") for prompt in prompts]

    request_id = f"cmpl-{uuid.uuid4().hex}"
    envelope = {"id": request_id, "created": int(time.time()), "model": request.model or generator.name}
    usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts), n=specs[0].n)
    num_choices = len(specs) * specs[0].n
    start = partial(_start, request_id, specs, generator, scores_only=request.max_tokens == 0)
    shape = CompletionShape(generator.tokenizer, request, prompts, specs[0].n)
    if request.stream:
        options = request.stream_options
        asked = request.model_dump_json(exclude_none=True).encode()
        return run_stream(
            http_request, start, shape, num_choices, usage, envelope, options, generator.name, context, asked
        )
    whole = await run_whole(http_request, start, num_choices, usage, generator.name, context)
    answer = {
        **envelope,
        "object": "text_completion",
        "choices": [shape.full(delta) for delta in whole],
        "usage": usage.as_dict(),
    }
    return json_response(answer, headers={"X-Request-Id": request_id})


def _wanted(request: CompletionRequest) -> Wanted:
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequestError("'max_tokens' may be 0 only with 'echo', to score a prompt.", "max_tokens")
    return Wanted(
        max_tokens=request.max_tokens,
        max_tokens_param="max_tokens",
        default_max_tokens=COMPLETION_MAX_TOKENS,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )


async def _tokenize_all(request: CompletionRequest, generator: TextGenerator, context: ApiContext) -> list[Prompt]:
    """Many short texts are as much work as a long one: beyond a size they go to a thread together."""
    add_special_tokens = request.add_special_tokens is not False
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    if sum(map(len, texts)) <= context.settings.inline_tokenize_chars:
        encoded = [generator.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]
    else:
        encode = generator.tokenizer.encode_batch
        encoded = await asyncio.to_thread(encode, texts, add_special_tokens=add_special_tokens)
    text_prompts = iter(map(Prompt, encoded, texts))
    return [
        next(text_prompts) if isinstance(prompt, str) else _given(prompt, request, generator)
        for prompt in request.prompt
    ]


def _given(token_ids: list[int], request: CompletionRequest, generator: TextGenerator) -> Prompt:
    """A prompt that came as token ids."""
    check_token_ids(token_ids, generator, "prompt")
    if not request.echo:
        return Prompt(token_ids, "")
    shown = generator.tokenizer.decode(token_ids, skip_special_tokens=request.skip_special_tokens is not False)
    return Prompt(token_ids, shown)


def _start(request_id: str, specs: list[GenerationSpec], generator: TextGenerator, *, scores_only: bool) -> Generation:
    """One prompt runs under the request's id; several under numbered ones."""
    generation: Generation
    if len(specs) == 1:
        generation = generator.generate(request_id, specs[0])
    else:
        starts = [partial(generator.generate, f"{request_id}-{i}", spec) for i, spec in enumerate(specs)]
        generation = MergedGeneration(request_id, starts, specs[0].n)
    return PromptOnlyGeneration(generation) if scores_only else generation


class CompletionShape:
    """The choices of `text_completion`, in chunks or whole."""

    object_name = "text_completion"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest, prompts: list[Prompt], n: int) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._prompts = prompts
        self._n = n
        self._unechoed = set(range(len(prompts) * n)) if request.echo else set()
        self._logprobs = [
            CompletionLogprobs(
                tokenizer, request.logprobs or 0, skip_special_tokens=request.skip_special_tokens is not False
            )
            for _ in range(len(prompts) * n if request.logprobs is not None else 0)
        ]
        self._is_bare = not (request.echo or self._logprobs or request.return_token_ids)

    def opening(self, index: int) -> None:
        """Completions have no role."""
        return

    def plain(self, index: int, text: str | msgspec.Raw) -> dict[str, Any]:
        """Text and nothing else."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def is_plain(self, delta: GenerationDelta) -> bool:
        """Whether text is all this request wants to see of a delta that has not finished."""
        return self._is_bare or (delta.index not in self._unechoed and not self._logprobs and not self._shows_ids)

    @property
    def _shows_ids(self) -> bool:
        return bool(self._request.return_token_ids)

    def full(self, delta: GenerationDelta) -> dict[str, Any] | None:
        """Everything of a delta, the prompt before the first one if `echo` asks for it."""
        prompt = self._prompts[delta.index // self._n]
        echoes = delta.index in self._unechoed
        self._unechoed.discard(delta.index)
        choice = self.plain(delta.index, prompt.text + delta.text if echoes else delta.text)
        if self._logprobs:
            choice["logprobs"] = self._choice_logprobs(delta, prompt if echoes else None)
        if self._shows_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = prompt.token_ids
        if self._request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                delta.prompt_logprobs or [], self._tokenizer, self._request.prompt_logprobs
            )
        if delta.finish_reason is not None:
            choice["finish_reason"] = delta.finish_reason.value
            choice["stop_reason"] = delta.stop_reason
        return choice

    def _choice_logprobs(self, delta: GenerationDelta, echoed: Prompt | None) -> dict[str, list[Any]]:
        token_ids = list(delta.token_ids)
        entries: list[TokenLogprobs | None] = list(delta.logprobs or [])
        if echoed is not None:
            token_ids = echoed.token_ids + token_ids
            entries = (delta.prompt_logprobs or []) + entries
        return self._logprobs[delta.index].add(token_ids, entries)
