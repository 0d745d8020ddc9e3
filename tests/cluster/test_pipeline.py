"""A model whose layers lie on two workers computes what it does on one machine, to the bit."""

import os
import signal
import threading
import time

import numpy as np
import pytest

import tinyllama
from tinyllama import TinyllamaError
from tinyllama.cluster.loading import load
from tinyllama.ops import FEW

STORY = "Tom and Lily went to the park. They saw a big dog and a small cat. "


@pytest.fixture(scope="module")
def near():
    """The model here, on one thread, as each worker has."""
    pytest.importorskip("tinyllama._native")
    with tinyllama.load("small", "c", 1) as llama:
        yield llama


@pytest.fixture(scope="module")
def far(near, client):
    with load("small", "c", scheduler=client, split=[1, 3]) as llama:
        yield llama


def assert_same(text, other):
    assert (text, text.ids, text.probs) == (other, other.ids, other.probs)


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": 0},
        {"seed": 1},
        {"seed": 2, "draft_lookup": True, "repeat_penalty": 1.3},
        {"seed": 3, "stop": ["Lily"]},
        {"seed": 4, "temp": 1.5, "top_k": 0, "stages": True, "n_predict": -1, "ctx_size": 60},
    ],
)
def test_a_text_is_the_same(far, near, settings):
    text, other = (llama.generate(STORY, **{"n_predict": 50} | settings) for llama in (far, near))
    assert_same(text, other)
    assert text.stop_reason == other.stop_reason
    for mine, its in zip(text.tokens, other.tokens, strict=True):
        assert [stage.kept.tolist() for stage in mine.stages] == [stage.kept.tolist() for stage in its.stages]


def test_on_numpy_too(client):
    near = tinyllama.load("small", "numpy", 1)
    with load("small", "numpy", scheduler=client) as far:
        assert_same(far.generate(STORY * 8, seed=14), near.generate(STORY * 8, seed=14))
        assert (far.trace("Once", "norm")["norm"] == near.trace("Once", "norm")["norm"]).all()


def test_a_small_model_guesses(far, near):
    for n_tokens in [*range(1, FEW + 1)] * 3:
        far.pace.note(n_tokens, 1.0)  # a pass takes a second, whatever it computes: guesses pay
    text, other = (llama.generate(STORY, seed=5, spec_draft_model="small") for llama in (far, near))
    assert_same(text, other)
    assert text.timings.n_accepted


def test_a_long_prompt_goes_through_in_pieces(far, near):
    ids = near.tokens(STORY * 40)
    assert (far.logits(ids[:900]) == near.logits(ids[:900])).all()
    for size in (300, 20):
        text, other = (
            llama.generate(STORY * 30, seed=6, n_predict=5, batch_size=size) for llama in (far, near)
        )
        assert_same(text, other)


def test_many_texts_are_what_each_is_alone(far, near):
    prompts = [STORY[: 5 * n + 1] for n in range(1, 12)] + [STORY * 30]
    each = [{"seed": n, "n_predict": 5 + 3 * n, "draft_lookup": n % 3 == 0} for n in range(12)]
    for text, other in zip(far.generate(prompts, each=each), near.generate(prompts, each=each), strict=True):
        assert_same(text, other)


def test_a_text_goes_on_from_one_that_is_remembered(far, near):
    first, other = (llama.generate(STORY * 5, seed=7) for llama in (far, near))
    text, its = (llama.generate(STORY * 5 + first + " The", seed=8) for llama in (far, near))
    assert first == other
    assert_same(text, its)
    assert text.timings.n_remembered == its.timings.n_remembered > 0


def test_what_a_bias_favours_is_written(far, near):
    (token,) = near.tokens("dog")[-1:]
    texts = []
    for llama in (far, near):
        text = llama.begin("A", tinyllama.llama.Settings(n_predict=3, temp=0), llama.remembered.recall)
        text.bias = {token: 100.0}
        texts.append(text.finish())
    assert texts[0].ids == texts[1].ids == [token] * 3


