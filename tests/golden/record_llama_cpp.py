"""Record what llama.cpp writes with greedy sampling, for test_smollm2.py to compare with.

pip install llama-cpp-python
python tests/golden/record_llama_cpp.py data/models/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import sys
from pathlib import Path

import llama_cpp

PROMPTS = (
    "The first man on the moon was",
    "Once upon a time",
    "def fibonacci(n):",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)


def main() -> None:
    """Write the prompts and llama.cpp's token ids beside this script."""
    llama = llama_cpp.Llama(sys.argv[1], n_ctx=512, seed=0, verbose=False)
    runs = []
    for prompt in PROMPTS:
        ids = llama.tokenize(prompt.encode(), add_bos=True, special=True)
        written = []
        for token in llama.generate(ids, temp=0, repeat_penalty=1.0):
            written.append(token)
            if token == llama.token_eos() or len(written) == 64:
                break
        text = llama.detokenize(written, special=True).decode()
        runs.append({"prompt": prompt, "prompt_ids": ids, "ids": written, "text": text})
        print(f"{prompt!r} -> {text!r}")
    record = {"llama_cpp_python": llama_cpp.__version__, "model": Path(sys.argv[1]).name, "runs": runs}
    (Path(__file__).parent / "llama_cpp.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
