"""Texts in asyncio: the same text, and no thread that goes on when nobody listens."""

import asyncio
import threading
import time

import pytest

import tinyllama
from tinyllama.errors import TinyllamaError

PROMPT, DEADLINE = "Once upon a time", 60


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", threads=1)


def writing() -> list:
    return [thread for thread in threading.enumerate() if thread.name == "astream"]


def until_none_is_writing() -> None:
    deadline = time.monotonic() + DEADLINE
    while writing():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_pieces_are_those_of_stream(llama):
    async def read():
        return [piece async for piece in llama.astream(PROMPT, n_predict=12, seed=3)]

    assert asyncio.run(read()) == list(llama.stream(PROMPT, n_predict=12, seed=3))


def test_two_texts_are_written_side_by_side(llama):
    async def read(seed):
        return "".join([piece async for piece in llama.astream(PROMPT, n_predict=12, seed=seed)])

    async def both():
        return await asyncio.gather(read(1), read(2))

    assert asyncio.run(both()) == [llama.generate(PROMPT, n_predict=12, seed=seed) for seed in (1, 2)]


def test_a_cancelled_task_ends_its_text(llama):
    async def read(begun):
        async for _ in llama.astream(PROMPT, n_predict=-1, ctx_size=2048):
            begun.set()

    async def cancel():
        begun = asyncio.Event()
        task = asyncio.create_task(read(begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    until_none_is_writing()


def test_what_goes_wrong_is_raised_where_the_text_is_read(llama):
    async def read():
        async for _ in llama.astream(""):
            pass

    with pytest.raises(TinyllamaError, match="the prompt is empty"):
        asyncio.run(read())
