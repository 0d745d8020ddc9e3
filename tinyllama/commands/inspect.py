"""What is in a model file, and what running it needs; of its weights only samples are read, unless asked."""

from collections.abc import Iterator
from dataclasses import asdict
from math import isfinite, prod
from pathlib import Path

import numpy as np

from ..backends import available, get_backend
from ..errors import check_cancelled, printable
from ..formats import Checkpoint, open_checkpoint
from ..formats.gguf import ROPE_FREQS
from ..machine.limits import UNKNOWN, human
from ..quant import BLOCK, TYPES
from ..settings import default_ctx_size
from ..tensor import Tensor
from ..tokenizer import TextStream, Tokenizer, make_tokenizer
from .mixes import ALIASES
from .printing import columns
from .tables import ranges, split_name, type_table

FAMILY = {"llama": "LLaMA", "qwen2": "Qwen2", "qwen3": "Qwen3"}
#: What a model of LLaMA's family resembles, as far as its vocabulary tells.
LIKE = {
    "Llama 3.1 to 3.3": lambda model: _pre(model) == "llama-bpe" and _is_stretched(model),
    "Llama 3": lambda model: _pre(model) == "llama-bpe",
    "SmolLM": lambda model: _pre(model) == "smollm",
    "Mistral Nemo or Small": lambda model: _pre(model) == "tekken",
    "Falcon3": lambda model: _pre(model) == "falcon3",
    "DeepSeek": lambda model: _pre(model).startswith("deepseek"),
    "the first Mistral 7B": lambda model: model["family"] == "llama" and model["window"],
}
EXTRA = {"biases": "biases of q, k and v", "output_bias": "and of wo", "qk_norms": "norms of q and k"}
#: Chat templates by what they write around a message: the first whose signs are all there.
TEMPLATES = {
    "llama3": ("<|start_header_id|>",),
    "llama2": ("[INST]", "<<SYS>>"),
    "mistral": ("[INST]",),
    "deepseek-r1": ("<｜User｜>",),
    "chatml": ("<|im_start|>",),
    "zephyr": ("<|user|>", "<|assistant|>"),
    "openchat": ("GPT4 Correct ",),
    "vicuna": ("USER:", "ASSISTANT:"),
    "alpaca": ("### Instruction:",),
    "deepseek": ("User:", "Assistant:"),
}

SAMPLE = 2**16  # weights of a tensor, of the first few of a type


def _pre(model: dict) -> str:
    return model["tokenizer"]["pre"] if model["family"] == "llama" else ""


def _is_stretched(model: dict) -> bool:
    return bool(model["rope"]["scaling"] or model["rope"]["largest_divisor"])


def inspect(model: str | Path, ctx_size: int | None = None, check: bool = False) -> dict:
    """Describe a model in plain dicts, lists, strings and numbers; `report` makes text of it.

    Args:
        model, ctx_size: as `tinyllama.load` and `Llama.stream` take them.
        check: look for NaN and infinity in all weights.
    Returns:
        What the JSON shows: sizes are in bytes, "mlx" is what backend mlx makes of the types that it has no
        exact form for, "not_finite" are the names of tensors that hold NaN or infinity, None where nobody
        has checked.
    Raises:
        TinyllamaError: there is no such model, or its file is damaged.
    """
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    ordered = config.tensor_shapes() | checkpoint.tensors  # as they are used; what no layer has comes last
    tensors = [checkpoint.tensors[name] for name in ordered if name in checkpoint.tensors]
    n_params = sum(prod(tensor.shape) for tensor in tensors)
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    ctx_size = ctx_size or default_ctx_size(config)
    memory = get_backend().memory(config, checkpoint.tensors, ctx_size)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "files": [{"path": str(file.path), "n_bytes": len(file)} for file in checkpoint.files],
        "family": config.family,
        "mix": _mix(checkpoint),
        "config": asdict(config),
        "rope": {"theta": config.rope_theta, **_scaling(checkpoint)},
        "window": config.sliding_window or None,
        "template": {"name": template_name(checkpoint.template), "text": checkpoint.template or None},
        "tokenizer": _describe_tokenizer(make_tokenizer(checkpoint.vocabulary, checkpoint.path)),
        "tensors": [_describe_tensor(tensor) for tensor in tensors],
        "types": _types(tensors),
        "mlx": _on_mlx(tensors),
        "n_params": n_params,
        "n_bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / n_params,
        "memory": {"ctx_size": ctx_size, **memory, "total": sum(memory.values())},
        "metadata": dict(checkpoint.metadata),
        "not_finite": list(_not_finite(checkpoint)) if check else None,
    }


