"""A conversation: what a model gets of it, what stays of it, and what is read again."""

import threading

import pytest

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.ops import FEW
from tinyllama.texts.templates import prompt_of

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant:{% endif %}"
STORY = "Once upon a time there was a little girl who had a red ball. " * 3


@pytest.fixture
def chat():
    llama = tinyllama.load("small", "numpy", 1)
    llama.remembered.clear()
    return tinyllama.Chat(llama, chat_template=TEMPLATE, n_predict=12, temp=0)


def said(*contents: str, system: str = "") -> list[dict]:
    told = [{"role": "system", "content": system}] * bool(system)
    return told + [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


def prompt(chat, messages: list[dict]) -> list[int]:
    return prompt_of(messages, chat.llama.template(TEMPLATE))


def test_an_answer_is_remembered_and_is_that_of_the_whole_conversation(chat):
    first = chat.ask("Tell me a story.")
    second = chat.ask("And then?")
    assert chat.messages == said("Tell me a story.", first, "And then?", second)
    assert chat.answer.prompt_ids == prompt(chat, chat.messages[:3])
    assert second == tinyllama.Chat(chat.llama, **chat.settings, messages=chat.messages[:2]).ask("And then?")


def test_the_second_turn_reads_only_what_is_new(smollm2_file):
    chat = tinyllama.Chat("smollm2", n_predict=12, temp=0)
    chat.ask("Tell me a story.")
    n_known = len(chat.answer.cache)
    took = chat.ask("And then?").timings
    assert took.n_remembered == n_known and took.n_prompt > n_known


def test_an_answer_that_is_being_written_counts_as_far_as_it_goes(chat):
    answer = chat.stream("Tell me a story.")
    assert chat.messages == said("Tell me a story.")
    piece = next(answer)
    assert chat.messages == said("Tell me a story.", piece)


def test_another_answer_takes_the_place_of_the_last_and_a_new_question_that_of_one_without_answer(chat):
    chat.ask("Hi")
    other = chat.ask(temp=1.5, seed=3)
    assert chat.messages == said("Hi", other)
    chat.ask("Unanswered", n_predict=0)
    assert chat.messages == said("Hi", other, "Unanswered")
    chat.ask("Answered")
    assert [message["content"] for message in chat.messages[:3]] == ["Hi", other, "Answered"]


def test_undo_takes_back_the_last_question_with_its_answer(chat):
    first = chat.ask("One")
    second = chat.ask("Two")
    assert chat.undo() == said("Two", second)
    assert chat.messages == said("One", first)
    assert chat.undo() == said("One", first) and chat.undo() == [] and chat.messages == []


def test_what_the_model_is_told_before_can_change(chat):
    assert chat.system == ""
    answer = chat.ask("Hi")
    chat.system = "Be brief."
    assert (chat.system, chat.messages) == ("Be brief.", said("Hi", answer, system="Be brief."))
    chat.system = "Be long."
    assert chat.messages == said("Hi", answer, system="Be long.")
    chat.system = ""
    assert chat.messages == said("Hi", answer)


def test_a_full_context_leaves_out_the_oldest_but_not_what_the_model_is_told_before(chat):
    chat.system, chat.settings = "Be brief.", chat.settings | {"ctx_size": 200, "n_predict": 8}
    questions, n_left_out = [f"{number} {STORY[:60]}" for number in range(12)], []
    for question in questions:
        chat.ask(question)
        n_left_out.append(chat.n_left_out)
        (warning,) = chat.answer.warnings if chat.n_left_out else [""]
        assert not warning or f"first {chat.n_left_out} messages are left out" in warning
        left = chat.messages[:-1]
        left = left[:1] + left[1 + chat.n_left_out :]
        assert chat.answer.prompt_ids == prompt(chat, left) and len(chat.answer.prompt_ids) <= 192
    assert [message["content"] for message in chat.messages[1::2]] == questions
    assert n_left_out == sorted(n_left_out) and n_left_out[0] == 0 and n_left_out[-1] > 0
    assert all(number % 2 == 0 for number in n_left_out)
    assert len(set(n_left_out)) < 6, "where some are left out, there is room for several turns"


def test_while_the_same_is_left_out_what_was_read_is_not_read_again(chat):
    chat.settings |= {"ctx_size": 200, "n_predict": 8}
    chat.ask("Hi")
    for number in range(12):
        before, n_read = chat.n_left_out, len(chat.answer.prompt_ids)
        chat.ask(f"{number} {STORY[:60]}")
        if before == chat.n_left_out and n_read > FEW:
            assert chat.answer.timings.n_remembered >= n_read - FEW


def test_one_message_that_is_too_long_is_refused_and_the_conversation_stays(chat):
    chat.settings |= {"ctx_size": 100}
    answer = chat.ask("Hi")
    with pytest.raises(TinyllamaError, match=r"context is full: the prompt has \d+ tokens, ctx_size is 100"):
        chat.ask(STORY * 4)
    assert chat.messages == said("Hi", answer)
    assert chat.ask("Go on") == chat.messages[-1]["content"]


def test_after_an_undo_what_was_left_out_comes_back(chat):
    chat.settings |= {"ctx_size": 200, "n_predict": 8}
    chat.ask(STORY)
    chat.ask(STORY * 3)
    assert chat.n_left_out == 2
    chat.undo()
    chat.ask("Go on")
    assert chat.n_left_out == 0


def test_an_answer_that_is_cancelled_keeps_what_was_written(chat):
    told = threading.Event()
    answer = chat.stream("Tell me a story.", cancel=told)
    piece = next(answer)
    told.set()
    rest = "".join(answer)
    assert answer.stop_reason == "cancelled"
    assert chat.messages == said("Tell me a story.", piece + rest)
    assert chat.ask("Go on")


def test_the_tokens_of_a_conversation_are_those_of_its_prompt_without_the_beginning_of_an_answer(chat):
    assert chat.tokens() == []
    chat.ask("Hi")
    template = chat.llama.template(TEMPLATE)
    assert chat.tokens() == template.encode(chat.messages, add_generation_prompt=False)


def test_what_is_no_chat_and_what_is_no_setting_is_refused_at_once(chat):
    with pytest.raises(TinyllamaError, match="role"):
        tinyllama.Chat(chat.llama, messages=[{"role": "llama", "content": "Hi"}])
    with pytest.raises(TinyllamaError, match="did you mean temp"):
        tinyllama.Chat(chat.llama, temperature=1)
    with pytest.raises(TinyllamaError, match="nothing has been said"):
        chat.ask()


def test_without_a_template_what_was_said_is_continued(chat):
    chat = tinyllama.Chat(chat.llama, n_predict=5, temp=0)
    first = chat.ask("Once upon a time")
    assert first == chat.llama.generate("Once upon a time", n_predict=5, temp=0)
    chat.ask("Then")
    assert chat.answer.prompt_ids == chat.llama.tokens(f"Once upon a time\n\n{first}\n\nThen")
