"""POST /tokenize and /detokenize, in vLLM's shapes. Knows no generation."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.context import ApiContext, json_response
from llmserve.api.prompts import tokenize_chat, tokenize_text
from llmserve.api.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from llmserve.api.sampling import check_token_ids
from llmserve.api.validation import parse_request
from llmserve.errors import InvalidRequestError


async def tokenize(http_request: Request, context: ApiContext) -> Response:
    """The token ids of a `prompt` or of `messages`, and the context they have to fit."""
    request = await context.read_body(http_request, _read)
    generator = context.generator(request.model)
    if isinstance(request, TokenizeChatRequest):
        token_ids = await tokenize_chat(request, request.add_special_tokens, generator, context.settings)
    else:
        add_special_tokens = request.add_special_tokens is not False
        token_ids = await tokenize_text(request.prompt, add_special_tokens, generator, context.settings)
    tokenizer = generator.tokenizer
    return json_response(
        {
            "count": len(token_ids),
            "max_model_len": generator.max_model_len,
            "tokens": token_ids,
            "token_strs": [tokenizer.token_text(token) for token in token_ids] if request.return_token_strs else None,
        }
    )


def _read(body: dict[str, Any]) -> TokenizeTextRequest | TokenizeChatRequest:
    if ("messages" in body) == ("prompt" in body):
        raise InvalidRequestError("Give either 'prompt' or 'messages'.", "prompt")
    return parse_request(TokenizeChatRequest, body) if "messages" in body else parse_request(TokenizeTextRequest, body)


async def detokenize(http_request: Request, context: ApiContext) -> Response:
    """The text of token ids, special tokens included."""
    request = await context.read_request(http_request, DetokenizeRequest)
    generator = context.generator(request.model)
    check_token_ids(request.tokens, generator, "tokens")
    return json_response({"prompt": generator.tokenizer.decode(request.tokens, skip_special_tokens=False)})
