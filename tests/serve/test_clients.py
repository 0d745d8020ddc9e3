"""Other programs that ask a server: llm, and lm-evaluation-harness where it is installed."""

import json
import math
import os
import subprocess
import sys

import pytest


def test_llm_chats(process, llama, tmp_path):
    pytest.importorskip("llm")
    model = f"- model_id: served\n  model_name: small\n  api_base: {process.url}/v1\n  api_key_name: none\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "served",
        "--no-log",
        "-o",
        "seed",
        "1",
        "-o",
        "max_tokens",
        "8",
    ]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run([*command, "Tell me a story"], env=environment, capture_output=True, text=True)
    text = llama.chat("Tell me a story", chat_template="chatml", n_predict=8, seed=1, temp=1.0, top_p=1.0)
    assert done.stdout.removesuffix("\n") == text, done.stderr


CHOICES = [
    ("Tom and his", " dog"),
    ("Tom and his", " xylophone"),
    ("Once upon a", " time"),
    ("The", " old king"),
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_gets_how_likely_choices_are(process, llama, batch_size):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    how = {"model": "small", "max_length": 2048, "batch_size": batch_size}
    asking = LocalCompletionsAPI(base_url=f"{process.url}/v1/completions", **how)
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=choice, idx=number)
        for number, choice in enumerate(CHOICES)
    ]
    for (context, choice), (logprob, is_greedy) in zip(CHOICES, asking.loglikelihood(asked), strict=True):
        n = len(llama.tokenizer.encode(context, bos=False))
        scored = llama.score(llama.tokenizer.encode(context + choice, bos=False))[n:]
        assert logprob == pytest.approx(sum(math.log(token.prob) for token in scored), abs=1e-6)
        assert is_greedy == all(token.stages[0].kept[0] == token.id for token in scored)


@pytest.mark.long
def test_32_clients_of_whom_some_go_away_for_ten_minutes():
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "soak.py"), "10", "small", "c"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(found)  # for `make soak`
    assert found["n_wrong"] == 0, found["wrong"]
    assert found["counts"]["whole"] > 100 and found["counts"]["gone"] > 100
    early, late = found["states"]
    assert late["rss"] < early["rss"] + 60_000_000 and late["fds"] <= early["fds"]
