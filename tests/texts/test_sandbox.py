"""Templates that mean no good: they reach nothing but the chat, and end soon in little memory."""

import re
import threading

import pytest

from tinyllama.errors import Cancelled, TinyllamaError, cancellable
from tinyllama.texts import sandbox
from tinyllama.texts.sandbox import compiled, rendered

START = "{% set n = namespace(a=[1], b=[1], x='aaaa') %}"


def run(source: str) -> str:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return rendered(compiled(source), messages=chat, eos_token="</s>")


def again(body: str, times: int = 99) -> str:
    return f"{START}{{% for i in range({times}) %}}{body}{{% endfor %}}"


LONG = again("{% set n.x = n.x ~ n.x %}", 17)  # n.x is a text of half a million characters

FORBIDDEN = [
    "''.__class__",
    "''['__class__']",
    "('' | safe).__class__",
    "([''] | map(attribute='__class__') | list)[0]",
    "cycler.__init__",
    "cycler(1).next.__globals__",
    "joiner.__init__.__globals__",
    "namespace.__init__.__globals__",
    "dict.__base__",
    "dict.mro",
    "self.__init__",
    "self._TemplateReference__context",
    "raise_exception.__globals__",
    "raise_exception.__code__",
    "strftime_now.__closure__",
    "nothing.__class__",
    "(messages | map('string')).gi_frame",
    "{}.items().mapping",
    "'{0.__class__}'.format",
    "('{0.__class__}' | safe).format",
    "''.format_map",
    "''.encode",
    "(5).to_bytes",
    "messages.append",
    "messages[0].update",
    "messages[0].pop",
]


@pytest.mark.parametrize("expression", FORBIDDEN)
def test_nothing_behind_the_values_can_be_reached(expression):
    with pytest.raises(TinyllamaError, match=r"unsafe|undefined|no attribute"):
        run(f"{{{{ ({expression})(1) }}}}")


@pytest.mark.parametrize("inside", ["{% macro f() %}{% endmacro %}{{ f._func }}{{ f._environment }}"])
def test_nothing_behind_jinjas_own_values_can_be_reached(inside):
    assert run(inside) == ""
    assert run("{% for i in [1] %}{{ loop._iterable }}{{ loop._recurse }}{% endfor %}") == ""


@pytest.mark.parametrize(
    "source",
    ["{% include 'x' %}", "{% import 'os' as os %}", "{% from 'os' import system %}", "{% extends 'x' %}"],
)
def test_there_are_no_other_templates(source):
    with pytest.raises(TinyllamaError, match="no loader"):
        run(source)


TOO_LARGE = {
    "text": again("{% set n.x = n.x ~ n.x %}"),
    "sum": again("{% set n.x = n.x + n.x %}"),
    "list": again("{% set n.a = n.a + n.a %}"),
    "written": again("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "filtered": again("{% set n.x %}{% filter upper %}{{ n.x }}{{ n.x }}{% endfilter %}{% endset %}"),
    "escaped": again("{% autoescape true %}{% set n.x = '<' ~ n.x ~ n.x %}{% endautoescape %}"),
    "replaced": again("{% set n.x = n.x.replace('a', n.x) %}"),
    "replaced by a filter": again("{% set n.x = n.x | replace('a', n.x) %}"),
    "joined": again("{% set n.x = n.x.join([n.x, n.x, n.x]) %}"),
    "joined by a filter": again("{% set n.x = [n.x, n.x, n.x] | join(n.x) %}"),
    "lists of lists": again("{% set n.a = [n.a, n.a] %}") + "{{ n.a }}",
    "tuples of tuples": again("{% set n.a = (n.a, n.a) %}") + "{{ n.a | string }}",
    "objects of objects": again("{% set n.a = {1: n.a, 2: n.a} %}") + "{{ n.a | tojson }}",
    "views of views": again("{% set n.a = {1: n.a, 2: n.a}.items() %}") + "{{ n.a }}",
    "compared": again("{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}") + "{{ n.a == n.b }}",
    "arguments": START
    + "{% macro f() %}{% set n.a = varargs %}{% endmacro %}"
    + "{% for i in range(99) %}{{ f(n.a, n.a) }}{% endfor %}",
    "names": START
    + "{% macro f() %}{% set n.a = kwargs %}{% endmacro %}"
    + "{% for i in range(99) %}{{ f(a=n.a, b=n.a) }}{% endfor %}",
    "sorted": LONG + "{{ range(9999) | map(attribute='x', default=n.x) | sort }}",
    "mapped": LONG + "{{ range(9999) | map(attribute='x', default=n.x) | map('upper') | list }}",
    "folded": "{{ 'aaaaaaaa'" + " | replace('a', 'aaaaaaaa')" * 12 + " }}",
    "JSON": LONG + "{{ [1, 2, 3] | tojson(separators=(n.x, n.x)) }}",
    "JSON's lines": "{{ [[[1]]] | tojson(indent=999999999) }}",
    "in all": LONG + "{% for i in range(99) %}{% set y = n.x ~ i %}{% endfor %}",
    "slices": LONG + "{% for i in range(99) %}{% set y = n.x[1:] %}{% endfor %}",
    "output": LONG + "{% for i in range(99) %}{{ n.x }}{% endfor %}",
    "lists in a text": "{% set x %}{% for i in range(999) %}{{ range(9999) | list }}{% endfor %}{% endset %}",
}


@pytest.mark.parametrize("source", TOO_LARGE.values(), ids=TOO_LARGE)
def test_whatever_grows_is_stopped_before_it_is_large(source):
    with pytest.raises(TinyllamaError, match=r"more than|wider"):
        run(source)


@pytest.mark.parametrize(
    "expression",
    [
        "range(10**9) | list",
        "'x' * 10**9",
        "[1] * 10**9",
        "2 ** 9999",
        "64 ** 64 ** 64",
        "10 ** 60 // 7",
        "('f' ~ ('ffff' | replace('f', 'ffff'))) | int(0, 16)",
        "'%999999999d' % 1",
        "'a'.ljust(999999999)",
        "'a'.zfill(999999999)",
        "'a'.expandtabs(999999999)",
        "'a'.translate({97: 'aa'})",
        "'a' | center(999999999)",
        "'a' | indent(999999999)",
        "'%999999999d' | format(1)",
        "[1] | batch(999999999, 'x') | list",
        "[1] | slice(999999999) | list",
        "1.5 | round(999999999)",
        "[[1]] | sum(start=[])",
        "lipsum(99999)",
        "strftime_now('%d' | replace('d', '" + "d" * 101 + "'))",
    ],
)
def test_what_makes_much_of_little_is_not_there(expression):
    with pytest.raises(TinyllamaError):
        run(f"{{{{ {expression} }}}}")


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% block b %}{{ self.b() }}{% endblock %}",
        "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
        "{{ " + "not " * 9999 + "1 }}",
        "{{ a" + ".a" * 9999 + " }}",
        "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "{% for a in [1] %}" * 500 + "{% endfor %}" * 500,
    ],
)
def test_what_is_too_deep_is_refused(source):
    with pytest.raises(TinyllamaError, match=r"recursion|nested|indentation"):
        run(source)


