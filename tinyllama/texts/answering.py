"""Requests of a file that are answered with a model: their texts are written together."""

from collections.abc import Iterator

from ..errors import Cancelled, TinyllamaError, require
from ..generation import Generation
from .answers import answer, chosen, scored_ids
from .jobs import AHEAD, Jobs
from .openai import CHAT, Refused, Request, parse
from .templates import NEEDED, available


class Answering:
    """What answers requests. `add` one while there is `room`, `turn` until none is left.

    Attributes:
        n_running: requests that are being answered; n_tokens, seconds: as of Jobs.
        load_seconds: how long loading the model took.
        where: who answers, for those who wait.
    """

    where = ""

    def __init__(self, llama, name: str, ctx_size: int | None, batch_size: int):
        """Args:
        name: of the model, for the answers.
        ctx_size, batch_size: of every text; see Settings.
        """
        self._llama, self._name, self._jobs = llama, name, Jobs(llama, batch_size)
        self._settings = {"ctx_size": ctx_size, "batch_size": batch_size}
        self._refused: list[tuple[object, Refused]] = []
        self.load_seconds = llama.load_seconds

    def __len__(self) -> int:
        """Requests that have no answer."""
        return len(self._jobs) + len(self._refused)

    room = property(lambda self: self._jobs.room and len(self._refused) < AHEAD)
    n_running = property(lambda self: self._jobs.n_running)
    n_tokens = property(lambda self: self._jobs.n_tokens)
    seconds = property(lambda self: self._jobs.seconds)

    def add(self, job: object, entry: dict) -> None:
        """Begin a request, {"method", "url", "body"}; `turn` says what becomes of it.

        Raises TinyllamaError where no chat at all can be answered: who installs what is missing wants them.
        """
        needs_jinja = entry.get("url") == CHAT and self._llama.checkpoint.template
        require(not needs_jinja or available(), NEEDED)
        try:
            if entry.get("method") != "POST":
                raise Refused(f"method must be POST, not {entry.get('method')!r:.40}", "method")
            request = parse(entry.get("url"), entry.get("body"), self._chat, **self._settings)
            if request.stream:
                raise Refused("stream can only be False here", "stream", "unsupported_value")
            self._jobs.add((job, request), request.texts(), request.bias)
        except Cancelled:
            raise
        except TinyllamaError as error:
            refusal = error if isinstance(error, Refused) else Refused(error, "prompt")
            self._refused.append((job, refusal))

    def turn(self) -> Iterator[tuple[object, dict | Refused]]:
        """Compute a step of all, and give the requests that have ended: the body of each's answer.

        Raises Cancelled after Ctrl-C, behind what has ended before.
        """
        refused, self._refused = self._refused, []
        yield from refused
        for (job, request), texts in self._jobs.turn() if self._jobs else ():
            yield job, self._body(request, texts)

    def _body(self, request: Request, texts: list[Generation]) -> dict:
        echoed = chosen(request, texts) if request.scores else []
        scored = [self._llama.score(scored_ids(text)) for text in echoed]
        return answer(request, texts, self._name, scored)

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a chat."""
        template = self._llama.template()
        require(template, "the model has no chat template: it is for continuing texts (/v1/completions)")
        return template.encode(messages)
