import random
import re
import sys
import threading
import unicodedata
from dataclasses import replace

import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from vocabularies import LANGUAGES, TEXT, bpe, bpe_by_hand, sentencepiece_model

from tinyllama.backends import libraries
from tinyllama.errors import Cancelled, TinyllamaError, cancellable, naming
from tinyllama.formats import ggml, gguf
from tinyllama.formats.checked import checked
from tinyllama.formats.pre_tokenizers import words_of
from tinyllama.formats.tokenizer_model import vocabulary_from_model
from tinyllama.tokenizer import (
    BYTE,
    BYTE_PIECES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    TextStream,
    Vocabulary,
    make_tokenizer,
    token_texts,
)

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe"]
LONG = "abcdefghij" * 2500  # a word for which a library is asked


@pytest.fixture(scope="session")
def small_model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return path


@pytest.fixture(scope="session")
def small_spm(small_model_file):
    return make_tokenizer(vocabulary_from_model(small_model_file))


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
    return make_tokenizer(vocabulary_from_model(llama_file))


@pytest.fixture(scope="session")
def llama_original(llama_file):
    return sentencepiece.SentencePieceProcessor(model_file=str(llama_file))


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    return make_tokenizer(gguf.read(smollm2_file).vocabulary)


@pytest.fixture(scope="session")
def smollm2_original(smollm2):
    return {pre: hugging_faces(replace(smollm2.vocabulary, **words_of(pre))) for pre in PRE_TOKENIZERS}


@pytest.fixture(scope="session")
def books(shared_data):
    shakespeare = (shared_data / "text" / "tinyshakespeare_input.txt").read_text()[:200_000]
    tales = (shared_data / "text" / "fairytaleqa_278_stories.txt").read_text()[:100_000]
    return [shakespeare, tales, *LANGUAGES, "\n".join(LANGUAGES)]


