"""What a text would be better without, said before it begins; and where it can't go on."""

from collections.abc import Iterator

import numpy as np

from ..errors import TinyllamaError
from ..settings import Settings, default_ctx_size
from ..taps.edits import is_edited


def doubts(llama, prompt, ids: list[int], wanted: Settings) -> Iterator[str]:
    """What about a prompt, of which ids were made, or about its settings will worsen the text."""
    bos, trained, has_template = llama.tokenizer.bos_id, llama.config.max_seq_len, llama.checkpoint.template
    n_ctx = wanted.ctx_size or default_ctx_size(llama.config)
    if wanted.chat and not (has_template or wanted.chat_template):
        yield "the model has no chat template: the text is continued (a chat_template, as alpaca, helps)"
    if isinstance(prompt, str) and prompt.rstrip().endswith("?") and has_template and not wanted.chat:
        yield "the model is made for chats, and the question is continued: to have it answered, say chat"
    if wanted.chat_template and not wanted.chat:
        yield "chat_template is ignored, since this is no chat"
    if bos is not None and ids[:2] == [bos, bos]:
        yield "the prompt starts with bos, and another one is put before it: leave yours out"
    if isinstance(prompt, str) and prompt.endswith(" ") and not wanted.chat:
        yield "the prompt ends in a space, but words begin with theirs: the text gets better without it"
    if n_ctx > trained:
        yield f"the model was trained on {trained} tokens, ctx_size is {n_ctx}"


def require_finite(llama, logits: np.ndarray, ids: list[int]) -> None:
    """Raise TinyllamaError where logits of the last of these ids are NaN or infinite."""
    for row in np.flatnonzero(~np.isfinite(logits).all(axis=-1)):
        at = len(ids) - len(logits) + int(row)
        piece = f"token {at + 1} of the text, {llama.tokenizer.piece(int(ids[at]))!r:.40}"
        cause = f"its file is damaged (`tinyllama inspect --check` finds the tensors){llama.backend.hint}"
        cause = "what is edited makes it so" if is_edited(llama) else cause
        what = f"after {piece}, the model computes NaN or infinity: {cause}"
        raise TinyllamaError(f"{llama.checkpoint.path}: {what}")
