"""Backend mlx beside MLX-LM: the same weights on the same device, in turns.

    pip install 'tinyllama-lab[mlx]' mlx-lm     # with CUDA: tinyllama-lab 'mlx[cuda12]' mlx-lm
    python benchmarks/beside_mlx_lm.py [model.gguf] [--dtype float16] [--sizes 1,16,128] [--seconds 60]

The arrays that backend mlx multiplies by are written to a folder as MLX-LM reads it, just as they are, in
groups of 32. So both compute the same, and their logits are compared before anything is timed. Then

    pass           so many tokens at once, and the last one's logits in NumPy; a single token behind 64 others
    text           32 tokens behind 64, each the likeliest, in each program's own loop
    first token    of a prompt of 5 tokens, from the start of a new process to its end
    graph          the processor's time that a token takes before anything is computed: our forward pass, the
                   calls of MLX that it makes written flat, and MLX-LM's

But for the first token both are in one process. A ratio is MLX-LM's seconds divided by ours, so above 1 we
are faster: the median of the ratios of runs that followed each other, and that of the best runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

import tinyllama
from tinyllama.config import OUTPUT, STEPS, tensor_names
from tinyllama.formats.huggingface import FIELDS
from tinyllama.model import Step, embed, run_layers, unembed
from tinyllama.quant import BLOCK

if missing := [name for name in ("mlx", "mlx_lm") if not find_spec(name)]:
    sys.exit(f"no module {' and '.join(missing)}: pip install mlx mlx-lm (with CUDA: 'mlx[cuda12]' mlx-lm)")

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.utils import load_model

PROMPT, N_PAST, N_TEXT = "The first man on the", 64, 32
LEAST, MOST = 1, 200  # rounds; between them, as many as --seconds allow
clock = time.perf_counter

TINYLLAMA = "import sys; from tinyllama.commands import main; sys.exit(main())"
LOAD_MODEL = """
import sys, mlx.core as mx
from pathlib import Path
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
model, ids = load_model(Path(sys.argv[1]))[0], [int(token) for token in sys.argv[2].split(",")]
print(next(generate_step(mx.array(ids), model, max_tokens=1))[0])
"""


# --- the folder -----------------------------------------------------------------------------------


def write_folder(llama: tinyllama.Llama, folder: Path) -> None:
    """A model of backend mlx as MLX-LM reads it: its arrays under Hugging Face's names."""
    config, tensors = llama.config, llama.checkpoint.tensors
    plain = config.family == "llama" and not (config.rope_scaling or config.sliding_window or config.biases)
    if not plain:
        sys.exit("take a model of LLaMA's family, without biases, window or scaled RoPE")
    arrays = {}
    for meta, _, name in tensor_names(config.n_layers, STEPS):
        if meta in tensors:
            weight, stem = weight_of(llama, meta), name.removesuffix("weight")
            parts = getattr(weight, "arrays", [weight])
            arrays |= {stem + part: x for part, x in zip(("weight", "scales", "biases"), parts, strict=False)}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    about = {key: getattr(config, field) for key, (field, _) in FIELDS.items()}
    about |= {"model_type": "llama", "tie_word_embeddings": OUTPUT not in tensors}
    about |= {"rope_theta": config.rope_theta, "rope_traditional": True}  # rows of wq and wk lie as Meta's
    about |= {"quantization": {"group_size": BLOCK, "bits": 4}}  # MLX-LM sees by the shapes which have others
    (folder / "config.json").write_text(json.dumps(about))


def weight_of(llama: tinyllama.Llama, name: str):
    """What backend mlx made of a weight, by Meta's name."""
    words, model = name.removesuffix(".weight").split("."), llama._model
    return model.layers[int(words[1])][words[-1]] if words[0] == "layers" else getattr(model, words[0])


