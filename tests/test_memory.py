"""What is larger than memory is refused with both figures before it is made; what fits is reckoned."""

import json
import os
import subprocess
import sys
from itertools import chain, islice, product
from types import SimpleNamespace

import pytest
import torch

import tinyllama
from tinyllama.commands import cli, convert
from tinyllama.machine import limits as resources
from tinyllama.backends import available
from tinyllama.config import PRESETS, Config
from tinyllama.errors import TinyllamaError
from tinyllama.formats import gguf, open_checkpoint
from tinyllama.commands.inspect import inspect
from tinyllama.memory import memory_needed
from tinyllama.model import tap_shapes
from tinyllama.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

long = pytest.mark.long
MILLION = 10**6
HUGE = [10**9, 2**31, 2**63, 10**30, 10**400]
backends = pytest.mark.parametrize("backend", [name for name, reason in available().items() if not reason])


@pytest.fixture
def small():
    return tinyllama.load("small")


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 2 * 10**9)


# --- contexts and prompts -------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", HUGE)
def test_a_context_larger_than_memory_is_refused_before_it_is_made(small, n_ctx):
    before = resources.peak_memory()
    for run in (lambda: small.generate("Once", ctx_size=n_ctx), lambda: small.new_cache(n_ctx)):
        with pytest.raises(
            TinyllamaError, match=r"a context of \d+ tokens needs .* of memory, and .* are free"
        ):
            run()
    assert resources.peak_memory() < before + 10**7


@pytest.mark.parametrize("n_ctx", HUGE)
def test_the_command_line_says_so_in_a_line(n_ctx, capsys):
    assert cli.main(["generate", "-p", "Once", "-c", str(n_ctx)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tinyllama: ")]
    assert "needs" in line and "are free" in line


def test_a_text_that_is_too_long_is_refused_without_cutting_it_into_tokens(small, monkeypatch):
    monkeypatch.setattr(small.tokenizer, "encode", lambda *_, **__: pytest.fail("it was cut"))
    with pytest.raises(TinyllamaError, match=r"the prompt has 5000000 characters, ctx_size is 2048 tokens"):
        small.generate("a word " * (5 * MILLION // 7) + "a wor")


def test_a_text_that_may_fit_is_never_refused_for_its_length(small):
    longest = max(small.tokenizer.vocabulary.pieces, key=len).replace("▁", " ")
    assert small.generate(longest * 200, ctx_size=250, n_predict=1)


def test_a_million_tokens_are_refused_with_both_numbers(small, little_memory):
    ids = [5] * MILLION
    with pytest.raises(TinyllamaError, match="the prompt has 1000000 tokens, ctx_size is 2048"):
        small.generate(ids)
    for run in (
        small.logits,
        small.score,
        small.trace,
        lambda ids: small.generate(ids, ctx_size=2 * MILLION),
    ):
        with pytest.raises(TinyllamaError, match=r"1000000 of|000 tokens needs .* are free"):
            run(ids)


def test_the_tokens_of_a_long_text_are_refused_where_they_do_not_fit(small, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 10**8)
    with pytest.raises(TinyllamaError, match=r"cutting 1000000 characters into tokens needs 200 MB"):
        small.tokenizer.encode("a" * MILLION)


def test_all_values_of_a_long_prompt_are_refused_and_some_of_them_kept(small, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 3 * 10**8)
    with pytest.raises(TinyllamaError, match=r"keeping 67 kinds of values of 800 tokens needs .* GB|MB"):
        small.trace([5] * 800)
    assert len(small.trace([5] * 800, "*residual")) == small.config.n_layers


@backends
def test_what_a_tap_is_shown_is_known_beforehand(backend):
    taps = tinyllama.load("small", backend).trace("Once upon a time")
    shapes = tap_shapes(tinyllama.load("small").config, len(taps["embedding"]))
    assert {name: array.shape for name, array in taps.items()} == shapes
    assert list(taps) == list(shapes), "in the same order"


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "-p", "a b " * 50_000],
        ["bench", "--prefill", "1000000000"],
        ["bench", "-n", "1000000000"],
        ["bench", "--shape", "65B"],
        ["perplexity", "-f", __file__, "-c", "1000000000"],
    ],
)
def test_every_command_refuses_in_a_line_what_is_too_large(arguments, little_memory, capsys):
    assert cli.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("tinyllama: ") and ("are free" in line or "n_predict" in line or "window" in line)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"temp": float("nan")},
        {"temp": float("inf")},
        {"temp": -1e-300},
        {"temp": 1e300},
        {"repeat_penalty": 1e300},
        {"repeat_penalty": 1e-300},
        {"seed": -2},
        {"n_predict": -2},
        {"batch_size": 0},
        {"threads": 0},
        {"threads": -1},
        {"threads": MILLION},
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(setting):
    (name,) = setting
    with pytest.raises(TinyllamaError, match=name):
        tinyllama.generate("Once", **setting)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "setting",
    [
        {"n_predict": 10**9},
        {"top_k": 10**9},
        {"temp": 1e-300},
        {"temp": 1e30},
        {"repeat_penalty": 1e30},
        {"repeat_penalty": 1e-30},
        {"repeat_last_n": 10**9},
        {"batch_size": 10**9},
        {"seed": 10**100},
    ],
)
def test_a_setting_at_the_far_end_of_its_range_works(small, setting):
    text = small.generate("Once upon", **({"n_predict": 3, "ctx_size": 16, "seed": 1} | setting))
    assert text.tokens and text.stop_reason in ("length", "context", "eos")


