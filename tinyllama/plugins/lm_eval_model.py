"""Our models for lm-evaluation-harness: `lm_eval --model tinyllama --model_args model=smollm2 --tasks ...`.

Versions of lm_eval after 0.4.13 find the class by an entry point. For 0.4.13 this module is the command:
`python -m tinyllama.plugins.lm_eval_model --model tinyllama ...`.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..errors import TinyllamaError, require
from ..llama import load
from ..model import Step
from ..ops import KVCache
from ..settings import Settings
from ..texts.jobs import Jobs
from ..texts.templates import Template, template_source

AT_ONCE = 512  # tokens in a pass, of as many texts as that are
SAMPLING = ("temperature", "top_k", "top_p")  # what a task may say about it

log = logging.getLogger("tinyllama")


@register_model("tinyllama")
class TinyllamaLM(TemplateLM):
    """A model by a name that `load` takes. Its scores are those that `--model hf` gives the same weights."""

    def __init__(
        self,
        model: str | None = None,
        backend: str | None = None,
        threads: int | None = None,
        mmap: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        batch_size=None,
        max_batch_size=None,
        device=None,
    ):
        """Args:
        model, backend, threads, mmap: as of `load`.
        max_length: tokens of a context; None: what the model was trained on.
        max_gen_toks: tokens of an answer, where the task doesn't say.
        seed: of tasks that sample.
        batch_size, max_batch_size, device: of no use here, but lm_eval gives them.
        """
        super().__init__()
        self.llama = load(model, backend, threads, mmap=mmap)
        self.max_length, self.max_gen_toks = max_length or self.llama.config.max_seq_len, max_gen_toks
        self.seed, self._template = seed, None

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text that has nothing before it."""
        bos = self.llama.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Text -> ids; control tokens that are written out are those, since chats come as text."""
        tokenizer = self.llama.tokenizer
        ids = tokenizer.encode(string, bos=False, special=True)
        wants_bos = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        has_bos = tokenizer.bos_id is None or (ids[:1] == [tokenizer.bos_id] and add_special_tokens is None)
        return [tokenizer.bos_id, *ids] if wants_bos and not has_bos else ids

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm_eval's own caches."""
        return self.llama.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, or one of tinyllama's by its name, which chats then take."""
        if not chat_template:
            return None
        named = isinstance(chat_template, str)
        source = template_source(chat_template) if named else self.llama.checkpoint.template
        require(source, f"{self.llama.name} has no chat template: name one, --apply_chat_template=chatml")
        self._template = Template(source, self.llama.tokenizer)
        return source

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """A chat as the text of a prompt; without add_generation_prompt its last message goes on."""
        chat = [{"role": message["role"], "content": message["content"]} for message in chat_history]
        if self._template is None:
            self.chat_template(True)
        try:
            text = self._template.render(chat, add_generation_prompt)
        except TinyllamaError as error:
            others = [message for message in chat if message["role"] != "system"]
            if others == chat:
                raise
            log.warning("tinyllama: %s: the system's message is left out", error)
            text = self._template.render(others, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    # --- how likely texts are ---------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Of each ((context, continuation), ids of the context, ids of the continuation) the log probability
        of the continuation, and whether each of its tokens is the likeliest.

        A context is read once, and then all its continuations in one pass, if they are short.
        """
        found, wanted = [(0.0, True)] * len(requests), []
        for number, (_, context, continuation) in enumerate(requests):
            n_kept = self.max_length + 1 - len(continuation)
            require(
                n_kept >= 1,
                f"a continuation of {len(continuation)} tokens: the model takes {self.max_length}",
            )
            wanted.append((context[-n_kept:], number, continuation))
        progress = tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm)
        for context, group in groupby(sorted(wanted), key=lambda request: request[0]):
            group = list(group)
            past = self._read(context[:-1])
            for steps in _passes(_steps(past, context[-1], group)):
                logits = self.llama.run([step for _, step, _ in steps])
                for (number, _, targets), rows in zip(steps, logits, strict=True):
                    known, is_greedy = found[number]
                    found[number] = known + _logprob(rows, targets), is_greedy and _is_greedy(rows, targets)
            for _, number, _ in group:
                if (request := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", request, found[number])
            progress.update(len(group))
        progress.close()
        return found

    def _read(self, ids: list[int]) -> KVCache:
        """A cache of these tokens, which goes on from one that begins like them."""
        llama = self.llama
        cache = llama.new_cache(max(1, len(ids)), at_once=min(AT_ONCE, self.max_length))
        cache = llama.remembered.recall(ids, cache, whole=False)
        for start in range(len(cache), len(ids), AT_ONCE):
            llama.run([Step(ids[start : start + AT_ONCE], cache, 0)])
        llama.remembered.keep(cache)
        return cache

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of each text the log probability, in windows where it is longer than the model takes."""
        windows = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, (None, *make_disjoint_window(window))) for window in cut]
        found = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        sums = [0.0] * len(requests)
        for (number, _), (logprob, _) in zip(windows, found, strict=True):
            sums[number] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # --- texts ------------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop strings: many at once."""
        texts, jobs = [""] * len(requests), Jobs(self.llama)
        space = self.llama.tokenizer.prefix.decode()  # which transformers drops, too
        prompts = sorted((self.tok_encode(request.args[0]), n) for n, request in enumerate(requests))
        progress = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        while prompts or len(jobs):
            while prompts and jobs.room:
                ids, number = prompts.pop(0)
                wanted, ids = self._settings(requests[number].args[1], ids, number)
                jobs.add(number, [(ids, wanted)])
            for number, (text,) in jobs.turn():
                texts[number] = text.completion().removeprefix(space)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                progress.update()
        progress.close()
        return texts

    def _settings(self, asked: dict, ids: list[int], number: int) -> tuple[Settings, list[int]]:
        """Of one text, and its prompt with room for what is to come."""
        asked = normalize_gen_kwargs(asked, self.max_gen_toks)
        n_predict, greedy = asked["max_gen_toks"], not asked["do_sample"]
        require(
            n_predict < self.max_length, f"max_gen_toks={n_predict}: the model takes {self.max_length} tokens"
        )
        others = asked.keys() - {"until", "max_gen_toks", "do_sample", *SAMPLING}
        require(not others, f"a task asks for {', '.join(sorted(others))}, which isn't supported")
        sampled = {"temp": asked["temperature"] if not greedy else 0.0}
        sampled |= {"top_k": asked.get("top_k", 50), "top_p": asked.get("top_p", 1.0)}  # transformers' own
        ids = ids[n_predict - self.max_length :]
        stop, n_ctx = [text for text in asked["until"] if text], len(ids) + n_predict
        seed = self.seed + number
        return Settings(n_predict=n_predict, stop=stop, ctx_size=n_ctx, seed=seed, **sampled), ids


