"""Where a text begins: its prompt becomes ids, and what it takes over, guesses with and keeps is found."""

from collections.abc import Callable

import numpy as np

from ..generation import Generation
from ..model import Step
from ..ops import KVCache
from ..settings import Settings, default_ctx_size
from ..taps.edits import is_edited
from ..taps.watch import Watch
from .completion import Timings
from .doubts import doubts
from .drafts import drafts_for
from .templates import prompt_of


def beginning(llama, prompt, wanted: Settings, recall: Callable, load: Callable, cancel=None) -> Generation:
    """A text before its first step.

    Args:
        recall: as `Remembered.recall`.
        load: as `llama.load`, for the model that guesses.
        cancel: as of `Llama.stream`.
    """
    n_ctx = wanted.ctx_size or default_ctx_size(llama.config)
    template = llama.template(wanted.chat_template) if wanted.chat else None
    ids = llama.tokens(prompt_of(prompt, template) if wanted.chat else prompt, n_ctx)
    cache = llama.backend.new_cache(llama.config, n_ctx, llama.checkpoint)
    origin = {"prompt": str(prompt) if isinstance(prompt, str) else ids, "model": llama.name}
    origin |= {"prompt": prompt} if wanted.chat else {}
    origin |= {"backend": llama.backend.name, "threads": llama.backend.threads, **llama.backend.options}
    took = Timings(load=llama.load_seconds, n_prompt=len(ids))

    def run_alone(step: Step) -> np.ndarray:
        (logits,) = llama.run([step], cancel=cancel)
        took.pack, took.n_packed, took.n_left = llama.packing.state
        return logits

    def recalled(ids: list[int], empty: KVCache) -> KVCache:
        return empty if is_edited(llama) else recall(ids, empty)

    known = {"recall": recalled, "keep": llama.remembered.keep} if wanted.remember else {}
    known |= {"watch": Watch(llama.config, wanted.taps)} if wanted.taps else {}
    about = {"origin": origin, "doubts": doubts(llama, prompt, ids, wanted), "door": llama.backend.running}
    about |= {"timings": took, "drafts": drafts_for(llama, wanted, n_ctx, load, cancel)}
    return Generation(run_alone, llama.tokenizer, cache, ids, wanted, **about, **known)
