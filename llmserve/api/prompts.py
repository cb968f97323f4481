"""From text or a conversation to prompt token ids. Knows no sampling and no route."""

from __future__ import annotations

import asyncio

from llmserve.api.protocol import ChatPrompt
from llmserve.api.settings import ApiSettings
from llmserve.backends.generation import TextGenerator
from llmserve.errors import InvalidRequestError
from llmserve.tokenizer import Tokenizer

# What a template is given by the server; a request that set these too would contradict itself.
_RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"}
)


def render_chat(request: ChatPrompt, tokenizer: Tokenizer) -> str:
    """The conversation as the model's chat template writes it. Raises InvalidRequestError."""
    if tokenizer.chat_template is None:
        raise InvalidRequestError(
            "This model has no chat template, so it cannot take messages. Use /v1/completions.", "messages"
        )
    continues = bool(request.continue_final_message)
    if continues and request.messages[-1].role != "assistant":
        raise InvalidRequestError(
            "'continue_final_message' needs a last message with the role 'assistant'.", "continue_final_message"
        )
    kwargs = request.chat_template_kwargs or {}
    if reserved := sorted(_RESERVED_KWARGS & kwargs.keys()):
        raise InvalidRequestError(
            f"'chat_template_kwargs' must not set {reserved[0]!r}: the server sets it.",
            f"chat_template_kwargs.{reserved[0]}",
        )
    generates = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    return tokenizer.apply_chat_template(
        [message.for_template() for message in request.messages],
        add_generation_prompt=generates,
        continue_final_message=continues,
        chat_template_kwargs=kwargs,
    )


async def tokenize_text(
    text: str, add_special_tokens: bool, generator: TextGenerator, settings: ApiSettings
) -> list[int]:
    """A long text goes to a thread: a megabyte takes the better part of a second, and other streams want to flow."""
    if len(text) <= settings.inline_tokenize_chars:
        return generator.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(generator.tokenizer.encode, text, add_special_tokens=add_special_tokens)


async def tokenize_chat(
    request: ChatPrompt, add_special_tokens: bool | None, generator: TextGenerator, settings: ApiSettings
) -> list[int]:
    """Chat templates write their special tokens themselves, so by default none are added."""
    if len(request.messages) > settings.max_messages:
        raise InvalidRequestError(f"'messages' holds more than {settings.max_messages} messages.", "messages")
    num_chars = sum(len(message.content) for message in request.messages)
    if len(request.messages) > settings.inline_render_messages or num_chars > settings.inline_tokenize_chars:
        text = await asyncio.to_thread(render_chat, request, generator.tokenizer)
    else:
        text = render_chat(request, generator.tokenizer)
    return await tokenize_text(text, bool(add_special_tokens), generator, settings)
