"""Chat templates render as transformers renders them, and what clients send cannot break out or break the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2.sandbox import SecurityError

from llmserve.chat_template import ChatTemplate
from llmserve.errors import InvalidRequestError, ModelLoadError
from llmserve.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FULL = """\
{{- bos_token }}
{%- if tools %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
{{ tool | tojson(indent=2) }}
    {%- endfor %}
{% endif %}
{%- set ns = namespace(seen=0) %}
{%- for message in messages %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {%- if message.role == 'assistant' %}
        {%- generation %}[{{ ns.seen }}] {{ message.content }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
{{ call.function.name }}({{ call.function.arguments | tojson }})
        {%- endfor %}
    {%- else %}
[{{ ns.seen }}] {{ message.role }}: {{ message['content'] | trim }}
    {%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking %}<think>{% endif %}
{%- if add_generation_prompt %}
assistant:
{%- endif %}"""
PARTS_ONLY = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}{{ raise_exception('text only') }}{% endif %}{% endfor %};{% endfor %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "grüß", "description": "a <b> & 'c'", "parameters": {"type": "object"}},
}
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "  Hi <b>&</b> 🙂 "},
    {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, "é"]}}}],
    },
    {"role": "user", "content": "More"},
]


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    defaults: dict[str, Any] = {
        "add_generation_prompt": False,
        "continue_final_message": False,
        "tools": None,
        "variables": {},
    }
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **(defaults | options))


@pytest.mark.parametrize("source", [CHATML, FULL])
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}])
def test_renders_as_transformers(
    source: str, generation_prompt: bool, tools: list[dict[str, Any]] | None, variables: dict[str, Any]
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    [expected], _ = render_jinja_template(
        [CONVERSATION],
        tools=tools,
        chat_template=source,
        add_generation_prompt=generation_prompt,
        bos_token="<s>",
        **variables,
    )
    assert expected == render(
        source, CONVERSATION, add_generation_prompt=generation_prompt, tools=tools, variables=variables
    )


@pytest.mark.parametrize("source", [CHATML, FULL])
@pytest.mark.parametrize("final", ["The answer is ", "  The answer", "The"])
def test_continues_the_final_message_as_transformers(source: str, final: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [*CONVERSATION[:2], {"role": "assistant", "content": final}]
    [expected], _ = render_jinja_template(
        [messages], chat_template=source, continue_final_message=True, bos_token="<s>"
    )
    assert render(source, messages, continue_final_message=True) == expected
    trimmed = [*CONVERSATION[:1], {"role": "user", "content": "And then "}]
    assert render(FULL, trimmed, continue_final_message=True).endswith("user: And then")


def test_continuing_and_prompting_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(CHATML, CONVERSATION, continue_final_message=True, add_generation_prompt=True)
    assert caught.value.param == "continue_final_message"


def test_a_final_message_that_is_not_shown_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequestError, match="does not show the final message"):
        render("{{ messages[0].content }}", CONVERSATION, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="needs a message"):
        render(CHATML, [], continue_final_message=True)


def test_content_parts_become_strings_or_strings_parts_as_the_template_wants() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    plain = [{"role": "user", "content": "a\nb"}]
    assert render(CHATML, parts) == render(CHATML, plain) == "<|user|>a\nb<|end|>\n"
    assert render(PARTS_ONLY, parts) == render(PARTS_ONLY, plain) == "user:a\nb;"
    assert render(PARTS_ONLY, plain, continue_final_message=True) == "user:a\nb"
    assert parts[0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "left alone"


def test_no_content_is_no_text() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert render(CHATML, [message]) == "<|assistant|><|end|>\n"
    assert render(CHATML, [{"role": "assistant"}]) == "<|assistant|><|end|>\n"


def test_arguments_of_calls_are_parsed() -> None:
    def message(arguments: str) -> list[dict[str, Any]]:
        return [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        ]

    assert 'f({"a": 1})' in render(FULL, message('{"a":1}'))
    with pytest.raises(InvalidRequestError) as caught:
        render(FULL, message("{"))
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (7, "messages[1].content"),
        ([7], "messages[1].content[0]"),
        ([{"text": "x"}], "messages[1].content[0]"),
        ([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}], "messages[1].content[1].type"),
        ([{"type": "text"}], "messages[1].content[0].text"),
    ],
)
def test_content_that_is_not_text_is_named(content: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(CHATML, [{"role": "user", "content": "x"}, {"role": "user", "content": content}])
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ undefined_function() }}",
        "{% for x in range(1000000000) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[0].keys().__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now(7) }}",
        "{% include 'x' %}",
    ],
)
def test_what_fails_while_rendering_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template") as caught:
        render("{% if messages[0].content == 'go' %}" + source + "{% endif %}", [{"role": "user", "content": "go"}])
    assert caught.value.param == "messages"
    assert not isinstance(caught.value.__cause__, SecurityError) or "unsafe" in str(caught.value)


def test_the_reason_a_template_gives_is_passed_on() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", CONVERSATION)


def test_variables_cannot_replace_the_conversation() -> None:
    assert render("{{ messages[0].content }}{{ bos_token }}", [{"role": "user", "content": "x"}]) == "x<s>"
    variables = {"messages": [], "bos_token": "!"}
    assert render("{{ messages[0].content }}{{ bos_token }}", CONVERSATION, variables=variables) == "Be kind.!"


def test_a_template_that_does_not_parse_is_the_models_error() -> None:
    with pytest.raises(ModelLoadError, match="does not parse"):
        ChatTemplate("{% for %}", {})


def test_smollm2(smollm2: Tokenizer) -> None:
    """The real template, and the ids a real conversation becomes."""
    prompt = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    token_ids = smollm2.encode(prompt, add_special_tokens=False)
    assert token_ids.count(1) == 3
    assert token_ids.count(2) == 2


def test_templates_by_name_and_by_the_client(smollm2: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert (
        smollm2.apply_chat_template(messages, chat_template="{{ messages[0].content }}{{ eos_token }}")
        == "Hi<|im_end|>"
    )
    with pytest.raises(InvalidRequestError) as caught:
        smollm2.apply_chat_template(messages, chat_template="{% if %}")
    assert caught.value.param == "chat_template"


def test_tojson_escapes_nothing_but_json() -> None:
    value = {"a": "<é & '\"🙂"}
    assert render("{{ x | tojson }}", [], variables={"x": value}) == json.dumps(value, ensure_ascii=False)
