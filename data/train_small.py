"""Train the small model of this folder: a Llama of 4 million parameters that tells stories.

    python data/train_small.py --text DIR --out data/small --minutes 60

DIR holds the two files named in SOURCES (data/README.md says where they come from). OUT gets Meta's layout:
tokenizer.model, params.json and consolidated.00.pth. The steps, each a section below: clean the text and hold
out every twentieth story; learn a vocabulary; build the model; train; measure the held-out loss.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import nn
from torch.nn import functional

from tinyllama.machine.files import written

SOURCES = {"fairy tales": "fairytaleqa_278_stories.txt", "TinyStories": "tinystories_train_2MiB.txt"}
PARAMS = {"dim": 256, "multiple_of": 32, "n_heads": 8, "n_layers": 4, "norm_eps": 1e-6, "vocab_size": 1536}
BOS, EOS = 1, 2
CONTEXT = 512  # tokens in a training window
BATCH = 8  # windows in a step
DROPOUT = 0.1
MUON_LEARNING_RATE, ADAM_LEARNING_RATE, WEIGHT_DECAY, WARMUP = 0.006, 0.004, 0.1, 0.02
EVALUATE_EVERY = 300  # steps

# ---- text ----------------------------------------------------------------------------------------

ASCII = str.maketrans("“”«»‘’–", '""""\'\'-', "_") | {ord("—"): "--", ord("…"): "..."}


def clean(story):
    """One story as plain paragraphs: ASCII quotes, one line a paragraph, one newline between paragraphs."""
    lines = [line.strip() for line in story.translate(ASCII).split("\n")]
    wrapped = sum(len(line) > 100 for line in lines) < 0.02 * len(lines)
    text = "\n".join(lines).strip()
    if wrapped:  # a lone newline in a book set at 70 columns is only a space
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return re.sub(r" +", " ", re.sub(r"\n+", "\n", text))


def read_stories(path):
    """The (training, held-out) stories of a file, without the fragment after its last <|endoftext|>."""
    stories = [clean(story) for story in path.read_text(encoding="utf-8").split("<|endoftext|>")[:-1]]
    held_out = stories[10::20]
    del stories[10::20]
    return stories, held_out


def write_held_out(held_out, path, max_bytes=200_000):
    """Held-out stories, about as many bytes of each source, with a blank line between stories."""
    waiting = [list(stories) for stories in held_out.values()]
    n_bytes = [0] * len(waiting)
    sample = []
    while all(waiting):
        fewest = n_bytes.index(min(n_bytes))
        story = waiting[fewest].pop(0) + "\n\n"
        n_bytes[fewest] += len(story.encode())
        if sum(n_bytes) > max_bytes:
            break
        sample.append(story)
    with written(path) as (unfinished,):
        unfinished.write_text("".join(sample), encoding="utf-8")


# ---- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(stories, path):
    """Byte-pair encoding with LLaMA's own settings: <unk> 0, bos 1, eos 2, bytes 3-258, then pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for story in stories for line in story.split("\n")),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=PARAMS["vocab_size"],
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=100_000,
        minloglevel=1,
    )
    path.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


# ---- model ---------------------------------------------------------------------------------------


def rope(x, cos, sin):
    """Rotate the pairs (2i, 2i+1) of [batch, n_heads, n_tokens, head_dim] by their position's angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal attention: softmax(q k^T / sqrt(head_dim)) v for each head."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, cos, sin):
        """[batch, n_tokens, dim] -> [batch, n_tokens, dim]"""
        n_heads = self.n_heads
        q, k, v = (w(x).unflatten(-1, (n_heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        heads = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        return self.wo(heads.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        """[batch, n_tokens, dim] -> [batch, n_tokens, dim]"""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, dim, n_heads, hidden_dim, norm_eps):
        super().__init__()
        self.attention = Attention(dim, n_heads)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm = nn.RMSNorm(dim, norm_eps)
        self.ffn_norm = nn.RMSNorm(dim, norm_eps)

    def forward(self, x, cos, sin):
        """[batch, n_tokens, dim] -> [batch, n_tokens, dim]"""
        x = x + functional.dropout(self.attention(self.attention_norm(x), cos, sin), DROPOUT, self.training)
        return x + functional.dropout(self.feed_forward(self.ffn_norm(x)), DROPOUT, self.training)


class Llama(nn.Module):
    """Meta's LLaMA with its tensor names; the embedding serves as output matrix too (tied while training)."""

    def __init__(self, dim, multiple_of, n_heads, n_layers, norm_eps, vocab_size):
        super().__init__()
        hidden_dim = (2 * (4 * dim) // 3 + multiple_of - 1) // multiple_of * multiple_of
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(dim, n_heads, hidden_dim, norm_eps) for _ in range(n_layers))
        self.norm = nn.RMSNorm(dim, norm_eps)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layers) if residual else 0.02)
        head_dim = dim // n_heads
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(CONTEXT), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens):
        """[batch, n_tokens] -> logits [batch, n_tokens, vocab_size]"""
        n_tokens = tokens.shape[1]
        x = functional.dropout(self.tok_embeddings(tokens), DROPOUT, self.training)
        for layer in self.layers:
            x = layer(x, self.cos[:n_tokens], self.sin[:n_tokens])
        return functional.linear(self.norm(x), self.tok_embeddings.weight)


