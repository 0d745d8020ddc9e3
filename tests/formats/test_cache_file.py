"""Prompt caches: what is saved goes on with the same bits, and whatever else is refused in one line."""

import json
import shutil
import struct
import sys
import zlib
from itertools import count

import checkpoints
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import tinyllama
from tinyllama.backends import available
from tinyllama.errors import Cancelled, TinyllamaError, cancellable
from tinyllama.formats import cache_file, open_checkpoint
from tinyllama.formats.cache_file import SAMPLE, SAMPLES, identity
from tinyllama.machine.download import small_folder
from tinyllama.ops import FEW, KVCache

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "
BACKENDS = [name for name, reason in available().items() if not reason]


@pytest.fixture(params=BACKENDS)
def llama(request):
    return tinyllama.load("small", request.param, 2)


@pytest.fixture
def small():
    return tinyllama.load("small", "numpy", 2)


def filled(llama, n_tokens: int = 40) -> KVCache:
    """A cache of a story, read at once, and of three tokens more that were read alone."""
    ids, cache = llama.tokens(STORY * 3)[:n_tokens], llama.new_cache(n_tokens + 10)
    llama.forward(ids[:-3], cache)
    for token in ids[-3:]:
        llama.forward([token], cache)
    return cache


@pytest.fixture
def path(small, tmp_path):
    filled(small).save(tmp_path / "prompt.cache")
    return tmp_path / "prompt.cache"


def test_a_cache_of_edited_values_is_not_saved(small, tmp_path):
    with small.edit({"layers.0.residual": lambda array: 2 * array}):
        cache = filled(small)
    with pytest.raises(TinyllamaError, match=r"what `Llama\.edit` has changed"):
        cache.save(tmp_path / "x")
    assert not [*tmp_path.iterdir()]


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_a_cache_from_a_file_goes_on_with_the_same_bits(llama, tmp_path, mapped):
    cache = filled(llama)
    cache.save(tmp_path / "a")
    again = llama.load_cache(tmp_path / "a", mapped=mapped)
    assert (again.ids, again.n_many) == (cache.ids, cache.n_many) and again.n_many == len(cache) - 3
    again = again.fork() if mapped else again
    for tokens in ([5, 6, 7], [8]):
        assert np.array_equal(llama.forward(tokens, again), llama.forward(tokens, cache))


def test_the_arrays_of_a_mapped_cache_are_the_file(small, path):
    cache = small.load_cache(path, mapped=True)
    assert not any(array.flags.writeable for array in (*cache.keys, *cache.values))
    assert small.load_cache(path).keys[0].flags.writeable


def test_a_beginning_is_saved_alone(small, tmp_path):
    cache = filled(small)
    cache.save(tmp_path / "a", 20)
    again = small.load_cache(tmp_path / "a")
    assert (again.ids, again.n_many) == (cache.ids[:20], 20)
    assert np.array_equal(again.values[1][:, :20], cache.values[1][:, :20])


def test_the_safetensors_package_opens_it_and_says_what_it_is_of(small, path):
    cache = small.load_cache(path)
    with safe_open(path, "np") as file:
        assert file.get_tensor("ids").tolist() == cache.ids
        assert np.array_equal(file.get_tensor("layers.1.keys"), cache.keys[1][:, : len(cache)])
        about = file.metadata()
    assert about["model"] == identity(small.checkpoint) and about["name"] == "small"
    assert (about["n_tokens"], about["n_many"], about["dtype"]) == ("40", "37", "float32")


def test_there_is_room_for_as_many_as_a_run_has_or_as_asked_for(small, path):
    assert small.load_cache(path).n_ctx == min(small.config.max_seq_len, 2048)
    assert small.load_cache(path, 40).n_ctx == 40
    checkpoints.refused(lambda: small.load_cache(path, 39), str(path), "holds 40 tokens", "say n_ctx=40")
    assert len(small.load_cache(path, 1, mapped=True).fork(n_ctx=50)) == 40


def test_a_prompt_goes_on_from_a_file_with_the_bits_that_it_gets_alone(llama, tmp_path):
    ids = llama.tokens(STORY * 2)
    fresh = llama.generate(ids, n_predict=8, seed=1, remember=False)
    filled(llama, 60).save(tmp_path / "a")  # of which 57 were computed among many
    llama.remembered.clear()
    llama.remembered.keep(llama.load_cache(tmp_path / "a", 1, mapped=True), whole=True)
    text = llama.generate(ids, n_predict=8, seed=1)
    assert text.timings.n_remembered == min(len(ids) - FEW - 1, 57) > 0
    if llama.backend.name == "c":
        assert text.probs == fresh.probs
    assert text == fresh


# --- which model ----------------------------------------------------------------------------------


