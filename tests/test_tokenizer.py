import random
import re
import tracemalloc
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vocabularies import LANGUAGES, TEXT, bpe, bpe_by_hand, sentencepiece_model

from tinyllama.errors import TinyllamaError
from tinyllama.formats import ggml, gguf
from tinyllama.tokenizer import TextStream, _Known, make_tokenizer
from tinyllama.vocabulary import CONTROL, USER_DEFINED, Vocabulary, vocabulary_from_model

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe"]


@pytest.fixture(scope="session")
def small_model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return path


@pytest.fixture(scope="session")
def small_spm(small_model_file):
    return make_tokenizer(Vocabulary("sentencepiece", model=small_model_file))


@pytest.fixture(scope="session")
def small_bpe():
    return make_tokenizer(bpe())


@pytest.fixture(scope="session", params=["small_spm", "small_bpe"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def llama_file(shared_data):
    return shared_data / "llama_tokenizer" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama(llama_file):
    return make_tokenizer(Vocabulary("sentencepiece", model=llama_file))


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    return make_tokenizer(gguf.read(smollm2_file).vocabulary)


@pytest.fixture(scope="session")
def books(shared_data):
    shakespeare = (shared_data / "text" / "tinyshakespeare_input.txt").read_text()[:200_000]
    tales = (shared_data / "text" / "fairytaleqa_278_stories.txt").read_text()[:100_000]
    return [shakespeare, tales, *LANGUAGES, "\n".join(LANGUAGES)]


# --- every byte sequence comes back ---------------------------------------------------------------

AWKWARD = st.text(st.sampled_from("▁ <s>0xA\n\0é🦙\ufffd\u2047\x85\udcff\udc80'l1½"))
ANYTHING = st.binary() | st.text().map(str.encode) | AWKWARD


@given(text=ANYTHING)
@example(text="")
@example(text=" ")
@example(text="  two before, two after  ")
@example(text="\n\n a\r\n\tb\n")
@example(text="▁ ▁▁a▁")
@example(text="<s></s><unk><0x0A><|im_start|>")
@example(text="\0")
@example(text="\udcff\udcc3\udca9")
@example(text=b"\xf0\x9f\xa6")
@example(text=bytes(range(256)))
def test_every_byte_sequence_comes_back(tokenizer, text):
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert tokenizer.encode(data) == ids


@given(text=ANYTHING)
def test_every_byte_sequence_comes_back_from_llamas_vocabulary(llama, text):
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    assert llama.decode_bytes(llama.encode(text)) == data


def test_long_texts_come_back(llama, smollm2, books):
    for text in books:
        assert llama.decode(llama.encode(text)) == text
        assert smollm2.decode(smollm2.encode(text)) == text


def test_a_control_token_of_one_character_isnt_found_in_plain_text(small_spm):
    vocabulary = small_spm.vocabulary
    changed = replace(vocabulary, pieces=(*vocabulary.pieces, "\uf8ff"), types=(*vocabulary.types, CONTROL))
    tokenizer = make_tokenizer(replace(changed, scores=(*vocabulary.scores, 0.0)))
    assert tokenizer.decode(tokenizer.encode("a\uf8ffb")) == "a\uf8ffb"
    assert tokenizer.vocab_size - 1 not in tokenizer.encode("a\uf8ffb")
    assert tokenizer.vocab_size - 1 in tokenizer.encode("a\uf8ffb", special=True)


def test_bytes_without_a_piece_become_the_unknown_token_whatever_its_name():
    pieces, types = ("?", "<s>", "</s>", "▁", "a"), (2, 3, 3, 1, 1)
    vocabulary = Vocabulary("sentencepiece", pieces=pieces, scores=(0.0,) * 5, types=types)
    assert make_tokenizer(vocabulary).encode(b"a\xff", bos=False) == [3, 4, 0]


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(TinyllamaError, match="half a character at position 1"):
        tokenizer.encode("a\ud83e")


def test_bytes_without_a_token_are_left_out_and_known(smollm2):
    assert len(smollm2.missing_bytes) == 21
    assert 0x04 in smollm2.missing_bytes
    assert smollm2.decode_bytes(smollm2.encode(b"a\x04b\xff")) == b"ab"


@given(data=st.binary())
def test_smollm2_gives_every_byte_back_that_it_has(smollm2, data):
    kept = bytes(byte for byte in data if byte not in smollm2.missing_bytes)
    assert smollm2.decode_bytes(smollm2.encode(kept)) == kept


# --- the same ids as others -----------------------------------------------------------------------


def test_llamas_ids_are_the_known_ones(llama):
    assert llama.encode("Hello world", bos=False) == [15043, 3186]
    assert llama.encode(" Hello world", bos=False) == [29871, 15043, 3186]
    assert llama.encode("This is 🦙.cpp") == [1, 910, 338, 29871, 243, 162, 169, 156, 29889, 8223]
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.stop_ids) == (32000, 1, 2, {2})


def test_llamas_ids_are_sentencepieces_own(llama, llama_file, books):
    original = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    for text in books:
        ids = original.encode(text)
        assert llama.encode(text, bos=False) == ids
        assert llama.decode(ids) == original.decode(ids)


@given(text=st.text(st.sampled_from(TEXT + "é🦙\n\0")))
def test_ids_are_sentencepieces_own(small_spm, text):
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert small_spm.encode(text, bos=False) == original.encode(text)


def test_a_vocabulary_rebuilt_from_a_ggml_file_gives_the_same_ids(llama, llama_file, books):
    rebuilt = make_tokenizer(ggml.rebuild_vocabulary(llama_file, ggml.token_texts(llama_file)))
    for text in books:
        assert rebuilt.encode(text) == llama.encode(text)
    spaces = random.Random(1)
    for _ in range(300):
        text = "".join(spaces.choice(["x", "\n", "the", " " * spaces.randrange(1, 40)]) for _ in range(9))
        assert rebuilt.encode(text) == llama.encode(text)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_bpe_merges_as_the_paper_says(pre):
    vocabulary = bpe(pre)
    tokenizer = make_tokenizer(vocabulary)
    for text in [TEXT, *LANGUAGES, "\n".join(LANGUAGES), "a1b22 333 4444\n\n\n x's X'S  'll\u00a0y"]:
        assert tokenizer.encode(text) == bpe_by_hand(vocabulary, text)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 1812", "!", " ", " x"]),
        ("smollm", ["It", "'s", " ", "1", "8", "1", "2", "!", " ", " x"]),
        ("llama-bpe", ["It", "'s", " ", "181", "2", "!", " ", " x"]),
    ],
)
def test_pre_tokenizers_cut_text_into_words(pre, words):
    letters = [chr(code) for code in [*range(33, 127), 0x120]]
    pieces = list(dict.fromkeys(letters + [word.replace(" ", "Ġ") for word in words]))
    merges = []
    for word in words:
        spelled = word.replace(" ", "Ġ")
        for end in range(2, len(spelled) + 1):
            merges.append(f"{spelled[: end - 1]} {spelled[end - 1]}")
            pieces.append(spelled[:end])
    pieces = list(dict.fromkeys(pieces))
    vocabulary = replace(
        bpe(pre), pieces=tuple(pieces), types=(1,) * len(pieces), merges=tuple(dict.fromkeys(merges))
    )
    tokenizer = make_tokenizer(vocabulary)
    assert [tokenizer.piece(token_id) for token_id in tokenizer.encode("It's 1812!  x")] == words


