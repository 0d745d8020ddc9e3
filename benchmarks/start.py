"""From the start of a process to the first token of a short prompt, in tinyllama and in llama.cpp, in turns.

    python benchmarks/start.py model.gguf [--peer /path/to/python] [--threads 2] [--rounds 9]

Each line is a program, started anew in every round and timed to its end: `tinyllama generate -n 1` as a user
types it, llama-cpp-python with its class Llama, and as little of it as gives a token (its functions of C
alone, of which Python imports nothing else). Python with nothing, and with NumPy, say what comes before any
of them. The first round, which brings files into the system's page cache and writes bytecode, isn't counted.
`--peer` is a Python that has llama-cpp-python, which `tinyllama bench --against` says how to build.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PROMPT = "The first man on the moon was"

TINYLLAMA = "import sys; from tinyllama.commands import main; sys.exit(main())"

LLAMA = """
import sys, llama_cpp
path, prompt, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
llama = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, verbose=False)
print(llama(prompt, max_tokens=1)["choices"][0]["text"])
"""

FUNCTIONS = """
import ctypes, importlib.util, sys, types
path, prompt, threads = (sys.argv[1].encode(), sys.argv[2].encode(), int(sys.argv[3]))
package = types.ModuleType("llama_cpp")  # in the place of its own, which imports all the rest
package.__path__ = importlib.util.find_spec("llama_cpp").submodule_search_locations
sys.modules["llama_cpp"] = package
import llama_cpp.llama_cpp as c
quiet = c.llama_log_callback(lambda *_: None)
c.llama_log_set(quiet, None)
c.llama_backend_init()
model = c.llama_model_load_from_file(path, c.llama_model_default_params())
params = c.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 512, threads, threads
context, vocabulary = c.llama_init_from_model(model, params), c.llama_model_get_vocab(model)
ids = (c.llama_token * 64)()
n = c.llama_tokenize(vocabulary, prompt, len(prompt), ids, 64, True, False)
assert c.llama_decode(context, c.llama_batch_get_one(ids, n)) == 0
sampler = c.llama_sampler_init_greedy()
token, text = c.llama_sampler_sample(sampler, context, -1), ctypes.create_string_buffer(64)
size = c.llama_token_to_piece(vocabulary, token, text, 64, 0, False)
print(text.raw[:size].decode(errors="replace"))
"""


def programs(path: Path, threads: int, peer: str) -> dict[str, list[str]]:
    """What is run: a name, and a command."""
    arguments = [str(path), PROMPT, str(threads)]
    options = ["-m", str(path), "-p", PROMPT, "-n", "1", "-t", str(threads)]
    found = {
        "python": [sys.executable, "-c", ""],
        "python, numpy": [sys.executable, "-c", "import numpy"],
        "tinyllama": [sys.executable, "-c", TINYLLAMA, "generate", *options],
    }
    has_peer = subprocess.run([peer, "-c", "import llama_cpp"], capture_output=True).returncode == 0
    theirs = {"llama-cpp-python": LLAMA, "its C functions": FUNCTIONS} if has_peer else {}
    return found | {name: [peer, "-c", program, *arguments] for name, program in theirs.items()}


def seconds(command: list[str]) -> float:
    """How long a process takes, from its start to its end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, env=environment)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--peer", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    commands = programs(args.file, args.threads, args.peer)
    rounds = [{name: seconds(command) for name, command in commands.items()} for _ in range(args.rounds + 1)]
    took = {name: [round_[name] for round_ in rounds[1:]] for name in commands}
    ours = median(took["tinyllama"])
    print(f"{args.file.name}, {args.threads} threads: seconds of {args.rounds} rounds")
    print(f"{'':18} {'median':>7} {'best':>7}   tinyllama's share")
    for name, times in took.items():
        share = f"{ours / median(times):9.2f}" if name in ("llama-cpp-python", "its C functions") else ""
        print(f"{name:18} {median(times):7.3f} {min(times):7.3f}{share}")


if __name__ == "__main__":
    main()
