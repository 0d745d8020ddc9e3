"""The one forward pass on the C backend."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tinyllama._native", reason="the C backend is not built")

from tiny import CONFIG, all_taps, tensors

from tinyllama import _native, ops
from tinyllama.backends import get_backend
from tinyllama.machine.files import MappedFile
from tinyllama.model import build, forward
from tinyllama.tensor import Piece, Tensor

TOKENS = [1, 5, 9, 20, 33, 70, 11]

#: Mean squared error of the logits as a fraction of their mean square: float weights differ by the cache's
#: half precision; int8 activations by 3e-5 at each of some ten products.
LIMITS = {"f32": 1e-6, "f16": 1e-6, "bf16": 1e-6}
INT8_LIMIT = 2e-3


def run(name: str, type: str, tap=None, threads=2) -> np.ndarray:
    backend = get_backend(name, threads)
    model = build(CONFIG, tensors(type=type), lambda tensor: backend.prepare(tensor, copy=True))
    cache = backend.new_cache(CONFIG, 16)
    prompt = forward(model, backend, TOKENS, cache, taps=tap and all_taps(tap))
    return np.concatenate([prompt, forward(model, backend, [7], cache)])


def test_as_many_tokens_are_few_in_c_as_in_the_definition():
    assert _native.FEW == ops.FEW


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_0_2023"])
def test_logits_are_those_of_the_definition(type, level):
    got, expected = run("c", type), run("numpy", type)
    assert np.mean((got - expected) ** 2) / np.mean(expected**2) < LIMITS.get(type, INT8_LIMIT)


def test_the_same_bits_with_any_number_of_threads(level):
    one = run("c", "q4_0", threads=1)
    for threads in (2, 3):
        np.testing.assert_array_equal(run("c", "q4_0", threads=threads), one)


@pytest.mark.parametrize("type", ["f32", "f16", "q4_0", "q5_1", "q8_0"])
def test_a_token_has_the_same_bits_however_a_prompt_is_cut(type, level):
    backend = get_backend("c", 2)
    model = build(CONFIG, tensors(type=type), lambda tensor: backend.prepare(tensor, copy=True))
    ids = [*TOKENS, *TOKENS[::-1]]

    def logits(*sizes: int) -> np.ndarray:
        cache = backend.new_cache(CONFIG, 16)
        return np.concatenate([forward(model, backend, ids[len(cache) :][:n], cache) for n in sizes])

    one_by_one = logits(*[1] * len(ids)).view(np.int32)
    for sizes in ((14,), (7, 7), (1, 13), (2, 3, 4, 5), (6, 8)):
        np.testing.assert_array_equal(logits(*sizes).view(np.int32), one_by_one)


def test_every_step_can_be_tapped_and_stays_as_it_was(level):
    seen, copies = {}, {}

    def tap(name, array):
        seen[name], copies[name] = array, array.copy()

    tapped = run("c", "q4_0", tap)
    defined = {}
    run("numpy", "q4_0", defined.__setitem__)
    assert list(seen) == list(defined)
    for name, array in seen.items():
        np.testing.assert_array_equal(array, copies[name], err_msg=name)
    np.testing.assert_allclose(tapped, run("c", "q4_0"), rtol=0, atol=0.1)


@pytest.mark.parametrize("type", ["f32", "f16", "q4_0"])
def test_tensors_may_begin_at_any_byte_of_a_file(type):
    """ggml files pad nothing: behind the vocabulary a float may begin at an odd address."""

    def moved(tensor):
        data = b"\0" + tensor.pieces[0].blocks().tobytes()
        return Tensor(tensor.name, tensor.shape, (Piece(data, 1, tensor.type, tensor.shape),))

    backend, as_made = get_backend("c", 1), tensors(type=type)
    logits = [
        forward(build(CONFIG, source, lambda t: backend.prepare(t, copy=True)), backend, TOKENS, cache)
        for source in (as_made, {name: moved(tensor) for name, tensor in as_made.items()})
        for cache in [backend.new_cache(CONFIG, 16)]
    ]
    np.testing.assert_array_equal(*logits)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what is resident")
def test_preparing_a_mapped_file_keeps_one_copy_and_the_file_as_it_was(tmp_path):
    tensor = Tensor.from_array("w", np.ones((4096, 4096), np.float32), "q4_0")
    path = tmp_path / "blocks"
    whole = tensor.pieces[0].blocks().tobytes()
    path.write_bytes(whole)
    piece = Piece(MappedFile(path), 0, "q4_0", tensor.shape)
    assert piece.blocks().tobytes() == whole  # now it is in memory
    before = resident()
    table = get_backend("c", 2)
    weight = table.prepare(Tensor("w", tensor.shape, (piece,)), copy=True)
    assert resident() - before < weight.nbytes / 2  # as much as came, the file's pages went
    assert piece.blocks().tobytes() == whole


def resident() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Rss:"))
    return int(line.split()[1]) * 1024
