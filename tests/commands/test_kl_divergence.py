"""Statistics against llama-perplexity's figures and its formulas, files against a packer written by hand."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from tinyllama.commands.compare_models import compare, save_base
from tinyllama.commands.convert import convert, quantize
from tinyllama.commands.kl_divergence import (
    BaseFile,
    check_rows,
    packed,
    score,
    statistics,
    unpacked,
    writing,
)
from tinyllama.errors import TinyllamaError
from tinyllama.llama import load

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "tests" / "golden" / "llama_perplexity.json").read_text(encoding="utf-8"))
TEXT = (ROOT / "data" / "held_out.txt").read_text(encoding="utf-8")[: RECORD["n_characters"]]


def random_logits(n_tokens: int, vocab_size: int, seed=0, scale=4) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((n_tokens, vocab_size))).astype(np.float32)


def by_hand(logits) -> bytes:
    """The rows of a file, number by number, from the description of the format."""
    rows = b""
    for row in logits:
        most = max(row)
        least = max(min(row), most - np.float32(16))
        total = sum(float(np.exp(x - most)) for x in row)
        scale = (most - least) / np.float32(65535)
        rows += struct.pack("<ff", scale, least - most - np.float32(math.log(total)))
        inverse = np.float32(1) / scale if scale else np.float32(0)
        steps = [round(float(inverse * (x - least))) if x > least else 0 for x in row]
        rows += struct.pack(f"<{len(steps)}H", *steps) + b"\0\0" * (len(steps) % 2)
    return rows


# --- scores ---------------------------------------------------------------------------------------


def test_a_score_is_what_the_definitions_say():
    base, logits, targets = random_logits(40, 50), random_logits(40, 50, seed=1), np.arange(40)
    scores = score(base, logits, targets)
    for i, found in enumerate(scores):
        p, q = (np.exp(x[i].astype(float)) / np.exp(x[i].astype(float)).sum() for x in (base, logits))
        assert found["kld"] == pytest.approx(np.sum(p * np.log(p / q)))
        assert found["nll_base"] == pytest.approx(-math.log(p[i])) and found["token"] == i
        assert found["nll"] == pytest.approx(-math.log(q[i]))
        assert (found["base_top"], found["top"]) == (p.argmax(), q.argmax())
        assert found["base_top_p"] == pytest.approx(p.max()) and found["top_p"] == pytest.approx(q.max())


def test_a_model_does_not_diverge_from_itself():
    logits = random_logits(20, 50)
    found = statistics(score(logits, logits, np.arange(20)))
    assert found.kld == (0, 0) and found.dp_rms == (0, 0) and found.same_top == (1, 0)
    assert found.ratio[0] == 1 and found.difference[0] == 0


def test_statistics_are_llama_perplexity_s_formulas():
    base, logits = random_logits(200, 30), random_logits(200, 30, seed=1)
    scores = score(base, logits, np.arange(200) % 30)
    found, n = statistics(scores), 200
    a, b = scores["nll"], scores["nll_base"]

    def mean(x):  # mean_and_uncertainty
        return x.sum() / n, math.sqrt(((x * x).sum() / n - (x.sum() / n) ** 2) / (n - 1))

    covariance = ((a * b).sum() / n - a.sum() / n * (b.sum() / n)) / (n - 1)
    ratio = mean(a)[0] - mean(b)[0]
    ratio_error = math.sqrt(mean(a)[1] ** 2 + mean(b)[1] ** 2 - 2 * covariance)
    ppl, ppl_base = (math.exp(mean(x)[0]) for x in (a, b))
    errors = ppl * mean(a)[1], ppl_base * mean(b)[1]
    assert found.ppl == pytest.approx((ppl, errors[0]))
    assert found.ppl_base == pytest.approx((ppl_base, errors[1]))
    assert found.correlation == pytest.approx(covariance / (mean(a)[1] * mean(b)[1]))
    assert found.ln_ratio == pytest.approx((ratio, ratio_error))
    assert found.ratio == pytest.approx((math.exp(ratio), math.exp(ratio) * ratio_error))
    difference = math.sqrt(errors[0] ** 2 + errors[1] ** 2 - 2 * ppl * ppl_base * covariance)
    assert found.difference == pytest.approx((ppl - ppl_base, difference))
    assert found.kld == pytest.approx(mean(scores["kld"]))
    dp = np.exp(-a) - np.exp(-b)
    assert found.dp == pytest.approx(mean(dp))
    square, square_error = mean(dp**2)
    assert found.dp_rms == pytest.approx((math.sqrt(square), 0.5 / math.sqrt(square) * square_error))
    same = np.mean(logits.argmax(-1) == base.argmax(-1))
    assert found.same_top == pytest.approx((same, math.sqrt(same * (1 - same) / (n - 1))))
    ordered, at = np.sort(scores["kld"]), 0.99 * (n - 1)
    low, high = ordered[int(at)], ordered[int(at) + 1]
    assert found.kld_quantiles["99.0%"] == pytest.approx(low + (at - int(at)) * (high - low))
    assert found.kld_quantiles["Median"] == pytest.approx((ordered[99] + ordered[100]) / 2)
    assert found.kld_quantiles["Maximum"] == ordered[-1] and found.dp_quantiles["Minimum"] == dp.min()


def test_few_tokens_have_no_standard_errors():
    found = statistics(score(random_logits(3, 9), random_logits(3, 9, seed=1), np.arange(3)))
    assert found.n_scored == 3 and found.ppl[1] == found.kld[1] == 0


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [50, 51])
@pytest.mark.parametrize("scale", [0, 1, 4, 30])
def test_rows_are_byte_for_byte_what_the_format_says(vocab_size, scale):
    logits = random_logits(20, vocab_size, scale=scale)
    assert packed(logits).tobytes() == by_hand(logits)


def test_a_file_holds_header_tokens_and_rows(tmp_path):
    windows, logits = np.arange(24).reshape(2, 12), random_logits(10, 51)
    with writing(tmp_path / "base", windows, 51) as keep:
        keep(logits[:5])
        keep(logits[5:])
    head = b"_logits_" + struct.pack("<Iii", 12, 51, 2) + struct.pack("<24i", *range(24))
    assert (tmp_path / "base").read_bytes() == head + by_hand(logits)


def test_what_is_read_is_what_was_written_to_half_a_step(tmp_path):
    windows, logits = np.arange(24).reshape(2, 12), random_logits(10, 51, scale=2)
    with writing(tmp_path / "base", windows, 51) as keep:
        keep(logits)
    file = BaseFile(tmp_path / "base")
    assert (file.windows == windows).all() and (file.ctx_size, file.vocab_size) == (12, 51)
    rows = np.concatenate([rows for window in (0, 1) for rows in file.predictions(window, 3)])
    expected = logits - np.logaddexp.reduce(logits.astype(float), axis=-1, keepdims=True)
    np.testing.assert_allclose(unpacked(rows, 51), expected, atol=16 / 65535 / 2 + 1e-6)
    exact, stored = (score(base, logits[::-1], np.arange(10)) for base in (logits, rows))
    np.testing.assert_allclose(stored["kld"], exact["kld"], atol=1e-3)


def test_what_is_less_likely_than_e_to_the_minus_16_does_not_count():
    base = np.zeros((1, 4), np.float32)
    base[0, 0] = 40
    logits = random_logits(1, 4)
    found = score(packed(base), logits, np.array([0]))["kld"][0]
    p = np.exp(logits[0].astype(float))
    assert found == pytest.approx(-math.log(p[0] / p.sum()), rel=1e-4)


def test_a_file_that_cannot_be_whole_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "base", np.zeros((1, 12), int), 50):
        raise RuntimeError
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"GGUF" + data[4:], "no file of log-probabilities .* but a GGUF file"),
        (lambda data: data[:18], "was cut short"),
        (lambda data: data[:-2], "it was cut short"),
        (lambda data: data[:8] + b"\0" * 12 + data[20:], "is damaged: 0 windows of 0 tokens"),
        (lambda data: data[:20] + b"\xff" * 4 + data[24:], "tokens that aren't in the vocabulary"),
        (lambda data: data + b"\0\0", "is damaged: 2 bytes follow its last row"),
        (lambda data: b"", "is empty"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    with writing(tmp_path / "base", np.arange(12).reshape(1, 12), 50) as keep:
        keep(random_logits(5, 50))
    (tmp_path / "bad").write_bytes(damage((tmp_path / "base").read_bytes()))
    with pytest.raises(TinyllamaError, match=f"bad: .*{message}"):
        BaseFile(tmp_path / "bad")


@pytest.mark.parametrize("scale", [0, 1, 4, 30])
def test_rows_that_were_written_are_probabilities(scale):
    check_rows(packed(random_logits(40, 51, scale=scale)), 51)


@pytest.mark.parametrize(
    ("place", "value"), [(slice(4), 0xFFFF), (1, 0x7F80), (3, 0xFF80), (slice(4, 54), 0xFFFF), (slice(54), 0)]
)
def test_rows_that_are_no_probabilities_are_refused_with_the_file_s_name(tmp_path, place, value):
    rows = packed(random_logits(5, 50))
    rows[3, place] = value
    with writing(tmp_path / "base", np.arange(12).reshape(1, 12), 50) as keep:
        keep(random_logits(5, 50))
    data = (tmp_path / "base").read_bytes()
    (tmp_path / "base").write_bytes(data[: -rows.nbytes] + rows.tobytes())
    with pytest.raises(
        TinyllamaError, match="base: is damaged: it holds probabilities that don't add up to 1"
    ):
        [*BaseFile(tmp_path / "base").predictions(0, 3)]


# --- llama-perplexity -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The small model in 16 bits, and quantized, as when llama-perplexity was recorded."""
    folder = tmp_path_factory.mktemp("models")
    convert("small", "f16", folder / "f16.gguf", "gguf")
    quantize(folder / "f16.gguf", folder / "q4_0.gguf", "Q4_0")
    return [load(folder / name, "numpy", 2) for name in ("f16.gguf", "q4_0.gguf")]