def test_a_copy_of_a_model_is_the_same_model_wherever_and_whenever(small, tmp_path):
    shutil.copytree(small_folder(), tmp_path / "elsewhere", copy_function=shutil.copy)
    assert identity(open_checkpoint(tmp_path / "elsewhere")) == identity(small.checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("models") / "folder")


def test_each_quantization_of_a_model_and_other_weights_are_another_model(folder, tmp_path):
    from tinyllama.commands.convert import convert, quantize

    convert(folder, 1, tmp_path / "f16.gguf", "gguf")
    for type in ("q4_0", "q8_0", "q5_1"):
        quantize(tmp_path / "f16.gguf", tmp_path / f"{type}.gguf", type)
    other = checkpoints.write(tmp_path / "other", [checkpoints.weights(seed=1)])
    models = [*sorted(tmp_path.glob("*.gguf")), folder, other]
    assert len({identity(open_checkpoint(model)) for model in models}) == len(models) == 6


def test_a_hyper_parameter_makes_another_model(folder, tmp_path):
    for eps in (1e-5, 1e-6):
        checkpoints.write(tmp_path / str(eps), params=checkpoints.PARAMS | {"norm_eps": eps})
    assert identity(open_checkpoint(tmp_path / "1e-05")) != identity(open_checkpoint(tmp_path / "1e-06"))


