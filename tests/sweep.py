"""Good small files cut short at every byte of their headers and with every byte of them changed.

A damaged file must be refused in one line, or be read as an independent reader reads it: what it holds then
is either the same as before, or what the damaged bytes really say, such as another letter in a token.
`python tests/sweep.py` tries all and prints a table; tests/test_sweep.py tries a sample.
"""

import io
import itertools
import os
import random
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import gguf as gguf_package
import historical
import numpy as np
import torch
import vocabularies

from tinyllama.commands import convert
from tinyllama.config import Config, hidden_dim_of, tensor_names
from tinyllama.errors import TinyllamaError
from tinyllama.formats import ggml, headers, open_checkpoint
from tinyllama.formats.tokenizer_model import vocabulary_from_model
from tinyllama.tensor import Tensor
from tinyllama.tokenizer import make_tokenizer

CONFIG = Config(64, 1, 4, 400, hidden_dim_of(64, 32), 4, 32)
PARAMS = checkpoints.PARAMS | {"n_layers": 1}


@dataclass
class Subject:
    """A file to be damaged.

    Attributes:
        path: of the file.
        opened: what is given to the reader: the file, or the model that it belongs to.
        header: the ranges of its bytes that aren't weights.
        read: what we make of it: name -> whatever can be compared.
        oracle: what another reader makes of it, of those of the same names that it knows.
    """

    path: Path
    opened: Path
    header: list[range]
    read: Callable[[Path], dict]
    oracle: Callable[[Path], dict]


# --- what is read ---------------------------------------------------------------------------------


def ours(path: Path) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a value that is ignored
        checkpoint = open_checkpoint(path)
    vocabulary = make_tokenizer(checkpoint.vocabulary, checkpoint.path).vocabulary
    return (
        {
            name: (t.type, t.shape, [piece.blocks().tobytes() for piece in t.pieces])
            for name, t in checkpoint.tensors.items()
        }
        | vars(checkpoint.config)
        | vars(vocabulary)
    )


def ours_of_tokenizer(path: Path) -> dict:
    return vars(make_tokenizer(vocabulary_from_model(path), path).vocabulary)


def by_gguf_package(path: Path) -> dict:
    """As the gguf package reads it, which takes it long."""
    reader = gguf_package.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        tensor.name: (tensor.tensor_type, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in reader.tensors
    }
    return _said_by_gguf(values, tensors)


def by_gguf_struct(path: Path) -> dict:
    """A number at a time; once in fifty times the gguf package must read the same."""
    data = memoryview(path.read_bytes())
    at = 8

    def number(code: str):
        nonlocal at
        value = struct.unpack_from("<" + code, data, at)[0]
        at += struct.calcsize("<" + code)
        return value

    def value(kind: int):
        nonlocal at
        if kind == 8:
            length = number("Q")
            at += length
            return bytes(data[at - length : at]).decode()
        if kind == 9:
            kind, count = number("I"), number("Q")
            return [value(kind) for _ in range(count)]
        return number("BbHhIif?__Qqd"[kind])

    n_tensors, n_keys = number("Q"), number("Q")
    values = {}
    for _ in range(n_keys):
        key = value(8)
        values[key] = value(number("I"))
    infos = {
        value(8): ([number("Q") for _ in range(number("I"))], number("I"), number("Q"))
        for _ in range(n_tensors)
    }
    start = -(-at // values.get("general.alignment", 32)) * values.get("general.alignment", 32)
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        block, size = gguf_package.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(shape)) // block * size
        tensors[name] = (kind, shape, bytes(data[start + offset : start + offset + n_bytes]))
    found = _said_by_gguf(values, tensors)
    if not next(_COUNTED) % 50:
        assert found == by_gguf_package(path)
    return found


_COUNTED = itertools.count()


