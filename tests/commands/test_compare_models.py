"""Two models held against each other: every figure against a few lines that compute it another way."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny

import tinyllama
from tinyllama.backends import Backend, available
from tinyllama.commands import compare_steps, main
from tinyllama.commands.compare_models import Compared, compare
from tinyllama.commands.convert import convert, quantize
from tinyllama.commands.kl_divergence import score
from tinyllama.errors import Cancelled, TinyllamaError, cancellable
from tinyllama.formats import open_checkpoint
from tinyllama.llama import Llama
from tinyllama.model import build, forward

TEXT = (Path(__file__).parents[2] / "data" / "held_out.txt").read_text(encoding="utf-8")[:1500]
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model in 16 bits, and quantized."""
    folder = tmp_path_factory.mktemp("models")
    convert("small", "f16", folder / "f16.gguf", "gguf")
    quantize(folder / "f16.gguf", folder / "q4.gguf", "Q4_0")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return [tinyllama.load(folder / name, "numpy", 2) for name in ("f16.gguf", "q4.gguf")]


@pytest.fixture(scope="module")
def found(models) -> Compared:
    return compare(*models, TEXT, ctx_size=SIZE, n_steps=48, progress=False)


@pytest.fixture(scope="module")
def tokens(models):
    return [models[0].tokenizer.bos_id, *models[0].tokenizer.encode(TEXT)[1:48]]


@pytest.fixture(scope="module")
def traces(models, tokens):
    return [llama.trace(tokens) for llama in models]


def without_first(name: str, array: np.ndarray) -> np.ndarray:
    array = array[:, 1:] if name.endswith(("scores", "weights")) else array[1:]
    return np.where(np.isfinite(array), array, 0).astype(float)


class Later:
    """A flag that is set from the n-th look on."""

    def __init__(self, n: int):
        self.n = n

    def is_set(self) -> bool:
        self.n -= 1
        return self.n < 0


def other(config: dict, **changes) -> Llama:
    """The small model's vocabulary with random weights of another size."""
    checkpoint = open_checkpoint("small")
    wanted = replace(tiny.CONFIG, vocab_size=checkpoint.config.vocab_size, **config)
    return Llama(
        replace(checkpoint, config=wanted, tensors=tiny.tensors(wanted), **changes), Backend(1), "other"
    )


# --- inside ---------------------------------------------------------------------------------------


def test_the_error_of_every_step_is_that_of_traces(found, traces):
    ours, theirs = traces
    assert [step.name for step in found.steps] == [*ours] and found.n_step_tokens == 48
    for step in found.steps:
        x, y = (without_first(step.name, trace[step.name]) for trace in (ours, theirs))
        assert step.error == pytest.approx(np.sum((x - y) ** 2) / np.sum(x**2), rel=1e-3, abs=1e-9), step.name
        assert step.largest * step.rms == pytest.approx(np.abs(x - y).max(), rel=1e-3)
        if not step.name.endswith(("scores", "weights")):  # of which those of the future don't count
            assert step.rms == pytest.approx(np.mean(x**2) ** 0.5, rel=1e-3)


def test_the_error_of_weights_and_of_what_comes_out_of_them_is_that_of_products(found, models, traces):
    errors = {tensor.name: tensor for tensor in found.tensors}
    values = {"layers.1.attention.wv": "layers.1.attention.norm", "output": "norm"}
    values |= {"layers.2.attention.wo": "layers.2.attention.heads"}
    values |= {"layers.3.feed_forward.w2": "layers.3.feed_forward.hidden"}
    for name, value in values.items():
        w, v = (llama.weight(name).astype(float) for llama in models)
        x, tensor = traces[0][value][1:].astype(float), errors[f"{name}.weight"]
        assert tensor.error == pytest.approx(np.linalg.norm(w - v) / np.linalg.norm(w), rel=1e-4)
        expected = np.linalg.norm(x @ (w - v).T) / np.linalg.norm(x @ w.T)
        assert tensor.output_error == pytest.approx(expected, rel=1e-3)
    assert [tensor.worst for tensor in found.tensors] == sorted(
        (t.worst for t in found.tensors), reverse=True
    )
    assert errors["layers.0.attention_norm.weight"].error == 0
    assert errors["output.weight"].types == ("f16", "q6_k")


