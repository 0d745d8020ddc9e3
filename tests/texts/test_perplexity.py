"""Perplexity against a few lines that compute it from `Llama.logits`, and models whose figures are known."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tinyllama
from tinyllama.config import PRESETS
from tinyllama.errors import TinyllamaError
from tinyllama.ops import KVCache
from tinyllama.texts.perplexity import nll_of, perplexity

TEXT = (Path(__file__).parents[2] / "data" / "held_out.txt").read_text(encoding="utf-8")[:2000]


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy", 1)


def expected(llama, text: str, n_ctx: int) -> tuple[np.ndarray, bytes]:
    """The nll of every scored token, and their bytes, the slow way: every window's logits in one go."""
    tokens, nll, scored = llama.tokenizer.encode(text), [], []
    for start in range(0, len(tokens) - n_ctx + 1, n_ctx):
        window = [llama.tokenizer.bos_id, *tokens[start + 1 : start + n_ctx]]
        logits = llama.logits(window).astype(np.float64)
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        for i in range(n_ctx // 2, n_ctx - 1):
            nll.append(-log_probs[i, window[i + 1]])
            scored.append(window[i + 1])
    return np.array(nll), b"".join(map(llama.tokenizer.token_bytes, scored))


@pytest.mark.parametrize("n_ctx", [64, 33])
def test_every_figure_equals_the_definition(llama, n_ctx):
    nll, data = expected(llama, TEXT, n_ctx)
    score = perplexity(llama, TEXT, n_ctx, progress=False)
    assert score.n_scored == len(nll) == score.n_windows * (n_ctx - n_ctx // 2 - 1) and score.n_windows > 3
    assert score.n_bytes == len(data)
    assert score.nll == pytest.approx(nll.mean(), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll.sum() / math.log(2) / len(data), rel=1e-5)
    # as perplexity.cpp has it: sqrt((mean of squares - square of the mean) / (count - 1)) * perplexity
    variance = (np.mean(nll**2) - np.mean(nll) ** 2) / (len(nll) - 1)
    assert score.standard_error == pytest.approx(math.exp(nll.mean()) * math.sqrt(variance), rel=1e-4)


def test_the_running_value_is_that_of_all_windows_so_far(llama):
    nll, _ = expected(llama, TEXT, 64)
    by_window = nll.reshape(-1, 31)
    score = perplexity(llama, TEXT, 64, progress=False)
    wanted = [math.exp(by_window[: i + 1].mean()) for i in range(len(by_window))]
    assert score.running == pytest.approx(wanted, rel=1e-5)
    assert score.running[-1] == score.perplexity


@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
def test_any_batch_size_gives_the_same(llama, batch_size):
    whole = perplexity(llama, TEXT[:700], 64, progress=False)
    cut = perplexity(llama, TEXT[:700], 64, batch_size, progress=False)
    assert cut.perplexity == pytest.approx(whole.perplexity, rel=1e-4)


def test_bytes_and_text_score_the_same(llama):
    text = perplexity(llama, TEXT[:700], 64, progress=False)
    assert perplexity(llama, TEXT[:700].encode(), 64, progress=False) == text


def test_the_model_predicts_its_own_kind_of_text_better_than_noise(llama):
    words = TEXT.split()
    np.random.default_rng(0).shuffle(words)
    shuffled = perplexity(llama, " ".join(words), 64, progress=False)
    assert perplexity(llama, TEXT, 64, progress=False).bits_per_byte < shuffled.bits_per_byte < 8


class FakeLlama:
    """Predicts all of `n_tokens` alike; notes what it is run on."""

    def __init__(self, n_tokens: int, add_bos: bool):
        self.n_tokens, self.runs = n_tokens, []
        self.tokenizer = SimpleNamespace(
            bos_id=1, add_bos=add_bos, encode=lambda text, **_: list(text), token_bytes=lambda token: b"ab"
        )

    def new_cache(self, n_ctx, **run):
        return KVCache(PRESETS["7B"], n_ctx)

    def forward(self, tokens, cache, last=False):
        assert len(cache) + len(tokens) <= cache.n_ctx
        self.runs += [(len(cache) + i, int(token)) for i, token in enumerate(tokens)]
        cache.ids += tokens.tolist()
        return np.zeros((1 if last else len(tokens), self.n_tokens), np.float32)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    score = perplexity(FakeLlama(200, add_bos=True), bytes(range(2, 102)), 20, progress=False)
    assert score.perplexity == pytest.approx(200)
    assert score.standard_error == pytest.approx(0, abs=1e-9)
    assert score.bits_per_byte == pytest.approx(math.log2(200) / 2)
    assert (score.n_windows, score.n_scored) == (5, 5 * 9)


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_takes_the_place_of_each_windows_first_token_if_the_model_wants_one(add_bos):
    llama = FakeLlama(200, add_bos)
    perplexity(llama, bytes(range(10, 35)), 8, progress=False)
    first = [token for pos, token in llama.runs if pos == 0]
    assert first == ([1, 1, 1] if add_bos else [10, 18, 26])
    assert [token for pos, token in llama.runs if pos == 3] == [13, 21, 29]


def test_a_text_that_fills_no_window_is_refused_with_both_figures(llama):
    with pytest.raises(TinyllamaError, match=r"the text has 30 tokens, .* 512: lower ctx_size"):
        perplexity(FakeLlama(200, add_bos=True), b"abc" * 10, 512)


def test_a_text_that_fills_no_window_of_any_size_is_too_short():
    with pytest.raises(TinyllamaError, match="the text has 3 tokens: too few, a window takes at least 8"):
        perplexity(FakeLlama(200, add_bos=True), b"abc", 512)


@pytest.mark.parametrize("wrong", [5, None, ["abc"]])
def test_what_is_no_text_is_named(wrong):
    with pytest.raises(TinyllamaError, match="the text must be str or bytes, not"):
        perplexity(FakeLlama(200, add_bos=True), wrong, 64)


@pytest.mark.parametrize(
    "sizes", [(7, 512), (0, 512), (-1, 512), (64, 0), ("a", 512), (64.0, 512), (64, None)]
)
def test_sizes_that_leave_nothing_to_compute_are_refused(sizes):
    with pytest.raises(TinyllamaError, match="_size must be at least"):
        perplexity(FakeLlama(200, add_bos=True), b"abc" * 100, *sizes)


def test_nll_neither_overflows_nor_underflows():
    logits = np.array([[1e4, 0, -1e4]] * 3, np.float32)
    assert nll_of(logits, np.array([0, 1, 2])) == pytest.approx([0, 1e4, 2e4])


def test_a_perplexity_too_large_for_a_float_is_infinite():
    class Wrong(FakeLlama):
        def forward(self, tokens, *rest, **options):
            logits = super().forward(tokens, *rest, **options)
            logits[:, 150] = 5000.0
            return logits

    assert perplexity(Wrong(200, add_bos=True), b"abc" * 100, 64, progress=False).perplexity == math.inf
