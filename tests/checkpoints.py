"""Checkpoints of random weights in Meta's layout, small enough to be made anew in every test."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import vocabularies

from tinyllama.config import Config, hidden_dim_of
from tinyllama.errors import TinyllamaError

CONFIG = Config(64, 2, 4, vocab_size=400, hidden_dim=hidden_dim_of(64, 32), n_kv_heads=4, multiple_of=32)
PARAMS = {"dim": 64, "multiple_of": 32, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}

BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
BY_COLUMNS = ("tok_embeddings", "wo", "w2")


def weights(config: Config = CONFIG, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict:
    """A state dict in the order of Meta's own: embeddings, last norm and output, then the layers."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted(config.tensor_shapes(), key=lambda name: name.startswith("layers"))
    state = {}
    for name in names:
        state[name] = (torch.randn(config.tensor_shapes()[name], generator=generator) / 8).to(dtype)
    put_nasty_blocks(state["layers.0.attention.wq.weight"])
    state["layers.1.attention.inner_attention.rope.freqs"] = torch.arange(8.0)
    return state


def put_nasty_blocks(weight: torch.Tensor) -> None:
    """What quantizers stumble over, a block of 32 in each row."""
    steps = torch.arange(32.0)
    nasty = [
        torch.zeros(32),
        -1 - steps / 64,
        1 + steps / 64,
        torch.tensor([0.5, -0.5] * 16),
        torch.tensor([-0.5, 0.5] * 16),
        (steps - 7) / 2,
        torch.cat([torch.tensor([7.0, 0.49999997, -0.49999997, 0.5, -0.5, 1.5, -1.5, 2.5]), torch.zeros(24)]),
        torch.cat([torch.tensor([15.0, 0.0, 0.5, 1.5, 2.5, 0.49999997, 14.5]), torch.zeros(25)]),
        torch.full((32,), 6e-8),
        torch.full((32,), -3.0),
        torch.cat([torch.tensor([6e4, -6e-8]), torch.zeros(30)]),
    ]
    for row, block in enumerate(nasty):
        weight[row, :32] = block.to(weight.dtype)


def cut(state: dict, n_parts: int) -> list[dict]:
    """As Meta cut its checkpoints."""
    parts = [{} for _ in range(n_parts)]
    for name, tensor in state.items():
        kind = name.split(".")[-2]
        for number, part in enumerate(parts):
            if kind in BY_ROWS:
                part[name] = tensor.chunk(n_parts, 0)[number].clone()
            elif kind in BY_COLUMNS:
                part[name] = tensor.chunk(n_parts, 1)[number].clone()
            else:
                part[name] = tensor
    return parts


def split(folder: Path, out: Path, n_parts: int) -> Path:
    """A folder with a checkpoint of one part, cut into several."""
    out.mkdir()
    for name in ("params.json", "tokenizer.model"):
        shutil.copy(folder / name, out)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for number, part in enumerate(cut(state, n_parts)):
        torch.save(part, out / f"consolidated.{number:02d}.pth")
    return out


def write(folder: Path, parts: list[dict] | None = None, params: dict | None = None) -> Path:
    """A folder with everything that a checkpoint needs; by default one part of `weights()`."""
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(parts or [weights()]):
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params or PARAMS))
    (folder / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model())
    return folder


def refused(call, *words: str) -> str:
    """The one line that `call` fails with; it holds all the words."""
    with pytest.raises(TinyllamaError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message