def _said_by_gguf(values: dict, tensors: dict[str, tuple]) -> dict:
    names = {gguf_name: name for name, gguf_name, _ in tensor_names(values["llama.block_count"])}
    found = {
        names.get(name, name): (
            gguf_package.GGMLQuantizationType(kind).name.lower(),
            tuple(shape[::-1]),
            [raw],
        )
        for name, (kind, shape, raw) in tensors.items()
    }
    keys = {
        "dim": "llama.embedding_length",
        "n_layers": "llama.block_count",
        "n_heads": "llama.attention.head_count",
        "hidden_dim": "llama.feed_forward_length",
        "n_kv_heads": "llama.attention.head_count_kv",
        "norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "rope_theta": "llama.rope.freq_base",
        "max_seq_len": "llama.context_length",
        "bos_id": "tokenizer.ggml.bos_token_id",
        "eos_id": "tokenizer.ggml.eos_token_id",
        "add_bos": "tokenizer.ggml.add_bos_token",
        "pre": "tokenizer.ggml.pre" if values["tokenizer.ggml.model"] == "gpt2" else "",
    }
    found |= {field: values[key] for field, key in keys.items() if key in values}
    arrays = {"pieces": "tokens", "scores": "scores", "types": "token_type", "merges": "merges"}
    for field, key in arrays.items():
        if f"tokenizer.ggml.{key}" in values:
            found[field] = tuple(values[f"tokenizer.ggml.{key}"])
    # Types and ids that can't be are taken as llama.cpp takes them.
    if "types" in found:
        found["types"] = tuple(kind if 1 <= kind <= 6 else 1 for kind in found["types"])
    usual = (1, 2) if values["tokenizer.ggml.model"] == "llama" else (None, None)
    for field, default in zip(("bos_id", "eos_id"), usual, strict=True):
        if field in found and not 0 <= found[field] < len(found["pieces"]):
            found[field] = default
    return found


def by_torch(path: Path) -> dict:
    """Weights as torch.load reads them; of the first part of several, halves of them."""
    if not path.is_dir():
        path = path.parent
    parts = [torch.load(part, weights_only=True) for part in sorted(path.glob("*.pth"))]
    found = {}
    for name in parts[0]:
        if not name.endswith("freqs"):
            tensors = [part[name] for part in (parts if parts[0][name].ndim == 2 else parts[:1])]
            kinds = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
            raw = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
            shape = list(tensors[0].shape)
            if len(shape) == 2:
                shape[1 if name.split(".")[-2] in checkpoints.BY_COLUMNS else 0] *= len(tensors)
            found[name] = (kinds[tensors[0].dtype], tuple(shape), raw)
    return found


def by_struct(path: Path) -> dict:
    """Weights, hyper-parameters and texts of ggml files, a number at a time."""
    parts = [_ggml_part(part) for part in sorted(path.parent.glob(path.name + "*"))]
    (hparams, texts, _), *_ = parts
    names = ("vocab_size", "dim", "multiple_of", "n_heads", "n_layers")
    found = dict(zip(names, hparams, strict=False))
    found["pieces"] = tuple(
        piece if index < 259 else texts[index].decode("utf-8", "replace").replace(" ", "▁")
        for index, piece in enumerate(
            ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + texts[259:]
        )
    )
    for name, (ftype, shape, _) in parts[0][2].items():
        kind = ("f32", "f16", "q4_0_2023", "q4_1_2023")[ftype]
        raw = [part[2][name][2] for part in (parts if len(shape) == 2 else parts[:1])]
        if len(shape) == 2:
            axis = 1 if name.split(".")[-2] in checkpoints.BY_COLUMNS else 0
            shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(shape))
        found[name] = (kind, shape, raw)
    return found


def _ggml_part(path: Path) -> tuple:
    with path.open("rb") as file:
        numbers = lambda n: struct.unpack(f"<{n}i", file.read(4 * n))  # noqa: E731
        _, *hparams, _, _ = numbers(8)
        texts, tensors = [file.read(*numbers(1)) for _ in range(hparams[0])], {}
        while start := file.read(12):
            n_dims, n_name, ftype = struct.unpack("<3i", start)
            shape = numbers(n_dims)[::-1]
            name = file.read(n_name).decode()
            size = np.prod(shape) * (32 * 4, 32 * 2, 20, 24)[ftype] // 32
            tensors[name] = (ftype, shape, file.read(size))
    return hparams, texts, tensors


def by_wire(path: Path) -> dict:
    """Pieces, scores and types of a tokenizer.model, by the wire format of protocol buffers."""
    found = {"pieces": [], "scores": [], "types": []}
    for field, value in _fields(path.read_bytes()):
        if field == (1, 2):
            piece = dict(_fields(value))  # a field of another wire type is one that nobody knows
            found["pieces"].append(piece.get((1, 2), b"").decode())
            found["scores"].append(struct.unpack("<f", piece.get((2, 5), bytes(4)))[0])
            found["types"].append(piece.get((3, 0), 1) if piece.get((3, 0), 1) in range(1, 7) else 1)
    return {name: tuple(values) for name, values in found.items()}


