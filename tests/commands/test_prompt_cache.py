"""--prompt-cache: a second run reads what is new alone, and no file is lost."""

import os
import re
from argparse import Namespace

import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.commands import main
from tinyllama.commands.prompt_cache import PromptCache
from tinyllama.ops import FEW

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "
STORY += "The dog was big and brown, and he liked to run after the ball that she threw for him."
QUICK = ["-n", "8", "-s", "1", "-t", "2"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "story.cache"


@pytest.fixture
def run(capsys, path):
    """Generate with a cache file, as a process of its own would: (status, stdout, stderr)."""

    def run(prompt, *options: str):
        for backend in ("c", "numpy"):
            if not available()[backend]:
                tinyllama.load("small", backend, 2).remembered.clear()
        try:
            status = main(["generate", "-p", prompt, *QUICK, "--prompt-cache", str(path), *options])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def figures(err: str) -> tuple[int, int]:
    """Of the line about the prompt: its tokens, and how many of them were remembered."""
    (n_tokens, known) = re.findall(r"^prompt .* (\d+) tokens(?:, (\d+) remembered)?", err, re.MULTILINE)[0]
    return int(n_tokens), int(known or 0)


def saved(path) -> list[int]:
    return tinyllama.load("small", threads=2).load_cache(path).ids


def ids(prompt: str) -> list[int]:
    return tinyllama.load("small", threads=2).tokens(prompt)


def warnings(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("warning")]


def test_the_second_run_reads_the_end_of_the_prompt_and_writes_the_same_text(run, path):
    first, second = run(STORY), run(STORY)
    assert first[:2] == second[:2] == (0, first[1])
    n_tokens, known = figures(second[2])
    assert figures(first[2]) == (n_tokens, 0) and known == n_tokens - FEW - 1
    assert saved(path) == ids(STORY)
    assert f"tokens in {path}, " in first[2] and f"{n_tokens} tokens from {path}" in second[2]
    assert not warnings(first[2] + second[2])


def test_the_speed_of_the_prompt_is_that_of_the_tokens_that_were_read(run):
    run(STORY)
    err = run(STORY)[2]
    (line,) = re.findall(r"^prompt .*", err, re.MULTILINE)
    ms = float(re.search(r"([\d.]+) ms/token", line)[1])
    per_second = float(re.search(r"([\d.]+) tokens/s", line)[1])
    seconds = float(re.search(r"([\d.]+) s ", line)[1])
    assert ms * (FEW + 1) / 1000 == pytest.approx(seconds, abs=0.006)
    assert per_second == pytest.approx(1000 / ms, rel=0.1)


def test_another_end_goes_on_from_what_both_have_in_common(run, path):
    run(STORY + " One day it rained.")
    longer = STORY + " Then Tom came to see the big brown dog, and he ran, and he ran, and he ran."
    fresh = tinyllama.load("small", threads=2).generate(longer, n_predict=8, seed=1, remember=False)
    _, out, err = run(longer)
    assert out == f"{longer}{fresh}\n"
    assert figures(err)[1] == len(ids(STORY)) and saved(path) == ids(longer)


def test_a_file_that_holds_the_prompt_already_is_not_written_again(run, path):
    run(STORY)
    before = path.stat()
    run(STORY)
    run(STORY[: len(STORY) * 2 // 3])
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_all_saves_the_text_too_and_the_next_turn_goes_on_from_it(run, path):
    _, out, _ = run(STORY, "--prompt-cache-all")
    held = saved(path)
    text = tinyllama.load("small", threads=2).generate(STORY, n_predict=8, seed=1, remember=False)
    assert held == [*ids(STORY), *text.ids[:-1]]
    more = out.removesuffix("\n") + " They played."
    assert ids(more)[: len(held)] == held
    assert figures(run(more, "--prompt-cache-ro")[2])[1] == len(held)


@pytest.mark.parametrize("whole", [False, True])
def test_the_prompt_is_saved_before_the_text_is_written_and_after_control_c_nothing(path, whole):
    options = {"prompt_cache": str(path), "prompt_cache_all": whole, "prompt_cache_ro": False}
    llama, cache = tinyllama.load("small", threads=2), PromptCache(Namespace(**options))
    text = llama.stream(STORY, n_predict=20, seed=1)
    cache.keep(text)
    assert not path.exists()
    next(text)
    cache.keep(text)
    assert path.exists() != whole and text.stop_reason is None
    text.end("cancelled")
    cache.keep(text, ended=True)
    assert not path.exists() if whole else saved(path) == ids(STORY)


def test_ro_never_writes(run, path):
    _, _, err = run(STORY, "--prompt-cache-ro")
    assert not path.exists() and warnings(err) == [
        f"warning: {path}: isn't there or empty: the prompt is read"
    ]
    run(STORY)
    before = path.read_bytes()
    _, _, err = run("The " + STORY, "--prompt-cache-ro")
    assert path.read_bytes() == before and figures(err)[1] == 0
    path.write_bytes(before[:-1])
    _, _, err = run(STORY, "--prompt-cache-ro")
    assert len(path.read_bytes()) == len(before) - 1 and len(warnings(err)) == 1


def test_a_damaged_file_and_one_of_another_model_are_a_warning_and_written_anew(run, path, tmp_path):
    out = run(STORY)[1]
    good = path.read_bytes()
    other = re.sub(rb'("model": ".{63}).', rb"\1x", good)
    for bad in (good[:-100], other, good[:-2] + b"xx"):
        path.write_bytes(bad)
        status, found, err = run(STORY)
        assert (status, found) == (0, out) and figures(err)[1] == 0
        (line,) = warnings(err)
        assert line.startswith(f"warning: {path}: ") and line.endswith(": the text has to be read again")
        assert path.read_bytes() == good


@pytest.mark.skipif(available()["c"] is not None, reason="the C backend is not built")
def test_a_file_of_another_precision_is_a_warning(run, path):
    run(STORY, "--backend", "numpy")
    assert "keeps float32, and this one keeps float16" in warnings(run(STORY, "--backend", "c")[2])[0]


def test_an_empty_file_is_written_to(run, path):
    path.touch()
    assert run(STORY)[0] == 0 and saved(path) == ids(STORY)


def test_a_file_that_is_no_cache_is_left_alone(run, path):
    for data in (b"GGUF" + bytes(100), b"my novel"):
        path.write_bytes(data)
        status, out, err = run(STORY)
        assert (status, out) == (1, "") and err.startswith(f"tinyllama: {path}: is no prompt cache but ")
        assert len(err.splitlines()) == 1 and path.read_bytes() == data


def test_a_folder_and_a_file_in_none_are_refused_before_anything_is_read(run, path):
    path.mkdir()
    assert run(STORY)[:2] == (1, "")
    path.rmdir()
    path.parent.rmdir()
    status, _, err = run(STORY)
    assert (status, err) == (1, f"tinyllama: {path}: there is no folder {path.parent}\n")


def test_where_it_cannot_be_saved_the_text_goes_on(run, path):
    os.mkdir(f"{path}.tmp")
    status, out, err = run(STORY)
    assert status == 0 and len(out) > len(STORY) + 5
    assert len(warnings(err)) == 1 and str(path) in warnings(err)[0] and not path.exists()


@pytest.mark.parametrize("options", [["--prompt-cache-ro"], ["--prompt-cache-all"], ["--prompt_cache="]])
def test_options_that_need_the_file_s_name_say_so(capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "-p", "x", *options])
    assert "argument --prompt_cache: name the file" in capsys.readouterr().err


def test_all_and_ro_exclude_each_other(run):
    status, _, err = run(STORY, "--prompt-cache-all", "--prompt-cache-ro")
    assert status == 2 and "not allowed with" in err