def googles(vocabulary):
    """SentencePiece itself, with nothing done to the text on its way in."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = BYTE in vocabulary.types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = vocabulary.add_space_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    rows = zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
    for piece, score, kind in rows:
        proto.pieces.add(piece=piece, score=score, type=kind)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def hugging_faces(vocabulary):
    """The tokenizers package from end to end: it cuts text into words by its own rules, too."""
    pieces = zip(vocabulary.pieces, vocabulary.types, strict=True)
    ids = {piece: token_id for token_id, (piece, kind) in enumerate(pieces) if kind == NORMAL}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    model = tokenizers.models.BPE(ids, merges, ignore_merges=vocabulary.pre == "llama-bpe")
    before = tokenizers.pre_tokenizers
    gpt2 = before.ByteLevel(add_prefix_space=False, use_regex=True)
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    rules = {
        "gpt-2": [gpt2],
        "smollm": [before.Digits(individual_digits=True), gpt2],
        "llama-bpe": [
            before.Split(tokenizers.Regex(llama3), "isolated"),
            before.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = before.Sequence(rules[vocabulary.pre])
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


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


def test_half_a_surrogate_pair_is_refused(tokenizer):
    for text in ("a\ud83e", "a\udfffb"):
        with pytest.raises(TinyllamaError, match="half a character at position 1"):
            tokenizer.encode(text)


def test_bytes_without_a_token_are_left_out_and_known(smollm2):
    assert len(smollm2.missing_bytes) == 21
    assert 0x04 in smollm2.missing_bytes
    assert smollm2.decode_bytes(smollm2.encode(b"a\x04b\xff")) == b"ab"


@given(data=st.binary())
def test_smollm2_gives_every_byte_back_that_it_has(smollm2, data):
    kept = bytes(byte for byte in data if byte not in smollm2.missing_bytes)
    assert smollm2.decode_bytes(smollm2.encode(kept)) == kept


# --- known ids ------------------------------------------------------------------------------------


def test_llamas_ids_are_the_known_ones(llama):
    assert llama.encode("Hello world", bos=False) == [15043, 3186]
    assert llama.encode(" Hello world", bos=False) == [29871, 15043, 3186]
    assert llama.encode("This is 🦙.cpp") == [1, 910, 338, 29871, 243, 162, 169, 156, 29889, 8223]
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.stop_ids) == (32000, 1, 2, {2})


def test_smollm2s_ids_are_the_known_ones(smollm2):
    assert smollm2.encode("Hello world") == [19556, 905]
    assert smollm2.encode("Hello world", bos=True) == [1, 19556, 905]


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
    pieces, merges = letters + [word.replace(" ", "Ġ") for word in words], []
    for word in words:
        spelled = word.replace(" ", "Ġ")
        for end in range(2, len(spelled) + 1):
            merges.append(f"{spelled[: end - 1]} {spelled[end - 1]}")
            pieces.append(spelled[:end])
    pieces = tuple(dict.fromkeys(pieces))
    merges = tuple(dict.fromkeys(merges))
    tokenizer = make_tokenizer(replace(bpe(pre), pieces=pieces, types=(1,) * len(pieces), merges=merges))
    assert [tokenizer.piece(token_id) for token_id in tokenizer.encode("It's 1812!  x")] == words


def test_llama3s_rule_takes_a_word_that_is_a_piece_as_it_is():
    vocabulary = replace(bpe("llama-bpe"), pieces=(*bpe().pieces, "xyz"), types=(*bpe().types, 1))
    assert make_tokenizer(vocabulary).encode("xyz") == [len(bpe().pieces)]
    assert len(make_tokenizer(replace(vocabulary, **words_of("gpt-2"))).encode("xyz")) == 3


# --- the same ids as the libraries ----------------------------------------------------------------

LETTERS = "a|b|the |king|x's|'S|'LL|'ſ|’t|é|e\u0301|\u0301|ß|ǅ|ªº|Å|我|能吞|の|ひ|한국어|हिन्दी|العربية|ไทย"
SIGNS = "1|1812|½|Ⅷ|²|٣|!|?!|...|_|<|>|</|<s>|</s>|<unk>|<0x41>|<br>|Ġ|Ċ|🦙|👩\u200d👧|🇫🇷|\ufffd"
SPACES = " |  |    |\n|\r|\r\n|\n\n|\t|\v|\f|\0|\x1b[2J|\x1c|\x7f|\x85|\xa0|\xad|\u200b|\u2028|\u3000|\u180e"
FRAGMENTS = [*LETTERS.split("|"), *SIGNS.split("|"), *SPACES.split("|"), *(70 * char for char in "x 1")]
NASTY = st.lists(st.sampled_from(FRAGMENTS)).map("".join)
VERY_LONG = st.tuples(st.text() | NASTY, st.integers(1, 300)).map(lambda made: (made[0] * made[1])[:20_000])
TEXTS = st.text() | NASTY | VERY_LONG


def in_every_table(text):
    """Whether all characters are old enough for the Unicode tables of all libraries."""
    return not any(unicodedata.category(char) == "Cn" for char in text)


@given(text=TEXTS)
def test_ids_are_sentencepieces(small_spm, text):
    assume("▁" not in text)  # as a character of the text's own, which SentencePiece can't tell from a space
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert small_spm.encode(text, bos=False) == original.encode(text)


def test_llamas_ids_are_sentencepieces(llama, llama_original, books):
    for text in [*books, *FRAGMENTS, "".join(FRAGMENTS), LONG]:
        ids = llama_original.encode(text)
        assert llama.encode(text, bos=False) == (ids if text else [29871])
        assert llama.decode(ids) == llama_original.decode(ids)


@given(text=TEXTS)
def test_llamas_ids_are_sentencepieces_for_any_text(llama, llama_original, text):
    assume(text and "▁" not in text)
    assert llama.encode(text, bos=False) == llama_original.encode(text)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_smollm2s_ids_are_those_of_tokenizers(smollm2, smollm2_original, books, pre):
    tokenizer = make_tokenizer(replace(smollm2.vocabulary, **words_of(pre)))
    for text in [*books, *FRAGMENTS, "".join(FRAGMENTS), LONG]:
        if "<|" not in text:
            assert tokenizer.encode(text) == smollm2_original[pre](text)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_are_those_of_tokenizers_for_any_text(smollm2, smollm2_original, pre):
    tokenizer = make_tokenizer(replace(smollm2.vocabulary, **words_of(pre)))

    @given(text=TEXTS.filter(in_every_table))
    def check(text):
        assert tokenizer.encode(text) == smollm2_original[pre](text)

    check()


@st.composite
def sentencepiece_vocabularies(draw):
    """Few letters, so that pieces lie in each other; few scores, so that they are often equal."""
    letters = draw(st.sampled_from(["ab▁", "abc▁", "a▁é", "aé🦙▁"]))
    texts = draw(
        st.lists(st.text(st.sampled_from(letters), min_size=1, max_size=5), unique=True, max_size=14)
    )
    bytes_too = BYTE_PIECES if draw(st.booleans()) else []
    pieces = ["<unk>", "<s>", "</s>", *bytes_too, *texts]
    kinds = draw(st.sampled_from([[NORMAL], [NORMAL, NORMAL, NORMAL, USER_DEFINED]]))
    types = (
        [UNKNOWN, CONTROL, CONTROL] + [BYTE] * len(bytes_too) + [draw(st.sampled_from(kinds)) for _ in texts]
    )
    scores = [0.0] * (3 + len(bytes_too)) + [-draw(st.sampled_from([0.0, 1.0, 1 + 1e-9, 2.0])) for _ in texts]
    return Vocabulary(
        "sentencepiece",
        tuple(pieces),
        tuple(scores),
        tuple(types),
        add_bos=False,
        add_space_prefix=False,
        prefixed="text",
    )


@given(vocabulary=sentencepiece_vocabularies(), texts=st.lists(st.text("ab cé🦙x"), min_size=1))
def test_any_vocabulary_gives_sentencepieces_ids(vocabulary, texts):
    tokenizer, original = make_tokenizer(vocabulary), googles(vocabulary)
    for text in texts:
        assert tokenizer.encode(text) == original.encode(text)


@st.composite
def bpe_vocabularies(draw):
    """Merges in any order, some of them twice; sometimes bytes are missing."""
    letters = [piece for piece, kind in zip(bpe().pieces, bpe().types, strict=True) if kind == NORMAL][:256]
    missing = draw(st.sampled_from([[], ["a", "Ġ", "Ã"]]))
    pieces = [letter for letter in letters if letter not in missing]
    known, merges = [letter for letter in "abĠ1Ã©ðŁ" if letter in pieces], []
    for _ in range(draw(st.integers(0, 20))):
        left, right = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        merges.append(f"{left} {right}")
        known.append(left + right)
    pieces = tuple(dict.fromkeys([*pieces, *known]))
    merges, pre = tuple(draw(st.permutations(merges))), draw(st.sampled_from(PRE_TOKENIZERS))
    return replace(bpe(pre), pieces=pieces, types=(NORMAL,) * len(pieces), merges=merges)


@given(vocabulary=bpe_vocabularies(), texts=st.lists(st.text("ab 1é🦙\n'") | NASTY, min_size=1))
def test_any_vocabulary_gives_the_ids_of_tokenizers(vocabulary, texts):
    tokenizer, original = make_tokenizer(vocabulary), hugging_faces(vocabulary)
    for text in texts:
        assert tokenizer.encode(text) == original(text)


def test_a_vocabulary_rebuilt_from_a_ggml_file_gives_the_same_ids(llama, books):
    rebuilt = make_tokenizer(ggml.rebuild_vocabulary(token_texts(llama.vocabulary)))
    for text in books:
        assert rebuilt.encode(text) == llama.encode(text)
    spaces = random.Random(1)
    for _ in range(300):
        text = "".join(spaces.choice(["x", "\n", "the", " " * spaces.randrange(1, 40)]) for _ in range(9))
        assert rebuilt.encode(text) == llama.encode(text)


@pytest.mark.long
def test_ids_are_the_libraries_for_thousands_of_texts(llama, llama_original, smollm2, smollm2_original):
    ours = {pre: make_tokenizer(replace(smollm2.vocabulary, **words_of(pre))) for pre in PRE_TOKENIZERS}

    @settings(max_examples=5_000)
    @given(text=TEXTS.filter(in_every_table).filter(lambda text: text and "▁" not in text))
    def check(text):
        assert llama.encode(text, bos=False) == llama_original.encode(text)
        for pre, tokenizer in ours.items():
            assert tokenizer.encode(text) == smollm2_original[pre](text)

    check()


@pytest.mark.long
def test_any_character_of_unicode_is_in_the_class_that_tokenizers_has_it_in(smollm2, smollm2_original):
    kinds = [unicodedata.category(chr(code)) for code in range(0x110000)]
    starts = [code for code in range(1, 0x110000) if kinds[code] != "Lo" or kinds[code - 1] != "Lo"]
    chars = [
        chr(code) for code in starts if kinds[code] not in ("Cn", "Cs", "Co")
    ]  # of a run of Lo the first
    for pre, original in smollm2_original.items():
        tokenizer = make_tokenizer(replace(smollm2.vocabulary, **words_of(pre)))
        for char in chars:
            text = f"a{char}b {char} 1{char}2{char}{char}!{char}!  {char}x '{char}l"
            assert tokenizer.encode(text) == original(text), hex(ord(char))


# --- with the libraries and without ---------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """What the libraries are asked."""
    words = []

    def recording(make):
        def recorded_make(*args):
            encode = make(*args)
            return encode and (lambda word: words.append(word) or encode(word))

        return recorded_make

    for name in ("sentencepiece", "tokenizers"):
        monkeypatch.setattr(libraries, name, recording(getattr(libraries, name)))
    return words


@pytest.mark.parametrize("make", [lambda: bpe("llama-bpe"), None])
def test_long_words_are_the_libraries_and_get_the_same_ids(make, small_spm, monkeypatch, recorded):
    vocabulary = make() if make else small_spm.vocabulary
    fast, plain = make_tokenizer(vocabulary), make_tokenizer(vocabulary)
    texts = [
        LONG,
        TEXT,
        "\n".join(LANGUAGES),
        "我能吞下" * 50,
        " " * 99,
        "é" * 65,
        *(f * 70 for f in FRAGMENTS),
    ]
    found = [fast.encode(text) for text in texts]
    assert LONG in recorded[0]
    assert len(recorded) > 40
    assert min(map(len, recorded)) > 64
    for name in ("sentencepiece", "tokenizers"):
        monkeypatch.setattr(libraries, name, lambda *_: None)
    assert [plain.encode(text) for text in texts] == found


def test_ids_are_the_same_where_the_libraries_are_not_installed(small_spm, small_bpe, monkeypatch):
    found = [tokenizer.encode(LONG) for tokenizer in (small_spm, small_bpe)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("sentencepiece", "tokenizers")]:
        monkeypatch.setitem(sys.modules, name, None)
    without = [make_tokenizer(tokenizer.vocabulary) for tokenizer in (small_spm, small_bpe)]
    assert [tokenizer.encode(LONG) for tokenizer in without] == found


class RustPanic(BaseException):
    """None of the Exceptions, as pyo3's."""


