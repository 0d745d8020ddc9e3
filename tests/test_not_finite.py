"""NaN and infinity among the weights: never text, found on request, and never converted."""

import shutil
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import tiny
import torch
import vocabularies

import tinyllama
from tinyllama.backends import available, get_backend
from tinyllama.commands import main
from tinyllama.commands.convert import convert, quantize
from tinyllama.errors import TinyllamaError
from tinyllama.formats import Checkpoint, open_checkpoint
from tinyllama.lab.widgets.steps import Walk
from tinyllama.llama import Llama
from tinyllama.machine.download import small_folder
from tinyllama.model import Step
from tinyllama.quant import TYPES
from tinyllama.quant import quantize as to_blocks
from tinyllama.tensor import Tensor
from tinyllama.texts.perplexity import perplexity

KINDS = ["f32", "f16", "bf16", "q4_0", "q4_1", "q8_0"]
BACKENDS = [name for name, reason in available().items() if reason is None]
CONFIG = replace(tiny.CONFIG, vocab_size=400)
PROMPT = [1, 300, 310, 320]
NAMES = [name for name in CONFIG.tensor_shapes() if not name.startswith("layers.0")]
VALUES = [np.nan, np.inf, -np.inf]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def poisoned(tensor: Tensor, value: float, row: int) -> Tensor:
    """With one number, or one scale, of a row."""
    blocks = tensor.pieces[0].blocks().copy()
    numbers = blocks["d"] if blocks.dtype.names else blocks
    if tensor.type == "bf16":
        value = to_blocks(np.array([[value]], np.float32), "bf16")[0, 0]
    numbers[(row, 1) if numbers.ndim == 2 else 1] = value
    return Tensor.from_blocks(tensor.name, tensor.shape, tensor.type, blocks)


def loaded(backend: str, type: str = "f16", name: str | None = None, value: float = np.nan) -> Llama:
    """A model with one bad number: of the embedding in the row of a token of PROMPT."""
    tensors = tiny.tensors(CONFIG, type)
    if name:
        tensors[name] = poisoned(tensors[name], value, PROMPT[2] if "tok" in name else 0)
    checkpoint = Checkpoint(Path("tiny.gguf"), "gguf", CONFIG, tensors, vocabularies.bpe(), [])
    return Llama(checkpoint, get_backend(backend, 1), "tiny")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("backend", "type"),
    [(name, type) for name in BACKENDS for type in (KINDS if name != "mlx" else ["f32", "q4_0"])],
)
def test_no_backend_gives_logits_of_such_a_weight(backend, type, value):
    for name in NAMES:
        llama = loaded(backend, type, name, value)
        assert not llama.checkpoint.tensors[name].is_finite()
        (logits,) = llama.run([Step(PROMPT, llama.new_cache(4))], checked=False)
        if np.isfinite(logits).all():  # minus infinity among scores is a weight of 0
            assert "wk" in name and not np.isnan(value)
            continue
        where = r"tiny\.gguf: after token \d of the text, .* NaN or infinity: .*`tinyllama inspect --check`"
        with pytest.raises(TinyllamaError, match=where):
            llama.logits(PROMPT)


@pytest.mark.parametrize("type", ["f16", "q4_0", "q4_0_2023", "q4_0_2023_planar", "q4_1_2023", "q6_k"])
def test_every_scale_and_number_is_looked_at(type):
    kind = TYPES[type]
    good = kind.view(bytearray(kind.nbytes((600, 512))), (600, 512))
    assert kind.is_finite(good)
    for field in [name for name in ("d", "m") if name in (good.dtype.names or ())] or [None]:
        for row, value in [(0, np.nan), (255, np.inf), (256, -np.inf), (599, np.nan)]:
            bad = good.copy()
            (bad[field] if field else bad)[row, -1] = value
            assert not kind.is_finite(bad)


def test_a_good_model_is_used_without_a_word(recwarn):
    llama = loaded("numpy")
    assert all(tensor.is_finite() for tensor in llama.checkpoint.tensors.values())
    assert np.isfinite(llama.logits(PROMPT)).all()
    assert not recwarn.list


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "use",
    [
        lambda llama: llama.generate("the king"),
        lambda llama: list(llama.stream("the king", temp=0)),
        lambda llama: llama.score("the king"),
        lambda llama: llama.logits("the king"),
        lambda llama: perplexity(llama, vocabularies.TEXT, 16, progress=False),
        lambda llama: Walk(llama, "the king"),
    ],
    ids=["generate", "stream", "score", "logits", "perplexity", "stepper"],
)
def test_whatever_it_is_used_for_it_is_an_error_at_the_token(backend, use):
    llama = loaded(backend, "q4_0", "layers.1.ffn_norm.weight")
    with pytest.raises(TinyllamaError, match="after token") as error:
        use(llama)
    assert "\n" not in str(error.value)


# --- in files -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(small_folder(), tmp_path / "model"))


def poison(folder: Path, name: str, row: int, value: float = np.nan) -> None:
    path = folder / "consolidated.00.pth"
    state = torch.load(path)
    state[name][row] = value
    torch.save(state, path)


@pytest.mark.filterwarnings("always")
def test_the_text_so_far_stays_and_one_line_follows(folder, capsys):
    written = tinyllama.generate("Once upon a time", folder, n_predict=8, temp=0)
    third = next(i for i, token in enumerate(written.ids) if written.ids.index(token) == i and i > 3)
    poison(folder, "tok_embeddings.weight", written.ids[third])
    status = main(["generate", "-m", str(folder), "-p", "Once upon a time", "-n", "8", "--temp", "0"])
    out, err = capsys.readouterr()
    assert status == 1
    assert out == "Once upon a time" + "".join(token.piece for token in written.tokens[: third + 1]) + "\n"
    *_, last = err.strip().splitlines()
    assert last.startswith(f"tinyllama: {folder}: after token ")
    assert "Traceback" not in err and "RuntimeWarning" not in err


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["norm.weight", "layers.1.attention.wq.weight"])
@pytest.mark.parametrize(("ftype", "format"), [(0, "ggml"), (1, "ggml"), (1, "gguf")])
def test_convert_names_weights_that_are_not_finite_and_writes_nothing(folder, name, value, ftype, format):
    poison(folder, name, 3, value)
    checkpoints.refused(lambda: convert(folder, ftype, format=format), str(folder), name)
    assert not list(folder.glob("ggml*"))


def test_quantize_names_weights_that_are_not_finite_and_writes_nothing(folder):
    (path,) = convert(folder, 1, format="gguf")
    (piece,) = open_checkpoint(path).tensors["layers.1.attention.wq.weight"].pieces
    data = np.fromfile(path, np.uint8)
    data[piece.offset : piece.offset + 2] = np.array([np.nan], np.float16).view(np.uint8)
    data.tofile(path)
    target = folder / "q4_0.gguf"
    checkpoints.refused(
        lambda: quantize(path, target, "q4_0"), str(path), "layers.1.attention.wq.weight", "NaN"
    )
    assert not target.exists()
