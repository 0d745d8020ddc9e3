"""Sockets and signals: uvicorn, with limits for those who are slow, and an end that lets texts end."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import Cancelled, check_cancelled, naming, require
from ..llama import Llama
from ..machine.terminal import say
from .app import App
from .engine import Engine
from .guard import LOOPBACK

SECONDS = 15.0  # in which a request's head arrives, and in which a client that is sent something takes it
CONNECTIONS, MOST_PORT = 512, 65535
LEAVE = 5  # seconds in which answers are sent off at the end


class Protocol(H11Protocol):
    """HTTP; closes connections of clients who don't send what they began, or don't take what they get."""

    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        """Begin."""
        super().connection_made(transport)
        self._late = self.loop.call_later(SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """A part of a request: the clock runs while its head isn't whole."""
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._late:
            self._late = self._late.cancel()
        elif not answering and not self._late:
            self._late = self.loop.call_later(SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """The client doesn't take what it gets."""
        super().pause_writing()
        self._stuck = self.loop.call_later(SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        self._stuck = self._stuck and self._stuck.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        """The end."""
        super().connection_lost(error)
        for timer in (self._late, self._stuck):
            if timer:
                timer.cancel()


class Server(uvicorn.Server):
    """Ends when the process is told to: texts that have begun are finished first, for so many seconds."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self._engine, self._grace, self._until = engine, grace, None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command's: see `machine.interrupts`."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        engine = self._engine
        try:
            check_cancelled()
        except Cancelled:
            if not engine.ending:
                engine.ending, self._until = True, time.monotonic() + self._grace
                say(f"ending; {engine.n_texts} texts have {self._grace:g} s to end")
            if not engine.n_texts or time.monotonic() > self._until:
                await asyncio.to_thread(engine.stop)
                self.should_exit = True
        return await super().on_tick(counter)


def serve(
    llama: Llama,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    texts: int | None = None,
    grace: float = 10.0,
    **options,
) -> None:
    """Answer until the process is told to end.

    Args:
        name: of the model, for the answers.
        api_key: what clients must know; None: nothing.
        texts: how many are written at the same time.
        grace: seconds in which texts may end after that.
        options: of App: ctx_size, chat_template, log_prompts.
    """
    engine = Engine(llama, texts)
    try:
        app = App(engine, name, **options)
        with naming(f"{host}:{port}"):
            listener = _listener(host, port)
        address, port = listener.getsockname()[:2]
        is_local = ip_address(address).is_loopback
        asgi = app.guarded(api_key, {*LOOPBACK, host} if is_local else None)
        shown = f"[{address}]" if ":" in address else address
        say(f"{name} listens on http://{shown}:{port}")
        if not (is_local or api_key):
            say("warning: whoever reaches this computer may use it: there is no --api-key")
        asyncio.run(Server(config_of(asgi), engine, grace).serve([listener]))
    finally:
        engine.stop()
    check_cancelled()


def config_of(asgi: Callable) -> uvicorn.Config:
    """How uvicorn runs."""
    how = {"http": Protocol, "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
    how |= {"server_header": False, "proxy_headers": False, "limit_concurrency": CONNECTIONS}
    return uvicorn.Config(asgi, timeout_graceful_shutdown=LEAVE, **how)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens."""
    require(port <= MOST_PORT, f"port must be at most {MOST_PORT}")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