@pytest.mark.parametrize("error", [RuntimeError, RustPanic])
def test_what_a_library_fails_at_is_done_without_it(small_spm, small_bpe, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    class Fails:
        encode = tokenize = fail

    found = [tokenizer.encode(LONG) for tokenizer in (small_spm, small_bpe)]
    for made in (fail, lambda *args, **kwargs: Fails()):
        monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", made)
        monkeypatch.setattr(tokenizers.models, "BPE", made)
        without = [make_tokenizer(tokenizer.vocabulary) for tokenizer in (small_spm, small_bpe)]
        assert [tokenizer.encode(LONG) for tokenizer in without] == found


@pytest.mark.parametrize("text", ["a king " * 50_000, "abcdefghij" * 60_000, "<|im_start|>" * 50_000])
def test_a_long_text_can_be_stopped(tokenizer, text):
    class AfterAWhile:
        n_looks = 0

        def is_set(self):
            self.n_looks += 1
            return self.n_looks > 5

    with pytest.raises(Cancelled), cancellable(AfterAWhile()):
        tokenizer.encode(text)
    stopped = threading.Event()
    with cancellable(stopped):
        tokenizer.encode("a king")
        stopped.set()
        with pytest.raises(Cancelled):
            tokenizer.encode("a king")


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
    old = small_spm.encode("old", bos=False)
    assert small_spm.encode("<s>old</s>", bos=False, special=True) == [1, *old, 2]
    assert not {1, 2} & set(small_spm.encode("<s>old</s>", bos=False))
    assert small_bpe.encode("<|im_start|>old", special=True) == [1, *small_bpe.encode("old")]
    assert 1 not in small_bpe.encode("<|im_start|>old")


def test_control_tokens_stand_for_no_text(small_spm, small_bpe):
    assert small_spm.token_bytes(1) == b""
    assert small_bpe.decode([1, *small_bpe.encode("old"), 0]) == "old"
    assert small_spm.is_control(1) and not small_spm.is_control(300)
    assert (small_spm.piece(1), small_bpe.piece(1)) == ("<s>", "<|im_start|>")


def test_a_control_token_of_one_character_isnt_found_in_plain_text(small_spm):
    vocabulary = small_spm.vocabulary
    changed = replace(vocabulary, pieces=(*vocabulary.pieces, "\uf8ff"), types=(*vocabulary.types, CONTROL))
    tokenizer = make_tokenizer(replace(changed, scores=(*vocabulary.scores, 0.0)))
    for text in ("a\uf8ffb", f"{LONG}\uf8ffb"):  # the second is cut by the library
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.vocab_size - 1 not in tokenizer.encode(text)
        assert tokenizer.vocab_size - 1 in tokenizer.encode(text, special=True)


def test_bytes_without_a_piece_become_the_unknown_token_whatever_its_name():
    pieces, types = ("?", "<s>", "</s>", "▁", "a"), (2, 3, 3, 1, 1)
    vocabulary = Vocabulary("sentencepiece", pieces=pieces, scores=(0.0,) * 5, types=types)
    assert make_tokenizer(vocabulary).encode(b"a\xff", bos=False) == [3, 4, 0]


def test_user_defined_pieces_are_always_recognized_and_stand_for_their_text(small_bpe):
    assert small_bpe.encode("a<br>b") == [*small_bpe.encode("a"), 2, *small_bpe.encode("b")]
    assert small_bpe.decode([2]) == "<br>"


@given(
    pieces=st.lists(st.text("]^-\\a.*(|", min_size=1, max_size=6), unique=True, min_size=1, max_size=12),
    text=st.text("]^-\\a.*(|"),
)
def test_of_two_special_pieces_that_begin_together_the_longer_one_is_meant(pieces, text):
    marked = [f"\x01{piece}" for piece in pieces]
    spelled = "".join(f"\x01{char}" for char in text)
    vocabulary = bpe()
    special = replace(
        vocabulary, pieces=(*marked, *vocabulary.pieces), types=(CONTROL,) * len(marked) + vocabulary.types
    )
    tokenizer, found, at = make_tokenizer(special), [], 0
    while at < len(spelled):
        fitting = [piece for piece in marked if spelled.startswith(piece, at)]
        longest = max(fitting, key=len, default=spelled[at])
        found.append(marked.index(longest) if fitting else None)
        at += len(longest)
    ids = tokenizer.encode(spelled, bos=False, special=True)
    assert [token_id for token_id in ids if token_id < len(marked)] == [i for i in found if i is not None]


def test_no_merge_leads_to_a_piece_that_means_its_letters_themselves():
    vocabulary = bpe()
    merged = next(merge.replace(" ", "") for merge in vocabulary.merges if not merge.isascii())
    token_id, text = vocabulary.pieces.index(merged), merged.replace("Ġ", " ")
    assert token_id in make_tokenizer(vocabulary).encode(text)
    for kind in (USER_DEFINED, CONTROL, UNUSED):
        types = list(vocabulary.types)
        types[token_id] = kind
        tokenizer = make_tokenizer(replace(vocabulary, types=tuple(types)))
        assert token_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_all_tokens_that_end_a_text_are_known():
    assert make_tokenizer(replace(bpe(), eos_id=0, stop_ids=(1,))).stop_ids == {0, 1}
    assert make_tokenizer(replace(bpe(), eos_id=None)).stop_ids == frozenset()


def test_without_byte_pieces_an_unknown_character_becomes_unk(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(byte_fallback=False))
    tokenizer = make_tokenizer(vocabulary_from_model(tmp_path / "tokenizer.model"))
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


def test_the_texts_of_llamas_tokens_are_what_sentencepiece_decodes_them_to(llama, llama_original):
    dot = llama_original.piece_to_id(".")
    texts = llama_original.decode([[dot, token_id] for token_id in range(llama.vocab_size)])
    assert token_texts(llama.vocabulary) == [text.removeprefix(".").encode() for text in texts]


@given(data=st.data())
def test_smollm2_decodes_as_tokenizers_does(smollm2, data):
    normal = [token_id for token_id, kind in enumerate(smollm2.vocabulary.types) if kind == NORMAL]
    ids = data.draw(st.lists(st.sampled_from(normal)))
    pieces = [smollm2.vocabulary.pieces[token_id] for token_id in ids]
    assert smollm2.decode(ids) == tokenizers.decoders.ByteLevel().decode(pieces)


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

SPM = Vocabulary("sentencepiece", ("<unk>", "<s>", "a"), (0.0, 0.0, -1.0), (2, 3, 1), eos_id=None)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (Vocabulary("sentencepiece"), "a vocabulary of 0 pieces"),
        (replace(SPM, eos_id=3), "special token is number 3 of a vocabulary of 3"),
        (replace(SPM, eos_id=-1), "special token is number -1"),
        (replace(SPM, scores=(0.0,)), "3 pieces, but 1 scores"),
        (replace(SPM, scores=(0.0, 0.0, float("nan"))), "NaN or infinite"),
        (replace(SPM, scores=(0.0, 0.0, -1e60)), "NaN or infinite"),
        (replace(SPM, types=()), "3 pieces, but 0 types"),
        (replace(SPM, types=(2, 3, 9)), "types"),
        (replace(SPM, pieces=("<unk>", "a", "a")), "two tokens are the same piece, 'a'"),
        (replace(SPM, pieces=("<unk>", "<s>", "\ud800")), "surrogates not allowed"),
        (replace(SPM, types=(2, 3, 6)), "byte pieces"),
        (replace(SPM, pieces=("<unk>", "<s" * 99_999, "a")), "absurdly long"),
        (replace(bpe(), merges=(bpe().merges[0], "x nothing")), "merge 'x nothing'"),
        (replace(bpe(), merges=("t x",)), "merge 't x'"),
        (replace(bpe(), merges=("alone",)), "merge 'alone'"),
        (replace(bpe(), merges=("a b c",)), "merge 'a b c'"),
        (replace(bpe(), merges=("Ċ ©",)), "merge 'Ċ ©'"),
        (replace(bpe(), stop_ids=(400_000,)), "special token is number 400000"),
        (replace(bpe(), types=()), "but 0 types"),
        (replace(bpe(), words=("(",)), "missing \\)"),
    ],
)
def test_a_bad_vocabulary_is_refused_in_one_line(vocabulary, message, capfd):
    with pytest.raises(TinyllamaError, match=message) as error, naming("model.gguf"):
        make_tokenizer(checked(vocabulary), "model.gguf")
    assert "\n" not in str(error.value) and str(error.value).startswith("model.gguf: ")
    assert capfd.readouterr() == ("", "")


