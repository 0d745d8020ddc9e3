"""Make a checkpoint of random weights, of any LLaMA shape, in Meta's layout. 7B takes about a minute.

    python benchmarks/synthetic.py 7B /tmp/7B --tokenizer path/to/tokenizer.model
    python benchmarks/synthetic.py 13B /tmp/13B --parts 2 --layers 4
    python benchmarks/synthetic.py 7B /tmp/small --dim 256 --heads 8 --layers 2 --vocab-size 1024

torch writes the zip archive with empty space in place of the weights (which then aren't in memory
either); our own reader says where that space is, and threads fill it.
"""

import argparse
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from tinyllama.config import PRESETS, Config, hidden_dim_of
from tinyllama.formats import meta, pth
from tinyllama.formats.parts import share

CHUNK = 1 << 17  # bytes
N_PARTS = {"7B": 1, "13B": 2, "30B": 4, "65B": 8}  # that Meta cut a size into

# What weights are drawn from: 65,536 normal numbers. LLaMA's matrices have about this standard deviation.
NORMAL = np.random.default_rng(0).standard_normal(1 << 16)
WEIGHTS, NORMS = (0.02 * NORMAL).astype("<f2"), (1 + 0.1 * NORMAL).astype("<f2")


def make_checkpoint(folder: Path, config: Config, n_parts: int = 1, seed: int = 0) -> list[Path]:
    """Write params.json and consolidated.NN.pth with f16 weights; the norms are equal in all parts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params_of(config)))
    paths = [folder / meta.part_name(number) for number in range(n_parts)]
    for number, path in enumerate(paths):
        make_room(path, config, n_parts)
        fill(path, (seed, number))
    return paths


def params_of(config: Config) -> dict:
    names = ("dim", "multiple_of", "n_heads", "n_layers", "norm_eps")
    return {name: getattr(config, name) for name in names} | {"vocab_size": -1}


def make_room(path: Path, config: Config, n_parts: int) -> None:
    """The archive without its weights. torch.empty takes no memory as long as nobody writes into it."""
    shapes = {name: share(name, shape, n_parts) for name, shape in config.tensor_shapes().items()}
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}, path)


def fill(path: Path, seed: tuple[int, ...]) -> None:
    """Normally distributed weights; norms around 1, the same in every part."""
    with path.open("r+b") as file, ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
        chunks = [
            (piece, start)
            for piece in pth.read_part(path).values()
            for start in range(0, piece.nbytes, CHUNK)
        ]

        def work(numbered: tuple) -> int:
            number, (piece, start) = numbered
            is_norm = len(piece.shape) == 1
            generator = np.random.Generator(np.random.SFC64((number,) if is_norm else (*seed, number)))
            indices = np.frombuffer(generator.bytes(min(CHUNK, piece.nbytes - start)), np.uint16)
            weights = (NORMS if is_norm else WEIGHTS).take(indices)
            return os.pwrite(file.fileno(), weights.data, piece.offset + start)

        with tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar:
            for n_bytes in pool.map(work, enumerate(chunks)):
                bar.update(n_bytes)


def write_checklist(paths: list[Path]) -> None:
    """checklist.chk as Meta's: md5 and name of every part."""
    lines = []
    for path in paths:
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'md5').hexdigest()}  {path.name}\n")
    (paths[0].parent / "checklist.chk").write_text("".join(lines))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int, help="default: as many as Meta cut this size into")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model to copy into the folder")
    parser.add_argument("--checklist", action="store_true", help="write checklist.chk with the md5 sums")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = PRESETS[args.size]
    dim = args.dim or config.dim
    heads = args.heads or config.n_heads
    config = replace(
        config,
        dim=dim,
        n_layers=args.layers or config.n_layers,
        n_heads=heads,
        n_kv_heads=heads,
        vocab_size=args.vocab_size or config.vocab_size,
        hidden_dim=hidden_dim_of(dim, config.multiple_of),
    )
    paths = make_checkpoint(
        args.folder, config, args.parts or (1 if args.dim else N_PARTS[args.size]), args.seed
    )
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, args.folder / "tokenizer.model")
    if args.checklist:
        write_checklist(paths)
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