def test_llama3s_rule_takes_a_word_that_is_a_piece_as_it_is():
    vocabulary = replace(bpe("llama-bpe"), pieces=(*bpe().pieces, "xyz"), types=(*bpe().types, 1))
    assert make_tokenizer(vocabulary).encode("xyz") == [len(bpe().pieces)]
    assert len(make_tokenizer(replace(vocabulary, pre="gpt-2")).encode("xyz")) == 3


def test_smollm2s_ids_are_those_of_its_merges(smollm2, books):
    assert smollm2.encode("Hello world") == [19556, 905]
    assert smollm2.encode("Hello world", bos=True) == [1, 19556, 905]
    for text in [books[0][:20_000], *LANGUAGES, "\n".join(LANGUAGES)]:
        assert smollm2.encode(text) == bpe_by_hand(smollm2.vocabulary, text)


# --- special tokens -------------------------------------------------------------------------------


def test_bos_comes_first_if_the_vocabulary_or_the_caller_says_so(small_spm, small_bpe):
    assert small_spm.encode("old")[0] == small_spm.bos_id == 1
    assert small_spm.encode("old", bos=False) == small_spm.encode("old")[1:]
    assert small_bpe.encode("old", bos=True) == [0, *small_bpe.encode("old")]
    without = make_tokenizer(replace(bpe(), bos_id=None, add_bos=True))
    assert without.encode("old") == small_bpe.encode("old")
    with pytest.raises(TinyllamaError, match="no bos"):
        without.encode("old", bos=True)


