"""LLaMA on your own laptop, to read and to run.

The evening: what a learner reads, in this order.

    errors       the one exception for what a user can cause, and how a computation is told to stop
    config       hyper-parameters, the published sizes, families of models, the names of tensors
    block_type   what a type of weights is
    quant        how quantized weights lie in memory, byte by byte, and how they get there and back
    tensor       where a weight lies in its file, and the numbers it stands for
    ops          every operation of a LLaMA, in NumPy: the definition; the KV cache
    model        the forward pass, written once
    tokenizer    text <-> token ids
    settings     the settings of `generate`, of which its options are made
    sampling     logits -> the next token, stage by stage
    generation   the loop
    llama        where a file, a tokenizer, a backend and the model meet
    taps         values inside a model: their names, how to change them, what a text keeps of them
    texts        many texts at once, what one takes over from another; drafts; requests, chats; scores
    superblocks  K-quants and IQ4: scales of scales, and the searches for them
    formats      model files, and tokenizer.model: gguf is the one to read
    backends     tables of operations, NumPy's and faster ones

The plumbing below: what it needs of a computer, and what people type and look at.

    machine      files that are written whole or not at all, memory, Ctrl-C, downloads of models by name
    cluster      many processes and machines, by Dask
    serve        a model over HTTP, in OpenAI's form
    commands     the command line; convert, inspect, bench, compare
    lab          pictures, exercises, the playground and the stepper
    plugins      our models for other programs: llm, lm-evaluation-harness
"""

from .errors import Cancelled, TinyllamaError

__version__ = "0.1.0"

#: Where to find what is imported when it is asked for, so that `tinyllama --help` doesn't wait for NumPy.
_PLACES = {
    "llama": ("Llama", "generate", "stream"),
    "cluster.loading": ("load",),
    "cluster.mapper": ("Mapper",),
    "commands.compare": ("compare_backends",),
    "commands.compare_models": ("compare",),
    "commands.imatrix": ("imatrix",),
    "lab.widgets": ("playground", "stepper"),
    "taps.control_vectors": ("ControlVector",),
    "taps.interventions": ("ablate", "patch", "scale", "steer"),
    "texts.chat": ("Chat",),
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}
__all__ = ["Cancelled", "TinyllamaError", *_PLACE_OF]


def __getattr__(name: str):
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'tinyllama' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"errors"})