def write_tokenizer(llama: tinyllama.Llama, folder: Path) -> None:
    """A byte-level BPE vocabulary, cut into words as SmolLM2's: to see how long its reading takes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = llama.tokenizer.vocabulary
    merges = [tuple(merge.split(" ")) for merge in words.merges]
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate(words.pieces)}, merges))
    rules = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(list(rules)), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(words.pieces[token], special=True) for token in words.stop_ids])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words.pieces[words.eos_id]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- the programs ---------------------------------------------------------------------------------


class Ours:
    """tinyllama."""

    def __init__(self, llama: tinyllama.Llama, ids: list[int]):
        self.llama, self.ids, self.cache = llama, ids, llama.new_cache(len(ids) + N_PAST)

    def run(self, n_tokens: int, n_past: int) -> tuple[float, np.ndarray]:
        """So many tokens behind so many: the seconds, and the last one's logits [vocab_size]."""
        self.cache.trim(n_past)
        started = clock()
        logits = self.llama.forward(self.ids[:n_tokens], self.cache, last=True)
        return clock() - started, logits[0]

    def text(self) -> tuple[float, list[int]]:
        """Write a text: the seconds from its first token to its last, and its tokens."""
        run = self.llama.stream(self.ids[:N_PAST], n_predict=N_TEXT, temp=0, repeat_penalty=1, remember=False)
        started = 0.0
        for _ in run:
            started = started or clock()
        return clock() - started, [token.id for token in run.tokens]

    def build(self) -> tuple[float, mx.array]:
        """Note what is to be computed of a token: the seconds, and its logits, which nobody has looked at."""
        model, ops, step = self.llama._model, self.llama.backend, Step(self.ids[:1], self.cache)
        started = time.thread_time()
        x = run_layers(model, ops, ops.array(embed(model, ops, np.array(step.tokens))), [step])
        logits = unembed(model, ops, ops.concatenate([x[-1:]]))
        return time.thread_time() - started, logits

    def keep(self) -> float:
        """The seconds that the cache takes around a pass in which nothing was computed."""
        started = time.thread_time()
        self.cache.trim(N_PAST)
        self.cache.extend(self.ids[:1], 1)
        took = time.thread_time() - started
        self.cache.trim(N_PAST)
        return took


class Theirs:
    """MLX-LM."""

    def __init__(self, folder: Path, ids: list[int]):
        self.model, self.ids = load_model(folder)[0], mx.array(ids)
        self.cache = make_prompt_cache(self.model)

    def run(self, n_tokens: int, n_past: int) -> tuple[float, np.ndarray]:
        """As Ours.run."""
        trim_prompt_cache(self.cache, self.cache[0].offset - n_past)
        started = clock()
        logits = np.asarray(self._logits(n_tokens).astype(mx.float32))
        return clock() - started, logits[0, 0]

    def _logits(self, n_tokens: int) -> mx.array:
        """Of the last token alone: what its own `Model` would do of all."""
        last = self.model.model(self.ids[None, :n_tokens], self.cache)[:, -1:]
        tied = self.model.args.tie_word_embeddings
        return self.model.model.embed_tokens.as_linear(last) if tied else self.model.lm_head(last)

    def text(self) -> tuple[float, list[int]]:
        """As Ours.text."""
        started, tokens = 0.0, []
        for token, _ in generate_step(self.ids[:N_PAST], self.model, max_tokens=N_TEXT):
            started = started or clock()
            tokens.append(token)
        return clock() - started, tokens

    def build(self) -> tuple[float, mx.array]:
        """As Ours.build."""
        trim_prompt_cache(self.cache, self.cache[0].offset - N_PAST)
        started = time.thread_time()
        logits = self._logits(1)
        return time.thread_time() - started, logits


