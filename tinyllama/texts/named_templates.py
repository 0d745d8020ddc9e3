"""Chat templates by name, for models that have none or a wrong one. The names are llama.cpp's.

In a format … is what was said, [trimmed] the same without the spaces around it, [bos] and [eos] are the
model's own tokens for the beginning and the end of a text, whatever it calls them.
"""

ROLES = ("system", "user", "assistant")
ONCE = "{% if loop.first %}<|im_start|>{% endif %}"  # of smolvlm


def _tags(before: str, behind: str, end: str) -> tuple[str, ...]:
    """A format of which each part names its role."""
    roles = [f"{before}{role}{behind}" for role in ROLES]
    return *(f"{role}…{end}" for role in roles), roles[-1]


#: Names -> what the messages of the three roles become, and how an answer begins. Where the system's message
#: is the first part of the user's, also what begins the two.
FORMATS = {
    "alpaca": ("…\n\n", "### Instruction:\n…\n\n", "### Response:\n…\n\n", "### Response:\n"),
    "chatml": _tags("<|im_start|>", "\n", "<|im_end|>\n"),
    "deepseek": ("…", "### Instruction:\n…\n", "### Response:\n…\n[eos]\n", "### Response:\n"),
    "deepseek2": ("…\n\n", "User: …\n\n", "Assistant: …[eos]", "Assistant:"),
    "deepseek3": ("…\n\n", "<｜User｜>…", "<｜Assistant｜>…[eos]", "<｜Assistant｜>"),
    "falcon3": _tags("<|", "|>\n", "\n"),
    "granite": _tags("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\n"),
    "llama2": ("…\n", "… [/INST]", "…[eos]", "", "[INST] "),
    "llama2-sys": ("<<SYS>>\n…\n<</SYS>>\n\n", "… [/INST]", "…[eos]", "", "[INST] "),
    "llama2-sys-bos": ("<<SYS>>\n…\n<</SYS>>\n\n", "… [/INST]", "…[eos]", "", "[bos][INST] "),
    "megrez": _tags("<|role_start|>", "<|role_end|>", "<|turn_end|>"),
    "mistral-v1": ("…\n\n", "… [/INST]", " …[eos]", "", " [INST] "),
    "mistral-v3": ("…\n\n", "…[/INST]", " [trimmed][eos]", "", "[INST] "),
    "mistral-v3-tekken": ("…\n\n", "…[/INST]", "…[eos]", "", "[INST]"),
    "mistral-v7": ("[SYSTEM_PROMPT] …[/SYSTEM_PROMPT]", "[INST] …[/INST]", " …[eos]", ""),
    "mistral-v7-tekken": ("[SYSTEM_PROMPT]…[/SYSTEM_PROMPT]", "[INST]…[/INST]", "…[eos]", ""),
    "monarch": (
        "[bos]system\n…[eos]\n",
        "[bos]user\n…[eos]\n",
        "[bos]assistant\n…[eos]\n",
        "[bos]assistant\n",
    ),
    "openchat": (
        "…<|end_of_turn|>",
        "GPT4 Correct User: …<|end_of_turn|>",
        "GPT4 Correct Assistant: …<|end_of_turn|>",
        "GPT4 Correct Assistant:",
    ),
    "orion": ("…\n\n", "…\n\nAssistant: [eos]", "…[eos]", "", "Human: "),
    "phi3": _tags("<|", "|>\n", "<|end|>\n"),
    "phi4": _tags("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "smolvlm": (
        f"{ONCE}…\n\n",
        f"{ONCE}User: …<end_of_utterance>\n",
        f"{ONCE}Assistant: …<end_of_utterance>\n",
        "Assistant:",
    ),
    "vicuna": ("…\n\n", "USER: …\n", "ASSISTANT: …[eos]\n", "ASSISTANT:"),
    "vicuna-orca": ("SYSTEM: …\n", "USER: …\n", "ASSISTANT: …[eos]\n", "ASSISTANT:"),
    "zephyr": _tags("<|", "|>\n", "[eos]\n"),
}
#: The same, of texts without the spaces around them.
TRIMMED = {
    "command-r": (
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>…<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>…<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>…<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "exaone3": (
        "[|system|]…[|endofturn|]\n",
        "[|user|]…\n",
        "[|assistant|]…[|endofturn|]\n",
        "[|assistant|]",
    ),
    "gemma": (
        "…\n\n",
        "…<end_of_turn>\n",
        "<start_of_turn>model\n…<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<start_of_turn>user\n",
    ),
    "llama2-sys-strip": ("<<SYS>>\n…\n<</SYS>>\n\n", "… [/INST]", "…[eos]", "", "[INST] "),
    "llama3": _tags("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "llama4": _tags("<|header_start|>", "<|header_end|>\n\n", "<|eot|>"),
    "minicpm": ("…", "<用户>…<AI>", "…", ""),
}
ALIASES = {
    "deepseek-r1": "deepseek3",
    "granite-4.0": "granite",
    "granite-4.1": "granite",
    "hermes": "chatml",
    "llama3.1": "llama3",
    "llama3.2": "llama3",
    "llama3.3": "llama3",
    "mistral-nemo": "mistral-v3-tekken",
    "mistral-small": "mistral-v7-tekken",
    "mixtral": "mistral-v1",
    "qwen": "chatml",
    "smollm": "chatml",
    "tinyllama": "zephyr",
    "yi": "chatml",
}


def _jinja(text: str, system: str, user: str, assistant: str, answer: str, begin: str = "") -> str:
    """A format in Jinja."""
    first = f"{{% if not (loop.previtem and loop.previtem.role == 'system') %}}{begin}{{% endif %}}" * bool(
        begin
    )
    source = (
        f"{{% for message in messages %}}{{% if message.role == 'system' %}}{begin}{system}"
        f"{{% elif message.role == 'user' %}}{first}{user}"
        f"{{% else %}}{assistant}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )
    names = {"…": text, "[trimmed]": "message.content | trim", "[eos]": "eos_token", "[bos]": "bos_token"}
    for name, meant in names.items():
        source = source.replace(name, f"{{{{ {meant} }}}}")
    return source


#: Names -> Jinja, as templates.py takes it.
NAMED = {name: _jinja("message.content", *format) for name, format in FORMATS.items()}
NAMED |= {name: _jinja("message.content | trim", *format) for name, format in TRIMMED.items()}
NAMED = {name: NAMED[name] for name in sorted(NAMED)}