def _mix(checkpoint: Checkpoint) -> str | None:
    """The name of what a file says it is mostly, "Q4_K_M" say."""
    said = checkpoint.metadata.get("general.file_type") if checkpoint.format == "gguf" else None
    return ALIASES.get(str(said))


def type_of(checkpoint: Checkpoint) -> str:
    """What a model is quantized to, in short: its mix, or the type of most of its weights."""
    types = _types(list(checkpoint.tensors.values()))
    return _mix(checkpoint) or max(types, key=lambda type: types[type]["n_bytes"]).upper()


def _scaling(checkpoint: Checkpoint) -> dict:
    """How RoPE is stretched: by numbers, or by a tensor of divisors as in files of Llama 3.1."""
    scaling, divisors = checkpoint.config.rope_scaling, checkpoint.tensors.get(ROPE_FREQS)
    numbers = asdict(scaling).items() if scaling else ()
    told = {name: value for name, value in numbers if value is not None} or None
    return {"scaling": told, "largest_divisor": float(divisors.dequantize().max()) if divisors else None}


def _types(tensors: list[Tensor]) -> dict[str, dict[str, int]]:
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        sizes.setdefault(tensor.type, []).append(tensor.nbytes)
    return {type: {"n_tensors": len(some), "n_bytes": sum(some)} for type, some in sizes.items()}


