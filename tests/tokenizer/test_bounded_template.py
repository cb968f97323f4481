"""A template may neither run nor grow without end, and may do all that real templates do."""

from __future__ import annotations

import pytest
from jinja2.exceptions import SecurityError

from llmserve.bounded_template import MAX_CHARS, BoundedEnvironment, Budget
from llmserve.chat_template import ChatTemplate
from llmserve.errors import InvalidRequestError

GROW = "{%% set ns = namespace(v=%s) %%}{%% for i in range(100) %%}{%% set ns.v = %s %%}{%% endfor %%}"


def render(source: str, num_steps: int = 20_000, **variables: object) -> str:
    environment = BoundedEnvironment({}, [])
    template = environment.from_string(source)
    environment.budget = Budget(num_steps)
    return template.render(variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(20000) %}{% for j in range(20000) %}x{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for i in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
        "{% set l = range(100000)|list %}{% for i in range(10000) %}{% set k = l|sort %}{% endfor %}",
        "{% set s = 'ab' * 8000000 %}{% for i in range(10000) %}{% if 'c' in s %}{% endif %}{% endfor %}",
        "{% set s = 'ab' * 8000000 %}{% for i in range(10000) %}{% set t = s[1:] %}{% endfor %}",
        "{% set s = 'ab' * 8000000 %}{% for i in range(10000) %}{% set t = s.upper() %}{% endfor %}",
        GROW % ("'aa'", "ns.v ~ ns.v"),
        GROW % ("'aa'", "ns.v + ns.v"),
        GROW % ("'aa'", "ns.v|replace('a', ns.v)"),
        GROW % ("'aa'", "ns.v.replace('a', ns.v)"),
        GROW % ("'aa'", "[ns.v, ns.v]|join(ns.v)"),
        GROW % ("'aa'", "ns.v.join([ns.v, ns.v])"),
        GROW % ("'aa'", "'%s%s' % (ns.v, ns.v)"),
        GROW % ("'aa'", "'{0}{0}'.format(ns.v)"),
        GROW % ("[1]", "ns.v + ns.v"),
        GROW % ("10", "ns.v * ns.v"),
        "{% set n = namespace(v='aa') %}{% for i in range(99) %}{% set n.v %}{{ n.v ~ n.v }}{% endset %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ [0] * 10000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%9999999999d'|format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 9999999999) }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ 'a'.zfill(9999999999) }}",
        "{{ 'a'|indent(9999999999, true) }}",
        "{{ {'a': 1}|tojson(indent=9999999999) }}",
        "{{ [1]|batch(9999999999, 0)|list }}",
    ],
)
def test_what_would_not_end_is_ended(source: str) -> None:
    """Without a clock: the steps are counted. (Every one of these would run for hours or take all memory.)"""
    with pytest.raises(SecurityError):
        render(source)


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ self.__init__.x }}"])
def test_it_is_still_a_sandbox(source: str) -> None:
    with pytest.raises(SecurityError):
        render(source, messages=[])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in ms %}{{ m.role + ':' + m['content']|trim }}{{ ',' if not loop.last }}{% endfor %}", "u:a,v:b"),
        ("{% for m in ms[::-1] %}{{ loop.index0 }}{{ loop.previtem.role if loop.previtem }}{% endfor %}", "01v"),
        ("{{ ms|map(attribute='role')|join('-') }} {{ ms|selectattr('role', 'equalto', 'u')|list|length }}", "u-v 1"),
        ("{% set ns = namespace(n=0) %}{% for m in ms %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}{{ 'abc'[1:] }}{{ 'x' in 'xyz' }}", "bbcTrue"),
        ("{{ '%s-%02d' % ('a', 3) }} {{ '{} {}'.format(1, 'b') }} {{ '%s'|format(3) }}", "a-03 1 b 3"),
        (
            "{{ gone is defined }}{{ gone }}{{ gone or 'x' }}{{ none is none }}{{ 7 ~ none }}",
            "FalsexTrue7None",
        ),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f('b') }}", "<a><b>"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"),
        ("{% for i in range(3) if i != 1 %}{{ i }}{% else %}none{% endfor %}", "02"),
    ],
)
def test_what_real_templates_do_is_done(source: str, expected: str) -> None:
    ms = [{"role": "u", "content": " a"}, {"role": "v", "content": "b "}]
    assert render(source, ms=ms) == expected


def test_a_long_conversation_has_steps_enough_and_a_looping_template_has_not() -> None:
    source = "{% for m in messages %}{% if m.content|length > 3 %}{{ m.role + m.content|trim }}{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 40}] * 4096
    options = {"add_generation_prompt": False, "continue_final_message": False, "tools": None, "variables": {}}
    assert len(ChatTemplate(source, {}).render(messages, **options)) > 4096 * 200  # type: ignore[arg-type]
    looping = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    with pytest.raises(InvalidRequestError, match="chat template does not accept"):
        looping.render(messages[:1], **options)  # type: ignore[arg-type]


def test_one_text_of_the_largest_size_is_written() -> None:
    assert len(render("{{ text }}", 100_000, text="x" * (MAX_CHARS - 1))) == MAX_CHARS - 1
