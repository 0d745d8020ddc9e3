"""The settings of a run: the one list, of which the command line's options and docs/settings.md are made.

Nothing here needs NumPy, so that a mistyped option is refused at once.
"""

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real

from .errors import require


def _setting(default, help: str, least: float | None = None, most: float = math.inf, flag: str | None = None):
    return field(default=default, metadata={"help": help, "least": least, "most": most, "flag": flag})


@dataclass(frozen=True)
class Settings:
    """How a text is continued.

    Raises TinyllamaError, naming the setting, for a value of another kind or out of its range.
    """

    n_predict: int = _setting(128, "tokens to write; -1: until text or context end", -1, flag="-n")
    seed: int = _setting(-1, "the same seed gives the same text; -1: a new one", -1, flag="-s")
    temp: float = _setting(0.8, "temperature: below 1 sharpens, above 1 flattens, 0: the likeliest", 0, 1e30)
    top_k: int = _setting(40, "choose among so many likeliest tokens; 0: among all", 0)
    top_p: float = _setting(0.9, "of these, the likeliest that together are so probable; 1: all", 1e-9, 1)
    repeat_penalty: float = _setting(1.0, "how much less likely recent tokens become; 1: not", 1e-30, 1e30)
    repeat_last_n: int = _setting(64, "how many tokens are recent; 0: none", 0)
    stop: tuple[str, ...] = _setting((), "end before this text; may be repeated")
    ctx_size: int | None = _setting(None, "room in tokens; default: the model's, at most 2048", 1, flag="-c")
    batch_size: int = _setting(512, "tokens of the prompt that are computed at once", 1, flag="-b")
    remember: bool = _setting(True, "go on from an earlier text that begins like the prompt")
    draft_lookup: bool = _setting(False, "guess tokens by what came next in the text before", flag="")
    spec_draft_model: str | None = _setting(None, "a small model that guesses tokens", flag="-md")
    spec_draft_n_max: int = _setting(15, "tokens that are guessed at a time, at most", 1, 15)
    chat: bool = _setting(False, "answer the prompt, as what a user says, instead of continuing it", flag="")
    chat_template: str | None = _setting(None, "of chats, in place of the model's own: a name, or Jinja")
    taps: tuple[str, ...] = _setting((), "values inside the model that each token keeps; may be repeated")
    stages: bool = _setting(False, "record what each stage of sampling did to each token")

    def __post_init__(self):
        for name in ("stop", "taps"):
            given = getattr(self, name)
            texts = tuple(given) if isinstance(given, list | tuple) else (given,)
            object.__setattr__(self, name, texts)
            fine = all(isinstance(text, str) and text for text in texts)
            require(fine, f"{name} must be strings that aren't empty, not {texts!r}")
        object.__setattr__(self, "spec_draft_model", self.spec_draft_model and str(self.spec_draft_model))
        for setting in fields(self):
            if setting.metadata["least"] is not None:
                object.__setattr__(self, setting.name, _checked(getattr(self, setting.name), setting))


def _checked(value, setting) -> float | int | None:
    """A value as a number of Python's own: JSON takes no NumPy's."""
    least, most, is_real = setting.metadata["least"], setting.metadata["most"], setting.type is float
    ok = isinstance(value, Real if is_real else Integral) and least <= value <= most  # not NaN
    what = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least}"
    kind = "number" if is_real else "whole number"
    require(ok or value is setting.default is None, f"{setting.name} must be a {kind} {what}, not {value!r}")
    return value if value is None else float(value) if is_real else int(value)


def default_ctx_size(config) -> int:
    """Tokens that a run has room for if nobody says: 2048, or what the model was trained on if less."""
    return min(config.max_seq_len, 2048)
