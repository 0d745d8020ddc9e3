"""A conversation with a model, which remembers what was said."""

from bisect import bisect_left
from pathlib import Path

from ..errors import require
from ..generation import Generation
from ..llama import Llama, load
from ..settings import Settings, default_ctx_size
from .completion import Completion
from .keywords import settings_of, with_settings
from .templates import prompt_of

SHARE = 4  # the part of the context that is kept free for an answer, at least, where nobody says how long


class Chat:
    """What a user and a model said to each other. Every answer begins where the model left off.

    Attributes:
        llama: the model; another one goes on with the same conversation.
        settings: those of the answers; see `settings.Settings`.
        answer: the last answer, a Generation, which may still be written; None before the first.
        n_left_out: how many of the first messages it didn't get, since the context was full.
    """

    def __init__(
        self,
        model: str | Path | Llama | None = None,
        *,
        system: str = "",
        messages: list[dict] | None = None,
        **settings,
    ):
        """Args:
        model: as `load` takes it, or one that is loaded.
        system: what the model is told before the conversation; of `messages` the first may be that too.
        messages: what has been said before, each {"role": "user" or "assistant", "content": text}.
        settings: of all answers. Without n_predict an answer is as long as the model makes it.
        """
        self.llama = model if isinstance(model, Llama) else load(model)
        self.settings = {"n_predict": -1} | settings
        settings_of(**self.settings)
        self.messages = [{"role": "system", "content": system}] * bool(system) + list(messages or [])

    @property
    def messages(self) -> list[dict]:
        """All that was said, the answer that is being written as far as it goes."""
        if self.answer is None or not (text := str(self.answer.completion())):
            return list(self._said)
        return [*self._said, {"role": "assistant", "content": text}]

    @messages.setter
    def messages(self, messages: list[dict]) -> None:
        if messages:
            prompt_of(messages, None)  # which raises where they are no chat
        self._said, self.answer, self.n_left_out = list(messages), None, 0

    @property
    def system(self) -> str:
        """What the model is told before the conversation; "" for nothing, or what its template says."""
        return self._said[0]["content"] if _n_system(self._said) else ""

    @system.setter
    def system(self, text: str) -> None:
        said = self._said[_n_system(self._said) :]
        self._said = [{"role": "system", "content": text}] * bool(text) + said

    @with_settings()
    def stream(self, content: str | None = None, *, cancel=None, **settings) -> Generation:
        """Say something, and begin the answer: an iterator over its pieces.

        Args:
            content: None for another answer to what was said last.
            cancel: as of `Llama.stream`; what is written by then stays.
            settings: of this answer alone.
        Raises:
            TinyllamaError: what is said doesn't fit into the context, or the template refuses it. The
                conversation is then what it was.
        """
        said, answered = self.messages, "assistant" if content is None else "user"
        while said and said[-1]["role"] == answered:  # what is answered anew; what was never answered
            said.pop()
        said += [{"role": "user", "content": content}] * (content is not None)
        require(said and said[-1]["role"] == "user", "nothing has been said that could be answered")
        left = self._fitting(said, settings_of(**self.settings | settings))
        answer = self.llama.stream(left, cancel=cancel, **self.settings | settings | {"chat": True})
        self._said, self.answer, self.n_left_out = said, answer, len(said) - len(left)
        if self.n_left_out:
            answer.warnings.append(f"the context is full: the first {self.n_left_out} messages are left out")
        return answer

    @with_settings()
    def ask(self, content: str | None = None, **settings) -> Completion:
        """As `stream`, but return the answer when it is written."""
        return self.stream(content, **settings).finish()

    def undo(self) -> list[dict]:
        """Take back the last question and what was answered; returns them."""
        said = self.messages
        asked = [number for number, message in enumerate(said) if message["role"] == "user"]
        self.messages = said[: asked[-1]] if asked else said
        return said[len(self.messages) :]

    def tokens(self) -> list[int]:
        """The conversation as the model gets it, what is left out of it aside."""
        said, template = self.messages, self.llama.template(settings_of(**self.settings).chat_template)
        first = _n_system(said)
        left = said[:first] + said[first + self.n_left_out :]
        if not left:
            return []
        return template.encode(left, False) if template else self.llama.tokens(prompt_of(left, None))

    def _fitting(self, said: list[dict], wanted: Settings) -> list[dict]:
        """Messages with room for an answer: without the oldest, if there are too many, but for the system's.

        Where some have to go, as many go as make room for several answers: each time that the beginning of
        the prompt changes, all of it is read again.
        """
        n_ctx = wanted.ctx_size or default_ctx_size(self.llama.config)
        share, template = n_ctx // SHARE, self.llama.template(wanted.chat_template)
        room = n_ctx - min(share, wanted.n_predict if wanted.n_predict >= 0 else n_ctx)
        first = _n_system(said)
        turns = [n for n, message in enumerate(said) if message["role"] == "user" and n >= first]

        def left(start: int) -> list[dict]:
            return said[:first] + said[start if start > turns[0] else first :]

        def fits(start: int, most: int = room - share) -> bool:
            return len(self.llama.tokens(prompt_of(left(start), template))) <= most

        begun = min(bisect_left(turns, first + self.n_left_out), len(turns) - 1) if self.n_left_out else 0
        *more, last = turns[begun:]
        if not more or fits(turns[begun], room):
            return left(turns[begun])
        return left([*more, last][bisect_left(more, True, lo=1, key=fits)])


def _n_system(messages: list[dict]) -> int:
    """1 where the first message is what the model is told before the conversation, else 0."""
    return int(bool(messages) and messages[0]["role"] == "system")