def test_values_can_be_seen(far, near):
    seen, expected = far.trace("Once upon a time"), near.trace("Once upon a time")
    assert [*seen] == [*expected]
    assert all((seen[name] == expected[name]).all() for name in seen)
    text, other = (
        llama.generate("Once", seed=9, taps=["layers.*.attention.weights"]) for llama in (far, near)
    )
    for mine, its in zip(text.tokens, other.tokens, strict=True):
        assert all((mine.taps[name] == its.taps[name]).all() for name in its.taps)


def test_values_can_be_replaced(far, near):
    edit = {"layers.0.residual": lambda x: 2 * x, "layers.3.attention.weights": lambda x: x / 2}
    edit |= tinyllama.ablate("layers.2.attention.heads", heads=[1]) | {"norm": lambda x: x + 1}
    texts = []
    for llama in (far, near):
        with llama.edit(edit):
            texts.append(llama.generate("Once", seed=10))
    assert_same(*texts)
    assert texts[0] != near.generate("Once", seed=10)


def test_an_edit_that_fails_ends_its_pass_and_no_other(far, near):
    with (
        far.edit({"layers.2.residual": lambda x: x[:1]}),
        pytest.raises(TinyllamaError, match=r"edit of layers\.2"),
    ):
        far.logits("Once upon a time")
    assert (far.logits("Once") == near.logits("Once")).all()
    assert far.trace("Once", "layers.3.residual")


def test_probabilities_weights_and_the_lens_are_the_same(far, near):
    assert [token.prob for token in far.score(STORY)] == [token.prob for token in near.score(STORY)]
    for name in ("layers.0.attention.wq", "layers.3.feed_forward.w2", "norm", "tok_embeddings", "output"):
        assert (far.weight(name) == near.weight(name)).all()
    residual = near.trace("Once", "layers.1.residual")["layers.1.residual"]
    assert (far.unembed(residual) == near.unembed(residual)).all()
    assert (far.n_params, far.config) == (near.n_params, near.config)


def test_a_text_that_is_cancelled_ends_and_the_next_is_as_ever(far, near):
    flag = threading.Event()
    for _ in far.stream(STORY, n_predict=1000, seed=11, cancel=flag):
        flag.set()
    for seconds in (0.01, 0.03, 0.1):  # while the prompt is read
        flag.clear()
        timer = threading.Timer(seconds, flag.set)
        timer.start()
        assert far.generate(STORY * 40, batch_size=20, seed=11, cancel=flag).stop_reason is not None
    for name in ("embedding", "layers.2.residual", "norm"):  # while values are seen
        flag.clear()
        with pytest.raises(tinyllama.Cancelled):
            far.forward([1], far.new_cache(9), taps={name: lambda _: flag.set()}, cancel=flag)
    flag.clear()
    run = far.stream([STORY, "Once"], n_predict=200, seed=11, cancel=flag)
    for _ in run:
        flag.set()
    assert {text.stop_reason for text in run.generations} == {"cancelled"}
    assert_same(far.generate(STORY * 20, seed=11), near.generate(STORY * 20, seed=11))