def test_control_tokens_are_recognized_only_on_request(small_spm, small_bpe):
    assert small_spm.encode("<s>old</s>", bos=False, special=True) == [
        1,
        *small_spm.encode("old", bos=False),
        2,
    ]
    assert not {1, 2} & set(small_spm.encode("<s>old</s>", bos=False))
    assert small_bpe.encode("<|im_start|>old", special=True) == [1, *small_bpe.encode("old")]
    assert 1 not in small_bpe.encode("<|im_start|>old")


def test_control_tokens_stand_for_no_text(small_spm, small_bpe):
    assert small_spm.token_bytes(1) == b""
    assert small_bpe.decode([1, *small_bpe.encode("old"), 0]) == "old"
    assert small_spm.is_control(1) and not small_spm.is_control(300)
    assert (small_spm.piece(1), small_bpe.piece(1)) == ("<s>", "<|im_start|>")


def test_user_defined_pieces_are_always_recognized_and_stand_for_their_text(small_bpe):
    assert small_bpe.encode("a<br>b") == [*small_bpe.encode("a"), 2, *small_bpe.encode("b")]
    assert small_bpe.decode([2]) == "<br>"


def test_of_two_special_pieces_that_begin_together_the_longer_one_is_meant():
    pieces = ("<|a", "<|a|>", *bpe().pieces)
    tokenizer = make_tokenizer(replace(bpe(), pieces=pieces, types=(3, 3, *bpe().types)))
    assert tokenizer.encode("<|a|>", special=True) == [1]


def test_special_pieces_are_found_as_a_regular_expression_finds_them():
    rng = random.Random(0)
    for letters in ["ab", "<|>a", "]^-\\a", "a\udcff漢"] * 250:
        pieces = {"".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 12))}
        text = "".join(rng.choices(letters, k=rng.randint(0, 30)))
        pattern = "|".join(map(re.escape, sorted(pieces, key=len, reverse=True)))
        found = _Known({piece: token_id for token_id, piece in enumerate(pieces)}).cut(text)
        assert found == [run for run in re.split(f"({pattern})", text) if run]


def test_long_special_pieces_in_each_other_take_no_more_memory_than_themselves():
    known = _Known({"a" * length: length for length in range(2, 2000)})  # of 2 MB
    tracemalloc.start()
    assert known.cut("ab" * 2000 + "a" * 2500) == ["ab" * 2000, "a" * 1999, "a" * 501]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_no_merge_leads_to_a_piece_that_means_its_letters_themselves():
    vocabulary = bpe()
    merged = next(merge.replace(" ", "") for merge in vocabulary.merges if not merge.isascii())
    types = list(vocabulary.types)
    types[vocabulary.pieces.index(merged)] = USER_DEFINED
    with pytest.raises(TinyllamaError, match="isn't of two pieces of the vocabulary into a third"):
        make_tokenizer(replace(vocabulary, types=tuple(types)))


def test_all_tokens_that_end_a_text_are_known():
    assert make_tokenizer(replace(bpe(), eos_id=0, stop_ids=(1,))).stop_ids == {0, 1}
    assert make_tokenizer(replace(bpe(), eos_id=None)).stop_ids == frozenset()


def test_without_byte_pieces_an_unknown_character_becomes_unk(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(byte_fallback=False))
    tokenizer = make_tokenizer(Vocabulary("sentencepiece", model=tmp_path / "tokenizer.model"))
    assert 0 in tokenizer.encode("the 🦙")
    assert tokenizer.decode(tokenizer.encode("the 🦙")) == "the  ⁇ "
    assert tokenizer.decode(tokenizer.encode(b"the\xff")) == "the ⁇ "


# --- pieces and streams ---------------------------------------------------------------------------


def test_a_piece_is_readable_and_keeps_its_space(llama, smollm2):
    assert [llama.piece(token_id) for token_id in (15043, 29871, 243, 13)] == [" Hello", " ", "\\xf0", "\n"]
    assert [smollm2.piece(token_id) for token_id in (19556, 905, 2)] == ["Hello", " world", "<|im_end|>"]


def test_tokens_that_continue_a_text_keep_their_space(llama):
    assert llama.decode([15043, 3186]) == "Hello world"
    assert llama.decode([15043, 3186], strip_prefix=False) == " Hello world"


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_an_id_out_of_range_is_refused(tokenizer, token_id):
    with pytest.raises(TinyllamaError, match=f"no token {token_id}"):
        tokenizer.decode([token_id])