def test_samples_reach_from_the_first_byte_of_a_tensor_to_the_last(folder):
    checkpoint = open_checkpoint(folder)
    name, tensor = max(checkpoint.tensors.items(), key=lambda pair: pair[1].nbytes)
    (piece,) = tensor.pieces
    assert piece.nbytes > SAMPLE * SAMPLES
    data, found = bytearray(piece.data[piece.offset : piece.offset + piece.nbytes]), set()
    for at in (None, 0, SAMPLE - 1, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        if at is not None:
            changed[at] ^= 1
        blocks = piece.kind.view(bytes(changed), piece.shape)
        checkpoint.tensors[name] = type(tensor).from_blocks(name, piece.shape, piece.type, blocks)
        found.add(identity(checkpoint))
    assert len(found) == 4  # what lies between two samples isn't looked at


def test_a_model_that_was_closed_or_changed_says_so(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    llama = tinyllama.load(copy, "numpy", 1)
    cache = llama.new_cache(4)
    llama.forward([1, 2], cache)
    with (copy / "consolidated.00.pth").open("ab") as file:
        file.write(b"x")
    checkpoints.refused(lambda: cache.save(tmp_path / "a"), "was changed while it was in use")
    llama.close()
    checkpoints.refused(lambda: cache.save(tmp_path / "a"), str(tmp_path / "a"), "has been closed")
    assert not (tmp_path / "a").exists()


# --- written whole or not at all ------------------------------------------------------------------


def test_the_old_file_stays_where_the_new_one_cannot_be_written(small, path):
    cache, before, flag = filled(small, 30), path.read_bytes(), count()

    class Soon:
        def is_set(self):
            return next(flag) > 5

    with pytest.raises(Cancelled), cancellable(Soon()):
        cache.save(path)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_a_cache_of_no_model_or_without_tokens_is_not_saved(small, tmp_path):
    cache = KVCache(small.config, 8)
    cache.ids = [1]
    checkpoints.refused(lambda: cache.save(tmp_path / "a"), str(tmp_path / "a"), "of no model")
    checkpoints.refused(lambda: small.new_cache(8).save(tmp_path / "a"), "without tokens")
    assert not [*tmp_path.iterdir()]


# --- what is refused ------------------------------------------------------------------------------


def parts(path) -> tuple[dict, bytes]:
    """A file's header, and its data without the checksum."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:-4]


def write(path, header: dict, data: bytes) -> None:
    """A file with the right checksum."""
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    whole = struct.pack("<Q", len(encoded)) + encoded + data
    path.write_bytes(whole + zlib.crc32(whole).to_bytes(4, "little"))


def entry(name: str, **changes):
    return lambda header: header[name].update(changes)


def about(**changes):
    return lambda header: header["__metadata__"].update(changes)


HEADERS = {
    "another version": (about(version="2"), "is of the version 2, and this tinyllama reads 1"),
    "another model": (
        about(model="0" * 64, name="other.gguf"),
        "is of another model, other.gguf, not of small",
    ),
    "a name that steers terminals": (about(model="", name="\x1b[2J\n"), r"is of another model, \x1b[2J\n"),
    "a name of a megabyte": (about(model="", name="x" * 900_000), "is of another model, xxx"),
    "another precision": (about(dtype="float16"), "a backend that keeps float16, and this one keeps float32"),
    "no precision": (lambda header: header["__metadata__"].pop("dtype"), "a backend that keeps None"),
    "a number for a text": (about(version=1), "its metadata are no strings"),
    "no tokens": (about(n_tokens="0", n_many="0"), "its numbers of tokens make no sense"),
    "more among many than there are": (about(n_many="41"), "its numbers of tokens make no sense"),
    "-1 tokens": (about(n_tokens="-1"), "its numbers of tokens make no sense"),
    "5,000 digits": (about(n_tokens="9" * 5000), "its numbers of tokens make no sense"),
    "a billion tokens": (about(n_tokens="999999999"), "ids isn't what this model's cache has"),
    "a token more": (about(n_tokens="41"), "ids isn't what this model's cache has"),
    "another shape": (entry("layers.1.keys", shape=[2, 40, 32]), "layers.1.keys isn't what this model's"),
    "axes of 2^62": (entry("layers.0.keys", shape=[2**62, 2**62, 4]), "layers.0.keys isn't what"),
    "another type": (entry("layers.2.values", dtype="BF16"), "layers.2.values isn't what this model's"),
    "an offset behind the end": (entry("crc32", data_offsets=[2**62, 2**62 + 4]), "crc32 isn't what"),
    "an array that lies on another": (
        lambda header: header["layers.0.keys"].update(header["layers.0.values"]),
        "layers.0.keys isn't what this model's cache has",
    ),
    "a layer less": (lambda header: header.pop("layers.3.keys"), "layers.3.keys isn't what"),
    "a layer more": (
        lambda header: header.update({"layers.99.keys": header["crc32"]}),
        "layers.99.keys isn't",
    ),
    "an entry that is none": (lambda header: header.update({"ids": [[]]}), "ids isn't what"),
}


@pytest.mark.parametrize(("change", "words"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_cant_be_true_of_this_model_is_refused(small, path, change, words):
    header, data = parts(path)
    change(header)
    write(path, header, data)
    checkpoints.refused(lambda: small.load_cache(path), str(path), words, ": the text has to be read again")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", ["first", "last"])
def test_numbers_that_are_not_finite_are_refused(llama, tmp_path, value, at):
    path = tmp_path / "a"
    filled(llama).save(path)
    header, data = parts(path)
    data, dtype = bytearray(data), llama.backend.cache_type
    number = np.array(value, dtype).tobytes()
    start = header["layers.0.keys"]["data_offsets"][0] if at == "first" else len(data) - len(number)
    data[start : start + len(number)] = number
    write(path, header, bytes(data))
    checkpoints.refused(lambda: llama.load_cache(path), str(path), "holds NaN or infinity")


@pytest.mark.parametrize("token", [-1, 10**6, 2**31 - 1])
def test_ids_that_the_vocabulary_lacks_are_refused(small, path, token):
    header, data = parts(path)
    write(path, header, struct.pack("<i", token) + data[4:])
    checkpoints.refused(lambda: small.load_cache(path), str(path), "ids that the vocabulary doesn't have")


def test_a_file_that_lost_or_got_bytes_is_refused(small, path):
    good = path.read_bytes()
    for data in (good[:-1], good[: len(good) // 2], good + b"\0", good[:2000]):
        path.write_bytes(data)
        checkpoints.refused(lambda: small.load_cache(path), str(path), "is damaged or cut short")
    bad = bytearray(good)
    bad[len(good) // 2] ^= 16
    path.write_bytes(bad)
    checkpoints.refused(lambda: small.load_cache(path), str(path), "is damaged: its checksum")


NO_CACHES = {
    "nothing": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "a GGUF file": (b"GGUF" + bytes(100), "a GGUF file: name another file"),
    "another safetensors file": (struct.pack("<Q", 8) + b'{"a": {}}', "something else: name another file"),
}


@pytest.mark.parametrize(("data", "words"), NO_CACHES.values(), ids=NO_CACHES)
def test_another_file_is_refused_by_what_it_is(small, tmp_path, data, words):
    (tmp_path / "a").write_bytes(data)
    checkpoints.refused(lambda: small.load_cache(tmp_path / "a"), str(tmp_path / "a"), words)


def test_a_header_of_20_gb_is_refused_in_few_steps(small, path):
    data, steps = path.read_bytes(), count()
    for length in (20 << 30, 2**64 - 1, 2 << 20):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length) + data[8:])
            file.truncate(20 << 30)  # with holes, which take no room
        sys.setprofile(lambda *_: next(steps))
        try:
            checkpoints.refused(lambda: small.load_cache(path), str(path), "within its header")
        finally:
            sys.setprofile(None)
    assert next(steps) < 50_000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_one_line(small, path, data):
    good = path.read_bytes()
    damaged = bytearray(good)
    n_header = 8 + int.from_bytes(good[:8], "little")
    places = st.integers(0, n_header) | st.integers(0, len(good) - 1)
    for at in data.draw(st.sets(places, min_size=1, max_size=4)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(good)] * 3 + [len(good) // 2]))])
    try:
        with pytest.raises(TinyllamaError) as caught:
            cache_file.read(path, small.new_cache(50), small.config.vocab_size)
        assert str(caught.value).startswith(str(path)) and str(caught.value).isprintable()
    finally:
        path.write_bytes(good)
