"""Renders a conversation with a model's own Jinja template, as transformers does. Knows no tokens.

A template comes with the model's files and is run in a sandbox: it sees plain data only, and its steps and its output
are counted (`bounded_template`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from llmserve.bounded_template import BoundedEnvironment, Budget
from llmserve.errors import InvalidRequestError, ModelLoadError

Message = Mapping[str, Any]

# What untrusted data can provoke in a template that was written for other data.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_TEXT_PARTS = {"text": "text", "refusal": "refusal"}  # type of a content part -> its field that holds text
# Far more than the templates of real models take: some 20 steps a message, and a few looks at each text.
_STEPS, _STEPS_A_MESSAGE, _CHARS_A_STEP = 20_000, 500, 16
# Marks where a message that shall be continued ends. The space shows whether the template strips what it is given.
_END_MARK = "\ue000end-of-message\ue001"


class ChatTemplate:
    """One template, compiled once. `variables` are what it sees beside the conversation: `bos_token` and so on."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Raises ModelLoadError if the template does not parse."""
        self.source = source
        self._variables = dict(variables)
        self._environment = _environment()
        self._lock = threading.Lock()  # the environment counts one render at a time
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise ModelLoadError(f"The chat template does not parse: {error}") from error
        self.takes_strings = self._shows("llmserve-probe", "llmserve-probe") or not self._shows(
            [{"type": "text", "text": "llmserve-probe"}], "llmserve-probe"
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt. `variables` (a client's `chat_template_kwargs`) go over the template's own.

        Raises InvalidRequestError if the template refuses the messages or two options contradict.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other: set one of them to false.",
                param="continue_final_message",
            )
        conversation = [self._plain(index, message) for index, message in enumerate(messages)]
        if continue_final_message:
            _mark_end(conversation)
        context = {
            **self._variables,
            **variables,
            "messages": conversation,
            "tools": list(tools) if tools else None,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._render(context, conversation)
        except _RENDER_ERRORS as error:
            raise InvalidRequestError(
                f"The model's chat template does not accept these messages: {error}", param="messages"
            ) from error
        return _cut_at_mark(text) if continue_final_message else text

    def _render(self, context: dict[str, Any], conversation: Sequence[Message]) -> str:
        num_chars = sum(len(str(message.get("content"))) for message in conversation)
        num_steps = _STEPS + _STEPS_A_MESSAGE * len(conversation) + num_chars // _CHARS_A_STEP
        with self._lock:
            self._environment.budget = Budget(num_steps)
            return self._template.render(context)

    def _plain(self, index: int, message: Message) -> dict[str, Any]:
        """A copy in the form the template expects; the caller's message is left alone."""
        plain = dict(message)
        text = _flatten(plain.get("content"), f"messages[{index}].content")
        plain["content"] = text if self.takes_strings else [{"type": "text", "text": text}]
        if plain.get("tool_calls"):
            plain["tool_calls"] = [
                _with_parsed_arguments(call, f"messages[{index}].tool_calls[{position}]")
                for position, call in enumerate(plain["tool_calls"])
            ]
        return plain

    def _shows(self, content: Any, text: str) -> bool:
        """Whether a user message with this content renders, and its text appears (not as the repr of a list)."""
        context = {**self._variables, "messages": [{"role": "user", "content": content}], "tools": None}
        try:
            rendered = self._render({**context, "add_generation_prompt": False}, [])
        except _RENDER_ERRORS:
            return False
        return text in rendered and f"'{text}'" not in rendered


def _flatten(content: Any, param: str) -> str:
    """A message's content as one string: text parts are joined by line feeds, as vLLM joins them."""
    if content is None:
        return ""  # an assistant's message with tool calls only
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{param} must be a string or a list of content parts.", param=param)
    texts: list[str] = []
    for position, part in enumerate(content):
        field = f"{param}[{position}]"
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise InvalidRequestError(f"{field} must be an object with a type.", param=field)
        if part["type"] not in _TEXT_PARTS:
            message = f"{field}.type {part['type']!r} is not supported: this model takes text only."
            raise InvalidRequestError(message, param=f"{field}.type")
        key = _TEXT_PARTS[part["type"]]
        if not isinstance(part.get(key), str):
            raise InvalidRequestError(f"{field}.{key} must be a string.", param=f"{field}.{key}")
        texts.append(part[key])
    return "\n".join(texts)


def _with_parsed_arguments(call: Any, param: str) -> Any:
    """OpenAI sends a call's arguments as a JSON string; templates expect the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        field = f"{param}.function.arguments"
        raise InvalidRequestError(f"{field} is not JSON: {error}", param=field) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(conversation: list[dict[str, Any]]) -> None:
    """Appends the mark to the last message's text."""
    if not conversation:
        raise InvalidRequestError("continue_final_message needs a message to continue.", param="messages")
    content = conversation[-1]["content"]
    if isinstance(content, str):
        conversation[-1]["content"] = content + _END_MARK + " "
    else:
        content[-1]["text"] += _END_MARK + " "


def _cut_at_mark(text: str) -> str:
    """The prompt up to the end of the last message. Where the template strips messages, so is this one."""
    before, mark, after = text.rpartition(_END_MARK)
    if not mark:
        raise InvalidRequestError(
            "The model's chat template does not show the final message, so it cannot be continued.",
            param="continue_final_message",
        )
    return before if after.startswith(" ") else before.rstrip()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> BoundedEnvironment:
    """With the settings, filters and globals that templates on the Hugging Face hub are written for."""
    environment = BoundedEnvironment({"tojson": _tojson}, [_GenerationTag, jinja2.ext.loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes <, > and & for HTML; a prompt must not be escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
