"""Writes templates.json anew: what llama.cpp makes of chats by the names of templates that it has, too.

pip install llama-cpp-python==0.3.36 && python tests/golden/record_templates.py
"""

import ctypes
import json
from pathlib import Path

import llama_cpp

CHATS = {
    "one question": [("user", "First?")],
    "two": [("user", "First?"), ("assistant", "Yes."), ("user", "Second?")],
    "told": [("system", "Be brief."), ("user", "First?"), ("assistant", "Yes."), ("user", "Second?")],
    "spaces": [("system", " \n S \n"), ("user", " \n U \n"), ("assistant", " \n A \n"), ("user", " \n V \n")],
}


def names() -> list[str]:
    n_names = llama_cpp.llama_chat_builtin_templates(None, 0)
    found = (ctypes.c_char_p * n_names)()
    llama_cpp.llama_chat_builtin_templates(found, n_names)
    return [name.decode() for name in found]


def applied(name: str, chat: list[tuple[str, str]]) -> str:
    messages = (llama_cpp.llama_chat_message * len(chat))(
        *((role.encode(), text.encode()) for role, text in chat)
    )
    room = ctypes.create_string_buffer(1 << 16)
    size = llama_cpp.llama_chat_apply_template(name.encode(), messages, len(chat), True, room, len(room))
    return room.raw[:size].decode()


if __name__ == "__main__":
    made = {name: {label: applied(name, chat) for label, chat in CHATS.items()} for name in names()}
    page = Path(__file__).with_name("templates.json")
    page.write_text(json.dumps({"chats": CHATS, "made": made}, ensure_ascii=False, indent=1) + "\n")
