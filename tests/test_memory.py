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
from tinyllama.backends import available, get_backend
from tinyllama.commands import main
from tinyllama.commands.convert import convert, quantize
from tinyllama.commands.inspect import inspect
from tinyllama.config import PRESETS, Config
from tinyllama.errors import TinyllamaError
from tinyllama.formats import ggml, headers, open_checkpoint
from tinyllama.formats.parts import share
from tinyllama.formats.pre_tokenizers import words_of
from tinyllama.machine import limits
from tinyllama.model import tap_shapes
from tinyllama.quant import TYPES
from tinyllama.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary, token_texts

long = pytest.mark.long
MILLION = 10**6
HUGE = [10**9, 2**31, 2**63, 10**30, 10**400]
backends = pytest.mark.parametrize("backend", [name for name, reason in available().items() if not reason])


@pytest.fixture
def small():
    return tinyllama.load("small")


# --- contexts and prompts -------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", HUGE)
def test_a_context_larger_than_memory_is_refused_before_it_is_made(small, n_ctx):
    before = limits.peak_memory()
    for run in (lambda: small.generate("Once", ctx_size=n_ctx), lambda: small.new_cache(n_ctx)):
        with pytest.raises(
            TinyllamaError, match=r"a context of \d+ tokens needs .* of memory, and .* are free"
        ):
            run()
    assert limits.peak_memory() < before + 10**7


@pytest.mark.parametrize("n_ctx", HUGE)
def test_the_command_line_says_so_in_a_line(n_ctx, capsys):
    assert main(["generate", "-p", "Once", "-c", str(n_ctx)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tinyllama: ")]
    assert "needs" in line and "are free" in line


def test_a_text_that_is_too_long_is_refused_without_cutting_it_into_tokens(small, monkeypatch):
    monkeypatch.setattr(small.tokenizer, "encode", lambda *_, **__: pytest.fail("it was cut"))
    with pytest.raises(TinyllamaError, match=r"the prompt has 5000000 characters, ctx_size is 2048 tokens"):
        small.generate("a word " * (5 * MILLION // 7) + "a wor")


def test_a_text_that_may_fit_is_never_refused_for_its_length(small):
    longest = max(small.tokenizer.vocabulary.pieces, key=len).replace("▁", " ")
    assert small.generate(longest * 200, ctx_size=250, n_predict=1)


def test_a_million_tokens_are_refused_with_both_numbers(small, free_memory):
    free_memory(2 * 10**9)
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


def test_all_values_of_a_long_prompt_are_refused_and_some_of_them_kept(small, free_memory):
    free_memory(3 * 10**8)
    with pytest.raises(TinyllamaError, match=r"a context of 800 tokens, 800 .* needs .* [MG]B of memory"):
        small.trace([5] * 800)
    assert len(small.trace([5] * 800, "*residual")) == small.config.n_layers


@backends
def test_what_a_tap_is_shown_is_known_beforehand(backend):
    taps = tinyllama.load("small", backend).trace("Once upon a time")
    shapes = tap_shapes(tinyllama.load("small").config, len(taps["embedding"]))
    assert {name: array.shape for name, array in taps.items()} == shapes
    assert list(taps) == list(shapes), "in the same order"


@backends
def test_the_cache_takes_what_was_reckoned_once_it_is_full_and_less_before(backend):
    llama = tinyllama.load("small", backend)
    cache = llama.new_cache(300)
    assert cache.nbytes == 0
    llama.forward([5] * 10, cache)
    assert 0 < cache.nbytes < llama.backend.cache_bytes(llama.config, 300)
    llama.forward([5] * 290, cache)
    assert cache.nbytes == llama.backend.cache_bytes(llama.config, 300)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "-p", "a b " * 50_000],
        ["bench", "--prefill", "1000000000"],
        ["bench", "-n", "1000000000"],
        ["bench", "--shape", "65B"],
        ["perplexity", "-f", __file__, "-c", "1000000000"],
        ["imatrix", "-f", __file__, "-c", "1000000000"],
    ],
)
def test_every_command_refuses_in_a_line_what_is_too_large(arguments, free_memory, capsys):
    free_memory(2 * 10**9)
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("tinyllama: ") and ("are free" in line or "n_predict" in line or "window" in line)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, -1, MILLION])
def test_a_number_of_threads_out_of_range_is_refused_by_its_name(threads):
    with pytest.raises(TinyllamaError, match="threads"):
        tinyllama.generate("Once", threads=threads)


@pytest.mark.parametrize("setting", [{"temp": 1e300}, {"temp": -1e-300}, {"repeat_penalty": 1e300}])
def test_a_setting_far_out_of_range_is_refused_by_its_name(setting):
    with pytest.raises(TinyllamaError, match=next(iter(setting))):
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


# --- files ----------------------------------------------------------------------------------------


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
    shapes = {name: share(name, shape, 8) for name, shape in config.tensor_shapes().items()}
    state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
    for part in range(8):
        with torch.serialization.skip_data():
            torch.save(state, folder / f"consolidated.{part:02}.pth")
    return folder


def write_ggml(path, config, vocabulary, type):
    """All parts of a ggml file of zeros, of which nothing but what stands before the zeros is on the disk."""
    header = headers.ggml_header(config, token_texts(vocabulary), ggml.FTYPES[type])
    for number in range(8):
        with ggml.part_path(path, number).open("wb") as file:
            file.write(header)
            for name, shape in config.tensor_shapes().items():
                kind, shape = "f32" if len(shape) == 1 else type, share(name, shape, 8)
                file.write(headers.ggml_record(name, kind, shape))
                file.seek(TYPES[kind].nbytes(shape), os.SEEK_CUR)
            file.truncate()
    return path


