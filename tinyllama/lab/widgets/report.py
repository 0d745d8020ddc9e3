"""What the playground says about a token, a run, or two runs: plain values, ready to be drawn."""

import numpy as np

from ...machine.limits import human
from ...sampling import Stage
from ...texts.completion import STOP_REASONS
from .session import Run, Session

ALTERNATIVES = 10  # the likeliest tokens that are shown at a place
REMOVED = 5  # tokens that are named of those which a stage ruled out

#: Why the first token is left out where attention is tinted.
SINK = "No other gets as much: heads that find nothing of use often look there (an attention sink)."

#: Settings that a run is compared by, and what they are called.
NAMES = {
    "model": "Model",
    "backend": "Backend",
    "threads": "Threads",
    "temp": "Temperature",
    "top_k": "Top-k",
}
NAMES |= {"top_p": "Top-p", "repeat_penalty": "Repetition penalty", "n_predict": "Tokens asked for"}
NAMES |= {"seed": "Seed", "stop": "Stop strings", "ctx_size": "Context"}


def percent(share: float | None) -> str:
    """0.1234 -> "12 %", 0.00123 -> "0.12 %"; None -> "–"."""
    if share is None:
        return "–"
    if share >= 0.0995:
        return f"{100 * share:.0f} %"
    return f"{100 * share:.2g} %" if share >= 0.0001 else "< 0.01 %"


def visible(text: str) -> str:
    """A token as one word on one line: a space is "␣", the end of a line "↵", what can't be seen "\\xa0"."""
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text(run: Run | None, first: int = 0) -> dict:
    """A run as `Tokens` shows it, from a token on."""
    if run is None:
        return {}
    tokens = run.tokens[first:]
    return {
        "run": run.number,
        "texts": run.texts()[first : first + len(tokens)],
        "pieces": [visible(token.piece) for token in tokens],
        "probs": [token.prob and round(token.prob, 4) for token in tokens],
        "drafted": [token.drafted for token in tokens],
        "n_prompt": max(0, len(run.prompt_tokens) - first),
        "changed": None if run.changed is None else run.changed - first,
    }


def token_report(run: Run, index: int, can_resume: bool = True) -> dict:
    """What was expected at a token's place, and what the stages of sampling made of it.

    Returns:
        {"piece", "facts", "columns": [{"name", "note"}], "rows", "can_resume"}; a row is {"id", "piece",
        "is_chosen", "cells"}, and a cell is {"share", "text"}, "removed" or None: not known.
    """
    token = run.tokens[index]
    report = {"piece": visible(token.piece), "columns": [], "rows": [], "can_resume": can_resume}
    if not token.stages:
        why = "The first token has nothing before it that could predict it."
        return report | {"facts": why if index == 0 else "Its probability isn't known: click it once more."}
    likeliest, settings = token.stages[0].kept.tolist(), _settings(run, index)
    report["facts"] = _facts(run, index, likeliest)
    report["columns"] = [_column(stage, run, settings) for stage in token.stages]
    listed = [dict(zip(stage.kept.tolist(), stage.probs.tolist(), strict=True)) for stage in token.stages]
    listed[0].setdefault(token.id, token.prob)
    for token_id in dict.fromkeys([*likeliest[:ALTERNATIVES], token.id]):
        row = {"id": token_id, "piece": visible(run.tokenizer.piece(token_id))}
        cells = [_cell(stage, probs.get(token_id)) for stage, probs in zip(token.stages, listed, strict=True)]
        report["rows"].append(row | {"is_chosen": token_id == token.id, "cells": cells})
    return report


def _settings(run: Run, index: int) -> dict:
    """The settings by which a token was chosen; none if an earlier run chose it or somebody typed it."""
    is_new = index >= len(run.prompt_tokens) + len(run.taken)
    return run.completion.settings if is_new else {}


def _facts(run: Run, index: int, likeliest: list[int]) -> str:
    token, place = run.tokens[index], f"not among the model's {len(likeliest)} likeliest"
    if token.id in likeliest:
        place = f"the model's choice number {likeliest.index(token.id) + 1}"
    said = f"Probability {percent(token.prob)}, {place}. Surprise: {token.surprise:.1f} bits. "
    if index < len(run.prompt_tokens):
        return said + "It is part of the prompt."
    if index == run.changed:
        return said + "You picked it."
    return said + ("Temperature 0 takes the likeliest." if _settings(run, index).get("temp") == 0 else "")


def _column(stage: Stage, run: Run, settings: dict) -> dict:
    title = "the model" if stage.name == "logits" else NAMES[stage.name].lower()
    return {"name": f"{title} {settings.get(stage.name, '')}".rstrip(), "note": _note(stage, run, settings)}


def _note(stage: Stage, run: Run, settings: dict) -> str:
    if stage.name == "logits":
        return f"chooses among {stage.n_kept:,}"
    if stage.name == "repeat_penalty":
        return "pushes recent tokens down"
    if stage.name == "temp":
        temp = settings.get("temp", 1)
        return "sharpens" if temp < 1 else "flattens" if temp > 1 else ""
    if not stage.n_removed:
        return f"removes none of {stage.n_kept:,}"
    first = ", ".join(visible(run.tokenizer.piece(token)) for token in stage.removed[:REMOVED].tolist())
    more = " …" if stage.n_removed > REMOVED else ""
    return f"keeps {stage.n_kept:,}, removes {stage.n_removed:,}: {first}{more}"


def _cell(stage: Stage, prob: float | None) -> dict | str | None:
    if prob is not None:
        return {"share": prob, "text": percent(prob)}
    return "removed" if len(stage.kept) == stage.n_kept else None


