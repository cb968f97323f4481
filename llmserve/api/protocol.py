"""The request bodies of the OpenAI routes as pydantic models: fields, types and ranges. Knows no model and no limits.

Strict: "1" is no number, true is no integer, 1.0 is no integer, NaN is nothing. null means absent. What depends on the
model served or on the server's settings (context length, vocabulary, how many) is checked in `sampling.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Temperature = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveProbability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]*$")]


def _as_list_of_strings(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string or an array of strings")
    return value


def _as_bias_by_token(value: Any) -> Any:
    """JSON's keys are strings: {"50256": -100}."""
    if not isinstance(value, dict):
        raise ValueError("must be an object that maps token ids to numbers")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"has the key {key!r}, which is not a token id")
    return {int(key): bias for key, bias in value.items()}


class StrictModel(BaseModel):
    """No coercion, no unknown fields, finite numbers only."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(StrictModel):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None  # false is what this server does


class GenerationRequest(StrictModel):
    """What chat completions and completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[int, Field(ge=1)] | None = None
    min_tokens: NonNegativeInt | None = None
    temperature: Temperature | None = None
    top_p: PositiveProbability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None  # 0 and -1: off
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_as_bias_by_token)] | None
    ) = None
    seed: Int64 | None = None
    stop: Annotated[list[NonEmptyStr], BeforeValidator(_as_list_of_strings)] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[NonEmptyStr] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    prompt_logprobs: NonNegativeInt | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Int32 | None = None  # lower runs first
    cache_salt: CacheSalt | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None  # seconds from the request's arrival


def _as_text(value: Any) -> Any:
    """Content parts of text become one text, as the string-only chat templates want it; vLLM joins them by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or an array of content parts")
    texts: list[str] = []
    for position, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(f"has at {position} no content part: {{'type': 'text', 'text': ...}}")
        if part["type"] != "text":
            raise ValueError(f"has at {position} a part of type {part['type']!r}; only 'text' is supported")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise ValueError(f"has at {position} a text part that is not {{'type': 'text', 'text': <string>}}")
        texts.append(part["text"])
    return "\n".join(texts)


Text = Annotated[str, BeforeValidator(_as_text)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class ChatMessage(StrictModel):
    """One turn. An assistant's message may be sent back as the openai client dumps it, with its empty fields."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None
    annotations: Nothing | None = None

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees. `developer` is OpenAI's newer word for `system`, which templates know."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        reasoning = self.reasoning if self.reasoning is not None else self.reasoning_content
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        return message


class ChatPrompt(StrictModel):
    """The part of a chat request that becomes the prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    add_generation_prompt: bool | None = None  # default: true, unless continue_final_message
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatCompletionRequest(GenerationRequest, ChatPrompt):
    """POST /v1/chat/completions."""

    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None  # OpenAI's older name
    logprobs: bool | None = None
    top_logprobs: NonNegativeInt | None = None


def _as_prompts(value: Any) -> Any:
    """str | [str] | [int] | [[int]] becomes a list of str or of list of int."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, an array of strings, an array of token ids, or an array of those")
    if all(type(item) is int for item in value):
        value = [value]
    for position, prompt in enumerate(value):
        if isinstance(prompt, list):
            if not all(type(item) is int and 0 <= item < 2**31 for item in prompt):
                raise ValueError(f"has at {position} something that is not a token id")
        elif not isinstance(prompt, str):
            raise ValueError(f"has at {position} neither a string nor an array of token ids")
    return value


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `max_tokens: 0` is for `echo` alone: score the prompt and say nothing."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    max_tokens: NonNegativeInt | None = None
    logprobs: NonNegativeInt | None = None
    echo: bool | None = None


class TokenizeTextRequest(StrictModel):
    """POST /tokenize of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatPrompt):
    """POST /tokenize of a conversation."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(StrictModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
