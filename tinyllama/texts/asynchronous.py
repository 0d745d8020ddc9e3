"""Texts for asyncio: a thread computes, and the event loop gets the pieces."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextvars import copy_context

from ..errors import Cancelled


async def pieces_of(llama, prompt, **settings) -> AsyncIterator[str]:
    """The pieces of `Llama.stream`, which one thread computes from begin to end.

    Who leaves early, or whose task is cancelled, ends the text before its next layer.
    """
    loop, pieces, stop = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def compute() -> None:
        last: BaseException | None = None
        try:
            for piece in llama.stream(prompt, cancel=stop, **settings):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except BaseException as error:
            last = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(pieces.put_nowait, last)

    run = copy_context().run  # edits of the task hold there, too
    thread = threading.Thread(target=run, args=(compute,), name="astream", daemon=True)
    thread.start()
    try:
        while isinstance(piece := await pieces.get(), str | tuple):
            yield piece
        if piece is not None and not isinstance(piece, Cancelled):
            raise piece
    finally:
        stop.set()
