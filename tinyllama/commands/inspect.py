"""What is in a model file, and what running it needs; no weight is read for it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from ..backends import get_backend
from ..machine.download import find
from ..errors import printable
from ..formats import Checkpoint, open_checkpoint
from ..memory import default_ctx_size, memory_needed
from ..quant import Tensor
from ..machine.limits import human
from ..tokenizer import Tokenizer, make_tokenizer


def inspect(model: str | Path, ctx_size: int | None = None) -> dict:
    """Describe a model in plain dicts, lists, strings and numbers; `report` makes text of it.

    Args:
        model: a file, a folder or a name, as `tinyllama.load` takes them.
        ctx_size: tokens that the KV cache shall have room for; None as `tinyllama.load` does it.
    Returns:
        {"path", "format", "files", "config", "tokenizer", "tensors", "n_params", "n_bytes",
        "bits_per_weight", "memory", "metadata", "suspects"}; sizes are in bytes, and suspects are norms that
        hold NaN or infinity (`tinyllama.load` looks at every weight).
    Raises:
        TinyllamaError: there is no such model, or its file is damaged.
    """
    checkpoint = open_checkpoint(find(model))
    tensors = _in_reading_order(checkpoint)
    n_params = sum(math.prod(tensor.shape) for tensor in tensors)
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    ctx_size = ctx_size or default_ctx_size(checkpoint.config)
    memory = memory_needed(checkpoint, get_backend().name, ctx_size)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "files": [{"path": str(file), "n_bytes": file.stat().st_size} for file in checkpoint.files],
        "config": asdict(checkpoint.config) | {"head_dim": checkpoint.config.head_dim},
        "tokenizer": _describe_tokenizer(make_tokenizer(checkpoint.vocabulary, checkpoint.path)),
        "tensors": [_describe_tensor(tensor) for tensor in tensors],
        "n_params": n_params,
        "n_bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / n_params,
        "memory": {"ctx_size": ctx_size, **memory, "total": sum(memory.values())},
        "metadata": dict(checkpoint.metadata),
        "suspects": [tensor.name for tensor in tensors if len(tensor.shape) == 1 and not tensor.is_finite()],
    }


def tokens(model: str | Path, text: str) -> list[dict]:
    """How a model's tokenizer cuts a prompt: a {"id", "piece", "text"} for each token.

    "piece" is its spelling in the vocabulary ("▁Once"), "text" what it stands for (" Once"); special tokens
    that are written out are taken as such, as in every prompt.
    """
    checkpoint = open_checkpoint(find(model))
    tokenizer = make_tokenizer(checkpoint.vocabulary, checkpoint.path)
    ids = tokenizer.encode(text, special=True)
    return [{"id": i, "piece": tokenizer.vocabulary.pieces[i], "text": tokenizer.piece(i)} for i in ids]


def _in_reading_order(checkpoint: Checkpoint) -> list[Tensor]:
    """A file may hold its tensors in any order."""
    order = {name: i for i, name in enumerate(checkpoint.config.tensor_shapes())}
    return sorted(checkpoint.tensors.values(), key=lambda tensor: order.get(tensor.name, len(order)))


def _describe_tensor(tensor: Tensor) -> dict:
    names = {"name": tensor.name, "shape": list(tensor.shape), "type": tensor.type}
    return names | {"n_bytes": tensor.nbytes, "n_parts": len(tensor.parts)}


def _describe_tokenizer(tokenizer: Tokenizer) -> dict:
    vocabulary = tokenizer.vocabulary
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": vocabulary.unk_id}
    return {
        "kind": vocabulary.kind,
        "pre": vocabulary.pre,
        "size": tokenizer.vocab_size,
        "add_bos": tokenizer.add_bos,
        "special": {name: _token(tokenizer, i) for name, i in special.items() if i is not None},
        "ends": [_token(tokenizer, i) for i in sorted(tokenizer.stop_ids)],
    }


def _token(tokenizer: Tokenizer, token_id: int) -> dict:
    return {"id": int(token_id), "piece": tokenizer.vocabulary.pieces[token_id]}


# --- as text --------------------------------------------------------------------------------------


def report(model: dict) -> str:
    """What `inspect` returns, for people: a summary, then the tensors, then their total."""
    sections = {
        "hyper-parameters": [(name, f"{value:.6g}") for name, value in model["config"].items()],
        "tokenizer": _tokenizer_rows(model["tokenizer"]),
        f"memory to run it with a context of {model['memory']['ctx_size']} tokens": _memory_rows(
            model["memory"]
        ),
    }
    lines = _head(model)
    for title, rows in sections.items():
        lines += ["", title, *_columns(rows, "<<")]
    lines += ["", "tensors", *_columns(_tensor_rows(model["tensors"]), "<>>><")]
    total = f"{len(model['tensors'])} tensors, {model['n_params']:,} weights, {human(model['n_bytes'])}"
    lines += ["", f"total: {total}, {model['bits_per_weight']:.2f} bits per weight"]
    return "\n".join(lines + [f"warning: {name} holds NaN or infinity" for name in model["suspects"]])


def token_table(rows: list[dict]) -> str:
    """What `tokens` returns, for people: a line a token."""
    # repr shows a newline as \n; the backslash of a "\xf0", which stands for a byte, it would double.
    shown = [(row["id"], row["piece"], repr(row["text"]).replace("\\\\", "\\")) for row in rows]
    table = _columns(shown, "><<")
    return "\n".join([*table, f"{len(rows)} tokens"])


def backend_table(backends: dict[str, str | None]) -> str:
    """What `backends.available` returns, for people: the fastest first."""
    rows = [
        (name, f"can't run here: {reason}" if reason else "can run here" + _levels(name))
        for name, reason in backends.items()
    ]
    return "\n".join(_columns(rows, "<<"))


def _levels(backend: str) -> str:
    """What of a CPU the C backend can use, best first, and why it leaves out AMX where there is some."""
    if backend != "c":
        return ""
    from .. import _native

    obstacle = _native.amx_obstacle()
    return f" ({', '.join(_native.levels())}{f'; not amx: {obstacle}' if obstacle else ''})"


def _head(model: dict) -> list[str]:
    name = model["metadata"].get("general.name")
    size = human(sum(file["n_bytes"] for file in model["files"]))
    lines = [
        printable(f"{model['path']}: {model['format']}, {size}" + (f", {str(name)[:80]}" if name else ""))
    ]
    if len(model["files"]) > 1:
        lines += [
            printable(f"  part {Path(file['path']).name}: {human(file['n_bytes'])}")
            for file in model["files"]
        ]
    return lines


def _tokenizer_rows(tokenizer: dict) -> Iterator[tuple[str, str]]:
    yield "kind", " ".join(filter(None, (tokenizer["kind"], tokenizer["pre"])))
    yield "size", f"{tokenizer['size']}"
    for name, token in tokenizer["special"].items():
        first = ", put before every prompt" if name == "bos" and tokenizer["add_bos"] else ""
        yield name, f"{token['id']} {token['piece'][:80]}{first}"
    yield (
        "ends a text",
        ", ".join(f"{token['id']} {token['piece'][:80]}" for token in tokenizer["ends"][:20]) or "nothing",
    )


def _memory_rows(memory: dict) -> Iterator[tuple[str, str]]:
    return ((name.replace("_", " "), human(size)) for name, size in memory.items() if name != "ctx_size")


def _tensor_rows(tensors: list[dict]) -> list[tuple[str, ...]]:
    """A row for each kind of tensor: layers that agree in it share one, "layers.0-31.ffn_norm.weight"."""
    kinds: dict[tuple, list[int | None]] = {}
    for tensor in tensors:
        layer, rest = _layer_of(tensor["name"])
        kind = (rest, " × ".join(map(str, tensor["shape"])), tensor["type"], tensor["n_bytes"])
        kinds.setdefault(kind, []).append(layer)
    return [
        (
            rest if layers == [None] else f"layers.{_ranges(layers)}.{rest}",
            shape,
            type,
            human(n_bytes),
            f"× {len(layers)} = {human(len(layers) * n_bytes)}" if len(layers) > 1 else "",
        )
        for (rest, shape, type, n_bytes), layers in kinds.items()
    ]


def _layer_of(name: str) -> tuple[int | None, str]:
    """ "layers.3.ffn_norm.weight" -> (3, "ffn_norm.weight"); (None, name) of a tensor of no layer."""
    word, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return (int(number), rest) if word == "layers" and number.isdigit() else (None, name)


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _columns(rows: Iterable[tuple], align: str) -> list[str]:
    """Rows as lines of aligned columns, indented by two; `align` has a "<" or ">" for each column."""
    table = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        lines.append("  ".join(["", *cells]).rstrip())
    return lines