@pytest.mark.parametrize("name", ["attention.wv", "layers.3", "tok_embeddings", "output"])
def test_the_share_of_weights_is_the_divergence_that_they_make_alone(found, models, tokens, name):
    a, b = (llama.checkpoint for llama in models)
    chosen = {key: tensor for key, tensor in b.tensors.items() if name in key}
    backend, runs = Backend(1), []
    for tensors in (a.tensors, a.tensors | chosen, b.tensors):
        model = build(a.config, tensors, lambda tensor: backend.prepare(tensor, copy=True))
        runs.append(forward(model, backend, tokens, backend.new_cache(a.config, 48))[24:47])
    targets = np.array(tokens[25:])
    kld, whole = (score(runs[0], run, targets)["kld"].mean() for run in runs[1:])
    (share,) = (share for share in found.shares if share.name == name)
    assert share.kld == pytest.approx(kld, rel=1e-3)
    assert share.part == pytest.approx(kld / whole, rel=1e-3)


def test_the_whole_is_about_the_sum_of_the_layers(found):
    layers = [share.part for share in found.shares if share.name.startswith("layers.")]
    assert len(layers) == 4 and 0.5 < sum(layers) < 1.5


def test_the_first_step_above_the_limit_is_named(models, found):
    assert found.limit == ("4-bit", compare_steps.LIMITS["4-bit"][0]) and found.first_over is None
    strict = compare(*models, TEXT, ctx_size=SIZE, n_steps=8, limit="8-bit", progress=False)
    over = [step.name for step in strict.steps if step.error > 0.01]
    assert strict.limit == ("8-bit", 0.01) and strict.first_over == over[0]
    assert f"First step whose error is above 0.01 (8-bit): {over[0]}" in " ".join(strict.table().split())


# --- predictions ----------------------------------------------------------------------------------


