"""Text <-> token ids: SentencePiece (LLaMA) and byte-level BPE (SmolLM2, Llama 3)."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made from: a tokenizer.model, or the pieces that a model file carries.

    Attributes:
        kind: "sentencepiece" or "bpe" (byte-level).
        model: path of a tokenizer.model, or None; if there is one, the pieces below are empty.
        pieces: every piece in the order of the ids, as GGUF spells them ("▁Hello", "<0x0A>", "ĠHello").
        scores: of SentencePiece, one a piece: the higher is merged first.
        types: one a piece: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
        merges: of byte-level BPE, "left right", the first is merged first.
        pre: of byte-level BPE, the name of the rule that cuts text before merging ("smollm", "llama-bpe").
        bos_id, eos_id, unk_id: None where there is none.
        add_bos: put bos before every prompt.
        add_space_prefix: of SentencePiece, put a space before the text.
    """

    kind: str
    model: Path | None = None
    pieces: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    pre: str = ""
    bos_id: int | None = 1
    eos_id: int | None = 2
    unk_id: int | None = 0
    add_bos: bool = True
    add_space_prefix: bool = True
