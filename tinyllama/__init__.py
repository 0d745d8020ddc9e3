"""LLaMA on your own laptop, to read and to run.

The modules in reading order:

    errors      the one exception type for what a user can cause
    files       files from strangers, opened and read with care
    config      hyper-parameters, the published sizes, the names of axes and tensors
    vocabulary  what a tokenizer is made from
    tokenizer   text <-> token ids
    blocks      how quantized weights lie in memory, byte by byte
    quant       weights to blocks and back; a Tensor = blocks + type + shape
    mapped      model files mapped into memory, and what if one changes
    ops         every operation of a LLaMA, in NumPy: the definition
    model       the forward pass, written once
    sampling    logits -> the next token
    generation  the loop, and what a text knows about itself
    backends    the seam: tables of operations, NumPy's and faster ones
    formats     model files: meta (.pth), ggml (March 2023), gguf (today)
    memory      what running a model takes of memory
    llama       where a file, a tokenizer, a backend and the model meet
    convert     checkpoint -> f16 file -> 4-bit file: what goes where
    streaming   and how it gets there, in little memory
    perplexity  how well a model predicts a text
    inspect     what is in a model file, and what running it needs
    download    models by name
    resources   what this computer has of memory and disk
    threads     threads that an interrupt can't leave waiting for ever
    writing     files that appear when they are whole, whatever happens meanwhile
    bench       how fast this computer runs a model, held against what the hardware allows
    compare     the same prompt through two backends, step by step
    plots       the pictures that the notebooks share
    lessons     is it the same, and what is wrong with this answer?
    widgets     the prompt playground and the stepper, two live tools for notebooks
    cli         the command line: its arguments
    commands    and what each command does
"""

from .errors import Cancelled, TinyllamaError

__version__ = "0.1.0"
__all__ = [
    "Cancelled",
    "Llama",
    "TinyllamaError",
    "compare_backends",
    "generate",
    "load",
    "playground",
    "stepper",
    "stream",
]


def __getattr__(name: str):
    # Imported when asked for, so that `tinyllama --help` doesn't wait for NumPy.
    if name in ("Llama", "generate", "load", "stream"):
        from . import llama

        return getattr(llama, name)
    if name in ("playground", "stepper"):
        from .lab import widgets

        return getattr(widgets, name)
    if name == "compare_backends":
        from .commands.compare import compare_backends

        return compare_backends
    raise AttributeError(f"module 'tinyllama' has no attribute {name!r}")