def attention(found: np.ndarray | None, layer: int | None, sinks: bool, first: int = 0) -> dict:
    """What a token attended to as `Tokens` shows it, from a token on.

    Args:
        found: [n_layers, n_past], as `attention.attention` gives it, or None.
        layer: which one; None: the mean over all.
        sinks: tint the text's first token, too.
    Returns:
        {"shares": of each token, "levels": how strongly it is tinted, 0 to 1}
    """
    if found is None:
        return {}
    shares, levels = _attention(found, layer, sinks)
    strongest = levels.max() or 1
    return {
        "shares": shares[first:].round(4).tolist(),
        "levels": (levels[first:] / strongest).round(3).tolist(),
    }


def attention_note(found: np.ndarray | None, layer: int | None, sinks: bool, first: int = 0) -> str:
    """A line about what is tinted; the tokens before the first aren't shown."""
    if found is None:
        return "Click a token: what the pass that chose it attended to is tinted."
    shares, tinted = _attention(found, layer, sinks)
    which = f"all {len(found)} layers" if layer is None else f"layer {layer}"
    said = f"What the pass that chose this token attended to, the mean over all heads of {which}. "
    where = ", on a token before this answer: show what the model saw" * bool(tinted.argmax() < first)
    said += f"The strongest tint is {percent(float(tinted.max()))}{where}."
    if sinks or len(shares) == 1:
        return said
    said += f" The first token isn't tinted; it gets {percent(float(shares[0]))}."
    return said + f" {SINK}" * bool(shares.argmax() == 0)


def _attention(found: np.ndarray, layer: int | None, sinks: bool) -> tuple[np.ndarray, np.ndarray]:
    """The shares of all tokens, and those that are tinted, the others 0."""
    shares = found.mean(axis=0) if layer is None else found[layer]
    return shares, np.where((np.arange(len(shares)) > 0) | sinks | (len(shares) == 1), shares, 0)


def status(session: Session) -> str:
    """One line: what is going on, or what the shown run took."""
    run = session.run
    if session.worker.doing:
        return session.worker.doing
    if run is None:
        return "Ready."
    generation, text, timings = run.generation, run.completion, run.completion.timings
    if generation and not text.tokens:
        return f"Reading the prompt: {generation.n_read:,} of {len(generation.prompt_ids):,} tokens"
    known = timings.n_remembered
    n_read = timings.n_prompt - known if text.tokens else 0  # without a token it may have been stopped
    remembered = f" ({known:,} remembered)" if known else ""
    figures = [
        f"Prompt {timings.n_prompt:,} tokens{remembered}{_rate(n_read, timings.prompt)}",
        f"text {len(text.tokens):,} tokens{_rate(timings.n_predict, timings.predict)}",
        f"context {timings.n_prompt + len(text.tokens):,} of {text.settings['ctx_size']:,}",
        *([] if generation else [_memory(*run.memory)]),
        f"seed {text.seed}",
    ]
    return " · ".join(figures + ([f"ended: {STOP_REASONS[text.stop_reason]}"] if text.stop_reason else []))


def _memory(weights: int, texts: int) -> str:
    """What the model takes: its weights, and what it keeps so that texts needn't be read again."""
    return f"memory: model {human(weights)}, texts {human(texts)}"


def notes(run: Run, n_answers: int = 1) -> list[str]:
    """What somebody should know who reads this text, one of n_answers, or wonders that there is none."""
    text, said = run.completion, list(run.warnings)
    if text.stop_reason == "eos" and not run.answer.strip():
        what = (
            "the text at once: it added nothing"
            if run.system is None
            else "its answer at once, without a word"
        )
        said.insert(0, f"The model ended {what}.")
    if n_answers > 1 and text.settings["temp"] == 0:
        said.append("temperature 0 always takes the likeliest token, so all answers are the same")
    return [f"{sentence[:1].upper()}{sentence[1:].rstrip('.')}." for sentence in said]


def export(runs: list[Run]) -> list[dict]:
    """Runs as JSON can hold them: what each was told, what it wrote, and how likely each token was."""
    return [
        {
            "run": run.number,
            "name": run.name,
            "text": run.text,
            "tokens": [{"id": token.id, "piece": token.piece, "prob": token.prob} for token in run.tokens],
            "n_prompt": len(run.prompt_tokens),
            "n_taken": len(run.taken),
            "stop_reason": run.completion.stop_reason,
            "settings": run.completion.settings,
            "messages": None if run.system is None else run.messages,
        }
        for run in runs
    ]


def _rate(n_tokens: int, seconds: float) -> str:
    return f" at {n_tokens / seconds:,.0f}/s" if n_tokens and seconds else ""


def title(run: Run) -> str:
    """A run in a list of them."""
    if run.name:
        return f"{run.number}: {run.name}"
    prompt = " ".join(run.prompt.split())
    prompt = prompt if len(prompt) <= 32 else prompt[:31] + "…"
    model = str(run.origin[0]).rpartition("/")[2]
    settings = run.completion.settings
    how = f"temperature {settings['temp']:g}, seed {settings['seed']}"
    kind = "" if run.changed is None else ", a token picked"
    prompt = prompt if run.system is None else f"Chat: {prompt}"
    return f"{run.number}: {prompt} · {model} · {how}{kind}"


def comparison(*runs: Run) -> list[tuple[str, list[str], bool]]:
    """(name, its value in each run, whether they differ), for every setting that matters."""
    settings = [run.completion.settings for run in runs]
    rows = [(label, [_written(used[name]) for used in settings]) for name, label in NAMES.items()]
    return [(label, values, len(set(values)) > 1) for label, values in rows]


def _written(value) -> str:
    return ", ".join(map(repr, value)) or "none" if isinstance(value, tuple) else str(value)
