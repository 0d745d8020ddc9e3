"""The real lm-evaluation-harness: our models get the scores that transformers gives the same weights."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers

import tinyllama
from tinyllama.config import STEPS, tensor_names
from tinyllama.tensor import halves_order

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not here: pip install lm_eval accelerate")
TinyllamaLM = import_module("tinyllama.plugins.lm_eval_model").TinyllamaLM

CLOSE = 1e-3
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
STORY = (Path(__file__).parents[2] / "data" / "held_out.txt").read_text(encoding="utf-8")
WORDS = STORY[:4000].split()
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model as transformers saves it, with a template, of 128 tokens of context."""
    folder, llama = tmp_path_factory.mktemp("small"), tinyllama.load("small", backend="numpy")
    config = llama.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            max_position_embeddings=128,
            rms_norm_eps=config.norm_eps,
        )
    )
    state = {}
    for meta, _, theirs in tensor_names(config.n_layers, STEPS):
        if meta in llama.checkpoint.tensors:
            weight = llama.weight(meta.removesuffix(".weight"))
            if meta.split(".")[-2] in ("wq", "wk"):
                weight = weight[halves_order(config.n_heads, config.head_dim).argsort()]
            state[theirs] = torch.tensor(weight)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(
        (Path(tinyllama.load("small").checkpoint.path) / "tokenizer.model").read_bytes()
    )
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Names of small tasks, and where they lie."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for number in range(4):
        start = 40 * number
        choices = [" ".join(WORDS[start + at : start + at + 3]) for at in (12, 200, 300)]
        lines.append({"text": " ".join(WORDS[start : start + 12]), "choices": choices, "answer": 0})
    lines[3]["text"] = " ".join(WORDS[:300])  # longer than the context
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    for name, task in TASKS.items():
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        config = {"task": f"small_{name}", "test_split": "test"} | where | task
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # which is YAML, too
    return folder


def scores(tasks, model, monkeypatch, **options):
    """({task: its figures}, {task: what the model answered}) of a model."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    names = [f"small_{name}" for name in TASKS]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    answers = {
        name: [sample["filtered_resps"] for sample in samples] for name, samples in found["samples"].items()
    }
    return found["results"], answers


def numbers(found):
    """Of nested lists and tuples, one list."""
    return (
        [one for part in found for one in numbers(part)]
        if isinstance(found, list | tuple)
        else [float(found)]
    )


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_transformers(folder, tasks, monkeypatch, chat):
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)  # its threads wait busily for those of others
    chats = {"apply_chat_template": True, "system_instruction": "Be brief."} if chat else {}
    theirs = HFLM(str(folder), device="cpu", dtype="float32")
    expected, answered = scores(tasks, theirs, monkeypatch, **chats)
    ours = TinyllamaLM(str(folder), backend="numpy")
    found, answers = scores(tasks, ours, monkeypatch, **chats)
    for task, figures in expected.items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=CLOSE), (task, name)
    assert answers["small_answer"] == answered["small_answer"]
    for name in ("small_choice", "small_perplexity"):
        assert numbers(answers[name]) == pytest.approx(numbers(answered[name]), rel=CLOSE)


def test_continuations_of_one_context_are_computed_in_one_pass(folder, monkeypatch):
    ours, passes = TinyllamaLM(str(folder), backend="numpy"), []
    run = ours.llama.run
    monkeypatch.setattr(ours.llama, "run", lambda steps, **_: passes.append(len(steps)) or run(steps))
    requests = [(None, [1, *range(300, 340)], [400 + n, 500]) for n in range(4)]
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert passes == [1, 4]
    for (_, context, continuation), (logprob, _) in zip(requests, found, strict=True):
        scored = ours.llama.score([*context, *continuation])[-2:]
        assert logprob == pytest.approx(-sum(token.surprise for token in scored) * 0.6931472, abs=1e-3)


def test_a_model_without_a_template_names_what_to_do():
    with pytest.raises(tinyllama.TinyllamaError, match="has no chat template: name one"):
        TinyllamaLM("small").chat_template(True)


def test_the_command_knows_the_model_by_its_name():
    command = [sys.executable, "-m", "tinyllama.plugins.lm_eval_model", "--model", "tinyllama"]
    command += ["--model_args", "model=none-such", "--tasks", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "Unknown model" not in done.stderr
