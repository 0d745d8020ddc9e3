"""What a text says about itself, to people and to JSON."""

import json

import pytest

import tinyllama


@pytest.fixture(scope="module")
def text():
    return tinyllama.generate("Once upon", "small", n_predict=4, seed=1, stages=True)


def test_a_text_and_its_tokens_become_json_with_all_figures(text):
    found = json.loads(json.dumps(text.as_dict()))
    assert found["text"] == text and found["prompt"] == text.prompt == "Once upon" and found["seed"] == 1
    assert [token["id"] for token in found["tokens"]] == text.ids
    assert found["tokens"][0]["stages"][0]["kept"][0] == int(text.tokens[0].stages[0].kept[0])
    assert found["timings"]["n_predict"] == 3 and found["settings"]["temp"] == 0.8


def test_a_token_is_shown_in_a_few_characters(text):
    assert repr(text.tokens[0]).startswith(f"Token({text.ids[0]}, {text.tokens[0].piece!r}, prob=0.")
    assert len(repr(text.tokens)) < 300