def test_no_token_at_all_can_be_asked_for(small):
    assert small.generate("Once upon", n_predict=0) == ""


# --- limits that others set -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        ("0::/box", {"box/memory.max": "1000", "box/memory.current": "900"}, 100),
        (
            "0::/",
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "file 9\ninactive_file 50"},
            150,
        ),
        ("0::/a/b", {"a/memory.max": "500", "a/memory.current": "100", "a/b/memory.max": "max"}, 400),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "0"}, 700),
        ("4:memory:/x", {"memory/memory.limit_in_bytes": "70", "memory/memory.usage_in_bytes": "80"}, 0),
    ],
)
def test_a_container_s_limit_counts_less_what_is_in_use(line, files, left, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(f"7:cpu:/\n{line}\n")
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    monkeypatch.setattr(resources, "OWN_CGROUPS", tmp_path / "own")
    assert resources.available_memory() == left


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't hold to this limit")
def test_a_limit_of_the_address_space_counts():
    code = (
        "import resource, psutil, tinyllama\n"
        "llama = tinyllama.load('small', threads=1)\n"
        "used = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, used + 10**8))\n"
        "llama.generate('Once', ctx_size=100_000)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a context of 100000 tokens needs 410 MB of memory, and 1" in result.stderr.splitlines()[-1]


# --- files ----------------------------------------------------------------------------------------


def sparse(outputs, *_):
    """Files of full size that hold only their headers."""
    for output in outputs:
        with output.path.open("wb") as file:
            file.truncate(output.size)
            for offset, data in output.headers:
                file.seek(offset)
                file.write(data)
    return [output.path for output in outputs]


@pytest.fixture(scope="module")
def huge_folder(tmp_path_factory, shared_data):
    """Meta's 65B in 8 parts, 131 GB, of which almost nothing is on the disk."""
    folder, config = tmp_path_factory.mktemp("65B"), PRESETS["65B"]
    if sys.platform == "darwin":
        pytest.skip("macOS' disks have no sparse files of this size")
    (folder / "tokenizer.model").symlink_to(shared_data / "llama_tokenizer" / "tokenizer.model")
    params = {"dim": config.dim, "n_heads": config.n_heads, "n_layers": config.n_layers}
    params |= {"multiple_of": config.multiple_of, "norm_eps": config.norm_eps, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    state = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 2:
            by_columns = name.startswith("tok_embeddings") or name.endswith(("wo.weight", "w2.weight"))
            shape = (shape[0], shape[1] // 8) if by_columns else (shape[0] // 8, shape[1])
        state[name] = torch.empty(shape, dtype=torch.float16)
    for part in range(8):
        with torch.serialization.skip_data():
            torch.save(state, folder / f"consolidated.{part:02}.pth")
    return folder


@pytest.fixture(scope="module")
def huge_files(huge_folder):
    """{format: the path of its 65B}"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "write", sparse)
        ggml, *_ = convert.convert(huge_folder, 1)
        (gguf,) = convert.convert(huge_folder, 1, format="gguf")
        small_ggml, *_ = convert.quantize(ggml, huge_folder / "q4_0.bin", "q4_0")
    return {"pth": huge_folder, "ggml": ggml, "gguf": gguf, "ggml in 4 bits": small_ggml}


@pytest.mark.parametrize(
    "format", ["pth", "ggml in 4 bits", *(pytest.param(name, marks=long) for name in ("ggml", "gguf"))]
)
def test_65B_is_shown_but_not_loaded_where_it_does_not_fit(huge_files, format, little_memory):
    assert inspect(huge_files[format])["n_params"] == 65_285_660_672
    before = resources.used_memory()
    with pytest.raises(TinyllamaError, match=r"needs (1\d\d|4\d)\.\d GB of memory, and 2.0 GB are free"):
        tinyllama.load(huge_files[format])
    assert resources.used_memory() < before + 2 * 10**8


def test_65B_is_converted_and_quantized_only_where_the_disk_has_the_room(huge_files, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(TinyllamaError, match=r"needs 130.6 GB of disk in .*, and 1.0 GB are free"):
        convert.convert(huge_files["pth"], 1, tmp_path / "f16.bin")
    with pytest.raises(TinyllamaError, match=r"needs 36\.\d GB of disk in .*, and 1.0 GB are free"):
        convert.quantize(huge_files["gguf"], tmp_path / "q4_0", "q4_0")
    assert not list(tmp_path.iterdir())


def million_pieces(kind):
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = "abcdefghijklmnopqrstuvwxyz01234"
    words = chain.from_iterable(product(alphabet, repeat=length) for length in range(1, 6))
    pieces = tuple(base) + tuple(map("".join, islice(words, MILLION - len(base))))
    types = (UNKNOWN, CONTROL, CONTROL) + (BYTE,) * 256 + (NORMAL,) * (MILLION - len(base))
    if kind == "sentencepiece":
        return Vocabulary(kind, None, pieces, tuple(-float(i) for i in range(MILLION)), types)
    types = tuple(CONTROL if type != NORMAL else NORMAL for type in types)
    merges = tuple(f"{piece[:-1]} {piece[-1]}" for piece in pieces[len(base) :] if len(piece) > 1)
    return Vocabulary(kind, None, pieces, (), types, merges, "gpt-2")


def write_million(path, kind):
    """A model of zeros with a million pieces."""
    config = Config(32, 1, 2, MILLION, hidden_dim=64, n_kv_heads=2, multiple_of=32)
    shapes = config.tensor_shapes().items()
    infos = [(name, "f32" if len(shape) == 1 else "f16", shape) for name, shape in shapes]
    header, _, size = gguf.header(config, million_pieces(kind), infos, 1, "million")
    path.write_bytes(header)
    os.truncate(path, size)


PEAK = """
import sys, json, tinyllama
from tinyllama import llama, resources
import sentencepiece, tokenizers, tqdm.auto
before = resources.used_memory()
model = tinyllama.load(sys.argv[1], sys.argv[2])
text = model.generate(sys.argv[3] * int(sys.argv[4]), n_predict=4, seed=1, ctx_size=int(sys.argv[5]))
print(json.dumps([resources.peak_memory() - before, len(text.tokens)]))
"""


def peak(path, backend, word, n_words, n_ctx):
    """Bytes that loading a model and continuing a prompt really take, and the tokens of the text."""
    command = [sys.executable, "-c", PEAK, str(path), backend, word, str(n_words), str(n_ctx)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.skipif(available()["c"] is not None, reason="the C backend was not built")
def test_a_million_pieces_are_loaded_in_the_memory_that_is_told(tmp_path):
    million = tmp_path / "million.gguf"
    write_million(million, "sentencepiece")
    told = sum(memory_needed(open_checkpoint(million), "c", 16).values())
    taken, n_tokens = peak(million, "c", "abc", 1, 16)
    assert n_tokens == 4
    assert 0.4 * told < taken < told


@long
def test_a_million_pieces_with_as_many_merges_are_refused(tmp_path):
    write_million(tmp_path / "million.gguf", "bpe")
    with pytest.raises(TinyllamaError, match=r"million\.gguf: .*tokenizer\.ggml\.merges .* too many"):
        open_checkpoint(tmp_path / "million.gguf")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of other systems counts other things")
@pytest.mark.parametrize("backend", ["c", pytest.param("numpy", marks=long)])
def test_what_is_told_of_a_real_model_is_what_it_takes(backend, smollm2_file):
    if available()[backend]:
        pytest.skip(available()[backend])
    told = memory_needed(open_checkpoint(smollm2_file), backend, 1024)
    taken, _ = peak(smollm2_file, backend, "the moon and ", 330, 1024)
    in_file = smollm2_file.stat().st_size if backend == "numpy" else 0  # the system's, which can take it back
    assert 0.75 * sum(told.values()) < taken < 1.1 * sum(told.values()) + in_file