def _steps(past: KVCache, last: int, group: list[tuple]) -> Iterator[tuple[int, Step, list[int]]]:
    """(number of the request, step, the tokens that should come next) for continuations of one context.

    Args:
        past: all of the context but its last token.
    """
    for _, number, continuation in group:
        tokens = [last, *continuation[:-1]]
        cache = past.fork(n_ctx=len(past) + len(tokens))
        for start in range(0, len(tokens), AT_ONCE):
            piece = tokens[start : start + AT_ONCE]
            yield number, Step(piece, cache, len(piece)), continuation[start : start + AT_ONCE]


def _passes(steps: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Steps that are computed together, AT_ONCE tokens at most; so those of one text never are."""
    waiting, n_tokens = [], 0
    for step in steps:
        n = len(step[1].tokens)
        if waiting and n_tokens + n > AT_ONCE:
            yield waiting
            waiting, n_tokens = [], 0
        waiting.append(step)
        n_tokens += n
    yield waiting


def _logprob(logits: np.ndarray, targets: list[int]) -> float:
    """Log probability of tokens by logits [n_tokens, vocab_size]."""
    highest = logits.max(axis=-1)
    totals = np.log(np.exp(logits - highest[:, None]).sum(axis=-1, dtype=np.float64))
    return float((logits[np.arange(len(targets)), targets] - highest - totals).sum())


def _is_greedy(logits: np.ndarray, targets: list[int]) -> bool:
    return bool((logits.argmax(axis=-1) == targets).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