def _fields(data: bytes) -> Iterator[tuple[tuple[int, int], object]]:
    """((number, wire type), value) of each field."""
    file = io.BytesIO(data)
    while file.tell() < len(data):
        tag = _varint(file)
        match tag & 7:
            case 0:
                yield (tag >> 3, 0), _varint(file)
            case 1:
                yield (tag >> 3, 1), file.read(8)
            case 2:
                yield (tag >> 3, 2), file.read(_varint(file))
            case 5:
                yield (tag >> 3, 5), file.read(4)
            case _:
                raise ValueError("a group")


def _varint(file) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value


# --- good files -----------------------------------------------------------------------------------


def subjects(root: Path) -> dict[str, Subject]:
    """Every format's good small files, made in a folder."""
    state = {n: t for n, t in checkpoints.weights(CONFIG).items() if "layers.1" not in n}
    one = checkpoints.write(root / "one", [state], PARAMS)
    two = checkpoints.write(root / "two", checkpoints.cut(state, 2), PARAMS)
    found = {
        "pth": _pth(one, one / "consolidated.00.pth"),
        "pth, part 2 of 2": _pth(two, two / "consolidated.01.pth"),
    }
    (root / "ggml").mkdir()
    for folder, name in ((one, "f16"), (two, "f16-of-2")):
        for number, data in enumerate(historical.convert(folder, PARAMS, 1)):
            suffix = f".{number}" if number else ""
            (root / "ggml" / f"{name}.bin{suffix}").write_bytes(data)
            q4 = root / "ggml" / f"{name.replace('f16', 'q4_0')}.bin{suffix}"
            q4.write_bytes(historical.quantize(data, 2))
    for title, name, suffix in (
        ("ggml f16", "f16.bin", ""),
        ("ggml q4_0", "q4_0.bin", ""),
        ("ggml, part 2 of 2", "f16-of-2.bin", ".1"),
    ):
        path = root / "ggml" / f"{name}{suffix}"
        found[title] = Subject(path, root / "ggml" / name, _ggml_header(path), ours, by_struct)
    convert.convert(one, 1, root / "spm.gguf", "gguf")
    _write_bpe(root / "bpe.gguf")
    for title, path in (("GGUF, SentencePiece", root / "spm.gguf"), ("GGUF, BPE", root / "bpe.gguf")):
        start = min(t.data_offset for t in gguf_package.GGUFReader(path).tensors)
        found[title] = Subject(path, path, [range(int(start))], ours, by_gguf_struct)
    path = one / "tokenizer.model"
    found["tokenizer.model"] = Subject(path, path, [range(path.stat().st_size)], ours_of_tokenizer, by_wire)
    return found


def _pth(folder: Path, path: Path) -> Subject:
    """Everything but the storages' own bytes is header."""
    header, at = [], 0
    with zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name = info.filename.split("/")
            if name[-2] == "data":
                data = path.read_bytes()[info.header_offset + 26 : info.header_offset + 30]
                start = info.header_offset + 30 + sum(struct.unpack("<HH", data))
                header.append(range(at, start))
                at = start + info.file_size
    return Subject(path, folder, [*header, range(at, path.stat().st_size)], ours, by_torch)


def _ggml_header(path: Path) -> list[range]:
    header, at = [], 0
    for piece in ggml.read_part(path).pieces.values():
        header.append(range(at, piece.offset))
        at = piece.offset + piece.nbytes
    return header


def _write_bpe(path: Path) -> None:
    vocabulary = vocabularies.bpe()
    rng, names = np.random.default_rng(0), list(CONFIG.tensor_shapes().items())
    tensors = [
        Tensor.from_array(
            name, rng.normal(size=shape).astype(np.float32), "q8_0" if len(shape) == 2 else "f32"
        )
        for name, shape in names
    ]
    infos = [(tensor.name, tensor.type, tensor.shape) for tensor in tensors]
    head, offsets, size = headers.gguf_header(CONFIG, vocabulary, infos, 7, "tiny")
    with path.open("wb") as file:
        file.write(head)
        for tensor, offset in zip(tensors, offsets, strict=True):
            file.seek(offset)
            file.write(tensor.pieces[0].data.tobytes())
        file.truncate(size)


