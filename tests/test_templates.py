"""Templates render as transformers renders them, and end soon whatever they do."""

from __future__ import annotations

import concurrent.futures
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest

from finetuning.cli.main import main
from finetuning.data.text_template import TextTemplate
from finetuning.templates import MAX_SECONDS, ChatRenderer, LimitedEnvironment, TemplateLimitError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi", "name": None},
    {"role": "assistant", "content": "Ho", "reasoning": "They greet."},
]
LONG = "{% set ns = namespace(s='x' * 1000) %}"
TOO_LARGE = {
    "repeat": "{{ 'a' * 10000000000 }}",
    "repeat a list": LONG + "{{ ([ns.s * 1000] * 100000) | length }}{% set l = [ns.s * 1000] * 100000 %}{{ l }}",
    "constant in a branch that is not taken": "{{ 'a' * 10000000000 if messages[0].role == 'system' }}",
    "power": "{% set n = 10 ** 1000000000 %}",
    "pad": "{{ 'a' | center(10000000000) }}",
    "pad by a method": "{{ 'a'.ljust(10 ** 10) }}",
    "tabs": "{{ ('\\t' * 100000).expandtabs(100000) | length }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent by an argument": "{{ '%*d' % (10 ** 10, 1) }}",
    "format": "{{ '{:>10000000000}'.format('a') }}",
    "format by an argument": "{{ '{:>{}}'.format('a', 10 ** 10) }}",
    "concat": LONG + "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "add": LONG + "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "add many": LONG + "{% for i in range(60) %}{% set ns.s = ns.s + 'x' + ns.s + 'y' + ns.s %}{% endfor %}",
    "join": LONG + "{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "join by a method": LONG + "{{ ns.s.join([ns.s] * 100000) | length }}",
    "replace": LONG + "{% for i in range(60) %}{% set ns.s = ns.s | replace('x', 'xxxx') %}{% endfor %}",
    "replace by a method": LONG + "{% for i in range(60) %}{% set ns.s = ns.s.replace('x', 'xxxx') %}{% endfor %}",
    "shared parts": LONG + "{{ ([ns.s * 1000] * 100000) | tojson }}",
    "indent": "{{ 'a' | indent(10000000000, true) }}",
    "json": "{{ [1, 2] | tojson(indent=10000000000) }}",
    "fill": "{{ [1] | batch(1000000000, 'x') | list }}",
    "output of a macro": "{% set x %}{% for a in range(100000) %}{% for b in range(1000) %}"
    + "y" * 1000
    + "{% endfor %}{% endfor %}{% endset %}",
}
TOO_LONG = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
}


@pytest.fixture
def render(chatml_tokenizer: Any) -> Any:
    def run(source: str) -> str:
        chatml_tokenizer.chat_template = source
        return ChatRenderer(chatml_tokenizer).text(CHAT)

    return run


@pytest.mark.parametrize("source", TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_would_make_a_large_value_is_refused_before_it_does(render: Any, source: str) -> None:
    with pytest.raises(TemplateLimitError, match="makes a text or a list that is too long"):
        render(source)


@pytest.mark.parametrize("source", TOO_LONG.values(), ids=TOO_LONG)
def test_a_template_that_does_not_end_is_stopped(render: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.templates.MAX_SECONDS", 0.2)
    began = time.thread_time()
    with pytest.raises(TemplateLimitError, match="took more than"):
        render(source)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize("source", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(1000000000) }}"])
def test_recursion_and_ranges_are_bounded(render: Any, source: str) -> None:
    with pytest.raises((RecursionError, OverflowError)):
        render(source)


def test_the_limits_hold_in_threads_and_for_each_row_alone() -> None:
    environment = LimitedEnvironment()
    fast, slow = (
        environment.compiled("{% for i in range(2000) %}{{ n }}{% endfor %}"),
        environment.compiled(TOO_LARGE["concat"]),
    )

    def render_row(number: int) -> str:
        if number % 4:
            return environment.render(fast, {"n": number})
        with pytest.raises(TemplateLimitError):
            environment.render(slow, {})
        return "0" * 2000

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert [text[0] for text in pool.map(render_row, range(8))] == ["0", "1", "2", "3", "0", "5", "6", "7"]


FEATURES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' ~ m.content ~ loop.index }}{{ m.name is defined }}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.last }}{{ m.reasoning_content | default('no') }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ bos_token }}{{ tools }}{{ add_generation_prompt }}{{ documents }}",
    "{%- macro say(x) %}[{{ x | upper | indent(2) }}]{% endmacro %}{{ say('a\\nb') }}{% for m in messages %}\n"
    "  {% if loop.first %}{% continue %}{% endif %}{{ say(m.content) }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length * 2 %}{% endfor %}"
    "{{ ns.n }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ '%05.1f|%s' % (1.5, 'a') }} {{ '{:>4}'.format('x') }} {{ 'ab' * 3 }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ [1, 2] + [3] }}{{ ['b', 'a'] | sort | list }}"
    "{{ 'a,b'.split(',') }}{{ 'x' in messages[0].content }}{{ messages[1:] | length }}{{ dict(a=1) }}",
    "{{ 1 + 2.5 + 3 }}{{ [1] + [2] + [] }}{{ 'a' + 'b' + messages[0].role + '<' }}{{ 'a' + ('<' | e) + '<' + '>' }}"
    "{{ '>' + ('b' | safe) }}{% set n = messages | length + 1 - 2 + 3 %}{{ n }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
)


@pytest.mark.parametrize("source", FEATURES)
def test_a_template_renders_as_it_does_in_transformers(chatml_tokenizer: Any, source: str) -> None:
    chatml_tokenizer.chat_template = source
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for arguments in ({}, {"tools": tools}, {"prompt": True}, {"kwargs": {"bos_token": "B", "name": "n"}}):
        theirs = chatml_tokenizer.apply_chat_template(
            CHAT,
            tokenize=False,
            tools=arguments.get("tools"),
            add_generation_prompt=arguments.get("prompt", False),
            **arguments.get("kwargs", {}),
        )
        assert ChatRenderer(chatml_tokenizer).text(CHAT, **arguments) == theirs


def test_a_chat_template_that_does_not_end_is_one_message(
    sft_values: Any,
    write_config: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("finetuning.templates.MAX_SECONDS", 1.0)
    values = sft_values({"data_conf.chat_template_name": None, "data_conf.chat_template": TOO_LONG["loops"]})
    began = time.process_time()
    assert main(["sft", str(write_config(values))]) == 1
    assert time.process_time() - began < MAX_SECONDS + 20
    message = capsys.readouterr().err
    assert "the template was stopped: it took more than 1 seconds for one row" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_templates_of_columns_have_the_same_limits() -> None:
    with pytest.raises(TemplateLimitError):
        TextTemplate("{{ 'a' * 10000000000 }}")({}, {})
    assert TextTemplate("{% for x in xs %}{{ x ~ '!' }}{% endfor %}")({"xs": ["a", "b"]}, {}) == "a!b!"
    with pytest.raises(jinja2.TemplateSyntaxError):
        LimitedEnvironment().compiled("{% for %}")