def test_predictions_are_compared_on_every_window(found, models):
    windows = np.array(models[0].tokenizer.encode(TEXT))
    windows = windows[: len(windows) // SIZE * SIZE].reshape(-1, SIZE)
    windows[:, 0] = models[0].tokenizer.bos_id
    scores = []
    for window in windows:
        logits = [llama.logits(window)[SIZE // 2 : -1] for llama in models]
        scores.append(score(*logits, window[SIZE // 2 + 1 :]))
    assert found.n_windows == len(windows) > 3
    assert found.divergence.n_scored == len(windows) * (SIZE // 2 - 1)
    np.testing.assert_allclose(found.scores["kld"], [some["kld"] for some in scores], rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(found.windows, [some["kld"].mean() for some in scores], rtol=1e-3)


def test_perplexities_are_those_of_perplexity(found, models):
    from tinyllama.texts.perplexity import perplexity

    for llama, ppl in zip(models, (found.divergence.ppl_base, found.divergence.ppl), strict=True):
        assert perplexity(llama, TEXT, SIZE, progress=False).perplexity == pytest.approx(ppl[0], rel=1e-6)


def test_the_largest_divergences_are_shown_with_their_text(found, models):
    tokenizer, first = models[0].tokenizer, found.surprises[0]
    assert first.kld == found.scores["kld"].max() == found.divergence.kld_quantiles["Maximum"]
    ids = tokenizer.encode(TEXT)
    assert first.token == tokenizer.piece(ids[first.position])
    assert tokenizer.decode(ids[: first.position]).endswith(first.before)
    assert [some.kld for some in found.surprises] == sorted((s.kld for s in found.surprises), reverse=True)


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_any_batch_size_gives_the_same(models, found, batch_size):
    cut = compare(*models, TEXT, ctx_size=SIZE, batch_size=batch_size, n_steps=0, progress=False)
    assert cut.divergence.kld[0] == pytest.approx(found.divergence.kld[0], rel=1e-3)


def test_who_stops_gets_what_the_windows_until_then_gave(models, found):
    how, all_of_it = {"ctx_size": SIZE, "n_steps": 0, "progress": False}, Later(10**9)
    with cancellable(all_of_it):
        compare(*models, TEXT, **how)
    half = (10**9 - all_of_it.n) // 2
    with cancellable(Later(half)):
        some = compare(*models, TEXT, **how, partial=True)
    assert 0 < some.n_windows < found.n_windows
    assert some.windows == pytest.approx(found.windows[: some.n_windows], rel=1e-3)
    with cancellable(Later(half)), pytest.raises(Cancelled):
        compare(*models, TEXT, **how)


# --- which models ---------------------------------------------------------------------------------


def test_a_folder_and_the_file_made_from_it_are_the_same(folder):
    found = tinyllama.compare("small", folder / "f16.gguf", TEXT, ctx_size=SIZE, n_steps=16, progress=False)
    assert found.divergence.kld == (0, 0) and found.limit[0] == "rounding" and found.first_over is None
    assert not any(step.error for step in found.steps) and not any(t.error for t in found.tensors)
    assert "Weights: the same in both" in found.table()


@pytest.mark.long
def test_smollm2_in_blocks_and_the_same_weights_in_16_bits_agree(smollm2_file, tmp_path):
    if available()["c"]:
        pytest.skip(available()["c"])
    convert(smollm2_file, "f16", tmp_path / "f16.gguf")
    sides = [tinyllama.load(path, "c") for path in (tmp_path / "f16.gguf", smollm2_file)]
    found = compare(*sides, TEXT, ctx_size=SIZE, n_steps=16, limit="8-bit", progress=False)
    assert max(tensor.error for tensor in found.tensors) < 1e-3  # halves of scales and least values
    assert found.first_over is None and found.divergence.kld[0] < 0.01
    assert found.divergence.same_top[0] > 0.9


def test_two_backends_agree():
    if available()["c"]:
        pytest.skip(available()["c"])
    sides = [tinyllama.load("small", name) for name in ("numpy", "c")]
    found = compare(*sides, TEXT, ctx_size=SIZE, n_steps=32, progress=False)
    assert found.first_over is None and found.divergence.kld[0] < 1e-3 and found.shares == []
    assert "on two backends no weights are exchanged" in found.notes[0]


def test_models_of_two_sizes_are_compared_by_what_they_predict(models):
    found = compare(models[0], other({}), TEXT, ctx_size=SIZE, progress=False)
    assert found.divergence.kld[0] > 0.1 and found.steps == found.tensors == []
    (note,) = found.notes
    assert note == "steps and tensors can't be compared: one has 4 layers of 256, the other 2 layers of 64"
    assert note in " ".join(found.table().split())


def test_different_vocabularies_are_refused(models):
    vocabulary = open_checkpoint("small").vocabulary
    pieces = (*vocabulary.pieces[:700], "else", *vocabulary.pieces[701:])
    with pytest.raises(TinyllamaError, match=r"different vocabularies: token 700 is '.*' and 'else'"):
        compare(models[0], other({}, vocabulary=replace(vocabulary, pieces=pieces)), TEXT, ctx_size=SIZE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ctx_size": 4}, "ctx_size must be at least 8, not 4"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"n_steps": 3}, "n_steps must be 0 or at least 8, not 3"),
        ({"limit": "loose"}, "limit must be a number or one of rounding, 8-bit, 4-bit, not 'loose'"),
        ({"limit": -1}, "limit must be"),
        ({"ctx_size": 4096}, "a window takes 4096: lower ctx_size"),
        ({"text": ""}, "there is no text"),
    ],
)
def test_what_makes_no_sense_is_refused(models, wrong, message):
    with pytest.raises(TinyllamaError, match=message):
        compare(*models, **{"text": TEXT, "progress": False} | wrong)


def test_two_models_that_do_not_fit_into_memory_are_refused(folder, free_memory):
    free_memory(10_000_000)
    with pytest.raises(TinyllamaError, match=r"needs .* of memory, and 10 MB are free"):
        compare(folder / "f16.gguf", folder / "q4.gguf", TEXT, backend="numpy", threads=1)


# --- reports --------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Looks whether tags are closed in the order they were opened, and for addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("href", "src")]
        self.open += [] if tag in ("meta", "link", "br") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_by_itself(found, tmp_path):
    found.html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.addresses == ["data:,"] and "://" not in page and "$" not in page
    assert "q4.gguf against f16.gguf" in page and "layer 3, attention.q: " in page


def test_the_page_escapes_what_a_file_says(found, tmp_path):
    nasty = "<script>alert(1)</script>"
    surprises = [replace(found.surprises[0], before=nasty, token=nasty, a=(nasty, 0.5))]
    replace(found, a=replace(found.a, name=nasty), surprises=surprises).html(tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_table_names_the_weights_to_keep_finer(found):
    table = found.table()
    assert re.search(r"To keep\s+finer\s+first:\s+attention\.w", table)
    for name in (
        "Mean PPL(Q)/PPL(base)",
        "RMS Δp",
        "Same top p",
        "feed_forward.w2",
        "part of the divergence by",
    ):
        assert name in table


def test_a_notebook_shows_the_table(found):
    assert repr(found) == found.table()


def test_a_comparison_becomes_json(found):
    parsed = json.loads(json.dumps(found.as_dict()))
    assert parsed["divergence"]["kld"] == [*found.divergence.kld] and "scores" not in parsed
    assert parsed["steps"][1]["name"] == "layers.0.attention.norm"


def test_the_picture_shows_errors_shares_and_the_text(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def arguments(folder, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return ["-f", str(tmp_path / "text"), "-c", str(SIZE), "-t", "2"]


def test_the_command_prints_a_table_and_writes_a_page(folder, arguments, tmp_path, capsys):
    sides = [str(folder / "f16.gguf"), str(folder / "q4.gguf")]
    page = tmp_path / "page.html"
    assert main(["compare", *sides, *arguments, "--steps", "16", "--html", str(page)]) == 0
    assert "Mean KLD" in capsys.readouterr().out and page.exists()
    assert main(["compare", "-m", *sides, *arguments, "--steps", "0", "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["steps"] == [] and parsed["b"]["type"] == "Q4_0"


def test_the_command_has_llama_perplexity_s_two_steps(folder, arguments, tmp_path, capsys):
    base = ["--kl-divergence-base", str(tmp_path / "base.kld")]
    assert main(["compare", str(folder / "f16.gguf"), *arguments, *base]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
    assert main(["compare", str(folder / "q4.gguf"), *base, "--kl-divergence"]) == 0
    assert "log-probabilities from a file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["a", "b", "c"], "compares two models, not 3"),
        (["a", "b"], "argument -f: name the text"),
        (["a", "-f", "x"], "argument -f: is for two models"),
        (["a", "b", "-p", "x"], "argument -p: is for two backends"),
        (["a", "--kl-divergence"], "needs one model and --kl_divergence_base FILE"),
        (["a", "b", "-f", "x", "--backends", "c,c,c"], "name at most 2, not 3"),
        (["--html", "x.html"], "argument --html: is for two models"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_a_line(wrong, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", *wrong])
    assert message in capsys.readouterr().err


def test_a_page_that_has_no_place_is_refused_before_anything_is_computed(arguments, capsys):
    assert main(["compare", "a", "b", *arguments, "--html", "nowhere/page.html"]) == 1
    assert capsys.readouterr().err == "tinyllama: nowhere/page.html: there is no folder nowhere\n"


def test_a_file_that_is_no_base_is_named(folder, capsys):
    base = ["--kl-divergence-base", str(folder / "f16.gguf"), "--kl-divergence"]
    assert main(["compare", str(folder / "q4.gguf"), *base]) == 1
    assert "f16.gguf: no file of log-probabilities" in capsys.readouterr().err
