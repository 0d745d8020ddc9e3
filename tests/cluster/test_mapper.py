"""A model as a function: what it takes and gives, and that Dask and joblib can send it anywhere."""

import pickle

import dask.bag
import joblib
import numpy as np
import pandas as pd
import pytest
from dask import delayed

import tinyllama
from tinyllama import Mapper, TinyllamaError

PROMPTS = ["Once upon a time", "Tom", "The old king had three daughters, and", "In the forest"]
HOW = {"n_predict": 8, "threads": 1}


def written(prompts, seeds) -> list[str]:
    """What `generate` makes of each alone."""
    return [str(tinyllama.generate(one, seed=s, **HOW)) for one, s in zip(prompts, seeds, strict=True)]


def test_a_list_becomes_a_list_of_completions_of_seeds_that_follow_each_other():
    texts = Mapper(seed=5, **HOW)(PROMPTS)
    assert texts == written(PROMPTS, range(5, 9)) and [text.seed for text in texts] == [5, 6, 7, 8]
    assert Mapper(**HOW)([]) == [] and Mapper(seed=5, **HOW)(iter(PROMPTS)) == texts


def test_a_series_keeps_its_index_of_which_the_seeds_are_made():
    series = pd.Series(PROMPTS, index=[30, 10, 20, 0])
    texts = Mapper(seed=5, **HOW)(series)
    assert [*texts.index] == [30, 10, 20, 0] and [*texts] == written(PROMPTS, [35, 15, 25, 5])
    parts = pd.concat(Mapper(seed=5, **HOW)(part) for part in (series[2:], series[:2]))
    assert parts.sort_index().equals(texts.sort_index())
    named = Mapper(seed=5, **HOW)(pd.Series(PROMPTS, index=[*"abcd"]))
    assert [*named] == written(PROMPTS, range(5, 9))
    assert Mapper(**HOW)(series[:0]).empty


def test_tables_and_dicts_of_arrays_get_a_column():
    table = pd.DataFrame({"question": PROMPTS, "more": range(4)})
    mapper = Mapper(column="question", seed=5, **HOW)
    found = mapper(table)
    assert [*found["text"]] == written(PROMPTS, range(5, 9)) and [*found["more"]] == [0, 1, 2, 3]
    assert "text" not in table
    found = mapper({"question": np.array(PROMPTS), "more": np.arange(4)})
    assert [*found["text"]] == written(PROMPTS, range(5, 9)) and [*found] == ["question", "more", "text"]


def test_what_it_cannot_take_is_refused_in_one_line_and_names_when_it_is_made():
    with pytest.raises(TinyllamaError, match="no setting 'temprature': did you mean temp"):
        Mapper(temprature=1)
    with pytest.raises(TinyllamaError, match="temp must be a number"):
        Mapper(temp="hot")
    with pytest.raises(TinyllamaError, match="takes a list of prompts, not a text"):
        Mapper()("Tom")


def test_it_is_small_when_it_is_pickled_and_its_texts_keep_what_they_know():
    mapper = Mapper(seed=5, **HOW)
    (text,) = mapper(PROMPTS[:1])
    assert len(pickle.dumps(mapper)) < 1000
    again = pickle.loads(pickle.dumps(mapper))
    assert again(PROMPTS[:1]) == [text] and repr(again) == repr(mapper)
    copy = pickle.loads(pickle.dumps(text))
    assert (copy, copy.ids, copy.seed, copy.stop_reason) == (text, text.ids, 5, "length")


def test_dask_sends_it_to_its_workers_which_compute_with_their_threads(client):
    mapper = Mapper(n_predict=8, seed=5)
    bag = dask.bag.from_sequence(PROMPTS * 2, npartitions=2).map_partitions(mapper)
    texts = bag.compute(scheduler=client)
    assert texts == 2 * written(PROMPTS, range(5, 9))
    assert {text.settings["threads"] for text in texts} == {1}
    parts = [delayed(mapper)(pd.Series(PROMPTS[n::2], index=range(n, 4, 2))) for n in range(2)]
    found = pd.concat(client.compute(parts, sync=True)).sort_index()
    assert [*found] == written(PROMPTS, range(5, 9))


def test_joblib_sends_it_to_its_processes():
    mapper = Mapper(seed=5, **HOW)
    pieces = joblib.Parallel(n_jobs=2)(joblib.delayed(mapper)(PROMPTS[n : n + 2]) for n in (0, 2))
    assert pieces == [written(PROMPTS[:2], [5, 6]), written(PROMPTS[2:], [5, 6])]


def test_a_table_without_the_column_is_refused_with_those_that_it_has():
    for table in ({"text": ["Tom"], "id": [1]}, pd.DataFrame({"text": ["Tom"], "id": [1]})):
        with pytest.raises(TinyllamaError, match="no column 'prompt': there is text, id; column= names it"):
            Mapper()(table)
