"""Chat templates by name, for models that have none or a wrong one. The names are llama.cpp's."""

#: Of each, Jinja as templates.py takes it.
NAMED = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