def test_a_namespace_is_written_without_what_is_in_it():
    body = "{% set m = namespace() %}{% set m.x = n.a %}{% set m.y = n.a %}{% set n.a = m %}"
    assert run(again(body) + "{{ n.a }}{{ [n.a] }}") == "namespace[namespace]"


def test_loops_end_after_so_many_steps(monkeypatch):
    monkeypatch.setattr(sandbox, "STEPS", 10_000)
    for source in (
        "{% for a in range(60000) %}{% for b in range(60000) %}{% endfor %}{% endfor %}",
        "{% macro f(d) %}{% if d %}{{ f(d - 1) }}{{ f(d - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ):
        with pytest.raises(TinyllamaError, match="more than 10,000 steps"):
            run(source)


def test_time_runs_out_whatever_the_steps_do(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0)
    with pytest.raises(TinyllamaError, match="more than 0 seconds"):
        run("{{ messages | list }}")
    with pytest.raises(TinyllamaError, match="more than 0 seconds"):
        run("{% for a in range(9999) %}{% endfor %}")


def test_a_template_is_stopped_by_whoever_cancels():
    flag = threading.Event()
    flag.set()
    with cancellable(flag), pytest.raises(Cancelled):
        run("{% for a in range(9999) %}{% endfor %}")


def test_a_template_is_no_longer_than_those_of_models():
    with pytest.raises(TinyllamaError, match="more than 65,536 characters"):
        compiled("x" * 70_000)


def test_two_threads_have_their_own_bounds():
    errors, source = [], LONG + "{% for i in range(20) %}{% set y = n.x ~ i %}{% endfor %}"

    def work():
        try:
            run(source)
        except TinyllamaError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors


def test_filters_that_are_lazy_in_jinja_are_as_true_and_as_countable_as_there():
    assert run("{{ 'yes' if messages | selectattr('role', 'equalto', 'tool') }}") == "yes"
    with pytest.raises(TinyllamaError, match="has no len"):
        run("{{ messages | map(attribute='role') | length }}")


def test_each_allowed_filter_and_method_is_one_of_jinja_or_python():
    assert not re.search("format|center|just", " ".join((sandbox.FILTERS, sandbox.METHODS)))
    assert all(any(hasattr(kind, name) for kind in (str, list, dict)) for name in sandbox.METHODS.split())


def test_a_loop_that_was_left_half_way_does_not_switch_the_limits_off(monkeypatch):
    monkeypatch.setattr(sandbox, "STEPS", 20_000)
    for padding in range(0, 20, 3):
        left = "{% for a in range(9) if a %}{% break %}{% endfor %}" * padding
        endless = "{% for i in range(400) %}{% for j in range(400) %}{% endfor %}{% endfor %}"
        with pytest.raises(TinyllamaError, match="it takes more than"):
            run(left + endless)


def test_nothing_is_computed_while_a_template_is_read(monkeypatch):
    monkeypatch.setattr(sandbox, "STEPS", 200)
    source = "{{ 'b,a'.split(',')" + " | sort" * 60 + " }}"
    template = compiled(source * 20)
    with pytest.raises(TinyllamaError, match="it takes more than"):
        rendered(template)


def test_what_fails_in_jinjas_own_objects_is_an_error_of_one_line():
    with pytest.raises(TinyllamaError, match="refuses this chat"):
        run("{{ cycler() }}")
