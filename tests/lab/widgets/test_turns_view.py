"""The playground as a chat, without a browser."""

import numpy as np
import pytest

import tinyllama

pytest.importorskip("anywidget")
pytest.importorskip("ipywidgets")
pytest.importorskip("jinja2")

HOW = {"chat_template": "chatml", "seed": 3, "n_predict": 8, "backend": "numpy", "threads": 1}


@pytest.fixture
def tool():
    return tinyllama.playground(chat=True, system="Tell stories.", **HOW)


def say(tool, message):
    tool.inputs["prompt"].value = message
    tool.buttons["Generate"].click()
    return finished(tool)


def finished(tool):
    assert tool.worker.wait(30) and tool.worker.error == ""
    return tool


def turns(tool):
    """Of each turn what was said, and its answers: their tokens as text and their buttons by name."""
    for turn in tool.outputs["turns"].children:
        message, answers = turn.children
        yield message.children[1].value, [Answer(block) for block in answers.children]


class Answer:
    def __init__(self, block):
        (self.who, *buttons), self.tokens = block.children[0].children, block.children[1]
        self.buttons = {button.description: button for button in buttons}

    @property
    def text(self):
        return "".join(self.tokens.text["texts"])


def test_a_message_and_its_answer_become_blocks_with_the_text_that_a_chat_gives(tool):
    say(tool, "Once <b>upon</b> a time")
    ((said, (answer,)),) = turns(tool)
    chat = tinyllama.load("small", "numpy", 1).chat
    messages = [
        {"role": "system", "content": "Tell stories."},
        {"role": "user", "content": "Once <b>upon</b> a time"},
    ]
    settings = {name: HOW[name] for name in ("chat_template", "seed", "n_predict")}
    assert answer.text == chat(messages, **settings) and "&lt;b&gt;" in said
    assert tool.inputs["prompt"].value == "" and "It wrote: " in tool.outputs["keys"].says
    assert eval(tool.outputs["keys"].copies["Copy as tinyllama.generate(…)"]) == answer.text
    assert tool.outputs["keys"].copies["Copy as text"].startswith("System: Tell stories.\n\nUser: Once")


def test_another_answer_stands_beside_the_first_and_either_can_be_gone_on_from(tool):
    say(tool, "Once upon a time")
    ((_, (first,)),) = turns(tool)
    first.buttons["Another answer"].click()
    finished(tool)
    ((_, (first, second)),) = turns(tool)
    assert first.text != second.text and "2 of 2 ← taken" in second.who.value
    first.buttons["Take this one"].click()
    ((_, (first, second)),) = turns(tool)
    assert "1 of 2 ← taken" in first.who.value and "taken" not in second.who.value
    say(tool, "And then?")
    assert tool.session.run.messages[2]["content"] == first.text
    second = next(turns(tool))[1][1]
    second.buttons["Take this one"].click()
    assert len(list(turns(tool))) == 1
    next(turns(tool))[1][0].buttons["Take this one"].click()
    assert len(list(turns(tool))) == 2  # what was said after it is still there


def test_a_message_can_be_edited_and_the_chat_goes_on_from_there(tool):
    for message in ("Once upon a time", "And then?"):
        say(tool, message)
    (message, _), _ = (turn.children for turn in tool.outputs["turns"].children)
    message.children[0].children[1].click()
    assert tool.inputs["prompt"].value == "Once upon a time"
    assert tool.buttons["Generate"].description == "Send this instead"
    say(tool, "A dog sat")
    ((said, (_,)),) = turns(tool)
    assert "A dog sat" in said and len(tool.session.runs) == 3


def test_an_answer_can_be_edited_and_the_model_goes_on_from_there(tool):
    say(tool, "Once upon a time")
    next(turns(tool))[1][0].buttons["Edit"].click()
    say(tool, "There was a cat")
    ((_, (first, second)),) = turns(tool)
    assert second.text.strip() == "There was a cat" and tool.session.runs[0].answer == first.text
    edited = second.text
    tool.buttons["Continue"].click()
    finished(tool)
    ((_, (_, second)),) = turns(tool)
    assert second.text.startswith(edited) and len(second.text) > len(edited)