@np.errstate(all="ignore")  # a damaged file may hold anything
def _on_mlx(tensors: list[Tensor]) -> dict[str, dict]:
    """The types whose scales are of 16 weights, as MLX holds them: their bits, and the error of a sample.

    The error is relative, the root of the mean square; None where that is no number.
    """
    found = {}
    for type in {tensor.type: None for tensor in tensors if TYPES[tensor.type].part != BLOCK}:
        some = [tensor for tensor in tensors if tensor.type == type][:4]
        rows = [tensor.dequantize(0, max(1, SAMPLE // tensor.shape[-1])) for tensor in some]
        weights = np.concatenate([row.reshape(-1, BLOCK) for row in rows])
        error = np.sqrt(np.mean((in_8_bits(weights) - weights) ** 2) / np.mean(weights**2)).item()
        found[type] = {"bits": 8, "error": error if isfinite(error) else None}
    return found


@np.errstate(all="ignore")
def in_8_bits(weights: np.ndarray) -> np.ndarray:
    """What is left of weights in MLX's form of 8 bits, as mlx.core.quantize makes it: [n_groups, 32].

    w = scale * q + bias. The bias is the end of the range that is farther from 0; the scale is such that 0
    comes out as 0.
    """
    low, high = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)
    bias = np.where(-low > high, low, high)
    scale = np.copysign(np.maximum((high - low) / 255, 1e-7), -bias)
    zero = np.rint(bias / scale)
    scale, bias = np.where(zero == 0, scale, bias / zero), np.where(zero == 0, 0, bias)
    return scale * np.clip(np.rint((weights - bias) / scale), 0, 255) + bias


def template_name(template: str) -> str | None:
    """What people call a chat template, from what it writes around a message; None for others."""
    return next((name for name, signs in TEMPLATES.items() if all(sign in template for sign in signs)), None)


def _describe_tensor(tensor: Tensor) -> dict:
    names = {"name": tensor.name, "shape": list(tensor.shape), "type": tensor.type}
    return names | {"n_bytes": tensor.nbytes, "n_parts": len(tensor.pieces)}


def _not_finite(checkpoint: Checkpoint) -> Iterator[str]:
    from tqdm.auto import tqdm

    for tensor in tqdm(checkpoint.tensors.values(), "check", unit=" tensors", leave=False, delay=0.5):
        check_cancelled()
        if not tensor.is_finite():
            yield tensor.name
    checkpoint.check_unchanged()


def _describe_tokenizer(tokenizer: Tokenizer) -> dict:
    vocabulary = tokenizer.vocabulary
    pieces = vocabulary.pieces
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": vocabulary.unk_id}
    return {
        "kind": vocabulary.kind,
        "pre": vocabulary.pre,
        "size": tokenizer.vocab_size,
        "add_bos": tokenizer.add_bos,
        "special": {name: {"id": i, "piece": pieces[i]} for name, i in special.items() if i is not None},
        "ends": [{"id": i, "piece": pieces[i]} for i in sorted(tokenizer.stop_ids)],
    }


def tokens(model: str | Path, text: str) -> list[dict]:
    """How a model's tokenizer cuts a prompt: a {"id", "piece", "text", "completes"} for each token.

    "piece" is its spelling in the vocabulary ("▁Once"), "text" what it stands for (" Once"), "completes" the
    text that is whole with it, where the tokens before have begun a character; special tokens that are
    written out are taken as such, as in every prompt.
    """
    checkpoint = open_checkpoint(model)
    tokenizer = make_tokenizer(checkpoint.vocabulary, checkpoint.path)
    return token_rows(tokenizer, tokenizer.encode(text, special=True))


def token_rows(tokenizer: Tokenizer, ids: list[int]) -> list[dict]:
    """What `tokens` returns of tokens."""
    stream, rows = TextStream(tokenizer), []
    for i in ids:
        text, whole = tokenizer.piece(i), stream.feed(i)
        completes = whole if whole.strip() and whole != text and not tokenizer.is_control(i) else ""
        rows.append({"id": i, "piece": tokenizer.vocabulary.pieces[i], "text": text, "completes": completes})
    return rows


def report(model: dict) -> str:
    """What `inspect` returns, for people: a summary, then the tensors, then their total."""
    config, memory, files = model["config"].items(), model["memory"], model["files"]
    name = model["metadata"].get("general.name")
    size = human(sum(file["n_bytes"] for file in files))
    lines = [f"{model['path']}: {model['format']}, {size}" + (f", {str(name)[:80]}" if name else "")]
    if len(files) > 1:
        lines += [f"  part {Path(file['path']).name}: {human(file['n_bytes'])}" for file in files]
    config = [(name, f"{number:.6g}") for name, number in config if type(number) in (int, float) and number]
    needs = [(name.replace("_", " "), human(n)) for name, n in memory.items() if name != "ctx_size"]
    lines += ["", "model", *columns(_summary(model), "<<")]
    lines += ["", "hyper-parameters", *columns(config, "<<")]
    lines += ["", "tokenizer", *columns(_tokenizer_rows(model["tokenizer"]), "<<")]
    lines += ["", f"memory to run it with a context of {memory['ctx_size']} tokens", *columns(needs, "<<")]
    sizes = ((tensor["name"], tensor["type"], tensor["n_bytes"]) for tensor in model["tensors"])
    lines += ["", "types", *type_table(sizes)]
    lines += ["", "tensors", *columns(_tensor_rows(model["tensors"]), "<>>><")]
    total = f"{len(model['tensors'])} tensors, {model['n_params']:,} weights, {human(model['n_bytes'])}"
    lines += ["", f"total: {total}, {model['bits_per_weight']:.2f} bits per weight"]
    lines += [f"warning: {name} holds NaN or infinity" for name in model["not_finite"] or ()]
    lines += ["check: no weight is NaN or infinite"] if model["not_finite"] == [] else []
    return "\n".join(map(printable, lines))


def token_table(rows: list[dict]) -> str:
    """What `tokens` returns, for people: a line a token."""
    # repr shows a newline as \n; the backslash of a "\xf0", which stands for a byte, it would double.
    shown = []
    for row in rows:
        whole = f"completes {row['completes']!r}" if row["completes"] else ""
        shown.append((row["id"], row["piece"], repr(row["text"]).replace("\\\\", "\\"), whole))
    return "\n".join([*columns(shown, "><<<"), f"{len(rows)} tokens"])


def backends() -> dict[str, dict]:
    """Of every backend, the fastest first, why it can't run here ("obstacle"), or what it is and has free.

    "free_memory" is in bytes, for models and caches; None where the system doesn't say.
    """
    return {name: {"obstacle": why} | ({} if why else _able(name)) for name, why in available().items()}


def _able(name: str) -> dict:
    backend = get_backend(name)
    free = backend.free_memory()
    return {"title": backend.title, "free_memory": free if free < UNKNOWN else None}


def backend_table(backends: dict[str, dict]) -> str:
    """What `backends` returns, for people."""
    rows = {}
    for name, found in backends.items():
        if found["obstacle"]:
            rows[name] = f"can't run here: {found['obstacle']}", ""
        else:
            free = f"{human(found['free_memory'])} free" if found["free_memory"] is not None else ""
            rows[name] = f"can run here{found['title'].removeprefix(f'backend {name}')}", free
    if "title" in backends.get("c", ()):
        from .. import _native

        obstacle = _native.amx_obstacle()
        levels = f" ({', '.join(_native.levels())}{f'; not amx: {obstacle}' if obstacle else ''})"
        rows["c"] = rows["c"][0] + levels, rows["c"][1]
    return "\n".join(columns(((name, *row) for name, row in rows.items()), "<<<"))


def _summary(model: dict) -> Iterator[tuple[str, str]]:
    """What people ask first about a model."""
    config, window, template = model["config"], model["window"], model["template"]
    extras = [what for what in ("biases", "output_bias", "qk_norms") if config[what]]
    like = next((what for what, holds in LIKE.items() if holds(model)), "")
    family = FAMILY[model["family"]] + (f" (as {like})" if like else "")
    yield "family", ", ".join([family, *map(EXTRA.get, extras)])
    mix = f"{model['mix']}, " if model["mix"] else ""
    yield "weights", f"{mix}{model['bits_per_weight']:.2f} bits each: {', '.join(model['types'])}"
    if model["mlx"]:
        changed = [f"{type}{_error(how['error'])}" for type, how in model["mlx"].items()]
        yield "on MLX", f"as 8 bits: {', '.join(changed)}; others exact"
    yield "context", f"{config['max_seq_len']} tokens"
    seen = f"a token attends to {window} tokens" if window else "none: a token attends to all before it"
    yield "window", seen
    yield "RoPE", f"theta {model['rope']['theta']:.6g}{_stretched(model['rope'])}"
    yield "template", template["name"] or ("one of its own" if template["text"] else "none")


def _error(error: float | None) -> str:
    return "" if error is None else f" (error {error:.2%})"


def _stretched(rope: dict) -> str:
    scaling, divisor = rope["scaling"], rope["largest_divisor"]
    if divisor:
        return f", scaled as in Llama 3.1 (by up to {divisor:.6g}: rope_freqs.weight)"
    if not scaling:
        return ""
    how = {"linear": "positions are divided", "llama3": "scaled as in Llama 3.1", "yarn": "scaled by yarn"}
    trained = f", trained on {scaling['original_context']} tokens" if scaling["original_context"] else ""
    return f", {how[scaling['kind']]} (factor {scaling['factor']:.6g}{trained})"


def _tokenizer_rows(tokenizer: dict) -> Iterator[tuple[str, str]]:
    yield "kind", " ".join(filter(None, (tokenizer["kind"], tokenizer["pre"])))
    yield "size", tokenizer["size"]
    for name, token in tokenizer["special"].items():
        first = ", put before every prompt" if name == "bos" and tokenizer["add_bos"] else ""
        yield name, f"{token['id']} {token['piece'][:80]}{first}"
    ends = [f"{token['id']} {token['piece'][:80]}" for token in tokenizer["ends"][:20]]
    yield "ends a text", ", ".join(ends) or "nothing"


def _tensor_rows(tensors: list[dict]) -> Iterator[tuple[str, ...]]:
    """A row for each kind of tensor: layers that agree in it share one, "layers.0-31.ffn_norm.weight"."""
    kinds: dict[tuple, list[int]] = {}
    for tensor in tensors:
        layer, name = split_name(tensor["name"])
        kind = (layer is not None, name, tuple(tensor["shape"]), tensor["type"], tensor["n_bytes"])
        kinds.setdefault(kind, []).append(layer)
    for (in_layer, name, shape, type, n_bytes), layers in kinds.items():
        name = f"layers.{ranges(layers)}.{name}" if in_layer else name
        many = f"× {len(layers)} = {human(len(layers) * n_bytes)}" if len(layers) > 1 else ""
        yield name, " × ".join(map(str, shape)), type, human(n_bytes), many