# --- tokenizer.model ------------------------------------------------------------------------------


def assert_same(vocabulary, proto):
    """A vocabulary is what protobuf's own reader of the file says."""
    assert vocabulary.pieces == tuple(piece.piece for piece in proto.pieces)
    assert vocabulary.scores == tuple(piece.score for piece in proto.pieces)
    assert vocabulary.types == tuple(piece.type for piece in proto.pieces)
    for name in ("unk_id", "bos_id", "eos_id"):
        found = getattr(proto.trainer_spec, name)
        assert getattr(vocabulary, name) == (found if found >= 0 else None)
    assert vocabulary.add_space_prefix == proto.normalizer_spec.add_dummy_prefix


def test_pieces_scores_types_and_special_ids_are_the_models(small_spm, llama, llama_file):
    for tokenizer, data in [(small_spm, sentencepiece_model()), (llama, llama_file.read_bytes())]:
        assert_same(tokenizer.vocabulary, sentencepiece_model_pb2.ModelProto.FromString(data))
    assert small_spm.vocabulary.add_bos and small_spm.vocabulary.add_space_prefix


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.tuples(st.text(), NUMBERS, st.integers(1, 5))


@given(
    ids=st.lists(st.integers(-2, 2), min_size=3, max_size=3),
    prefix=st.booleans(),
    rows=st.lists(ROWS, min_size=3, unique_by=lambda row: row[0]),
)
def test_fields_of_any_values_are_read_as_protobuf_reads_them(tmp_path_factory, ids, prefix, rows):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = ids
    proto.normalizer_spec.add_dummy_prefix = prefix
    for piece, score, kind in rows:
        proto.pieces.add(piece=piece, score=score, type=kind)
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    assert_same(vocabulary_from_model(path), proto)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n\n  <html>", "a web page"),
        (b"", "no SentencePiece model"),
        (b"\xff" * 100, "no SentencePiece model"),
        (b"GGUF\3\0\0\0", "no SentencePiece model"),
        (sentencepiece_model()[:1000], "no SentencePiece model"),
        (sentencepiece_model()[:-1], "no SentencePiece model"),
        (b"\n\0" * (1 << 22), "absurdly many pieces"),
        (bytes(1 << 26), "too large"),
        (sentencepiece_model("unigram"), "not of the BPE kind"),
        (sentencepiece_model().replace(b"<0x41>", b"<0x\xd71>"), "no SentencePiece model, or a damaged one"),
    ],
)
def test_what_is_no_tokenizer_model_is_refused_with_its_name(tmp_path, capfd, data, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TinyllamaError, match=f"{re.escape(str(path))}: .*{message}") as error:
        vocabulary_from_model(path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_tokenizer_model_and_a_folder_are_refused_with_their_names(tmp_path):
    with pytest.raises(TinyllamaError, match=r"nowhere\.model: No such file"):
        vocabulary_from_model(tmp_path / "nowhere.model")
    with pytest.raises(TinyllamaError, match=f"{re.escape(str(tmp_path))}: is a folder, not a file"):
        vocabulary_from_model(tmp_path)


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


def test_errors_in_a_tokenizer_model_name_it_and_not_the_file_beside_it(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model().replace(b"<0x41>", b"<0x42>"))
    with pytest.raises(
        TinyllamaError, match=f"{re.escape(str(path))}: two tokens are the same piece, '<0x42>'"
    ):
        make_tokenizer(vocabulary_from_model(path), "ggml-model-f16.bin")


def test_loading_prints_nothing(small_model_file, capfd):
    make_tokenizer(vocabulary_from_model(small_model_file)).encode(LONG)
    assert capfd.readouterr() == ("", "")