@given(data=st.data(), strip_prefix=st.booleans())
def test_the_joined_stream_is_the_decoded_whole(tokenizer, data, strip_prefix):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)) | st.text().map(tokenizer.encode))
    stream = TextStream(tokenizer, strip_prefix)
    pieces = [stream.feed(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, strip_prefix)


def test_a_stream_never_splits_a_character(llama):
    stream = TextStream(llama)
    pieces = [stream.feed(token_id) for token_id in llama.encode("a🦙b", bos=False)]
    assert pieces == [" a", "", "", "", "🦙", "b"]
    assert stream.flush() == ""


def test_half_a_character_at_the_end_is_shown_as_such(llama):
    stream = TextStream(llama)
    assert stream.feed(243) + stream.flush() == "�"


# --- bad vocabularies -----------------------------------------------------------------------------

SPM = Vocabulary("sentencepiece", pieces=("<unk>", "<s>", "a"), scores=(0.0, 0.0, -1.0), types=(2, 3, 1))


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (Vocabulary("wordpiece"), "unknown kind 'wordpiece'"),
        (Vocabulary("sentencepiece"), "empty"),
        (replace(SPM, eos_id=3), "special token is number 3 of a vocabulary of 3"),
        (replace(SPM, eos_id=-1), "special token is number -1"),
        (replace(SPM, eos_id=None, scores=(0.0,)), "3 pieces, but 1 scores"),
        (replace(SPM, eos_id=None, types=()), "3 pieces, but 0 types"),
        (replace(SPM, eos_id=None, types=(2, 3, 9)), "types"),
        (replace(SPM, eos_id=None, pieces=("<unk>", "a", "a")), "tokens 1 and 2 are the same piece, 'a'"),
        (replace(SPM, eos_id=None, pieces=("<unk>", "<s>", "")), "SentencePiece can't use this vocabulary"),
        (replace(SPM, eos_id=None, pieces=("<unk>", "<s>", "\ud800")), "SentencePiece can't use this vocab"),
        (replace(SPM, eos_id=None, types=(1, 3, 1)), "SentencePiece can't use this vocabulary"),
        (replace(SPM, eos_id=None, types=(2, 3, 6)), "SentencePiece can't use this vocabulary"),
        (replace(bpe(), merges=(bpe().merges[0], "x nothing")), "merge 'x nothing'"),
        (replace(bpe(), merges=("t x",)), "merge 't x'"),
        (replace(bpe(), merges=("alone",)), "merge 'alone'"),
        (replace(bpe(), merges=("a b c",)), "merge 'a b c'"),
        (replace(bpe(), merges=("Ċ ©",)), "merge 'Ċ ©'"),
        (replace(bpe(), stop_ids=(400_000,)), "special token is number 400000"),
        (replace(bpe(), types=()), "but 0 types"),
        (replace(bpe(), pre="deepseek-llm"), "'deepseek-llm' isn't supported, only gpt-2, smollm, llama-bpe"),
    ],
)
def test_a_bad_vocabulary_is_refused_in_one_line(vocabulary, message, capfd):
    with pytest.raises(TinyllamaError, match=message) as error:
        make_tokenizer(vocabulary, "model.gguf")
    assert "\n" not in str(error.value) and str(error.value).startswith("model.gguf: ")
    assert capfd.readouterr() == ("", "")


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_tokenizer_model_is_used_or_refused_but_never_crashes(tmp_path_factory, seed):
    random_bytes = random.Random(seed)
    data = bytearray(sentencepiece_model())
    for _ in range(random_bytes.randrange(1, 4)):
        data[random_bytes.randrange(len(data))] = random_bytes.randrange(256)
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    path.write_bytes(data[: random_bytes.choice([len(data), random_bytes.randrange(len(data))])])
    try:
        make_tokenizer(vocabulary_from_model(path)).encode("a king")
    except TinyllamaError as error:
        assert "\n" not in str(error)


def test_a_tokenizer_is_the_same_from_a_file_and_from_its_pieces(small_model_file, small_spm):
    pieces = vocabulary_from_model(small_model_file)
    assert pieces.model is None
    assert make_tokenizer(pieces).encode(TEXT) == small_spm.encode(TEXT)


def test_loading_prints_nothing(small_model_file, capfd):
    make_tokenizer(Vocabulary("sentencepiece", model=small_model_file)).encode(TEXT)
    assert capfd.readouterr() == ("", "")