def test_what_is_not_sent_after_all_stays_in_its_field(tool):
    tool.inputs["backend"].options = ["abacus"]
    tool.inputs["prompt"].value = "Once upon a time"
    tool.buttons["Generate"].click()
    assert tool.worker.wait(30) and "abacus" in tool.outputs["error"].value
    assert tool.inputs["prompt"].value == "Once upon a time" and list(turns(tool)) == []


def test_an_empty_message_is_not_sent(tool):
    tool.buttons["Generate"].click()
    assert "the message is empty" in tool.outputs["error"].value and tool.session.runs == []


def test_a_token_of_an_earlier_answer_can_be_looked_at_and_another_one_be_picked(tool):
    for message in ("Once upon a time", "And then?"):
        say(tool, message)
    answer = next(turns(tool))[1][0]
    answer.tokens.act("select", 2)
    assert answer.tokens.selected == 2 and len(list(turns(tool))) == 2
    other = next(row for row in tool.outputs["alternatives"].report["rows"] if not row["is_chosen"])
    tool.outputs["alternatives"].act("pick", other["id"])
    finished(tool)
    ((_, (_, second)),) = turns(tool)
    assert second.tokens.text["changed"] == 2 and second.text != answer.text


def test_all_that_the_model_saw_is_a_click_away(tool):
    say(tool, "Once upon a time")
    assert tool.outputs["texts"].layout.display == "none"
    tool.inputs["raw"].value = True
    shown = tool.outputs["text"].text
    assert tool.outputs["texts"].layout.display is None
    assert "".join(shown["texts"][: shown["n_prompt"]]).count("Tell stories.")
    assert "<|im_start|>user\nOnce upon a time<|im_end|>" in "".join(shown["texts"])


def test_the_switch_leads_from_a_text_to_a_chat_and_back(tool):
    say(tool, "Once upon a time")
    tool.inputs["mode"].value = False
    assert tool.session.run is None and tool.outputs["turns"].layout.display == "none"
    say(tool, "A dog")
    assert tool.session.run.system is None and "A dog" in "".join(tool.outputs["text"].text["texts"])
    tool.inputs["history"].value = 1
    assert tool.inputs["mode"].value is True and len(list(turns(tool))) == 1
    tool.buttons["Clear"].click()
    assert list(turns(tool)) == [] and len(tool.session.runs) == 2


def test_an_empty_text_says_so_and_offers_a_chat(smollm2_file):
    question = "Hi! Who are you, and what is the capital of France?"
    tool = tinyllama.playground(smollm2_file, question, temp=0)
    tool.buttons["Generate"].click()
    finished(tool)
    assert "The model ended the text at once" in tool.outputs["notes"].value
    assert tool.offer.layout.display is None
    tool.inputs["n_predict"].value = 5
    tool.offer.click()
    finished(tool)
    ((said, (answer,)),) = turns(tool)
    assert question in said and answer.text and tool.offer.layout.display == "none"
    tool.inputs["raw"].value = True
    assert "<|im_start|>" in tool.outputs["text"].text["pieces"]


def test_what_a_token_of_an_answer_attended_to_is_tinted_in_it_and_in_what_the_model_saw(tool):
    say(tool, "Once upon a time")
    ((_, (answer,)),) = turns(tool)
    tool.inputs["attend"].value = tool.inputs["raw"].value = True
    answer.tokens.act("select", 5)
    whole = finished(tool).outputs["text"].attention["shares"]
    n_prompt = len(tool.session.run.prompt_tokens)
    assert len(whole) == n_prompt + 5 and answer.tokens.attention["shares"] == whole[n_prompt:]
    n_before = np.argmax([0, *whole[1:]]) < n_prompt
    assert "show what the model saw" not in tool.outputs["attention"].value
    tool.inputs["raw"].value = False
    assert ("show what the model saw" in tool.outputs["attention"].value) == n_before
    say(tool, "And then?")
    assert answer.tokens.attention == {}
