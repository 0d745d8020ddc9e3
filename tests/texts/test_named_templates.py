"""Templates by name: what llama.cpp makes of a chat by the same name."""

import json
from pathlib import Path

import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.texts.named_templates import ALIASES, NAMED
from tinyllama.texts.sandbox import compiled, rendered
from tinyllama.texts.templates import template_source

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "templates.json").read_text())
OWN = {"alpaca"}
#: What llama.cpp writes where we write the model's own token.
ENDS = {"zephyr": "<|endoftext|>", "deepseek": "<|EOT|>"}
ENDS |= dict.fromkeys(("deepseek2", "deepseek3"), "<｜end▁of▁sentence｜>")


def written(name: str, chat: list) -> str:
    messages = [{"role": role, "content": text} for role, text in chat]
    names = {"eos_token": ENDS.get(name, "</s>"), "bos_token": "<s>"}
    return rendered(compiled(template_source(name)), messages=messages, add_generation_prompt=True, **names)


@pytest.mark.parametrize("name", sorted({*NAMED, *ALIASES} & {*GOLDEN["made"]}))
def test_a_name_says_what_it_says_in_llama_cpp(name):
    for label, chat in GOLDEN["chats"].items():
        assert written(name, chat).removeprefix("<s>") == GOLDEN["made"][name][label], label


def test_every_name_is_one_of_llama_cpps_or_known_to_be_our_own():
    assert {*NAMED} - {*GOLDEN["made"]} == OWN
    assert {*ALIASES.values()} <= {*NAMED}
    assert not {*NAMED} & {*ALIASES}


def test_alpaca_is_written_as_its_models_were_trained():
    chat = [("system", "Be brief."), ("user", "First?")]
    assert written("alpaca", chat) == "Be brief.\n\n### Instruction:\nFirst?\n\n### Response:\n"


def test_turns_that_do_not_alternate_each_begin_anew():
    chat = [("user", "a"), ("system", "s"), ("user", "b"), ("user", "c")]
    assert written("mistral-v3", chat) == "[INST] a[/INST][INST] s\n\nb[/INST][INST] c[/INST]"


def test_a_name_that_there_is_not_names_the_nearest_or_all():
    with pytest.raises(TinyllamaError, match=r"no chat template 'lama3': did you mean llama3\?"):
        template_source("lama3")
    with pytest.raises(TinyllamaError, match="there are alpaca, chatml, "):
        template_source("nothing like it")
    assert template_source("{{ messages }}") == "{{ messages }}"
