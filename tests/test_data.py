"""The small model in data/: its files are whole, in Meta's layout, and as good as data/README.md says."""

import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

DATA = Path(__file__).parent.parent / "data"
SMALL = DATA / "small"
README = (DATA / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads that share their cores with other programs mostly wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def train_small():
    spec = importlib.util.spec_from_file_location("train_small", DATA / "train_small.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick(train_small, monkeypatch):
    """A smaller model, trained on less at once: bf16 is slow on a CPU that has no instructions for it."""
    monkeypatch.setattr(train_small, "PARAMS", train_small.PARAMS | {"dim": 64, "n_heads": 2, "n_layers": 2})
    monkeypatch.setattr(train_small, "BATCH", 2)
    return train_small.PARAMS


@pytest.fixture(scope="module")
def params():
    return json.loads((SMALL / "params.json").read_text())


@pytest.fixture(scope="module")
def weights():
    return torch.load(SMALL / "consolidated.00.pth", weights_only=True)


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(SMALL / "tokenizer.model"))


@pytest.fixture(scope="module")
def held_out():
    return (DATA / "held_out.txt").read_text(encoding="utf-8").strip().split("\n\n")


def expected_shapes(params):
    """Meta's tensor names in Meta's order, each with its shape."""
    dim, multiple_of, vocab_size = params["dim"], params["multiple_of"], params["vocab_size"]
    hidden_dim = (2 * (4 * dim) // 3 + multiple_of - 1) // multiple_of * multiple_of
    shapes = {"tok_embeddings.weight": (vocab_size, dim), "norm.weight": (dim,)}
    shapes["output.weight"] = (vocab_size, dim)
    for layer in range(params["n_layers"]):
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"layers.{layer}.attention.{name}.weight"] = (dim, dim)
        shapes[f"layers.{layer}.feed_forward.w1.weight"] = (hidden_dim, dim)
        shapes[f"layers.{layer}.feed_forward.w2.weight"] = (dim, hidden_dim)
        shapes[f"layers.{layer}.feed_forward.w3.weight"] = (hidden_dim, dim)
        shapes[f"layers.{layer}.attention_norm.weight"] = (dim,)
        shapes[f"layers.{layer}.ffn_norm.weight"] = (dim,)
    return shapes


def assert_metas_layout(weights, params):
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected_shapes(params)
    assert list(weights) == list(expected_shapes(params))
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert all(weight.is_contiguous() and weight.isfinite().all() for weight in weights.values())


def test_the_readme_gives_the_size_and_checksum_of_every_file_that_ships():
    rows = re.findall(r"^\| `([\w./]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$", README, re.MULTILINE)
    shipped = {path.relative_to(DATA).as_posix() for path in [*SMALL.iterdir(), DATA / "held_out.txt"]}
    assert {name for name, _, _ in rows} == shipped
    for name, n_bytes, checksum in rows:
        content = (DATA / name).read_bytes()
        assert len(content) == int(n_bytes.replace(",", "")), name
        assert hashlib.sha256(content).hexdigest() == checksum, name


def test_the_small_model_takes_at_most_10_mb_and_the_held_out_text_200_kb():
    assert sum(path.stat().st_size for path in SMALL.iterdir()) <= 10_000_000
    assert (DATA / "held_out.txt").stat().st_size <= 200_000


def test_the_checkpoint_has_metas_keys_shapes_and_f16(weights, params, train_small):
    assert set(params) == {"dim", "multiple_of", "n_heads", "n_layers", "norm_eps", "vocab_size"}
    assert_metas_layout(weights, params)
    assert params == train_small.PARAMS
    assert 1_000_000 <= sum(weight.numel() for weight in weights.values()) <= 4_000_000


def test_each_half_of_a_matrix_still_has_whole_quantization_blocks(weights, params):
    matrices = [weight for weight in weights.values() if weight.ndim == 2]
    assert all(length % 64 == 0 for weight in matrices for length in weight.shape)
    assert params["n_heads"] % 2 == 0 and params["dim"] // params["n_heads"] in range(32, 65)


def test_token_ids_are_where_llama_has_them(tokenizer, params):
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(3 + byte) for byte in range(256)] == [f"<0x{b:02X}>" for b in range(256)]
    assert all(tokenizer.is_byte(3 + byte) for byte in range(256)) and not tokenizer.is_byte(259)
    assert tokenizer.vocab_size() == params["vocab_size"]
    assert tokenizer.piece_to_id(".") > 258


