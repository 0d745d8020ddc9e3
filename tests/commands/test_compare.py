import json

import numpy as np
import pytest

from tinyllama.commands import compare
from tinyllama.backends import BACKENDS, numpy_backend
from tinyllama.commands.cli import main
from tinyllama.commands.compare import LAYER_STEPS, compare_backends
from tinyllama.errors import TinyllamaError
from tinyllama.model import forward


@pytest.fixture(scope="module")
def same():
    return compare_backends("small", "Once upon", ("numpy", "numexpr"))


def test_every_step_of_every_layer_is_compared_and_within_its_limit(same):
    assert len(same.steps) == 3 + 4 * sum(map(len, LAYER_STEPS))
    assert same.first_wrong is None and same.agree
    assert same.kl == pytest.approx(0, abs=1e-6)


def test_steps_are_named_as_taps_are(same):
    from tinyllama.llama import load

    llama, names = load("small", "numpy"), []
    forward(
        llama._model, llama.backend, [1, 2], 0, llama.new_cache(2), tap=lambda name, _: names.append(name)
    )
    unnamed = ("scores", "weights", "residual")  # inside attention, or no operation's result
    assert sorted(step.name for step in same.steps) == sorted(n for n in names if not n.endswith(unnamed))


def test_a_wrong_kernel_is_found_where_it_is(monkeypatch):
    def broken_backend(threads):
        table = numpy_backend(threads)
        calls = []

        def swiglu(gate, up):
            calls.append(1)
            return table.swiglu(gate, up) * np.float32(1.01 if len(calls) == 2 else 1)

        return compare.replace(table, name="broken", swiglu=swiglu)

    monkeypatch.setitem(BACKENDS, "broken", broken_backend)
    found = compare_backends("small", "Once upon", ("numpy", "broken"))
    assert found.first_wrong.name == "layers.1.feed_forward.hidden"
    assert [step.name for step in found.steps if not step.is_within] == ["layers.1.feed_forward.hidden"]
    assert "layers.1.feed_forward.hidden" in compare.table(found)


def test_the_c_backend_is_right():
    pytest.importorskip("tinyllama._native", reason="the C backend is not built")
    found = compare_backends("small", "Once upon a time")
    assert found.backends == ("numpy", "c") and found.first_wrong is None


def test_an_unknown_backend_is_named():
    with pytest.raises(TinyllamaError, match="fortran"):
        compare_backends("small", "Once", ("numpy", "fortran"))


def test_the_command_prints_a_table_and_json(capsys):
    assert main(["compare", "-p", "Once", "--backends", "numpy,numexpr"]) == 0
    assert "Every step stays within its limit." in capsys.readouterr().out
    assert main(["compare", "-p", "Once", "--backends", "numpy,numexpr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["first_wrong"] is None


def test_the_command_wants_two_backends(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--backends", "numpy"])
    assert "name two" in capsys.readouterr().err
