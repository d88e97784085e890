"""Hostile templates: each ends in a RenderError or in harmless text, within its limits, and nothing gets out."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from salalocal.prompt import sandbox
from salalocal.prompt.sandbox import MAX_TEXT_BYTES, RenderError, render, render_apart

VARIABLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x"}],
    "add_generation_prompt": True,
    "tools": None,
}

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ (''|attr('format'))('{0.__class__}', 1) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ '%s'|format(raise_exception.__globals__) }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ strftime_now.__closure__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.__reduce__() }}",
    "{{ messages[0].__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages.clear() }}",
    "{% set x = messages.pop() %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% from 'x' import y %}",
    "{% do messages.append(1) %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1') }}",
    "{{ import('os') }}",
    "{{ __import__('os') }}",
    "{{ config }}{{ request.application }}",
    "{{ x.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{{ caller.__closure__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in range(3) %}{{ loop.__class__ }}{{ loop._iterable.gi_frame }}{% endfor %}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ dict.__base__ }}",
    "{{ dict.fromkeys.__self__.mro() }}",
    "{{ range.__class__ }}",
]

BOMBS = [
    "{{ 'a' * 9000000 }}",
    "{{ 'a' * 5000000000 }}",
    "{% for i in range(9999) %}{{ 'a' * 10000 }}{% endfor %}",
    "{% for i in range(99999) %}{{ 'é' * 100 }}{% endfor %}",
    "{{ range(10 ** 9)|list }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ '%99999999999d'|format(1) }}",
    "{{ 'a'|center(99999999999) }}",
    "{{ 'ab'|replace('', 'x' * 1000000)|replace('x', 'y' * 1000000) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
]

HANGS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 8) % 7 }}",
]

BROKEN = [
    "{% if %}",
    "{{ x.y.z }}",
    "{{ messages[7].content }}",
    "{{ 1 / 0 }}",
    "{% generation %}x{% endgeneration %}",
    "{{",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_nothing_of_python_is_reached(template: str) -> None:
    try:
        text = render(template, VARIABLES)
    except RenderError:
        return
    assert not any(word in text for word in ("<class", "builtin", "root:", "uid=", "<module", "<frame", "<code"))


def test_an_escape_that_hides_is_harmless_in_the_child_too() -> None:
    assert render_apart("{{ raise_exception.__globals__ }}", VARIABLES) == ""
    with pytest.raises(RenderError, match="unsafe"):
        render_apart(ESCAPES[0], VARIABLES)


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_memory_and_text_are_bounded(template: str) -> None:
    with pytest.raises(RenderError):
        render_apart(template, VARIABLES)


@pytest.mark.skipif(sys.platform == "win32", reason="only clock time is bounded there")
@pytest.mark.parametrize("template", HANGS, ids=range(len(HANGS)))
def test_time_is_bounded(template: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(RenderError, match="the limits are 2 s, 256 MiB"):
        render_apart(template, VARIABLES)
    assert time.monotonic() - started_s < sandbox.MAX_CLOCK_S + 5


def test_clock_time_is_bounded_where_cpu_time_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(sandbox, "__file__", str(sleeper))
    monkeypatch.setattr(sandbox, "MAX_CLOCK_S", 0.3)
    started_s = time.monotonic()
    with pytest.raises(RenderError, match="stopped"):
        render_apart("x", VARIABLES)
    assert time.monotonic() - started_s < 30


@pytest.mark.parametrize(
    "program",
    ["", "import sys; sys.stdin.read(); print('x' * 20_000_000)", "import sys; sys.stdin.close(); sys.exit(1)", "1/0"],
)
def test_a_child_out_of_hand_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> None:
    child = tmp_path / "child.py"
    child.write_text(program)
    monkeypatch.setattr(sandbox, "__file__", str(child))
    variables = {"messages": [{"role": "user", "content": "x" * 1_000_000}]}
    if program == "":
        assert render_apart("x", variables) == ""
        return
    with pytest.raises(RenderError, match="stopped"):
        render_apart("x", variables)


@pytest.mark.parametrize("template", BROKEN)
def test_broken_templates_say_why(template: str) -> None:
    for run in (render, render_apart):
        with pytest.raises(RenderError) as caught:
            run(template, VARIABLES)
        assert str(caught.value)


def test_what_hugging_face_templates_expect() -> None:
    template = (
        "{%- if tools is not none %}tools{% endif -%}\n"
        "{% for m in messages %}\n"
        "    {% if m['role'] == 'system' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}|{{ m.content.strip() }}|{{ messages[0]['content'][1:] }}\n"
        "    {% if loop.last %}{% break %}{% endif %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y')|length }}{{ '<é>' | tojson }}\n"
    )
    variables = {"messages": [{"role": "system", "content": "abc"}, {"role": "user", "content": " é "}], "tools": None}
    expected = json.dumps(variables["messages"][1], ensure_ascii=False) + '|é|bc\n4"<é>"'
    assert render(template, variables) == expected
    assert render_apart(template, variables) == expected


def test_a_template_can_refuse() -> None:
    for run in (render, render_apart):
        with pytest.raises(RenderError, match="no system role here"):
            run("{{ raise_exception('no system role here') }}", VARIABLES)


def test_the_child_imports_nothing_of_salalocal_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('taken from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert render_apart("{{ 1 + 1 }}", VARIABLES) == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["jinja2.py"]


def test_text_up_to_the_limit_passes() -> None:
    assert len(render_apart("{% for i in range(8) %}{{ 'a' * 1048576 }}{% endfor %}", VARIABLES)) == MAX_TEXT_BYTES
