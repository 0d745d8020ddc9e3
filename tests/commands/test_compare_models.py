"""Two models held against each other: every figure against a few lines that compute it another way."""

import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny

import tinyllama
from tinyllama.backends import Backend, available
from tinyllama.commands import compare_report, compare_steps, main
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


def test_scores_that_one_of_two_models_does_not_compute_do_not_count():
    config = replace(tiny.CONFIG, vocab_size=open_checkpoint("small").config.vocab_size)
    checkpoint = replace(open_checkpoint("small"), config=config, tensors=tiny.tensors(config))
    windowed = replace(checkpoint, config=replace(config, sliding_window=4))
    for sides in ((checkpoint, windowed), (windowed, checkpoint)):
        both = (Llama(side, Backend(1), "tiny") for side in sides)
        found = compare(*both, TEXT, ctx_size=SIZE, n_steps=16, progress=False)
        assert all(math.isfinite(step.error) and math.isfinite(step.largest) for step in found.steps)
        (scores,) = (step for step in found.steps if step.name == "layers.0.attention.scores")
        assert scores.error == 0


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


def stopped_at(share: float, models, all_of_it: Later, **how) -> Compared:
    with cancellable(Later(int(share * (10**9 - all_of_it.n)))):
        return compare(*models, TEXT, ctx_size=SIZE, progress=False, partial=True, **how)