class Flat:
    """The calls of MLX that our forward pass makes for one token, one after the other."""

    def __init__(self, ours: Ours):
        llama = ours.llama
        self.config, self.ours, self.swiglu = llama.config, ours, llama.backend.swiglu
        own = llama.config.rope_theta ** (np.arange(0, self.config.head_dim, 2) / self.config.head_dim)
        self.divisors = mx.array(own).astype(mx.float32)
        self.names = "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w3", "w2"
        self.layers = [[layer[name] for name in self.names] for layer in llama._model.layers]
        self.table, self.norm, self.output = (
            weight_of(llama, name) for name in ("tok_embeddings", "norm", "output")
        )

    def build(self) -> tuple[float, mx.array]:
        """As Ours.build."""
        config, keys, values, swiglu = self.config, self.ours.cache.keys, self.ours.cache.values, self.swiglu
        token, eps, n_past = np.array(self.ours.ids[:1]), config.norm_eps, len(self.ours.cache)
        heads, scale = (1, -1, config.head_dim), config.head_dim**-0.5

        def times(x, weight, matmul=mx.quantized_matmul):
            return matmul(x, *weight.arrays, transpose=True, group_size=BLOCK, bits=weight.bits)

        def turn(x, rope=mx.fast.rope, width=config.head_dim, freqs=self.divisors):
            how = {"traditional": True, "base": None, "scale": 1.0, "offset": positions, "freqs": freqs}
            return rope(x[:, :, None], width, **how)[:, :, 0]

        started = time.thread_time()
        positions = mx.array(np.array([n_past]))
        ids = mx.array(token)
        x = mx.dequantize(*[array[ids] for array in self.table.arrays], BLOCK, self.table.bits)
        for i, (attention_norm, wq, wk, wv, wo, ffn_norm, w1, w3, w2) in enumerate(self.layers):
            norm = mx.fast.rms_norm(x, attention_norm, eps)
            q, k, v = times(norm, wq).reshape(heads), times(norm, wk).reshape(heads), times(norm, wv)
            q, k = turn(q), turn(k)
            keys[i][:, n_past : n_past + 1] = k.swapaxes(0, 1)
            values[i][:, n_past : n_past + 1] = v.reshape(heads).swapaxes(0, 1)
            past = keys[i][None, :, : n_past + 1], values[i][None, :, : n_past + 1]
            attended = mx.fast.scaled_dot_product_attention(q.swapaxes(0, 1)[None], *past, scale=scale)
            x = x + times(attended[0].swapaxes(0, 1).reshape(1, -1), wo)
            norm = mx.fast.rms_norm(x, ffn_norm, eps)
            x = x + times(swiglu(times(norm, w1), times(norm, w3)), w2)
        logits = times(mx.fast.rms_norm(x[-1:], self.norm, eps), self.output)
        return time.thread_time() - started, logits


# --- what is measured -----------------------------------------------------------------------------


def in_turns(programs: list[Callable], seconds: float) -> list[tuple[float, ...]]:
    """Rounds of calls that return their seconds, or these first: they change places in every round."""
    rounds, started = [], time.perf_counter()
    while len(rounds) < LEAST or (len(rounds) < MOST and time.perf_counter() - started < seconds):
        order = range(len(programs)) if len(rounds) % 2 == 0 else reversed(range(len(programs)))
        took = {i: programs[i]() for i in order}
        rounds.append(tuple(took[i] for i in range(len(programs))))
    return rounds


def line(name: str, rounds: list[tuple[float, ...]], n_tokens: int) -> str:
    """A row: tokens a second of both, and the ratio."""
    ours, theirs = (n_tokens / median(times) for times in zip(*rounds, strict=True))
    ratio = median(other / own for own, other in rounds)
    best = min(other for _, other in rounds) / min(own for own, _ in rounds)
    return f"{name:26} {ours:9.1f} {theirs:9.1f} {ratio:7.2f} {best:7.2f} {len(rounds):7}"


def graphs(ours: Ours, theirs: Theirs, seconds: float) -> None:
    """Print what a token takes in Python."""
    ours.run(N_PAST, 0)
    theirs.run(N_PAST, 0)
    flat, seen = Flat(ours), {}

    def built(program):
        took, logits = program.build()
        mx.eval(logits, ours.cache.keys, ours.cache.values)
        seen[program] = np.asarray(logits.astype(mx.float32))
        return took

    calls = [lambda program=program: built(program) for program in (ours, flat, theirs)]
    rounds = in_turns([*calls, ours.keep], seconds)
    assert (seen[ours] == seen[flat]).all(), "the flat loop computes something else"
    own, bare, other, cache = (1e3 * median(times) for times in zip(*rounds, strict=True))
    seam = 1e3 * median(mine - least for mine, least, *_ in rounds)
    print(f"\ngraph of a token, {ours.llama.config.n_layers} layers, {len(rounds)} rounds: milliseconds")
    print(f"ours {own:.3f}, flat {bare:.3f}, MLX-LM's {other:.3f}; ours without the flat one's {seam:.3f}")
    print(f"our cache around a pass: {cache:.3f}; together {seam + cache:.3f}")