@pytest.fixture(scope="module")
def file(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "base.kld"
    save_base(models[0], TEXT, path, RECORD["ctx_size"], progress=False)
    return path


def test_a_file_is_what_llama_perplexity_writes(file):
    data, n = file.read_bytes(), len(RECORD["tokens"])
    assert data[:20].hex() == RECORD["header"] and len(data) == RECORD["n_bytes"]
    assert np.frombuffer(data, "<i4", n, 20).tolist() == RECORD["tokens"]
    row = data[20 + 4 * n :]
    theirs = np.array(RECORD["steps"]) * RECORD["scale, least"][0] + RECORD["scale, least"][1]
    scale, least = np.frombuffer(row, "<f4", 2)
    ours = np.frombuffer(row, "<u2", len(theirs), 8) * scale + least
    np.testing.assert_allclose(ours, theirs, atol=0.05)  # llama.cpp multiplies with 16 bits


def test_the_statistics_are_those_that_llama_perplexity_prints(models, file):
    found, theirs = compare(file, models[1], progress=False).divergence, RECORD["statistics"]
    assert found.ppl == pytest.approx(theirs["Mean PPL(Q)"], rel=0.01)
    assert found.ppl_base == pytest.approx(theirs["Mean PPL(base)"], rel=0.001)
    assert found.difference == pytest.approx(theirs["Mean PPL(Q)-PPL(base)"], rel=0.1)
    assert found.ln_ratio == pytest.approx(theirs["Mean ln(PPL(Q)/PPL(base))"], rel=0.1)
    assert 100 * found.correlation == pytest.approx(theirs["Cor(ln(PPL(Q)), ln(PPL(base)))"][0], abs=0.1)
    assert found.kld == pytest.approx(theirs["Mean KLD"], rel=0.05)
    for name in ("99.9%", "99.0%", "95.0%", "90.0%", "Median"):
        assert found.kld_quantiles[name] == pytest.approx(theirs[f"{name} KLD"][0], rel=0.1)
    assert 100 * found.dp_rms[0] == pytest.approx(theirs["RMS Δp"][0], rel=0.05)
    assert 100 * found.same_top[0] == pytest.approx(theirs["Same top p"][0], abs=1)


def test_a_file_and_the_model_that_wrote_it_compare_alike(models, file):
    text, stored = TEXT, compare(file, models[1], progress=False)
    direct = compare(*models, text, ctx_size=RECORD["ctx_size"], n_steps=0, progress=False)
    assert stored.divergence.kld == pytest.approx(direct.divergence.kld, abs=1e-4)
    assert stored.divergence.ppl == direct.divergence.ppl
    assert (stored.n_windows, stored.ctx_size) == (direct.n_windows, direct.ctx_size)


def test_comparing_can_write_the_file_too(models, file, tmp_path):
    size = RECORD["ctx_size"]
    compare(*models, TEXT, ctx_size=size, n_steps=0, base=tmp_path / "base", progress=False)
    assert (tmp_path / "base").read_bytes() == file.read_bytes()


def test_a_file_of_another_vocabulary_is_refused(models, tmp_path):
    with writing(tmp_path / "base", np.arange(12).reshape(1, 12), 50) as keep:
        keep(random_logits(5, 50))
    with pytest.raises(TinyllamaError, match="different vocabularies, of 50 and 1536 tokens"):
        compare(tmp_path / "base", models[1])


def test_an_error_of_the_model_does_not_blame_the_file(models, file, monkeypatch):
    def fail(*_, **__):
        raise TinyllamaError("q4_0.gguf: computes NaN")

    monkeypatch.setattr(models[1], "forward", fail)
    with pytest.raises(TinyllamaError, match=r"^q4_0"):
        compare(file, models[1], progress=False)


def test_what_a_file_has_already_is_ignored_and_said(models, file):
    with pytest.warns(UserWarning, match=r"^text, ctx_size, n_steps, limit: ignored, since .*base\.kld has"):
        compare(file, models[1], TEXT, ctx_size=16, n_steps=8, limit=1, progress=False)


def test_a_file_does_not_replace_the_model_that_it_is_made_from(models, tmp_path):
    for path, message in ((models[0].checkpoint.path, "would replace"), (tmp_path / "no" / "x", "no folder")):
        with pytest.raises(TinyllamaError, match=message):
            save_base(models[0], TEXT, path, 64)
        with pytest.raises(TinyllamaError, match=message):
            compare(*models, TEXT, ctx_size=64, base=path)
