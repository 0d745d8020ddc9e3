"""Settings as keywords of Python."""

import inspect

import pytest

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.settings import Settings
from tinyllama.texts.keywords import settings_of


@pytest.mark.parametrize("function", [tinyllama.generate, tinyllama.stream, tinyllama.Llama.generate])
def test_help_and_completion_show_every_setting_with_its_meaning(function):
    shown = inspect.signature(function).parameters
    assert Settings.__annotations__.keys() <= shown.keys() and "settings" not in shown
    assert shown["n_predict"].default == 128
    assert "    temp: temperature: below 1 sharpens" in function.__doc__


def test_functions_that_load_a_model_show_how():
    assert {"model", "backend", "threads", "mmap", "each", "cancel"} <= inspect.signature(
        tinyllama.generate
    ).parameters.keys()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_tokens", "n_predict"), ("temperature", "temp"), ("top_n", "top_p"), ("sed", "seed")],
)
def test_a_name_that_no_setting_has_is_refused_with_the_one_that_is_meant(wrong, right):
    with pytest.raises(TinyllamaError, match=f"no setting '{wrong}': did you mean {right}\\?$"):
        tinyllama.generate("Once", **{wrong: 1})


def test_a_name_like_none_is_refused_with_all_that_there_are():
    with pytest.raises(TinyllamaError, match="no setting 'zzzz': there are n_predict, seed"):
        settings_of(zzzz=1)


def test_a_tab_behind_tinyllama_offers_what_people_call():
    assert {"generate", "load", "stream", "Chat", "playground", "stepper"} <= set(dir(tinyllama))