def save_checkpoint(model, path):
    """Meta's consolidated.00.pth: a dict of f16 tensors, in Meta's order, written whole or not at all."""
    weights = {name: weight.detach().half() for name, weight in model.named_parameters()}
    names = ["tok_embeddings.weight", "norm.weight", "output.weight"]
    for layer in range(len(model.layers)):
        names += [f"layers.{layer}.attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")]
        names += [f"layers.{layer}.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")]
        names += [f"layers.{layer}.attention_norm.weight", f"layers.{layer}.ffn_norm.weight"]
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    with written(path) as (unfinished,), unfinished.open("wb") as file:
        torch.save({name: weights[name] for name in names}, file)


# ---- training ------------------------------------------------------------------------------------


def batches(stories, seed):
    """Endless [BATCH, CONTEXT + 1] windows: each pass joins the stories in a new order, cut elsewhere."""
    random = np.random.default_rng(seed)
    while True:
        stream = np.concatenate([stories[i] for i in random.permutation(len(stories))])
        stream = np.roll(stream, random.integers(CONTEXT))
        windows = np.lib.stride_tricks.sliding_window_view(stream, CONTEXT + 1)[::CONTEXT]
        order = random.permutation(len(windows))
        for start in range(0, max(len(order) - BATCH, 0) + 1, BATCH):
            yield torch.from_numpy(windows[order[start : start + BATCH]].astype(np.int64))


def make_optimizers(model):
    """Muon for the matrices (each step is made orthogonal), AdamW for the embedding and the norms."""
    matrices = [w for w in model.layers.parameters() if w.ndim == 2]
    norms = [w for w in model.layers.parameters() if w.ndim == 1]
    others = [*norms, model.tok_embeddings.weight, model.norm.weight]
    rms = "match_rms_adamw"  # steps as large as AdamW's, so that its learning rates serve
    return [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn=rms),
        torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def loss_of(model, windows, reduction="mean"):
    """Cross-entropy in nats of predicting each token of [batch, n_tokens + 1] from those before it."""
    logits = model(windows[:, :-1]).flatten(0, 1).float()
    return functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction=reduction)


def save_state(path, model, optimizers, **counters):
    """Everything that going on after an interruption needs."""
    state = {**counters, "parts": [part.state_dict() for part in (model, *optimizers)]}
    with written(path) as (unfinished,), unfinished.open("wb") as file:
        torch.save(state, file)


def load_state(path, model, optimizers):
    """Restore what save_state wrote; returns its counters."""
    state = torch.load(path, weights_only=True)
    for part, saved in zip((model, *optimizers), state["parts"], strict=True):
        part.load_state_dict(saved)
    return state["step"], state["seconds"], state["best"]


