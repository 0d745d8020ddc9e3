"""A conversation with a model, which remembers what was said."""

from pathlib import Path

from ..errors import require
from ..generation import Generation
from ..llama import Llama, load
from ..settings import Settings, default_ctx_size
from .completion import Completion
from .templates import prompt_of

SHARE = 4  # the part of the context that is kept free for an answer, at least, where nobody says how long


class Chat:
    """What a user and a model said to each other. Every answer begins where the model left off.

    Attributes:
        llama: the model.
        settings: those of the answers; see `settings.Settings`.
        answer: the last answer, a Generation, which may still be written; None before the first.
        n_left_out: how many of the first messages it didn't get, since the context was full.
    """

    def __init__(
        self,
        model: str | Path | Llama = "small",
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
        Settings(**self.settings)
        self._said = [{"role": "system", "content": system}] * bool(system) + list(messages or [])
        self.answer: Generation | None = None
        self.n_left_out = 0

    @property
    def messages(self) -> list[dict]:
        """All that was said, the answer that is being written as far as it goes."""
        if self.answer is None or not (text := str(self.answer.completion())):
            return list(self._said)
        return [*self._said, {"role": "assistant", "content": text}]

    @messages.setter
    def messages(self, messages: list[dict]) -> None:
        self._said, self.answer = list(messages), None

    def stream(self, content: str | None = None, **settings) -> Generation:
        """Say something, and begin the answer: an iterator over its pieces.

        Args:
            content: None for another answer to what was said last.
            settings: of this answer alone.
        """
        said, answered = self.messages, "assistant" if content is None else "user"
        while said and said[-1]["role"] == answered:  # what is answered anew; what was never answered
            said.pop()
        said += [{"role": "user", "content": content}] * (content is not None)
        require(said and said[-1]["role"] == "user", "nothing has been said that could be answered")
        wanted = Settings(**self.settings | settings)
        left, self.n_left_out = self._fitting(said, wanted)
        answer = self.llama.stream(left, **self.settings | settings | {"chat": True})
        if self.n_left_out:
            answer.warnings.append(f"the context is full: the first {self.n_left_out} messages are left out")
        self._said, self.answer = said, answer
        return answer

    def ask(self, content: str | None = None, **settings) -> Completion:
        """As `stream`, but return the answer when it is written."""
        return self.stream(content, **settings).finish()

    def undo(self) -> list[dict]:
        """Take back the last question and what was answered; returns them."""
        said = self.messages
        asked = [number for number, message in enumerate(said) if message["role"] == "user"]
        self.messages = said[: asked[-1]] if asked else said
        return said[len(self.messages) :]

    def _fitting(self, said: list[dict], wanted: Settings) -> tuple[list[dict], int]:
        """Messages with room for an answer: without the oldest, if there are too many, but for the system's.

        Returns them, and how many are left out.
        """
        n_ctx = wanted.ctx_size or default_ctx_size(self.llama.config)
        room = n_ctx - min(n_ctx // SHARE, wanted.n_predict if wanted.n_predict >= 0 else n_ctx)
        first = int(said[0]["role"] == "system")
        turns = [n for n, message in enumerate(said) if message["role"] == "user" and n >= first]
        for start in turns:
            left = said[:first] + said[start if start > turns[0] else first :]
            prompt = prompt_of(left, self.llama.template(wanted.chat_template))
            if start == turns[-1] or len(self.llama.tokens(prompt)) <= room:
                break
        return left, len(said) - len(left)
