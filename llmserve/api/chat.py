"""POST /v1/chat/completions. Translates and decides nothing."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.chunks import Usage
from llmserve.api.context import ApiContext, json_response
from llmserve.api.logprobs import chat_logprobs, prompt_logprobs
from llmserve.api.prompts import tokenize_chat
from llmserve.api.protocol import ChatCompletionRequest
from llmserve.api.sampling import Wanted, build_spec, check_request, tokenize_bad_words
from llmserve.api.serving import run_stream, run_whole
from llmserve.backends.generation import Generation, GenerationDelta
from llmserve.errors import InvalidRequestError
from llmserve.tokenizer import Tokenizer


async def chat_completions(http_request: Request, context: ApiContext) -> Response:
    """Answers one request, as a stream if it asks for one."""
    request = await context.read_request(http_request, ChatCompletionRequest)
    generator = context.ready_generator(request.model)
    wanted = _wanted(request)
    check_request(request, wanted, generator, context.settings)
    prompt = await tokenize_chat(request, request.add_special_tokens, generator, context.settings)
    bad_words = await tokenize_bad_words(request, generator)
    spec = build_spec(request, prompt, bad_words, wanted, generator, "messages")
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    envelope = {"id": request_id, "created": int(time.time()), "model": request.model or generator.name}
    usage = Usage(prompt_tokens=len(prompt), n=spec.n)

    def start() -> Generation:
        return generator.generate(request_id, spec)

    if request.stream:
        shape = ChatShape(generator.tokenizer, request, prompt)
        asked = request.model_dump_json(exclude_none=True).encode()
        options = request.stream_options
        return run_stream(http_request, start, shape, spec.n, usage, envelope, options, generator.name, context, asked)
    whole = await run_whole(http_request, start, spec.n, usage, generator.name, context)
    answer = {
        **envelope,
        "object": "chat.completion",
        "choices": [_choice(request, delta, generator.tokenizer) for delta in whole],
        "usage": usage.as_dict(),
    }
    if request.return_token_ids:
        answer["prompt_token_ids"] = prompt
    if request.prompt_logprobs is not None:
        entries = whole[0].prompt_logprobs or []
        answer["prompt_logprobs"] = prompt_logprobs(entries, generator.tokenizer, request.prompt_logprobs)
    return json_response(answer, headers={"X-Request-Id": request_id})


def _wanted(request: ChatCompletionRequest) -> Wanted:
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    newer = request.max_completion_tokens is not None
    return Wanted(
        max_tokens=request.max_completion_tokens if newer else request.max_tokens,
        max_tokens_param="max_completion_tokens" if newer else "max_tokens",
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        logprobs_param="top_logprobs",
    )


class ChatShape:
    """The choices of `chat.completion.chunk`."""

    object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, request: ChatCompletionRequest, prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = bool(request.logprobs)
        self._num_top = request.top_logprobs or 0
        self._with_token_ids = bool(request.return_token_ids)
        self._prompt_token_ids = prompt_token_ids
        self._is_bare = not self._with_logprobs and not self._with_token_ids

    def opening(self, index: int) -> dict[str, Any]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if self._with_token_ids:
            choice["prompt_token_ids"] = self._prompt_token_ids
        return choice

    def plain(self, index: int, text: str | msgspec.Raw) -> dict[str, Any]:
        """Text and nothing else."""
        return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}

    def is_plain(self, delta: GenerationDelta) -> bool:
        """Whether text is all this request wants to see of a delta that has not finished."""
        return self._is_bare

    def full(self, delta: GenerationDelta) -> dict[str, Any] | None:
        """Everything of a delta; None if a token has not completed a character yet and nothing else is to be said."""
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return None
        choice = self.plain(delta.index, delta.text)
        if not delta.text:
            choice["delta"] = {}
            if self._is_bare and delta.finish_reason is None:
                return None
        if self._with_logprobs:
            choice["logprobs"] = chat_logprobs(delta.logprobs or [], self._tokenizer, self._num_top)
        if self._with_token_ids:
            choice["token_ids"] = delta.token_ids
        if delta.finish_reason is not None:
            choice["finish_reason"] = delta.finish_reason.value
            choice["stop_reason"] = delta.stop_reason
        return choice


def _choice(request: ChatCompletionRequest, delta: GenerationDelta, tokenizer: Tokenizer) -> dict[str, Any]:
    """A choice of the answer that is no stream."""
    logprobs = chat_logprobs(delta.logprobs or [], tokenizer, request.top_logprobs or 0) if request.logprobs else None
    choice: dict[str, Any] = {
        "index": delta.index,
        "message": {"role": "assistant", "content": delta.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
        "stop_reason": delta.stop_reason,
    }
    if request.return_token_ids:
        choice["token_ids"] = delta.token_ids
    return choice