def train(model, stories, held_out, args):
    """Train until args.minutes (or args.steps) are over; args.out always holds the best weights so far.

    The learning rate rises for the first WARMUP of the budget, then falls linearly to zero.
    """
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, seconds, best = 0, 0.0, math.inf
    if args.state and args.state.exists():
        step, seconds, best = load_state(args.state, model, optimizers)
    began = time.monotonic() - seconds
    data = batches(stories, args.seed + step)
    progress = 0.0
    while progress < 1:
        seconds = time.monotonic() - began
        progress = min((step + 1) / args.steps if args.steps else seconds / (60 * args.minutes), 1)
        schedule = min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, next(data))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % EVALUATE_EVERY and progress < 1:
            continue
        nats, n_tokens, _ = evaluate(model, held_out)
        progress_line = f"{seconds / 60:5.1f} min  step {step:5d}  training {loss.item():.3f}"
        print(f"{progress_line}  held out {nats / n_tokens:.3f} nats/token", flush=True)
        if nats / n_tokens < best:
            best = nats / n_tokens
            save_checkpoint(model, args.out / "consolidated.00.pth")
        if args.state:
            save_state(args.state, model, optimizers, step=step, seconds=seconds, best=best)


@torch.no_grad()
def evaluate(model, stories):
    """(nats, tokens, UTF-8 bytes) of (text, token ids) stories, read in windows of CONTEXT without overlap.

    Counts every token of the text, given the bos before it; not the eos after it.
    """
    model.eval()
    nats = n_tokens = 0
    for _, tokens in stories:
        tokens = torch.from_numpy(tokens[:-1].astype(np.int64))
        for start in range(0, len(tokens) - 1, CONTEXT):
            window = tokens[None, start : start + CONTEXT + 1]
            nats += loss_of(model, window, "sum").item()
            n_tokens += window.shape[1] - 1
    return nats, n_tokens, sum(len(text.encode()) for text, _ in stories)


def report(model, held_out):
    """Print the held-out loss of each source and of both, in nats a token and in bits a byte."""
    rows = {name: evaluate(model, stories) for name, stories in held_out.items()}
    rows["both"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    for name, (nats, n_tokens, n_bytes) in rows.items():
        per_token, per_byte = nats / n_tokens, nats / math.log(2) / n_bytes
        print(f"held out, {name}: {per_token:.4f} nats/token, {per_byte:.4f} bits/byte ({n_bytes} bytes)")


def load_checkpoint(model, path):
    """Put the weights of Meta's layout into the model; its output.weight is the embedding once more."""
    weights = torch.load(path, weights_only=True)
    del weights["output.weight"]
    model.load_state_dict(weights)


def main(argv=None):
    """Read the stories, train, and report the held-out loss of the best weights."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="the folder with the two text files")
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--minutes", type=float, default=60, help="length of the training (60)")
    parser.add_argument("--steps", type=int, help="its length in steps instead: repeats a run exactly")
    parser.add_argument("--state", type=Path, help="a file to go on from after an interruption")
    parser.add_argument("--held-out", type=Path, help="write a sample of the held-out stories to this file")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    sources = {name: read_stories(args.text / file) for name, file in SOURCES.items()}
    training = [story for stories, _ in sources.values() for story in stories]
    if args.held_out:
        write_held_out({name: stories for name, (_, stories) in sources.items()}, args.held_out)
    tokenizer = train_tokenizer(training, args.out / "tokenizer.model")
    (args.out / "params.json").write_text(json.dumps(PARAMS) + "\n")

    def encode(story):
        return np.array([BOS, *tokenizer.encode(story), EOS], dtype=np.uint16)

    training = [encode(story) for story in training]
    held_out = {name: [(story, encode(story)) for story in stories] for name, (_, stories) in sources.items()}
    model = Llama(**PARAMS)
    n_parameters = sum(weight.numel() for weight in model.parameters()) + model.tok_embeddings.weight.numel()
    n_tokens = sum(map(len, training))
    print(f"{n_parameters:,} parameters, {n_tokens:,} tokens in {len(training)} stories", flush=True)
    train(model, training, [story for stories in held_out.values() for story in stories], args)
    load_checkpoint(model, args.out / "consolidated.00.pth")
    report(model, held_out)


if __name__ == "__main__":
    main()
