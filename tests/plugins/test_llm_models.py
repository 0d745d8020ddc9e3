"""`llm`, the real one, finds our models, and has them answer as tinyllama does."""

import asyncio
import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tinyllama
from tinyllama.machine import places
from tinyllama.settings import Settings

llm = pytest.importorskip("llm")
pytest.importorskip("jinja2")
cli = import_module("llm.cli").cli
models = import_module("tinyllama.plugins.llm_models")

GREEDY = {"temperature": 0, "max_tokens": 12}
CHATML = {"chat_template": "chatml"} | GREEDY


@pytest.fixture(autouse=True)
def computer(tmp_path, monkeypatch):
    """One with a small model, and a place for llm's files."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYLLAMA_MODEL", raising=False)
    monkeypatch.setattr(places, "models_folder", lambda: tmp_path / "data" / "models")
    monkeypatch.chdir(tmp_path)
    llm.load_plugins()
    if not any(module is models for _, module in llm.pm.list_name_plugin()):
        llm.pm.register(models)
    return tmp_path


def command(*arguments: str, typed: str | None = None):
    """What `llm` prints, and how it ends."""
    from click.testing import CliRunner

    return CliRunner().invoke(cli, arguments, input=typed)


def options(**given) -> list[str]:
    return [word for name, value in given.items() for word in ("-o", name, str(value))]


def test_llm_finds_the_module_by_an_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["llm"] == {"tinyllama": models.__name__}


def test_every_model_on_this_computer_is_listed_and_none_is_opened(computer, monkeypatch):
    for name in ("models/7B/model.gguf", "ollama/manifests/registry.ollama.ai/library/llama3.2/1b"):
        (computer / name).parent.mkdir(parents=True)
        (computer / name).write_bytes(b"nothing that would open")
    monkeypatch.setenv("TINYLLAMA_MODEL", "elsewhere.gguf")
    listed = command("models", "list", "-q", "tinyllama/").stdout.splitlines()
    names = ["elsewhere.gguf", "small", "models/7B/model.gguf", "ollama:llama3.2:1b"]
    assert listed == [f"Model: tinyllama/{name}" for name in names]


def test_a_prompt_is_continued_as_generate_continues_it():
    given = {"seed": 3, "temp": 0.7, "n_predict": 12, "top_k": 20}
    found = command("-m", "tinyllama/small", "Once upon a time", *options(**given))
    assert found.stdout == tinyllama.generate("Once upon a time", **given) + "\n"
    assert found.stderr.splitlines() == []  # logging has handlers of pytest's


def test_without_a_template_it_says_so(caplog):
    llm.get_model("tinyllama/small").prompt("Once upon a time", **GREEDY).text()
    assert "no chat template" in caplog.text


@pytest.mark.parametrize(
    "listed, other", [("temperature", "temp"), ("max_tokens", "n_predict"), ("ctx_size", "n_ctx")]
)
def test_options_have_our_names_and_those_of_others(listed, other):
    first, second = (models.Model.Options(**{name: 5}) for name in (listed, other))
    assert first == second and dict(first)[listed] == 5


def test_every_setting_is_an_option_with_its_limits():
    for name, field in Settings.__dataclass_fields__.items():
        least = field.metadata["least"]
        if name not in models.LEFT_OUT and least is not None:
            assert models.Model.Options(**{name: max(least, 1)})
            found = command("-m", "tinyllama/small", "Hi", *options(**{name: least - 1}))
            assert found.exit_code == 1 and "greater than or equal" in found.output


def test_a_response_knows_its_tokens_and_how_likely_they_were():
    response = llm.get_model("tinyllama/small").prompt("Once upon a time", **GREEDY)
    expected = tinyllama.generate("Once upon a time", temp=0, n_predict=12)
    assert response.text() == expected
    about = json.loads(json.dumps(response.response_json))
    assert [(token["id"], token["piece"], token["prob"]) for token in about["tokens"]] == [
        (token.id, token.piece, token.prob) for token in expected.tokens
    ]
    assert about["stop_reason"] == "length" and about["timings"]["n_prompt"] == 5
    assert (response.usage().input, response.usage().output) == (5, 12)


def test_the_second_turn_of_a_conversation_reads_only_what_is_new():
    tinyllama.load("small").remembered.clear()
    conversation = llm.get_model("tinyllama/small").conversation()
    first = conversation.prompt("The king had three daughters.", system="You tell stories.", **CHATML)
    said = [
        {"role": "system", "content": "You tell stories."},
        {"role": "user", "content": "The king had three daughters."},
    ]
    assert first.text() == tinyllama.Chat(messages=said, temp=0, chat_template="chatml").ask(n_predict=12)
    second = conversation.prompt("And then?", **CHATML)
    assert second.text()
    timings, before = second.response_json["timings"], first.response_json["timings"]
    assert timings["n_remembered"] >= before["n_prompt"] > 20
    assert second.usage().details == {"remembered_tokens": timings["n_remembered"]}


def test_a_conversation_goes_on_from_the_log():
    asked = ["-m", "tinyllama/small", *options(**CHATML)]
    first = command(*asked, "The king had three daughters.").stdout
    assert command("-c", "And then?", *options(**CHATML)).exit_code == 0
    logged = json.loads(command("logs", "--json", "-n", "0").stdout)
    assert logged[0]["response"] + "\n" == first
    assert logged[1]["input_tokens"] > 2 * logged[0]["input_tokens"]
    assert logged[1]["conversation_id"] == logged[0]["conversation_id"]


def test_a_chat_goes_on_until_exit():
    found = command("chat", "-m", "tinyllama/small", *options(**CHATML), typed="Once upon\nAnd then?\nexit\n")
    assert found.exit_code == 0 and found.stdout.count("\n> ") == 3


def test_a_chat_model_continues_a_text_if_that_is_asked_for():
    given = CHATML | {"chat": False}
    response = llm.get_model("tinyllama/small").prompt("Once upon a time", **given)
    assert response.text() == tinyllama.generate("Once upon a time", temp=0, n_predict=12)


@pytest.mark.parametrize("begun", [["prompt"], ["chat"]])
def test_what_goes_wrong_is_one_line(computer, begun):
    (computer / "models").mkdir()
    (computer / "models" / "broken.gguf").write_bytes(b"GGUF")
    found = command(
        *begun, "-m", "tinyllama/models/broken.gguf", *["Hi"][: begun == ["prompt"]], typed="Hi\n"
    )
    assert found.exit_code == 1
    assert (
        found.stderr.startswith("Error: ") and found.stderr.count("\n") == 1 and "broken.gguf" in found.stderr
    )


def test_python_gets_errors_of_llm_s_own_kind():
    with pytest.raises(llm.ModelError, match="no chat template 'none such'"):
        llm.get_model("tinyllama/small").prompt("Hi", chat_template="none such").text()


def test_asyncio_gets_the_same_text():
    async def pieces():
        response = llm.get_async_model("tinyllama/small").prompt("Once upon a time", **GREEDY)
        return [piece async for piece in response], response.response_json

    found, about = asyncio.run(pieces())
    assert "".join(found) == tinyllama.generate("Once upon a time", temp=0, n_predict=12)
    assert len(found) > 5 and len(about["tokens"]) == 12


def test_whoever_stops_listening_ends_the_text():
    async def some():
        response = llm.get_async_model("tinyllama/small").prompt("Once upon a time", max_tokens=-1)
        async for _ in response.astream_events():
            return response

    assert 1 <= len(asyncio.run(some()).response_json["tokens"]) <= 3
