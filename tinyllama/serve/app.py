"""What is answered under which path."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import Cancelled, TinyllamaError, printable, require
from ..machine.terminal import say
from ..settings import default_ctx_size
from ..texts import openai
from ..texts.answers import Chunks, answer, chosen, scored_ids, told, told_likeliest
from ..texts.openai import CHAT, COMPLETIONS, LISTED, Refused
from ..texts.templates import template_source
from . import taps
from .engine import Busy, Engine, Job
from .guard import Bodies, Guard, as_answer, as_json, failure, of_exception
from .metrics import Metrics

OPEN = ("/", "/health")  # what is answered without the key, beside STATIC
HERE, STATIC = Path(__file__).parent, "/static/"
SUFFIXES = (".css", ".js", ".svg", ".png", ".ico")  # of what the page is made of
PARSERS = 2  # requests that are parsed at the same time: templates and tokenizers take turns anyway
TOLD = 250_000  # tokens of which an answer says how likely they are, alternatives among them, at most
LONGEST = 500_000  # characters of a text that is tokenized, and ids of one that is made
#: What the page may load and be: its own files alone, and in nobody's frame.
POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


class App:
    """What answers.

    Args:
        engine: what computes.
        name: of the model, for the answers.
        ctx_size: room in tokens for each text; None: as `default_ctx_size` says.
        chat_template: in place of the model's own; a name, or Jinja.
        log_prompts: whether stderr gets every request.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        ctx_size: int | None = None,
        chat_template: str | None = None,
        log_prompts: bool = False,
    ):
        self.engine, self.llama, self.name, self._log = engine, engine.llama, name, log_prompts
        self._n_ctx = ctx_size or default_ctx_size(self.llama.config)
        self._template = self.llama.template(chat_template)
        self._source = template_source(chat_template) if chat_template else self.llama.checkpoint.template
        self._longest = self._n_ctx * max(map(len, self.llama.tokenizer.vocabulary.pieces))  # characters
        self._started, self._bodies, self._parsers = int(time.time()), Bodies(), CapacityLimiter(PARSERS)
        self._tapped = 0  # bytes of answers that are under way
        posts = {COMPLETIONS: self._text, CHAT: self._text, "/v1/score": self._score, "/v1/taps": self._taps}
        posts |= {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        posts |= {"/apply-template": self._apply_template}
        gets = {"/health": self._health, "/metrics": self._metrics, "/v1/models": self._models}
        gets |= {"/tokenizer_info": self._tokenizer_info, "/": self._page}
        self.metrics = Metrics(engine, [*posts, *gets])
        self._routes = [Route(path, self._posted(act), methods=["POST"]) for path, act in posts.items()]
        self._routes += [Route(path, act, methods=["GET"]) for path, act in gets.items()]
        self._routes += [Route("/v1/models/{name:path}", self._model, methods=["GET"])]
        self._routes += [Route(STATIC + "{name}", self._page, methods=["GET"])]

    def guarded(self, api_key: str | None = None, hosts=None) -> Guard:
        """All of it as ASGI has it; see Guard."""
        handlers = dict.fromkeys((HTTPException, TinyllamaError, ClientDisconnect, Exception), as_answer)
        app = Starlette(routes=self._routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Guard(app, api_key, hosts, self.metrics.answered, OPEN, STATIC)

    def _posted(self, act: Callable) -> Callable:
        """A handler that is given the body, too."""

        async def posted(request: Request) -> Response:
            self.engine.require_open()
            body = await self._bodies.read(request)
            try:
                if self._log:
                    say(printable(f"{request.url.path} {json.dumps(body)}"))
                return await act(request, body)
            finally:
                self._bodies.release(body)

        return posted

    async def _aside(self, act: Callable, *args):
        """What takes longer than others should wait for."""
        return await to_thread.run_sync(act, *args, limiter=self._parsers)

    # --- texts ------------------------------------------------------------------------------------

    async def _text(self, request: Request, body: dict) -> Response:
        """/v1/completions and /v1/chat/completions."""
        wanted, texts = await self._aside(self._asked, request.url.path, body)
        self._bodies.release(body)
        job = self.engine.write(texts, wanted.bias, wanted.listed)
        await job.begun()
        if wanted.stream:
            return _Stream(self._events(wanted, job), _listening(request, job), "text/event-stream")
        async with _listening(request, job):
            async for _ in job.events():
                pass
            self._count(wanted, job)
            echoed = chosen(wanted, job.texts) if wanted.scores else []
            scored = [await self._scored(request, scored_ids(text), follows=True) for text in echoed]
            return as_json(await self._aside(answer, wanted, job.texts, self.name, scored))

    def _asked(self, path: str, body: dict) -> tuple[openai.Request, list[tuple]]:
        """A request, and its texts with their prompts as ids."""
        wanted = openai.parse(path, body, self._chat, ctx_size=self._n_ctx)
        n, most = len(wanted.prompts) * wanted.best_of, self.engine.most
        if n > most:
            raise Refused(f"{n} texts are asked for, and there is room for {most}", "prompt")
        prompts = [self._ids(prompt) for prompt in wanted.prompts]
        n_each = wanted.settings.n_predict if wanted.settings.n_predict >= 0 else self._n_ctx
        n_tokens = [min(self._n_ctx, n_each + len(ids) * wanted.echo) for ids in prompts]
        n_told = sum(n_tokens) * wanted.best_of * (1 + wanted.listed) if wanted.listed is not None else 0
        if n_told > TOLD:
            raise Refused(
                f"logprobs of up to {n_told:,} tokens are asked for, at most {TOLD:,} told", "logprobs"
            )
        texts = zip((ids for ids in prompts for _ in range(wanted.best_of)), wanted.texts(), strict=True)
        return wanted, [(ids, settings) for ids, (_, settings) in texts]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        try:
            return self.llama.tokens(prompt, self._n_ctx)
        except Cancelled:
            raise
        except TinyllamaError as error:
            is_full = str(error).startswith("the context is full")
            raise Refused(error, "prompt", "context_length_exceeded" if is_full else None) from None

    def _chat(self, messages: list[dict]) -> list[int]:
        none = (
            "the model has no chat template: it is for continuing texts (/v1/completions), or name a template"
        )
        require(self._template, f"{none} (--chat-template chatml)")
        n = sum(len(str(message["content"])) for message in messages)
        full = f"the context is full: the chat has {n:,} characters, ctx_size is {self._n_ctx} tokens"
        require(n <= self._longest, full)
        return self._template.encode(messages)

    async def _events(self, wanted: openai.Request, job: Job) -> AsyncIterator[str]:
        """An answer piece by piece, as server-sent events."""
        chunks = Chunks(wanted, job.texts, self.name)
        try:
            for chunk in chunks.first():
                yield _event(chunk)
            async for happened in job.events():
                for chunk in chunks.piece(*happened):
                    yield _event(chunk)
            for chunk in chunks.last():
                yield _event(chunk)
        except TinyllamaError as error:
            yield f"data: {of_exception(error).body.decode()}\n\n"
        finally:
            self._count(wanted, job)
        yield "data: [DONE]\n\n"

    def _count(self, wanted: openai.Request, job: Job) -> None:
        n_prompt = sum(len(text.prompt_ids) for text in job.texts[:: wanted.best_of])
        self.metrics.computed(n_prompt, sum(len(text.tokens) for text in job.texts))

    # --- what others don't serve ------------------------------------------------------------------

    async def _score(self, request: Request, body: dict) -> Response:
        """/v1/score: how likely each token of a prompt is."""
        ids = await self._aside(self._prompt, body, {"top"})
        top = body.get("top", 0)
        fine = type(top) is int and 0 <= top <= LISTED
        _require(fine, f"top must be a whole number from 0 to {LISTED}, not {top!r:.60}", "top")
        scored, tokenizer = await self._scored(request, ids), self.llama.tokenizer
        self.metrics.computed(len(ids))
        tokens = [told(tokenizer, token.id, token.prob) for token in scored]
        if top:
            for token, found in zip(tokens, scored, strict=True):
                token["top_logprobs"] = told_likeliest(tokenizer, found, top)
        total = sum(token["logprob"] for token in tokens[1:])
        return as_json({"object": "score", "model": self.name, "tokens": tokens, "logprob": total})

    async def _scored(self, request: Request, ids: list[int], follows: bool = False) -> list:
        job = self.engine.compute(partial(taps.scored, self.llama, ids), follows)
        async with _listening(request, job):
            return await job.done()

    async def _taps(self, request: Request, body: dict) -> Response:
        """/v1/taps: intermediate values, as safetensors."""
        ids, patterns = await self._aside(self._prompt, body, {"taps"}), body.get("taps")
        fine = isinstance(patterns, list) and patterns and all(isinstance(one, str) for one in patterns)
        _require(fine, "taps must be a list of names, as layers.*.residual", "taps")
        try:
            names, n_bytes = taps.wanted_taps(self.llama, patterns, len(ids))
        except TinyllamaError as error:
            raise Refused(error, "taps") from None
        if self._tapped + n_bytes > taps.LARGEST:
            raise Busy("too many large answers are under way: try again later")
        self._tapped += n_bytes
        try:
            job = self.engine.compute(partial(taps.trace, self.llama, ids, names))
            async with _listening(request, job):
                arrays = await job.done()
        except BaseException:
            self._tapped -= n_bytes
            raise
        self.metrics.computed(len(ids))
        pieces = [self.llama.tokenizer.piece(token) for token in ids]
        about = {"model": self.name, "ids": json.dumps(ids), "pieces": json.dumps(pieces)}
        parts = taps.safetensors(arrays, about)

        async def content() -> AsyncIterator:
            for part in parts:
                yield part

        return _Stream(content(), self._sending(n_bytes), "application/octet-stream")

    @asynccontextmanager
    async def _sending(self, n_bytes: int):
        try:
            yield
        finally:
            self._tapped -= n_bytes

    def _prompt(self, body: dict, others: set[str]) -> list[int]:
        """The ids of a prompt, which is a text, ids or messages."""
        unknown = body.keys() - {"prompt", "messages", "model", *others}
        _require(not unknown, f"{min(unknown, default='')!r:.60} isn't supported", min(unknown, default=""))
        _require(
            "prompt" not in body or "messages" not in body, "prompt and messages exclude each other", "prompt"
        )
        kind, key = (CHAT, "messages") if "messages" in body else (COMPLETIONS, "prompt")
        prompts = openai.parse(kind, {key: body.get(key)}, self._chat).prompts
        _require(len(prompts) == 1, "prompt must be one here", "prompt")
        return self._ids(prompts[0])

    # --- tokens: llama.cpp's keys, and vLLM's where they have others ----------------------------------

    async def _tokenize(self, request: Request, body: dict) -> Response:
        content, tokenizer = body.get("content", body.get("prompt")), self.llama.tokenizer
        fine = isinstance(content, str) and len(content) <= LONGEST
        _require(fine, f"content must be a text of at most {LONGEST:,} characters", "content")
        usual = {
            "add_special": False,
            "add_special_tokens": False,
            "parse_special": True,
            "with_pieces": False,
        }
        flags = {key: body.get(key, value) for key, value in usual.items()}
        for key, value in flags.items():
            _require(isinstance(value, bool), f"{key} must be true or false, not {value!r:.60}", key)
        bos = None if flags["add_special"] or flags["add_special_tokens"] else False
        encode = partial(tokenizer.encode, content, bos=bos, special=flags["parse_special"])
        ids = await self._aside(encode)
        if flags["with_pieces"]:
            return as_json({"tokens": [{"id": token, "piece": tokenizer.piece(token)} for token in ids]})
        return as_json({"tokens": ids})

    async def _detokenize(self, request: Request, body: dict) -> Response:
        ids = body.get("tokens")
        fine = isinstance(ids, list) and len(ids) <= LONGEST and all(type(token) is int for token in ids)
        _require(fine, f"tokens must be a list of at most {LONGEST:,} token ids", "tokens")
        text = await self._aside(self._spelled, ids)
        return as_json({"content": text, "prompt": text})

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self.llama.tokenizer
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names = {name: None if token is None else tokenizer.piece(token) for name, token in ids.items()}
        return as_json(names | {"chat_template": self._source})

    async def _apply_template(self, request: Request, body: dict) -> Response:
        given, tokenizer = {"messages": body.get("messages")}, self.llama.tokenizer
        ids = (await self._aside(openai.parse, CHAT, given, self._chat)).prompts[0]
        own = tokenizer.add_bos and ids[:1] == [tokenizer.bos_id]  # which every prompt gets
        return as_json({"prompt": self._spelled(ids[own:]), "tokens": ids})

    def _spelled(self, ids: list[int]) -> str:
        """Ids as text, control tokens by their names."""
        tokenizer = self.llama.tokenizer
        spelled = [
            tokenizer.piece(token).encode() if tokenizer.is_control(token) else tokenizer.token_bytes(token)
            for token in ids
        ]
        return b"".join(spelled).removeprefix(tokenizer.prefix).decode("utf-8", errors="replace")

    # --- about the server -------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return failure(503, "the server is ending") if self.engine.ending else as_json({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    def _about(self) -> dict:
        config, n_params = self.llama.config, self.llama.n_params
        meta = {"n_vocab": config.vocab_size, "n_ctx_train": config.max_seq_len, "n_embd": config.dim}
        meta |= {"n_params": n_params, "n_ctx": self._n_ctx, "has_template": self._template is not None}
        about = {"id": self.name, "object": "model", "created": self._started, "owned_by": "tinyllama"}
        return about | {"meta": meta}

    async def _models(self, request: Request) -> Response:
        return as_json({"object": "list", "data": [self._about()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            raise HTTPException(404, f"there is one model, {self.name}")
        return as_json(self._about())

    async def _page(self, request: Request) -> Response:
        """The page, and what it is made of."""
        name = request.path_params.get("name", "page.html")
        files = {path.name: path for path in HERE.iterdir() if path.suffix in (*SUFFIXES, ".html")}
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return FileResponse(files[name], headers=PAGE)


class _Stream(StreamingResponse):
    """An answer that is sent part by part, inside of a context."""

    def __init__(self, content: AsyncIterator, around: AbstractAsyncContextManager, media_type: str):
        super().__init__(content, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type)
        self._around = around

    async def __call__(self, scope, receive, send) -> None:
        """As ASGI says."""
        async with self._around:
            await self.stream_response(send)


@asynccontextmanager
async def _listening(request: Request, job: Job):
    """Inside, a job is cancelled as soon as its client goes away, and at the end what is left of it."""

    async def listen() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()
        job.cancel()


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"


def _require(ok: object, message: str, param: str) -> None:
    if not ok:
        raise Refused(message, param)
