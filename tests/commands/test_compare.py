import json
import sys
from functools import partial

import numpy as np
import pytest
import tiny

from tinyllama.backends import BACKENDS, Backend, available, get_backend
from tinyllama.commands import compare, main
from tinyllama.commands.compare import Comparison, InStep, Step, compare_backends
from tinyllama.config import FAMILIES, Config, Family
from tinyllama.errors import TinyllamaError
from tinyllama.llama import load
from tinyllama.model import build, forward

HIDDEN = ("scores", "weights", "residual", "residual_mid")  # inside attention, or no operation's result


class Broken(Backend):
    """Its second swiglu is wrong by a hundredth."""

    name, calls = "broken", 0

    def swiglu(self, gate, up):
        self.calls += 1
        return Backend.swiglu(gate, up) * np.float32(1.01 if self.calls == 2 else 1)


class Diverging(Backend):
    """Its logits are NaN."""

    name = "diverging"

    def matmul(self, x, *weights):
        results = super().matmul(x, *weights)
        return results if len(weights) > 1 else results * np.float32("nan")


@pytest.fixture(autouse=True)
def backends_with_faults(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinyllama.backends.faults", sys.modules[__name__])
    monkeypatch.setitem(BACKENDS, "broken", ("faults", "Broken"))
    monkeypatch.setitem(BACKENDS, "diverging", ("faults", "Diverging"))


def in_step(config, *sides):
    models = [build(config, tiny.tensors(config), partial(side.prepare, copy=True)) for side in sides]
    return models, InStep(list(sides), models)


@pytest.fixture(scope="module")
def same():
    return compare_backends("small", "Once upon", ("numpy", "numexpr"))


def test_every_step_of_every_layer_is_compared_and_within_its_limit(same):
    names = [name for name in load("small", "numpy").trace("Once upon") if not name.endswith(HIDDEN)]
    assert [step.name for step in same.steps] == names
    assert same.first_wrong is None and same.agree
    assert same.kl == pytest.approx(0, abs=1e-6)


def test_steps_of_families_that_norm_queries_and_keys_have_names_too(monkeypatch):
    monkeypatch.setitem(FAMILIES, "other", Family(biases=True, qk_norms=True))
    config = Config(64, 2, 4, vocab_size=96, hidden_dim=96, n_kv_heads=2, family="other")
    (model, _), both = in_step(config, Backend(1), Backend(2))
    logits = forward(model, both, [5, 6, 7], both.new_cache(config, 3))
    assert (logits == forward(model, Backend(1), [5, 6, 7], Backend(1).new_cache(config, 3))).all()
    names = [step.name for step in both.steps]
    assert names[2:9] == [
        f"layers.0.attention.{name}" for name in ["q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope"]
    ]
    assert names[-1] == "logits" and not any(step.mean_error > step.limit for step in both.steps)


@pytest.mark.parametrize("name", [name for name, reason in available().items() if not reason])
def test_tokens_behind_others_are_compared_too(name):
    (model, _), both = in_step(tiny.CONFIG, Backend(1), get_backend(name, 2))
    cache = both.new_cache(tiny.CONFIG, 40)
    forward(model, both, list(range(33)), cache)
    n_steps = len(both.steps)
    forward(model, both, [7], cache)
    assert cache.ids == [*range(33), 7]
    assert [step.name for step in both.steps[n_steps:]] == [step.name for step in both.steps[:n_steps]]
    assert [step.name for step in both.steps if step.mean_error > step.limit] == []


def test_a_wrong_kernel_is_found_where_it_is():
    found = compare_backends("small", "Once upon", ("numpy", "broken"))
    assert found.first_wrong == "layers.1.feed_forward.hidden"
    assert [step.name for step in found.steps if step.mean_error > step.limit] == [
        "layers.1.feed_forward.hidden"
    ]
    assert "layers.1.feed_forward.hidden" in compare.table(found)


def test_a_backend_that_computes_nan_is_named():
    with pytest.raises(TinyllamaError, match="small: backend diverging computes NaN or infinity"):
        compare_backends("small", "Once upon", ("numpy", "diverging"))


def test_the_c_backend_is_right():
    if available()["c"]:
        pytest.skip(available()["c"])
    found = compare_backends("small", "Once upon a time")
    assert found.backends == ("numpy", "c") and found.first_wrong is None


def test_an_unknown_backend_is_named():
    with pytest.raises(TinyllamaError, match="fortran"):
        compare_backends("small", "Once", ("numpy", "fortran"))


def test_a_prompt_that_does_not_fit_into_memory_is_refused():
    with pytest.raises(TinyllamaError, match=r"small with this prompt needs .* GB of memory, and .* free"):
        compare_backends("small", "a b " * 100_000, ("numpy", "numexpr"))


def test_the_command_prints_a_table_and_json(capsys):
    assert main(["compare", "-p", "Once", "--backends", "numpy,numexpr"]) == 0
    assert "Every step stays within its limit." in capsys.readouterr().out
    assert main(["compare", "-p", "Once", "--backends", "numpy,numexpr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["first_wrong"] is None


def test_the_table_shows_the_worst_layer_of_each_kind_and_who_expects_what():
    steps = [
        Step("embedding", 0.0, 0.0, 1e-9, (2.0, 1.0)),
        Step("layers.0.attention.q", 3e-8, 0.25, 5e-4, (1.0, 0.5)),
        Step("layers.1.attention.q", 1e-3, 0.5, 5e-4, (1.0, 0.5)),
    ]
    found = Comparison(("numpy", "c"), steps, (("a", 0.75), ("b", 0.5)), 1.5e-3)
    assert compare.table(found).splitlines() == [
        "step         mean error  largest  limit    layer  numpy ms  c ms  faster",
        "embedding    0.0e+00     0.0e+00  1e-09           2.0       1.0   2.0 x",
        "attention.q  1.0e-03     5.0e-01  5e-04 !  1      2.0       1.0   2.0 x",
        "",
        "First step outside its limit: layers.1.attention.q.",
        "They disagree on the next token: numpy 'a' (75.0%), c 'b' (50.0%).",
        "Divergence of what they expect after a token: 1.5e-03 nats on average.",
    ]


def test_the_command_wants_two_backends(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--backends", "numpy"])
    assert "name two" in capsys.readouterr().err


def test_the_picture_shows_the_errors_of_all_layers(same, tmp_path):
    pytest.importorskip("matplotlib")
    compare.plot(same, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 10_000
