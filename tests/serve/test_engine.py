"""The thread that computes: each gets what it would get alone, and who leaves makes room."""

import asyncio
import threading

import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.serve.engine import Busy, Ending, Engine, Failed, Gone
from tinyllama.settings import Settings

LONG = Settings(n_predict=2000, temp=1.5)


def wanted(llama, *seeds, n_predict=12):
    ids = llama.tokens("Once upon a time")
    return [(ids, Settings(n_predict=n_predict, seed=seed)) for seed in seeds]


async def written(job) -> list[str]:
    pieces = {}
    await job.begun()
    async for happened in job.events():
        pieces[happened.index] = pieces.get(happened.index, "") + happened.piece
    return [pieces[index] for index in sorted(pieces)]


def test_texts_of_many_jobs_are_what_each_is_alone(llama, engine):
    async def all_jobs():
        jobs = [engine.write(wanted(llama, seed, seed + 100)) for seed in range(8)]
        return await asyncio.gather(*map(written, jobs))

    for seed, texts in enumerate(asyncio.run(all_jobs())):
        alone = [llama.generate("Once upon a time", n_predict=12, seed=s) for s in (seed, seed + 100)]
        assert texts == alone
    assert engine.n_texts == 0 and engine.n_running == 0


def test_of_each_token_only_what_is_told_is_kept(llama, engine):
    settings = Settings(n_predict=5, seed=1, stages=True)

    async def one():
        job = engine.write([(llama.tokens("Tom"), settings)], listed=2)
        await written(job)
        return job.texts[0].tokens

    tokens = asyncio.run(one())
    expected = llama.generate("Tom", n_predict=5, seed=1, stages=True).tokens
    for token, other in zip(tokens, expected, strict=True):
        (stage,) = token.stages
        assert stage.kept.tolist() == other.stages[0].kept[:2].tolist() and stage.kept.base is None
        assert token.prob == other.prob


def test_a_cancelled_text_ends_before_its_next_step_and_makes_room(llama):
    engine = Engine(llama, at_once=1)

    async def both():
        first = engine.write([(llama.tokens("Tom"), LONG)])
        await first.begun()
        events = first.events()
        await anext(events)
        second = asyncio.create_task(written(engine.write(wanted(llama, 3))))
        n_before = len(first.texts[0].tokens)
        first.cancel()
        with pytest.raises(Gone):
            async for _ in events:
                pass
        return first.texts[0], n_before, await second

    text, n_before, (second,) = asyncio.run(both())
    assert text.stop_reason == "cancelled" and len(text.tokens) <= n_before + 2
    assert second == llama.generate("Once upon a time", n_predict=12, seed=3)
    engine.stop()


def test_what_ended_holds_no_memory(llama, engine):
    async def one():
        return await written(engine.write(wanted(llama, 1)))

    asyncio.run(one())
    engine.stop()
    assert not engine._owners and not engine._together._running and not engine._together._waiting


def test_too_many_are_told_so_and_the_others_go_on(llama):
    engine = Engine(llama, at_once=1, waiting=2)

    async def four():
        job = engine.write(wanted(llama, 1, 2, 3))
        with pytest.raises(Busy, match="3 texts"):
            engine.write(wanted(llama, 4))
        with pytest.raises(Busy):
            engine.compute(lambda cancel: iter(()))
        texts = await written(job)
        return texts, await written(engine.write(wanted(llama, 4)))

    texts, (last,) = asyncio.run(four())
    assert [*texts, last] == [llama.generate("Once upon a time", n_predict=12, seed=s) for s in (1, 2, 3, 4)]
    engine.stop()


def test_a_prompt_that_cannot_be_continued_is_refused_and_no_other_of_its_job_is(llama, engine):
    async def refused():
        job = engine.write([*wanted(llama, 1), ([], Settings())])
        with pytest.raises(TinyllamaError, match="the prompt is empty"):
            await job.begun()

    asyncio.run(refused())
    assert engine.n_texts == 0


def test_other_jobs_are_computed_between_the_steps_of_texts(llama, engine):
    async def both():
        text = engine.write(wanted(llama, 1, n_predict=40))
        seen = []

        def pieces(cancel):
            for _ in range(3):
                seen.append(len(text.texts[0].tokens))
                yield
            return "done"

        other = engine.compute(pieces)
        (whole,) = await written(text)
        return whole, await other.done(), seen

    whole, result, seen = asyncio.run(both())
    assert whole == llama.generate("Once upon a time", n_predict=40, seed=1) and result == "done"
    assert seen[0] < seen[1] < seen[2]


def test_a_cancelled_job_ends_within_its_piece(llama, engine):
    entered = threading.Event()

    def pieces(cancel):
        yield
        entered.set()
        cancel.wait()
        llama.score("Once upon a time", cancel=cancel)
        yield

    async def one():
        job = engine.compute(pieces)
        await asyncio.to_thread(entered.wait)
        job.cancel()
        with pytest.raises(TinyllamaError, match="cancelled"):
            await job.done()

    asyncio.run(one())


def test_an_error_in_a_pass_ends_what_runs_and_what_comes_later_is_written(llama, engine, monkeypatch):
    run = engine._together._run

    def broken(steps):
        raise TinyllamaError("damaged")

    async def two():
        monkeypatch.setattr(engine._together, "_run", broken)
        with pytest.raises(Failed, match="damaged"):
            await written(engine.write(wanted(llama, 1, 2)))
        monkeypatch.setattr(engine._together, "_run", run)
        return await written(engine.write(wanted(llama, 1)))

    assert asyncio.run(two()) == [llama.generate("Once upon a time", n_predict=12, seed=1)]
    assert engine.n_texts == 0


def test_at_the_end_whoever_waits_is_told(llama):
    engine = Engine(llama, at_once=1)

    async def ending():
        jobs = [engine.write([(llama.tokens("Tom"), LONG)]) for _ in range(3)]
        await jobs[0].begun()
        engine.ending = True
        with pytest.raises(Ending):
            engine.write(wanted(llama, 1))
        await asyncio.to_thread(engine.stop)
        for job in jobs:
            with pytest.raises(Ending):
                await written(job)

    asyncio.run(ending())
    engine.stop()  # twice is fine
