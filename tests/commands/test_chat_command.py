"""`tinyllama chat`, as somebody at a terminal meets it, and in a pipe."""

import io
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tinyllama
from tinyllama.commands import chat, editor, main
from tinyllama.machine import places, terminal

prompt_toolkit = pytest.importorskip("prompt_toolkit")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant:{% endif %}"
ARGUMENTS = ["-m", "small", "--backend", "numpy", "-t", "1", "-n", "12", "--temp", "0"]
SETTINGS = {"chat_template": TEMPLATE, "n_predict": 12, "temp": 0}
ENTER, END, INTERRUPT, ALT_ENTER = "\r", "\x04", "\x03", "\x1b\r"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def answers(*contents: str, **settings) -> list[str]:
    """What is answered to each."""
    talk = tinyllama.Chat(tinyllama.load("small", "numpy", 1), **SETTINGS | settings)
    return [str(talk.ask(content)) for content in contents]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "1000")
    return tmp_path


@pytest.fixture
def talk(monkeypatch):
    """Type keys at a terminal: (exit status, stdout, stderr)."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    def talk(*keys: str, arguments=(), template=TEMPLATE):
        out, err, argv = Screen(), Screen(), ["chat", *ARGUMENTS, *arguments]
        argv += ["--chat-template", template] if template else []
        with monkeypatch.context() as patched, create_pipe_input() as typed:
            patched.setattr(sys.stdin, "isatty", lambda: True, raising=False)
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            patched.setattr(terminal, "PATIENCE", 60)
            typed.send_text("".join(keys))
            with create_app_session(input=typed, output=DummyOutput()):
                status = main(argv)
        err = re.sub(r"\x1b\[[\d;]*[mK]|\r", "", err.getvalue())
        return status, out.getvalue(), err.partition("Ctrl-D ends.\n")[2] or err

    return talk


def line(text: str) -> str:
    return f"{text}{ENTER}"


# --- at a terminal --------------------------------------------------------------------------------


def test_messages_are_answered_one_after_the_other_until_control_d(talk):
    status, out, _ = talk(line("Hi"), line("And then?"), END)
    assert (status, out) == (0, "".join(f"{answer}\n" for answer in answers("Hi", "And then?")))


def test_a_message_may_have_several_lines(talk):
    pasted = "\x1b[200~one\ntwo\n\nthree\x1b[201~"
    for keys, message in (
        (f"one{ALT_ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\{ENTER}two{ENTER}", "one\ntwo"),
        (f"{pasted}{ENTER}", "one\ntwo\n\nthree"),
    ):
        assert talk(keys, END)[1] == f"{answers(message)[0]}\n"


def test_control_c_clears_what_is_typed(talk):
    assert talk("never said", INTERRUPT, line("Hi"), END)[:2] == (0, f"{answers('Hi')[0]}\n")


def test_control_c_stops_an_answer_and_the_conversation_goes_on_from_it(talk, monkeypatch, home):
    forward, n_calls = tinyllama.Llama.run, 0

    def interrupted(self, *args, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 6:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **options)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(tinyllama.Llama, "run", interrupted)
        status, out, err = talk(line("Hi"), line(f"/save {home}/talk.json"), line("Go on"), END)
    (whole,) = answers("Hi")
    messages = json.loads((home / "talk.json").read_text())["messages"]
    stopped = messages[1]["content"]
    assert status == 0 and "(stopped)" in err and signal.getsignal(signal.SIGINT) == before
    assert stopped and whole.startswith(stopped) and stopped != whole
    assert out.startswith(f"{stopped}\n") and len(out) > len(stopped) + 5


def test_control_c_before_the_first_word_says_what_becomes_of_the_message(talk, monkeypatch):
    def interrupted(self, *args, **options):
        signal.raise_signal(signal.SIGINT)
        raise tinyllama.Cancelled("cancelled")

    monkeypatch.setattr(tinyllama.Llama, "run", interrupted)
    status, out, err = talk(line("Hi"), END)
    assert status == 0 and out.strip() == "" and "stopped before it began: the message is left out" in err


def test_a_template_that_is_missing_is_said_once_and_text_is_continued(talk):
    _, out, err = talk(line("Once upon a time"), line("Then"), END, template=None)
    assert err.count("has no chat template") == 1 and "chat_template=" not in err
    assert out.startswith(str(tinyllama.generate("Once upon a time", n_predict=12, temp=0)))


def test_retry_edit_and_undo(talk):
    (hi,), (other,) = answers("Hi"), answers("Hello there")
    assert talk(line("Hi"), line("/retry"), END)[1] == f"{hi}\n{hi}\n", "the likeliest is the same again"
    assert talk(line("Hi"), line("/edit Hello there"), END)[1] == f"{hi}\n{other}\n"
    prefilled = "\x01\x0b"  # to its beginning, and delete to its end
    assert talk(line("Hi"), line("/edit"), prefilled, line("Hello there"), END)[1] == f"{hi}\n{other}\n"
    assert talk(line("Hi"), line("/edit"), line(" there"), END)[1] == f"{hi}\n{answers('Hi there')[0]}\n"
    _, out, err = talk(line("Hi"), line("/undo"), line("Hello there"), END)
    assert out == f"{hi}\n{other}\n" and "(taken back: Hi)" in err


def test_an_edit_that_is_not_answered_changes_nothing(talk, home):
    talk(line("Hi"), line(f"/edit {'too long ' * 60}"), line(f"/save {home}/a"), END, arguments=["-c", "100"])
    assert json.loads((home / "a").read_text())["messages"][0]["content"] == "Hi"


def test_a_retry_has_another_seed_that_is_the_same_each_time(talk):
    how = {"arguments": ["-s", "7", "--temp", "1.5"]}
    first = talk(line("Hi"), line("/retry"), END, **how)[1]
    assert first == talk(line("Hi"), line("/retry"), END, **how)[1]
    one, other = first.splitlines()[:1], first.splitlines()[-1:]
    assert one != other


def test_what_the_model_is_told_before(talk):
    (answer,) = answers("Hi", system="Be brief.")
    assert talk(line("Hi"), END, arguments=["-sys", "Be brief."])[1] == f"{answer}\n"
    _, out, err = talk(line("/system Be brief."), line("Hi"), line("/system -"), line("/system"), END)
    assert out == f"{answer}\n" and 'told before: "Be brief."' in err and err.count("before: nothing") == 2


def test_tokens_are_counted_and_shown(talk):
    _, _, err = talk(line("/tokens"), line("Hi"), line("/tokens"), line("/tokens all"), END)
    chat = tinyllama.Chat(tinyllama.load("small", "numpy", 1), **SETTINGS)
    chat.ask("Hi")
    n_ctx = min(2048, chat.llama.config.max_seq_len)
    assert f"(0 of {n_ctx} tokens, 0 messages)" in err
    assert err.count(f"({len(chat.tokens())} of {n_ctx} tokens, 2 messages)") == 2
    assert f"{len(chat.tokens())} tokens\n" in err and re.search(r"^ *\d+ +\S+ +'.*'$", err, re.MULTILINE)


def test_verbose_says_what_an_answer_took(talk):
    pattern = r"\(\d+ of \d+ tokens read in [\d.]+ s, 12 written, [\d.]+ tokens/s\)"
    assert re.search(pattern, talk(line("Hi"), END, arguments=["--verbose"])[2])
    assert not re.search(pattern, talk(line("Hi"), END)[2])


def test_help_lists_every_command_and_fits_into_40_columns(talk, monkeypatch):
    shown = talk(line("/help"), END)[2]
    rows = [row for row in shown.splitlines() if row.startswith("/")]
    assert [row.split()[0] for row in rows] == [f"/{name}" for name in chat.COMMANDS]
    assert max(map(len, rows)) <= 40
    assert all(hasattr(chat.Conversation, f"_{name}") for name in chat.COMMANDS)


def test_an_unknown_command_is_told_the_nearest_and_two_slashes_say_it_to_the_model(talk):
    _, out, err = talk(line("/tokns"), line("/"), line("/dance"), line("//tokns"), END)
    assert "no command /tokns: did you mean /tokens?" in err and "no command /dance: /help lists" in err
    assert out == f"{answers('/tokns')[0]}\n"


def test_an_error_is_one_line_and_the_conversation_goes_on(talk):
    _, out, err = talk(line("word " * 200), line("Hi"), END, arguments=["-c", "100"])
    assert "the context is full: the prompt has" in err and out == f"{answers('Hi', ctx_size=100)[0]}\n"


def test_a_full_context_is_said(talk):
    _, _, err = talk(*(line(f"{number} {'word ' * 12}") for number in range(8)), END, arguments=["-c", "160"])
    assert re.search(r"\(the context is full: the first \d+ messages are left out\)", err)


def test_another_model_goes_on_and_one_that_is_not_there_changes_nothing(talk):
    _, out, err = talk(line("Hi"), line("/model nowhere"), line("/model small"), line("Go on"), END)
    assert "nowhere: there is no such file" in err and "small, backend numpy" in err
    assert out == "".join(f"{answer}\n" for answer in answers("Hi", "Go on"))


def test_an_answer_does_not_steer_the_terminal_and_words_are_not_cut(talk, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(
        tinyllama.generation.Generation, "__next__", steering(["a\x1b[2Jb ", "twenty ", "c" * 9])
    )
    assert talk(line("Hi"), END)[1] == f"a␛[2Jb twenty\n{'c' * 9}\n"


def steering(pieces: list[str]):
    def __next__(self):
        if not pieces:
            self.stop_reason = "eos"
            raise StopIteration
        return pieces.pop(0)

    return __next__


# --- files ----------------------------------------------------------------------------------------


def test_a_conversation_is_kept_and_goes_on_elsewhere(talk, home):
    path = home / "a talk.json"
    hi, rest = answers("Hi", "Go on")
    assert "(2 messages in " in talk(line("Hi"), line(f"/save {path}"), END)[2]
    kept = json.loads(path.read_text())
    assert kept["model"] == "small" and kept["settings"]["temp"] == 0
    assert kept["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": hi}]
    _, out, err = talk(line(f"/load {path}"), line("Go on"), END, arguments=["--temp", "2"])
    assert out == f"{rest}\n", "its settings are those that it was kept with"
    assert f"(2 messages, the last one: {hi.strip()[:20]}" in err


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "line 1 column 2"),
        ("[" * 100_000, "RecursionError"),
        ("7", "is no conversation"),
        ('{"settings": {}}', "is no conversation"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": 7}', "at least one message"),
        ('{"messages": [{"role": "llama", "content": "Hi"}]}', "role"),
        ('{"messages": [{"role": "user", "content": "a"}], "settings": {"temp": "hot"}}', "temp"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "settings": {"spec_draft_model": "x"}}',
            "spec_draft",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "model": 7}', "model"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(talk, home, text, why):
    path = home / "talk.json"
    path.write_text(text)
    _, out, err = talk(line("Hi"), line(f"/load {path}"), line("Go on"), END)
    (error,) = (found for found in err.splitlines() if str(path) in found)
    assert why in error or (why == "RecursionError" and "recursion" in error)
    assert out == "".join(f"{answer}\n" for answer in answers("Hi", "Go on"))


def test_a_list_of_messages_is_a_conversation_too(talk, home):
    (home / "a.json").write_text('[{"role": "user", "content": "Hi"}]')
    assert talk(line(f"/load {home}/a.json"), line("/retry"), END)[1] == f"{answers('Hi')[0]}\n"


def test_no_other_file_is_written_over(talk, home):
    (home / "precious.txt").write_text("precious")
    _, _, err = talk(line("Hi"), line(f"/save {home}/precious.txt"), line(f"/save {home}/none/a"), END)
    assert (home / "precious.txt").read_text() == "precious"
    assert "precious.txt: is there already, and is no conversation" in err and "there is no folder" in err


def test_what_is_typed_is_kept_for_the_next_conversation_and_for_its_owner_alone(talk, home):
    history = home / "state" / "tinyllama" / "history"
    talk(line("Hi"), END)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and "+Hi\n" in history.read_text()
    up = "\x1b[A"
    assert talk(up, ENTER, END)[1] == f"{answers('Hi')[0]}\n"
    history.unlink()
    talk(line("Hi"), END, arguments=["--no-history"])
    assert not history.exists()


def test_a_history_that_cannot_be_kept_is_done_without(talk, home):
    (home / "state").write_text("a file, where a folder should be")
    assert talk(line("Hi"), END)[:2] == (0, f"{answers('Hi')[0]}\n")


def test_the_history_lies_where_such_files_lie(monkeypatch):
    assert places.state_folder() == Path(os.environ["XDG_STATE_HOME"]) / "tinyllama"
    monkeypatch.delenv("XDG_STATE_HOME")
    for system, folder in (("linux", ".local/state"), ("darwin", "Library/Application Support")):
        monkeypatch.setattr(sys, "platform", system)
        assert places.state_folder() == Path.home() / folder / "tinyllama"


def test_commands_models_and_files_are_completed(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "talk.json").touch()
    assert chat.completions("/s") == ["/system", "/save"]
    assert chat.completions("/load ta") == ["talk.json"]
    assert chat.completions("/save ") == ["state", "talk.json"] or "talk.json" in chat.completions("/save ")
    assert chat.completions(f"/load {home}/t") == [f"{home}/talk.json"]
    assert "small" in chat.completions("/model sm")
    assert (
        chat.completions("what is /s") == chat.completions("/edit s") == chat.completions("/load no/") == []
    )


# --- in a pipe ------------------------------------------------------------------------------------


@pytest.fixture
def pipe(capsys, monkeypatch, tmp_path):
    """Send text through a pipe: (exit status, stdout, stderr)."""

    def pipe(text: str | bytes, *arguments: str):
        (tmp_path / "piped").write_bytes(text if isinstance(text, bytes) else text.encode())
        with open(tmp_path / "piped") as file, monkeypatch.context() as patched:
            patched.setattr("sys.stdin", file)
            status = main(["chat", *ARGUMENTS, "--chat-template", TEMPLATE, *arguments])
        return status, *capsys.readouterr()

    return pipe


def test_lines_of_a_pipe_are_answered_and_nothing_else_is_printed(pipe):
    first, second = answers("Hi", "And\nthen?")
    assert pipe("Hi\nAnd\\\nthen?") == (0, f"{first}\n{second}\n", "")
    assert pipe("") == (0, "", "")


def test_a_single_turn_answers_all_of_a_pipe_or_a_prompt(pipe):
    assert pipe("One\ntwo\n", "-st") == (0, f"{answers('One' + chr(10) + 'two')[0]}\n", "")
    assert pipe("never read", "-st", "-p", "/Hi") == (0, f"{answers('/Hi')[0]}\n", "")
    assert pipe("", "-st")[0] == 1
    assert pipe("Go on\n", "-p", "Hi")[1] == "".join(f"{answer}\n" for answer in answers("Hi", "Go on"))


def test_bytes_that_are_no_text_are_bytes_to_the_model(pipe):
    assert pipe(b"caf\xe9\n")[:2] == (0, f"{answers('caf' + chr(0xDCE9))[0]}\n")


def test_an_error_in_a_pipe_ends_it(pipe):
    for text, why in (
        ("/tokns\nHi\n", "no command"),
        ("word " * 3000, "context is full"),
        ("/edit\n", "said"),
    ):
        status, out, err = pipe(text)
        assert (status, out) == (1, "") and err.startswith("tinyllama: ") and why in err


def test_control_c_in_a_pipe_ends_it(pipe, monkeypatch):
    forward, n_calls = tinyllama.Llama.run, 0

    def interrupted(self, *args, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", interrupted)
    status, out, _ = pipe("Hi\nAnd then?\n")
    assert status == 130 and n_calls == 4 and answers("Hi")[0].startswith(out.strip("\n"))


def test_without_prompt_toolkit_lines_are_read_as_they_are(talk, monkeypatch):
    read, write = os.pipe()
    os.write(write, b"Hi\n/edit\n")
    os.close(write)
    monkeypatch.setattr(editor, "find_spec", lambda name: None)
    with open(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
        status, out, err = talk()
    assert (status, out) == (0, f"{answers('Hi')[0]}\n") and "> " in err and "say /edit TEXT" in err


def test_the_model_is_smollm2_and_where_it_is_not_here_one_is_told_what_to_do(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TINYLLAMA_MODEL", raising=False)
    monkeypatch.setattr(places, "models_folder", lambda: tmp_path)
    assert main(["chat", "-p", "Hi"]) == 1
    assert "`tinyllama download smollm2` fetches it" in capsys.readouterr().err


# --- a real terminal ------------------------------------------------------------------------------


def test_at_a_real_terminal_text_comes_and_a_signal_ends_it():
    import pty

    leader, follower = pty.openpty()
    argv = [sys.executable, "-m", "tinyllama", "chat", *ARGUMENTS, "--chat-template", TEMPLATE]
    environment = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "COLUMNS": "80"}
    streams = {"stdin": follower, "stdout": follower, "stderr": follower}
    with subprocess.Popen(argv, **streams, env=environment, start_new_session=True) as process:
        os.close(follower)
        shown = until(leader, r"small, backend numpy, 1 thread.*>")
        assert "loading" in shown
        os.write(leader, b"Hi\r")
        until(leader, re.escape(answers("Hi")[0].split()[-1]) + ".*>")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    os.close(leader)


def until(leader: int, pattern: str) -> str:
    """What comes from a terminal until this does."""
    shown, end = "", time.monotonic() + 30
    while not re.search(pattern, re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown), re.DOTALL):
        assert time.monotonic() < end, shown
        if select.select([leader], [], [], 1)[0]:
            shown += os.read(leader, 1000).decode(errors="replace")
    return shown