def write_gguf(path, config, vocabulary, type="f16"):
    """The same as GGUF."""
    infos = [
        (name, "f32" if len(shape) == 1 else type, shape) for name, shape in config.tensor_shapes().items()
    ]
    header, _, size = headers.gguf_header(config, vocabulary, infos, TYPES[type].file_type, "zeros")
    path.write_bytes(header)
    os.truncate(path, size)
    return path


@pytest.fixture(scope="module")
def huge_files(huge_folder):
    """{format: the path of its 65B}"""
    checkpoint = open_checkpoint(huge_folder)
    model = checkpoint.config, checkpoint.vocabulary
    return {
        "pth": huge_folder,
        "ggml": write_ggml(huge_folder / "f16.bin", *model, "f16"),
        "gguf": write_gguf(huge_folder / "f16.gguf", *model),
        "ggml in 4 bits": write_ggml(huge_folder / "q4_0.bin", *model, "q4_0_2023_planar"),
        "gguf in 4 bits": write_gguf(huge_folder / "q4_0.gguf", *model, "q4_0"),
    }


@pytest.mark.parametrize("format", ["pth", "ggml", "gguf", "ggml in 4 bits", "gguf in 4 bits"])
def test_65B_is_shown_but_not_loaded_where_it_does_not_fit(huge_files, format, free_memory):
    assert inspect(huge_files[format])["n_params"] == 65_285_660_672
    free_memory(2 * 10**9)
    before = limits.used_memory()
    with pytest.raises(TinyllamaError, match=r"needs (1\d\d|[34]\d)\.\d GB of memory, and 2.0 GB are free"):
        tinyllama.load(huge_files[format])
    assert limits.used_memory() < before + 2 * 10**8


def test_65B_is_converted_and_quantized_only_where_the_disk_has_the_room(huge_files, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(TinyllamaError, match=r"needs 130.6 GB of disk in .*, and 1.0 GB are free"):
        convert(huge_files["pth"], 1, tmp_path / "f16.bin")
    with pytest.raises(TinyllamaError, match=r"needs 36\.\d GB of disk in .*, and 1.0 GB are free"):
        quantize(huge_files["gguf"], tmp_path / "q4_0", "q4_0")
    assert not list(tmp_path.iterdir())


def million_pieces(kind):
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = "abcdefghijklmnopqrstuvwxyz01234"
    words = chain.from_iterable(product(alphabet, repeat=length) for length in range(1, 6))
    pieces = tuple(base) + tuple(map("".join, islice(words, MILLION - len(base))))
    types = (UNKNOWN, CONTROL, CONTROL) + (BYTE,) * 256 + (NORMAL,) * (MILLION - len(base))
    if kind == "sentencepiece":
        return Vocabulary(kind, pieces, tuple(-float(i) for i in range(MILLION)), types)
    types = tuple(CONTROL if type != NORMAL else NORMAL for type in types)
    merges = tuple(f"{piece[:-1]} {piece[-1]}" for piece in pieces[len(base) :] if len(piece) > 1)
    return Vocabulary(
        kind,
        pieces,
        types=types,
        merges=merges,
        add_space_prefix=kind == "sentencepiece",
        **words_of("gpt-2"),
    )


def write_million(path, kind):
    """A model of zeros with a million pieces."""
    config = Config(32, 1, 2, MILLION, hidden_dim=64, n_kv_heads=2, multiple_of=32)
    return write_gguf(path, config, million_pieces(kind))


PEAK = """
import sys, json, tinyllama
from tinyllama import llama
from tinyllama.machine import limits
import sentencepiece, tokenizers, tqdm.auto
before = limits.used_memory()
model = tinyllama.load(sys.argv[1], sys.argv[2])
text = model.generate(sys.argv[3] * int(sys.argv[4]), n_predict=4, seed=1, ctx_size=int(sys.argv[5]))
print(json.dumps([limits.peak_memory() - before, len(text.tokens)]))
"""


def told(path, backend, n_ctx):
    """Bytes that running a model is said to take."""
    checkpoint = open_checkpoint(path)
    return sum(get_backend(backend).memory(checkpoint.config, checkpoint.tensors, n_ctx).values())


def peak(path, backend, word, n_words, n_ctx):
    """Bytes that loading a model and continuing a prompt really take, and the tokens of the text."""
    command = [sys.executable, "-c", PEAK, str(path), backend, word, str(n_words), str(n_ctx)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.skipif(available()["c"] is not None, reason="the C backend was not built")
def test_a_million_pieces_are_loaded_in_the_memory_that_is_told(tmp_path):
    million = write_million(tmp_path / "million.gguf", "sentencepiece")
    reckoned = told(million, "c", 16)
    taken, n_tokens = peak(million, "c", "abc", 1, 16)
    assert n_tokens == 4
    assert 0.4 * reckoned < taken < reckoned


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
    reckoned = told(smollm2_file, backend, 1024)
    taken, _ = peak(smollm2_file, backend, "the moon and ", 330, 1024)
    in_file = smollm2_file.stat().st_size if backend == "numpy" else 0  # the system's, which can take it back
    assert 0.75 * reckoned < taken < 1.1 * reckoned + in_file