@pytest.mark.parametrize(
    "text",
    ["Once upon a time", " two  spaces ", "a\nb\n\nc\t", "🦙 été “1984” \u200d", "", "\x7f", "x" * 50],
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids


def test_each_digit_and_a_newline_are_one_token(tokenizer):
    assert len(tokenizer.encode("x1984")) == len(tokenizer.encode("x")) + 4
    assert tokenizer.encode("a\nb").count(3 + ord("\n")) == 1


def test_the_model_predicts_the_held_out_text_as_well_as_the_readme_says(
    train_small, params, tokenizer, held_out
):
    model = train_small.Llama(**params)
    train_small.load_checkpoint(model, SMALL / "consolidated.00.pth")
    stories = [(story, np.array([1, *tokenizer.encode(story), 2])) for story in held_out[::4]]
    nats, _, n_bytes = train_small.evaluate(model, stories)
    stated = re.search(r"^\| `held_out.txt`, every fourth story.* \|.*\| (\d\.\d+) \|$", README, re.MULTILINE)
    assert nats / math.log(2) / n_bytes == pytest.approx(float(stated[1]), abs=0.002)


def test_no_story_of_the_held_out_text_was_trained_on(train_small, held_out, shared_data):
    sources = [train_small.read_stories(shared_data / "text" / name) for name in train_small.SOURCES.values()]
    trained_on = {story for training, _ in sources for story in training}
    left_out = {story for _, held_out in sources for story in held_out}
    assert not trained_on & set(held_out)
    assert set(held_out) <= left_out


def test_cleaning_joins_wrapped_lines_and_keeps_paragraphs(train_small):
    wrapped = (
        "“Who’s there?”\n\n" + "The wolf knocked\nat the door  of the  house.\n\n\nNobody —\nnobody came…\n"
    )
    assert train_small.clean(wrapped) == (
        '"Who\'s there?"\nThe wolf knocked at the door of the house.\nNobody -- nobody came...'
    )
    long_lines = "\n".join(["The wolf went on knocking at the door of the house. " * 3] * 2)
    assert train_small.clean(long_lines).count("\n") == 1


def test_training_one_step_writes_a_checkpoint_in_metas_layout(
    train_small, quick, held_out, tmp_path, capsys
):
    for part, name in enumerate(train_small.SOURCES.values()):
        stories = "".join(f"{story}\n<|endoftext|>\n" for story in held_out[part::2])
        (tmp_path / name).write_text(stories, encoding="utf-8")
    out, state = tmp_path / "small", tmp_path / "state"
    train_small.main(["--text", str(tmp_path), "--out", str(out), "--steps", "1", "--state", str(state)])
    names = {path.name for path in out.iterdir()}
    assert names == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    params = json.loads((out / "params.json").read_text())
    assert params == quick
    assert_metas_layout(torch.load(out / "consolidated.00.pth", weights_only=True), params)
    assert re.search(r"held out, both: \d\.\d+ nats/token, \d\.\d+ bits/byte", capsys.readouterr().out)


def test_an_interrupted_training_goes_on_with_the_state_it_saved(train_small, quick, tmp_path):
    torch.manual_seed(1)
    model = train_small.Llama(**quick)
    optimizers = train_small.make_optimizers(model)
    train_small.loss_of(model, torch.randint(0, quick["vocab_size"], (1, 9))).backward()
    for optimizer in optimizers:
        optimizer.step()
    train_small.save_state(tmp_path / "state", model, optimizers, step=7, seconds=1.5, best=3.25)
    other = train_small.Llama(**quick)
    counters = train_small.load_state(tmp_path / "state", other, train_small.make_optimizers(other))
    assert counters == (7, 1.5, 3.25)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name