# --- damage ---------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """A damaged file was read as something that it doesn't say, or crashed its reader."""


class Sweep:
    """Damages one file again and again, and counts what came of it."""

    def __init__(self, subject: Subject):
        self.subject, self.data, self.good = subject, subject.path.read_bytes(), subject.read(subject.opened)
        self.counts, self.slowest = Counter(), 0.0  # seconds of this thread
        expected = subject.oracle(subject.opened)
        for name, value in expected.items():
            assert _same(self.good[name], value), f"the oracle reads another {name} from the good file"

    def cut(self, size: int) -> None:
        """Try the first `size` bytes."""
        os.truncate(self.subject.path, size)
        try:
            self._try(f"cut at byte {size}")
        finally:
            self.subject.path.write_bytes(self.data)

    def flip(self, at: int, bits: int) -> None:
        """Try another byte."""
        with self.subject.path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([self.data[at] ^ bits]), at)
            try:
                self._try(f"byte {at}: {self.data[at]:#04x} became {self.data[at] ^ bits:#04x}")
            finally:
                os.pwrite(file.fileno(), self.data[at : at + 1], at)

    def _try(self, damage: str) -> None:
        subject, started = self.subject, time.thread_time()
        try:
            found = subject.read(subject.opened)
        except TinyllamaError as error:
            if not str(error).isprintable() or str(subject.path.parent) not in str(error):
                raise Wrong(f"{subject.path}: {damage}: {error}") from None
            outcome = "refused"
        except Exception as error:
            raise Wrong(f"{subject.path}: {damage}: {error!r}") from error
        else:
            outcome = "the same" if found == self.good else self._as_said(found, damage)
        self.slowest = max(self.slowest, time.thread_time() - started)
        self.counts[outcome] += 1

    def _as_said(self, found: dict, damage: str) -> str:
        """What differs now must differ for another reader, too."""
        try:
            expected = self.subject.oracle(self.subject.opened)
        except Exception as error:
            raise Wrong(
                f"{self.subject.path}: {damage}: read, but the other reader says {error!r}"
            ) from error
        for name, value in expected.items():
            if not _same(found.get(name), value):
                raise Wrong(f"{self.subject.path}: {damage}: the other reader reads another {name}")
        return "as it says"


def _same(ours, theirs) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        return ours == theirs or (ours != ours and theirs != theirs)
    return ours == theirs


def positions(subject: Subject, n_data: int = 1000) -> tuple[list[int], list[int]]:
    """Every byte of the header, and places in the data."""
    header = [at for part in subject.header for at in part]
    chance = random.Random(1)
    within = sorted(set(range(subject.path.stat().st_size)) - set(header))
    return header, sorted(chance.sample(within, min(n_data, len(within))))


def sweep(subject: Subject, every: int = 1) -> dict[str, Sweep]:
    """Cut and flip; of all that can be tried each `every`-th. -> "cuts" and "flips", with their counts.

    A byte of the header is turned round, and then two of its bits, one at a time, that chance chooses.
    """
    (header, data), chance = positions(subject), random.Random(2)
    cuts, flips = Sweep(subject), Sweep(subject)
    for size in [*header, *data][::every]:
        cuts.cut(size)
    masks = [
        (at, mask) for at in header for mask in (0xFF, *(1 << bit for bit in chance.sample(range(8), 2)))
    ]
    for at, mask in masks[::every]:
        flips.flip(at, mask)
    return {"cuts": cuts, "flips": flips}


def main() -> None:
    scratch = "/dev/shm" if Path("/dev/shm").is_dir() else None
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    outcomes = ("refused", "the same", "as it says")
    print("| File | Damage | Tried | " + " | ".join(outcomes) + " | Slowest |")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for name, subject in subjects(Path(folder)).items():
            for damage, done in sweep(subject, every).items():
                cells = " | ".join(f"{done.counts[outcome]:,}" for outcome in outcomes)
                slowest = f"{1000 * done.slowest:.0f} ms"
                print(f"| {name} | {damage} | {done.counts.total():,} | {cells} | {slowest} |", flush=True)


if __name__ == "__main__":
    main()