def test_who_stops_gets_what_the_windows_until_then_gave(models, found):
    how, all_of_it = {"ctx_size": SIZE, "progress": False}, Later(10**9)
    with cancellable(all_of_it):
        compare(*models, TEXT, n_steps=0, **how)
    some = stopped_at(0.5, models, all_of_it)
    assert 0 < some.n_windows < found.n_windows and some.steps == []
    assert some.windows == pytest.approx(found.windows[: some.n_windows], rel=1e-3)
    (note,) = some.notes
    assert note == f"stopped after {some.n_windows} of {found.n_windows} windows, before steps and weights"
    assert f"Note: {note}." in " ".join(some.table().split())
    half = Later((10**9 - all_of_it.n) // 2)
    with cancellable(half), pytest.raises(Cancelled):
        compare(*models, TEXT, n_steps=0, **how)


def test_who_stops_after_the_windows_gets_what_is_known_of_steps_and_weights(models, found, tmp_path):
    all_of_it = Later(10**9)
    with cancellable(all_of_it):
        compare(*models, TEXT, ctx_size=SIZE, n_steps=8, progress=False)
    seen = set()
    for share in (0.6, 0.65, 0.7, 0.8, 0.95):
        some = stopped_at(share, models, all_of_it, n_steps=8)
        if some.n_windows == found.n_windows:
            seen.add(some.notes[-1].split(",")[0].split(" of ")[0].rstrip("0123456789"))
            assert len(some.shares) < len(found.shares)
            some.html(tmp_path / "page.html")
            assert some.notes[-1] in " ".join(some.table().split())
            assert "The KL divergence is" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "stopped after " in seen


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
        ({"limit": "inf"}, "limit must be"),
        ({"limit": math.nan}, "limit must be"),
        ({"limit": [1]}, "limit must be"),
        ({"ctx_size": 4096}, "a window takes 4096: lower ctx_size"),
        ({"ctx_size": "a"}, "ctx_size must be at least 8, not 'a'"),
        ({"n_steps": 8.5}, "n_steps must be 0 or at least 8, not 8.5"),
        ({"text": ""}, "there is no text"),
        ({"text": 5}, "the text must be str or bytes, not int"),
        ({"text": "Once", "text_name": "story.txt"}, "story.txt has 2 tokens: too few"),
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
    assert "on a scale of square roots" in page
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


def test_json_has_no_infinity(found):
    wrong = replace(found.divergence, ppl=(math.inf, math.nan))
    wrong = replace(found, divergence=wrong, windows=[math.inf])
    parsed = json.loads(json.dumps(wrong.as_dict(), allow_nan=False))
    assert parsed["divergence"]["ppl"] == [None, None] and parsed["windows"] == [None]


def test_pages_and_pictures_do_not_replace_the_models(found, folder):
    for write in (found.html, found.plot):
        with pytest.raises(TinyllamaError, match=r"q4\.gguf: would replace what it is made from"):
            write(folder / "q4.gguf")
        with pytest.raises(TinyllamaError, match="there is no folder"):
            write(folder / "nowhere" / "x.png")


def test_a_page_of_models_whose_paths_are_no_utf_8_is_written(found, tmp_path):
    name = os.fsdecode(b"/models/f\xfcr.gguf")
    replace(found, a=replace(found.a, name=name)).html(tmp_path / "page.html")
    assert "f?r.gguf" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_picture_of_a_kind_that_matplotlib_does_not_draw_is_refused(found, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("found", "found.doc"):
        with pytest.raises(TinyllamaError, match=f"{name}: the name of a picture ends in .png"):
            found.plot(tmp_path / name)
    assert [*tmp_path.iterdir()] == []


def test_the_picture_shows_errors_shares_and_the_text(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_every_axis_of_the_picture_is_named(found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(compare_report, "save_picture", lambda figure, path: drawn.append(figure))
    found.plot(tmp_path / "found.png")
    axes = drawn[0].axes
    assert [each.get_xlabel() for each in axes] == ["layer", "layer", "token scored"]
    assert all(each.get_ylabel() for each in axes)


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
    assert (
        main(["compare", str(folder / "q4.gguf"), *base, "--kl-divergence", "-c", "64", "--steps", "9"]) == 0
    )
    out, err = capsys.readouterr()
    assert "log-probabilities from a file" in out
    assert f"warning: -c, --steps are ignored: {tmp_path / 'base.kld'} has the windows of its text" in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["a", "b", "c"], "compares two models, not 3"),
        (["a", "b"], "argument -f: name the text"),
        (["a", "-f", "x"], "-f: is for two models, not for two backends: name a second model, or a prompt"),
        (["a", "b", "-p", "x"], "argument -p: is for two backends, not for two models"),
        (["a", "--steps", "8"], "argument --steps: is for two models, not for two backends"),
        (["a", "b", "-f", "x", "--steps", "3"], "argument --steps: must be 0 or at least 8, not 3"),
        (["a", "--kl-divergence-base", "x"], "argument -f: name the text that is read"),
        (["a", "-f", "x", "--kl-divergence-base", "y", "--html", "z"], "not for a base file that is written"),
        (["a", "-f", "x", "--kl-divergence-base", "y", "--steps", "9"], "--steps: is for two models, not"),
        (["a", "b", "-f", "x", "--backends", "numpy,"], "argument --backends: a name is missing"),
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


@pytest.mark.parametrize("option", ["--html", "--plot", "--kl-divergence-base"])
@pytest.mark.parametrize("name", ["q4.gguf", "text.png", "old.html"])
def test_nothing_that_is_read_and_nothing_else_is_replaced(folder, tmp_path, option, name, capsys):
    for file in ("text.png", "old.html"):
        (tmp_path / file).write_text(TEXT, encoding="utf-8")
    path = folder / name if name == "q4.gguf" else tmp_path / name
    before = path.read_bytes()
    sides = [str(folder / "f16.gguf"), str(folder / "q4.gguf"), "-f", str(tmp_path / "text.png")]
    other = "--plot" if option == "--html" else "--html"
    more = [other, str(path)] if name == "old.html" else []
    assert main(["compare", *sides, option, str(path), *more]) == 1
    line = capsys.readouterr().err
    assert "name another file to write\n" in line and str(path) in line and line.count("\n") == 1
    assert path.read_bytes() == before


def test_the_base_file_that_is_read_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "base").write_bytes(b"_logits_")
    base = ["--kl-divergence-base", str(tmp_path / "base"), "--kl-divergence"]
    assert main(["compare", str(folder / "q4.gguf"), *base, "--html", str(tmp_path / "base")]) == 1
    assert "base: would replace what it is made from" in capsys.readouterr().err


def test_a_picture_s_ending_is_looked_at_before_anything_is_computed(arguments, capsys):
    pytest.importorskip("matplotlib")
    assert main(["compare", "a", "b", *arguments, "--plot", "found.doc"]) == 1
    assert "found.doc: the name of a picture ends in .png" in capsys.readouterr().err


def test_the_text_is_named_as_it_was(folder, tmp_path, capsys):
    (tmp_path / "story.txt").write_text("Once upon a time, there was a dog.", encoding="utf-8")
    story = ["-f", str(tmp_path / "story.txt")]
    assert main(["compare", str(folder / "f16.gguf"), str(folder / "q4.gguf"), *story]) == 1
    assert re.search(
        r"story\.txt has \d+ tokens, and a window takes 512: lower ctx_size \(-c\)", capsys.readouterr().err
    )


def test_a_context_beyond_the_trained_one_is_said_once_with_the_model(folder, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    sides = [str(folder / "f16.gguf"), str(folder / "q4.gguf")]
    assert main(["compare", *sides, "-f", str(tmp_path / "text"), "-c", "4096"]) == 1
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warned) == 1 and "f16.gguf was trained on 2048 tokens, ctx_size (-c) is 4096" in warned[0]


def test_a_file_that_is_no_base_is_named(folder, capsys):
    base = ["--kl-divergence-base", str(folder / "f16.gguf"), "--kl-divergence"]
    assert main(["compare", str(folder / "q4.gguf"), *base]) == 1
    assert "f16.gguf: no file of log-probabilities" in capsys.readouterr().err
