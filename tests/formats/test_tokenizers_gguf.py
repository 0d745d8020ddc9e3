"""What a GGUF file says about its vocabulary, and what is made of it where it says too little or too much."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from nasty_texts import TEXTS
from vocabularies import TEXT, bpe, hugging_faces, sentencepiece_model

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.formats.gguf import Metadata
from tinyllama.formats.pre_tokenizers import RULES, rule_of
from tinyllama.formats.tokenizer_model import vocabulary_from_model
from tinyllama.formats.vocabulary import END_PIECES, from_gguf, padded
from tinyllama.sampling import sample
from tinyllama.settings import Settings
from tinyllama.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, make_tokenizer

STRING, U32, I32, F32 = 8, 4, 5, 6


def keys(**changed) -> Metadata:
    """The key-values of a byte-level vocabulary; of a changed one None leaves it out."""
    vocabulary = bpe()
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": (STRING, list(vocabulary.pieces)),
        "token_type": (I32, list(vocabulary.types)),
        "merges": (STRING, list(vocabulary.merges)),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return metadata(values | changed)


@pytest.fixture
def spm(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    return vocabulary_from_model(tmp_path / "tokenizer.model")


def spm_keys(spm, **changed) -> Metadata:
    values = {"model": "llama", "tokens": (STRING, list(spm.pieces))}
    values |= {"scores": (F32, list(spm.scores)), "token_type": (I32, list(spm.types))}
    return metadata(values | changed)


def metadata(values: dict) -> Metadata:
    made = Metadata()
    for name, value in values.items():
        if isinstance(value, tuple):
            made.set(f"tokenizer.ggml.{name}", value[1], value[0])
        elif value is not None:
            made[f"tokenizer.ggml.{name}"] = value
    return made


def quietly(made: Metadata):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return from_gguf(made)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", RULES)
def test_every_rule_is_known(pre):
    vocabulary = quietly(keys(pre=pre))
    assert (vocabulary.pre, vocabulary.words) == (pre, RULES[pre].words)
    assert (vocabulary.ignore_merges, vocabulary.add_bos) == (RULES[pre].ignore_merges, RULES[pre].add_bos)
    make_tokenizer(vocabulary).encode(TEXT)


@pytest.mark.parametrize(
    ("alias", "pre"),
    [
        *((alias, "llama-bpe") for alias in ("llama3", "llama-v3", "falcon3", "pixtral")),
        *((alias, "qwen2") for alias in ("deepseek-r1-qwen", "megrez", "stablelm2")),
        ("starcoder", "smollm"),
        ("phi-2", "gpt-2"),
        ("llama4", "gpt-4o"),
    ],
)
def test_aliases_are_the_same_rule_and_keep_their_name(alias, pre):
    vocabulary = quietly(keys(pre=alias))
    assert rule_of(alias) is RULES[pre]
    assert vocabulary.pre == alias
    assert replace(vocabulary, pre=pre) == quietly(keys(pre=pre))


def test_without_a_rule_it_is_llama_cpps_default_and_a_warning():
    with pytest.warns(UserWarning, match="doesn't say how its tokenizer cuts text into words"):
        vocabulary = from_gguf(keys(pre=None))
    assert vocabulary.words == RULES["default"].words
    expected = hugging_faces(bpe("default")).encode
    for text in TEXTS:
        assert make_tokenizer(vocabulary).encode(text) == expected(text).ids


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(TinyllamaError, match="the pre-tokenizer 'bloom' isn't supported, only gpt-2, smollm"):
        from_gguf(keys(pre="bloom"))


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED, UNUSED])
@pytest.mark.parametrize("piece", sorted(END_PIECES))
def test_ends_of_a_text_are_known_by_their_spelling_whatever_their_type(piece, kind):
    pieces, types = [*bpe().pieces, piece], [*bpe().types, kind]
    pieces[0] = "<none>"
    made = keys(tokens=(STRING, pieces), token_type=(I32, types), eos_token_id=None)
    tokenizer = make_tokenizer(quietly(made))
    assert 400 in tokenizer.stop_ids
    assert tokenizer.decode([400]) == "" and tokenizer.is_control(400)
    assert 400 not in tokenizer.unused_ids
    assert tokenizer.encode(piece, special=True) == [400]
    assert 400 not in tokenizer.encode(piece)


def test_every_end_ends_a_text():
    made = keys(eot_token_id=5, eom_token_id=6)
    assert make_tokenizer(quietly(made)).stop_ids == {0, 5, 6}


# --- what a file leaves out, or has odd values for ------------------------------------------------


def test_types_of_any_whole_numbers_are_read():
    types = list(bpe().types)
    for kind in (U32, 0, 1, 10, 11):
        assert quietly(keys(token_type=(kind, types))) == quietly(keys())
    assert quietly(keys(token_type=(I32, [*types[:-1], 0]))).types[-1] == NORMAL


def test_without_types_special_ids_and_the_spelling_of_bytes_tell_them(spm):
    vocabulary = quietly(spm_keys(spm, token_type=None))
    assert vocabulary.types == spm.types
    assert quietly(keys(token_type=None)).types == (CONTROL,) + (NORMAL,) * 399
    all_normal = quietly(spm_keys(spm, token_type=(I32, [NORMAL] * len(spm.pieces))))
    assert all_normal.types.count(BYTE) == 256 and UNKNOWN not in all_normal.types
    assert make_tokenizer(all_normal).encode("我") == make_tokenizer(spm).encode("我")


def test_without_scores_pieces_are_merged_from_left_to_right(spm):
    vocabulary = quietly(spm_keys(spm, scores=None))
    assert set(vocabulary.scores) == {0.0}
    tokenizer = make_tokenizer(vocabulary)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    whole = quietly(spm_keys(spm, scores=(I32, [round(score) for score in spm.scores])))
    assert whole.scores == tuple(map(round, spm.scores))


@pytest.mark.parametrize("odd", [0xFFFFFFFF, 400, -1])
@pytest.mark.parametrize("name", ["bos", "eos", "unknown", "eot"])
def test_a_special_id_out_of_range_is_ignored_with_a_warning(name, odd):
    with pytest.warns(UserWarning, match=rf"{name}_token_id is ignored: there is no token {odd} among 400"):
        vocabulary = from_gguf(keys(**{f"{name}_token_id": odd}))
    usual = quietly(keys(**{f"{name}_token_id": None}))
    assert vocabulary == usual


def test_of_sentencepiece_it_is_llama_cpps_default_then(spm):
    with pytest.warns(UserWarning, match="bos_token_id is ignored"):
        vocabulary = from_gguf(spm_keys(spm, bos_token_id=0xFFFFFFFF))
    assert vocabulary.bos_id == 1


def test_several_empty_pieces_stand_for_nothing():
    pieces, types = [*bpe().pieces, "", "", "x y"], [*bpe().types, NORMAL, NORMAL, CONTROL]
    tokenizer = make_tokenizer(quietly(keys(tokens=(STRING, pieces), token_type=(I32, types))))
    plain = make_tokenizer(quietly(keys()))
    assert tokenizer.decode([400, 401]) == "" and tokenizer.piece(400) == ""
    assert tokenizer.encode(TEXT) == plain.encode(TEXT)


def test_several_empty_pieces_of_sentencepiece_stand_for_nothing(spm):
    made = spm_keys(
        spm,
        tokens=(STRING, [*spm.pieces, "", ""]),
        scores=(F32, [*spm.scores, 0.0, 0.0]),
        token_type=(I32, [*spm.types, NORMAL, UNUSED]),
    )
    tokenizer, plain = make_tokenizer(quietly(made)), make_tokenizer(spm)
    for text in (TEXT, "abcdefghij" * 3000):  # the second is cut by a library
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_two_pieces_that_are_the_same_are_refused():
    with pytest.raises(TinyllamaError, match="two tokens are the same piece, 'dup'"):
        from_gguf(keys(tokens=(STRING, ["dup", "dup", *bpe().pieces[2:]])))


def test_a_vocabulary_of_another_kind_is_refused_by_name():
    for kind in ("bert", "t5", "rwkv"):
        with pytest.raises(TinyllamaError, match=f"a tokenizer of the kind '{kind}'"):
            from_gguf(keys(model=kind))


# --- user-defined pieces --------------------------------------------------------------------------


def test_user_defined_pieces_of_sentencepiece_are_matched_whole_with_their_spaces(spm):
    """As llama.cpp does, and Hugging Face with added tokens; behind them a space is put, too."""
    n = len(spm.pieces)
    made = spm_keys(
        spm,
        tokens=(STRING, [*spm.pieces, "<x y>", "    "]),
        scores=(F32, [*spm.scores, 0.0, 0.0]),
        token_type=(I32, [*spm.types, USER_DEFINED, USER_DEFINED]),
    )
    tokenizer = make_tokenizer(quietly(made))
    old = tokenizer.encode("old", bos=False)
    assert tokenizer.encode("old<x y>old    old", bos=False) == [*old, n, *old, n + 1, *old]
    assert (tokenizer.decode([n]), tokenizer.decode([n + 1], strip_prefix=False)) == ("<x y>", "    ")


# --- unused pieces --------------------------------------------------------------------------------


def test_unused_tokens_are_never_drawn():
    logits = np.array([1, 5, 2, 9, 8], np.float32)
    for temp in (0, 1):
        for seed in range(50):
            settings = Settings(temp=temp, top_k=0, top_p=1)
            token = sample(logits, settings, [], np.random.default_rng(seed), None, [3, 4])
            assert token in (0, 1, 2)
    assert logits[3] == 9


def test_a_model_with_more_embeddings_than_tokens_writes_only_tokens(monkeypatch):
    llama = tinyllama.load("small", backend="numpy", threads=2)
    n = llama.tokenizer.vocab_size
    vocabulary = llama.tokenizer.vocabulary
    usual = llama.generate("Once", temp=0, n_predict=5)
    drawn = set(usual.ids)
    types = [UNUSED if token in drawn else kind for token, kind in enumerate(vocabulary.types)]
    monkeypatch.setattr(llama, "tokenizer", make_tokenizer(replace(vocabulary, types=tuple(types))))
    for seed in range(5):
        text = llama.generate("Once", temp=seed / 2, n_predict=20, seed=seed)
        assert not drawn & set(text.ids) and len(text.ids) > 1
    assert len(padded(vocabulary, n + 64).pieces) == n + 64
