"""Templates of unknown origin: what they may not do, and what real ones may."""

from __future__ import annotations

import time

import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.texts.chat_template import ChatTemplate, template_text
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.template import NOT_THE_ANSWER_MARKED, Renderer
from proxykd_jax.texts.template_sandbox import TemplateTooCostly
from proxykd_jax.texts.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
_DOUBLED = "{% set n = namespace(v=START) %}{% for i in range(70) %}STEP{% endfor %}{{ n.v }}"


def _render(text: str) -> str:
    return ChatTemplate(text, {"bos_token": "<s>"}).render(MESSAGES, add_generation_prompt=False)


def _doubled(start: str, step: str) -> str:
    return _DOUBLED.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize(
    "text",
    [
        "{{ 7 ** (7 ** 11) }}",
        "{{ 7 ** 7 ** 7 ** 7 }}",
        "{{ ('no' * 5000000000)|length }}",
        "{{ 5000000000 * [0] }}",
        "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}",
        "{% for i in range(9000) %}" + "text" * 1000 + "{% endfor %}",
        "{% for i in range(9000) %}{{ 'text' * 9000 }}{% endfor %}",
        _doubled("'ab'", "{% set n.v = n.v + n.v %}"),
        _doubled("'ab'", "{% set n.v = n.v ~ n.v %}"),
        _doubled("'ab'", "{% set n.v = [n.v, n.v]|join %}"),
        _doubled("'ab'", "{% set n.v = '%s%s' % (n.v, n.v) %}"),
        _doubled("'ab'", "{% set n.v = '{0}{0}'.format(n.v) %}"),
        _doubled("'ab'", "{% set t %}{{ n.v }}{{ n.v }}{% endset %}{% set n.v = t %}"),
        _doubled("'ab'", "{% set n.v = n.v.replace('a', 'aa') %}"),
        _doubled("[1]", "{% set n.v = [n.v, n.v] %}"),
        _doubled("[1]", "{% set n.v = {'a': n.v, 'b': n.v} %}"),
        _doubled("[1]", "{% set n.v = n.v + n.v %}"),
        _doubled("7", "{% set n.v = n.v * n.v %}"),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{{ range(9000)|join('wide' * 9000) }}",
        "{{ ('w' * 9000).join('i' * 9000) }}",
        "{{ 'a'|indent(900000000, true) }}",
        "{{ [1]|tojson(indent=900000000) }}",
        "{{ '%0900000000d' % 3 }}",
        "{{ '%*d' % (900000000, 3) }}",
        "{{ '{:900000000}'.format(3) }}",
        "{{ '{:{w}}'.format(3, w=900000000) }}",
        "{% set t = 'a' * 900000 %}{% for i in range(90000) %}{{ 'b' in t }}{% endfor %}",
        "{% set t = 'a' * 900000 %}{% for i in range(90000) %}{% set u = t[1:] %}{% endfor %}",
    ],
)
def test_what_costs_too_much_stops_at_once(text):
    began = time.monotonic()
    with pytest.raises(TemplateTooCostly):
        _render(text)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ 'a'.center(900000000) }}",
        "{{ 'a'|center(900000000) }}",
        "{{ 'a'.zfill(900000000) }}",
        "{{ (7).to_bytes(900000000, 'big') }}",
        "{{ 1.5|round(900000000, 'ceil') }}",
        "{{ [[1], [2]]|sum(start=[]) }}",
        "{{ messages.pop() }}",
        "{{ messages[0].update(role='x') }}",
        "{{ [1, 2]|random }}",
        "{{ lipsum() }}",
        "{{ namespace(a=1) }}",
        "{{ messages|map('upper') }}",
        "{% for i in [[1]] recursive %}{{ loop(i) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% extends 'x' %}",
        "{{ " + "(" * 9000 + "0" + ")" * 9000 + " }}",
        "{{ " + "[" * 300 + "]" * 300 + " }}",
        "{{ " + "not " * 9000 + "0 }}",
        "{% if a %}" * 120 + "{% endif %}" * 120,
        "{% for i in a %}" * 25 + "{% endfor %}" * 25,
        "{% generation %}",
    ],
)
def test_what_is_not_allowed_is_a_sentence(text):
    with pytest.raises(UserError, match="chat template"):
        _render(text)


@pytest.mark.parametrize(
    "text, written",
    [
        ("{{ bos_token ~ messages|length ~ none }}", "<s>2None"),
        ("{% for m in messages[::-1] %}{{ loop.index }}{{ m.role[0] }}{% endfor %}", "1a2u"),
        ("{% for m in messages if loop is defined %}{% else %}-{% endfor %}", "-"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% endfor %}", "2False2True"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", None),
        ("{{ messages|map(attribute='role')|join(', ') }}", "user, assistant"),
        ("{{ ', '.join(['a', messages[0].role]) }}", "a, user"),
        ("{% for m in messages %}{{ m.content.replace('?', '') }}{% endfor %}", "WhySo."),
        ("{{ 'a</t>b'.split('</t>')[-1].lstrip() }}", "b"),
        ("{{ '%s is %.1f' % ('x', 2) }}{{ '{}-{a}'.format(1, a=2) }}", "x is 2.01-2"),
        ("{{ messages|tojson }}", None),
        ("{{ {'a': 'é'}|tojson(indent=1, ensure_ascii=false) }}", '{\n "a": "é"\n}'),
        ("{{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ 7 / 2 }}", "3 3 1024 3.5"),
        ("{{ [1, 2]|sum }} {{ 2.55|round(1) }} {{ '7'|int + 1 }}", "3 2.5 8"),
        ("{{ 'a\nb'|indent(2) }} {{ '<'|e }} {{ '<'|safe }}", "a\n  b &lt; <"),
        ("{% macro f(a, b='c') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}", "1c"),
        ("{{ strftime_now('%Y') }}", "2024"),
        ("{% set n = namespace(k=false) %}{% set n.k = true %}{{ n.k }}", "True"),
    ],
)
def test_what_real_templates_do(text, written):
    assert written is None or _render(text) == written
    assert _render(text)


@pytest.mark.parametrize("character", ["\0", "\x01", "\x0c", "\x1b"])
def test_a_binary_file_is_no_template(tmp_path, character):
    (tmp_path / "t").write_text(f"{{{{ messages }}}}{character}")
    with pytest.raises(UserError, match="control character"):
        template_text(str(tmp_path / "t"), None)


@pytest.mark.parametrize(
    "text",
    [
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
        "{% for m in messages %}{{ m.content }}{% generation %}!{% endgeneration %}{% endfor %}",
    ],
)
def test_marks_must_hold_the_answer_and_nothing_of_the_prompt(bpe_folder, tmp_path, text):
    (tmp_path / "t").write_text(text)
    renderer = Renderer(load_tokenizer(bpe_folder), str(tmp_path / "t"))
    row = TextRow((Message("user", "Why?"), Message("assistant", "So.")), None, "a:1")
    (encoded,) = renderer.encode_batch([row])
    assert encoded.drop == NOT_THE_ANSWER_MARKED


def test_a_costly_template_stops_the_reading_and_drops_no_row(bpe_folder, tmp_path):
    (tmp_path / "t").write_text("{% for m in messages %}{{ 'a' * 10 ** 9 }}{% endfor %}")
    renderer = Renderer(load_tokenizer(bpe_folder), str(tmp_path / "t"))
    row = TextRow((Message("user", "Why?"), Message("assistant", "So.")), None, "a:1")
    with pytest.raises(TemplateTooCostly):
        renderer.encode_batch([row])