def process(command: list[str]) -> float:
    """Seconds from the start of a process to its end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started, before = clock(), children()
    done = subprocess.run(command, capture_output=True, env=environment)
    took = clock() - started + (children() - before) * (clock is time.process_time)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]}\n{done.stderr.decode()[-2000:]}")
    return took


def children() -> float:
    """Seconds of processor time that all processes took that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def first_tokens(llama: tinyllama.Llama, folder: Path, dtype: str, n_rounds: int) -> None:
    """Print what a user waits for."""
    python, ids = [sys.executable, "-c"], ",".join(map(str, llama.tokens(PROMPT)))
    options = ["-p", PROMPT, "-n", "1", "--backend", "mlx", "--dtype", dtype]
    theirs = ["--model", str(folder), "--prompt", PROMPT, "--max-tokens", "1", "--ignore-chat-template"]
    commands = {
        "Python, import mlx.core": [*python, "import mlx.core as mx; mx.eval(mx.zeros(1))"],
        "tinyllama generate": [*python, TINYLLAMA, "generate", "-m", str(llama.checkpoint.path), *options],
        "mlx_lm generate": [sys.executable, "-m", "mlx_lm", "generate", *theirs],
        "its load_model, with ids": [*python, LOAD_MODEL, str(folder), ids],
    }
    if not (folder / "tokenizer.json").exists():
        del commands["mlx_lm generate"]
    rounds = [{name: process(command) for name, command in commands.items()} for _ in range(n_rounds + 1)][1:]
    title = f"first token, {n_rounds} rounds"
    print(f"\n{title:26} {'median s':>9} {'best':>9} {'ratio':>7}")
    for name in commands:
        ratio = median(took[name] / took["tinyllama generate"] for took in rounds)
        times = [took[name] for took in rounds]
        print(f"{name:26} {median(times):9.2f} {min(times):9.2f} {ratio:7.2f}", flush=True)


def difference(ours: Ours, theirs: Theirs) -> str:
    """How far the logits of both are from each other."""
    (_, own), (_, other) = ours.run(N_PAST, 0), theirs.run(N_PAST, 0)
    error = np.abs(own - other).max() / np.abs(own).max()
    same = "the same" if own.argmax() == other.argmax() else "ANOTHER"
    return f"logits differ by at most {error:.1e} of the largest; {same} token is the likeliest"


def main() -> None:
    """Measure and print."""
    global clock
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", default="smollm2", help="a GGUF file; q4_0 and q4_1 are 4 bits")
    parser.add_argument("--dtype", help="of activations; default: float16 on a GPU, else float32")
    parser.add_argument("--sizes", default="1,2,4,8,16,128,512", help="tokens at once")
    parser.add_argument("--seconds", type=float, default=30, help="for each size, but one round at least")
    parser.add_argument("--rounds", type=int, default=5, help="of first tokens; 0: none")
    parser.add_argument("--cpu", action="store_true", help="count processor time: of MLX on a CPU")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else clock
    sizes = [int(size) for size in args.sizes.split(",") if size]
    llama = tinyllama.load(args.file, "mlx", dtype=args.dtype)
    ids = np.random.default_rng(0).integers(300, llama.config.vocab_size, max([N_PAST, *sizes])).tolist()
    with tempfile.TemporaryDirectory(prefix="tinyllama-mlx-lm-") as name:
        folder = Path(name)
        write_folder(llama, folder)
        if llama.tokenizer.vocabulary.kind == "bpe":
            write_tokenizer(llama, folder)
        ours, theirs = Ours(llama, ids), Theirs(folder, ids)
        print(f"{llama.checkpoint.path.name}, {llama.backend.title}, MLX {mx.__version__}")
        print(difference(ours, theirs), flush=True)
        unit = "tokens/s" if clock is time.perf_counter else "tokens a second of CPU"
        columns = f"{'tinyllama':>9} {'MLX-LM':>9} {'ratio':>7} {'of best':>7} {'rounds':>7}"
        print(f"\n{unit:26} {columns}", flush=True)
        for size in sizes:
            n_past = N_PAST if size == 1 else 0
            for program in (ours, theirs):
                program.run(N_PAST, 0)
            calls = [lambda p=p, n=size, past=n_past: p.run(n, past)[0] for p in (ours, theirs)]
            print(line(f"pass of {size}", in_turns(calls, args.seconds), size), flush=True)
        written = {program: program.text()[1] for program in (ours, theirs)}
        rounds = in_turns([lambda p=p: p.text()[0] for p in (ours, theirs)], args.seconds)
        print(line(f"text of {N_TEXT} tokens", rounds, N_TEXT - 1))
        print("both texts are the same" if written[ours] == written[theirs] else "the texts differ")
        graphs(ours, theirs, args.seconds)
        if args.rounds:
            first_tokens(llama, folder, llama.backend.cache_type, args.rounds)


if __name__ == "__main__":
    main()