def test_threads_share_it(far, near):
    texts, expected = {}, {seed: near.generate(STORY * 3, seed=seed, n_predict=20) for seed in range(4)}
    threads = [
        threading.Thread(target=lambda s=s: texts.update({s: far.generate(STORY * 3, seed=s, n_predict=20)}))
        for s in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == expected


def test_threads_see_values_at_the_same_time(far, near):
    name = "layers.3.residual"
    expected = near.trace(STORY, name)[name]
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(far.trace(STORY, name)[name])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 and all((values == expected).all() for values in seen)


def test_a_tap_that_would_wait_for_itself_is_refused(far):
    edit = far.edit({"layers.1.residual": lambda x: x + 0 * far.logits("Hi")[0, 0]})
    with edit, pytest.raises(TinyllamaError, match="can't run the model that it is in"):
        far.logits("Once")
    assert far.logits("Once").shape


def test_a_text_goes_on_from_one_that_was_cancelled_while_its_prompt_was_read(far, near):
    prompt = STORY * 30
    for n_turns in (1, 2, 4):
        run = far.stream([prompt + str(n_turns), "Once", prompt + "The"], batch_size=64, seed=15, n_predict=9)
        for _ in range(n_turns):
            run._schedule.turn()
        run.generations[0].cancelled = True
        texts = run.finish()
        assert texts[1:] == near.generate(["Once", prompt + "The"], seed=15, n_predict=9)
    fork = far.new_cache(9).fork()
    assert (far.forward([1, 2], fork) == near.forward([1, 2], near.new_cache(9))).all()


def test_what_is_wrong_with_a_call_ends_no_model(far, near):
    for wrong in ("layers.0", "layers.x.y", "nothing"):
        with pytest.raises(TinyllamaError, match="no weight is named"):
            far.weight(wrong)
    with pytest.raises(ValueError):
        far.unembed(np.zeros((1, 3), np.float32))
    with pytest.raises(IndexError):
        far.forward([10**6], far.new_cache(9))
    assert (far.logits("Once") == near.logits("Once")).all()


def test_a_client_that_was_closed_before_is_told(client):
    llama = load("small", scheduler=client.scheduler.address)
    llama._client.close()
    with pytest.raises(TinyllamaError, match=r"its Dask client has been closed|the scheduler is gone"):
        llama.generate("Once")
    llama.close()


def test_a_cache_cant_be_kept_in_a_file(far, tmp_path):
    with pytest.raises(TinyllamaError, match="several machines"):
        far.new_cache(10).save(tmp_path / "cache")
    with pytest.raises(TinyllamaError, match="several machines"):
        far.load_cache(tmp_path / "cache")


def test_a_context_that_doesnt_fit_is_refused(far):
    with pytest.raises(TinyllamaError, match="of memory"):
        far.generate("Once", ctx_size=2**40)


def caches(client) -> int:
    """How many caches all stages hold."""

    def n_caches(dask_worker) -> int:
        return sum(len(stage._caches) for stage in dask_worker.state.actors.values())

    return sum(client.run(n_caches).values())


def test_caches_that_nobody_needs_are_given_back(far, client):
    far.generate("Once", remember=False, n_predict=2)
    before = caches(client)
    for _ in range(5):
        far.generate("Once", remember=False, n_predict=2)
    assert caches(client) <= before


def test_closing_gives_the_memory_back(client):
    def actors(dask_worker) -> int:
        return len(dask_worker.state.actors)

    before = client.run(actors)
    llama = load("small", scheduler=client)
    assert sum(client.run(actors).values()) == sum(before.values()) + len(llama.shares)
    llama.close()
    llama.close()
    deadline = time.monotonic() + 20
    while client.run(actors) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.run(actors) == before
    with pytest.raises(TinyllamaError, match="closed"):
        llama.generate("Once")


def test_a_worker_that_is_killed_ends_the_text_with_a_line(client):
    llama = load("small", scheduler=client, split=[2, 2])
    pids, (_, second) = client.run(os.getpid), llama.shares
    text = llama.stream("Once", n_predict=1000, seed=12)
    next(text)
    os.kill(pids[second.address], signal.SIGKILL)
    with pytest.raises(TinyllamaError, match=rf"{second.address} .* is gone, and with it layers 2 to 3"):
        for _ in text:
            pass
    with pytest.raises(TinyllamaError, match="is gone"):
        llama.generate("Once")
    client.wait_for_workers(2)  # Dask starts another one
    again = load("small", scheduler=client)
    assert again.generate("Once", seed=13)
    again.close()


def test_a_worker_that_is_killed_while_it_loads_is_told(client):
    pids = client.run(os.getpid)

    def kill(layers, *_):
        for address, pid in pids.items():
            if layers.startswith(f"layers 2 to 3 on worker {address} "):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(TinyllamaError, match=r"worker .* is gone, and with it layers 2 to 3 of small"):
        load("small", scheduler=client, split=[2, 2], announce=kill)
    client.wait_for_workers(2)
