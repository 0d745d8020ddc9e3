"""What the playground says about a token, a run, or two runs: plain values, ready to be drawn."""

import math
from dataclasses import asdict

from ...machine import limits as resources
from ...generation import STOP_REASONS
from ...sampling import Sampling, Stage
from .session import Run, Session

ALTERNATIVES = 10  # the likeliest tokens that are shown at a place
REMOVED = 5  # tokens that are named of those which a stage ruled out

#: Settings that a run is compared by, and what they are called.
NAMES = {
    "model": "Model",
    "backend": "Backend",
    "threads": "Threads",
    "temp": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
    "repeat_penalty": "Repetition penalty",
    "n_predict": "Tokens asked for",
    "seed": "Seed",
}


def percent(share: float) -> str:
    """0.1234 -> "12 %", 0.00123 -> "0.12 %"."""
    if math.isnan(share):
        return "–"
    if share >= 0.0995:
        return f"{100 * share:.0f} %"
    return f"{100 * share:.2g} %" if share >= 0.0001 else "< 0.01 %"


def visible(text: str) -> str:
    """A token as one word on one line: a space is "␣", the end of a line "↵"."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


# --- a token ---------------------------------------------------------------------------------------


def token_report(run: Run, index: int, can_resume: bool = True) -> dict:
    """What was expected at a token's place, and what the stages of sampling made of it.

    Returns:
        {"piece", "facts", "columns": [{"name", "note"}], "rows", "can_resume"}; a row is {"id", "piece",
        "rank", "is_chosen", "cells"}, and a cell is {"share", "text"}, "removed" or None: not known.
    """
    token = run.tokens[index]
    report = {"piece": visible(token.piece), "columns": [], "rows": [], "can_resume": can_resume}
    if not token.stages:
        why = "The first token has nothing before it that could predict it."
        return report | {"facts": why if index == 0 else "Its probability isn't known: click it once more."}
    first, sampling = token.stages[0], _sampling(run, index)
    ids = first.kept[:ALTERNATIVES].tolist()
    ids += [token.id] if token.id not in ids else []
    ranks = {token_id: rank for rank, token_id in enumerate(first.kept.tolist(), 1)}
    report["facts"] = _facts(run, index, ranks.get(token.id))
    report["columns"] = [_column(stage, run, sampling) for stage in token.stages]
    for token_id in ids:
        cells = [_cell(stage, token_id) for stage in token.stages]
        if token_id == token.id and cells[0] is None:
            cells[0] = {"share": token.prob, "text": percent(token.prob)}
        piece, rank = visible(run.tokenizer.piece(token_id)), ranks.get(token_id)
        row = {"id": token_id, "piece": piece, "rank": rank, "is_chosen": token_id == token.id}
        report["rows"].append(row | {"cells": cells})
    return report


def _sampling(run: Run, index: int) -> Sampling | None:
    """The settings by which a token was chosen, None if an earlier run chose it or somebody typed it."""
    is_new = index >= len(run.prompt_tokens) + len(run.taken)
    names = asdict(Sampling())
    return Sampling(**{name: run.completion.settings[name] for name in names}) if is_new else None


def _facts(run: Run, index: int, rank: int | None) -> str:
    token = run.tokens[index]
    place = f"the model's choice number {rank}" if rank else "not among the model's 50 likeliest"
    said = f"Probability {percent(token.prob)}, {place}. Surprise: {token.surprise:.1f} bits. "
    if index < len(run.prompt_tokens):
        return said + "It is part of the prompt."
    if index == run.changed:
        return said + "You picked it."
    sampling = _sampling(run, index)
    return said + ("Temperature 0 takes the likeliest." if sampling and sampling.temp == 0 else "")


def _column(stage: Stage, run: Run, sampling: Sampling | None) -> dict:
    titles = {
        "logits": ("the model", None),
        "repeat_penalty": ("repetition penalty", "repeat_penalty"),
        "temp": ("temperature", "temp"),
        "top_k": ("top-k", "top_k"),
        "top_p": ("top-p", "top_p"),
    }
    title, setting = titles[stage.name]
    value = f" {getattr(sampling, setting)}" if setting and sampling else ""
    return {"name": title + value, "note": _note(stage, run, sampling)}


def _note(stage: Stage, run: Run, sampling: Sampling | None) -> str:
    if stage.name == "logits":
        return f"chooses among {stage.n_kept:,}"
    if stage.name == "repeat_penalty":
        return "pushes recent tokens down"
    if stage.name == "temp":
        temp = sampling.temp if sampling else 1
        return "sharpens" if temp < 1 else "flattens" if temp > 1 else ""
    if not stage.n_removed:
        return f"removes none of {stage.n_kept:,}"
    first = ", ".join(visible(run.tokenizer.piece(int(token))) for token in stage.removed[:REMOVED])
    return f"keeps {stage.n_kept:,}, removes {stage.n_removed:,}: {first}" + (
        " …" if stage.n_removed > REMOVED else ""
    )


def _cell(stage: Stage, token_id: int) -> dict | str | None:
    listed = dict(zip(stage.kept.tolist(), stage.probs.tolist(), strict=True))
    if token_id in listed:
        return {"share": listed[token_id], "text": percent(listed[token_id])}
    return "removed" if len(listed) == stage.n_kept else None


# --- a run, and two of them ------------------------------------------------------------------------


def status(session: Session) -> str:
    """One line: what is going on, or what the shown run took."""
    run = session.run
    if session.state == "loading":
        return f"Loading the model: {percent(session.loaded)}"
    if session.state == "scoring":
        return "Reading the prompt once more, for the probabilities of its tokens"
    if run is None:
        return f"Ready. Memory {resources.human(resources.used_memory())}."
    if session.state == "reading" and run.generation:
        return f"Reading the prompt: {run.generation.n_read:,} of {len(run.generation.prompt_ids):,} tokens"
    return " · ".join(_figures(run))


def _figures(run: Run) -> list[str]:
    text, timings = run.completion, run.completion.timings
    n_used = timings.n_prompt + len(text.tokens)
    figures = [
        f"Prompt {timings.n_prompt:,} tokens{_rate(timings.n_prompt, timings.prompt)}",
        f"text {len(text.tokens):,} tokens{_rate(timings.n_predict, timings.predict)}",
        f"context {n_used:,} of {text.settings['ctx_size']:,} tokens",
        f"memory {resources.human(resources.used_memory())}",
        f"seed {text.seed}",
    ]
    return figures + ([f"ended: {STOP_REASONS[text.stop_reason]}"] if text.stop_reason else [])


def _rate(n_tokens: int, seconds: float) -> str:
    return f" at {n_tokens / seconds:,.0f} tokens/s" if n_tokens and seconds else ""


def title(run: Run) -> str:
    """A run in a list of them."""
    prompt = " ".join(run.prompt.split())
    prompt = prompt if len(prompt) <= 32 else prompt[:31] + "…"
    model = str(run.origin[0]).rpartition("/")[2]
    settings = run.completion.settings
    how = f"temperature {settings['temp']:g}, seed {settings['seed']}"
    kind = "" if run.changed is None else ", a token picked"
    return f"{run.number}: {prompt} · {model} · {how}{kind}"


def comparison(*runs: Run) -> list[tuple[str, list[str], bool]]:
    """(name, its value in each run, whether they differ), for every setting that matters."""
    rows = []
    for name, label in NAMES.items():
        values = [str(run.completion.settings[name]) for run in runs]
        rows.append((label, values, len(set(values)) > 1))
    return rows


def is_setting(name: str) -> bool:
    """Whether the playground has a control for a setting of this name."""
    return name in NAMES and name != "model"
