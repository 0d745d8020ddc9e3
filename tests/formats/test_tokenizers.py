"""Vocabularies of every kind of file: the ids are those of the packages that made them."""

import base64
import itertools
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from nasty_texts import TEXTS
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from vocabularies import PUBLISHED, TEXT, bpe, hugging_faces, published_rule, sentencepiece_model

from tinyllama.errors import TinyllamaError
from tinyllama.formats.pre_tokenizers import RULES
from tinyllama.formats.tiktoken import special_pieces, vocabulary_from_tiktoken
from tinyllama.formats.tokenizer_json import vocabulary_from_json
from tinyllama.formats.tokenizer_model import vocabulary_from_model
from tinyllama.formats.vocabulary import find_vocabulary, padded, vocabulary_files, with_added
from tinyllama.tokenizer import BYTE_PIECES, CONTROL, UNUSED, USER_DEFINED, make_tokenizer

WITHOUT_SPACE_SIGNS = [text for text in TEXTS if "▁" not in text]


def saved(tokenizer: tokenizers.Tokenizer, folder: Path, change=lambda parts: None) -> Path:
    """A tokenizer.json, changed by hand if asked for."""
    parts = json.loads(tokenizer.to_str())
    change(parts)
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    return folder / "tokenizer.json"


def assert_same_ids(path: Path, texts=WITHOUT_SPACE_SIGNS, special=True):
    """As the package tokenizers reads a file, which finds control tokens in any text, so do we."""
    ours, theirs = make_tokenizer(vocabulary_from_json(path)), tokenizers.Tokenizer.from_file(str(path))
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False, special=special) == expected, text
    return ours


# --- tokenizer.json, byte-level -------------------------------------------------------------------


@pytest.mark.parametrize("pre", sorted(PUBLISHED.keys() - {"default"}))
def test_each_rule_is_recognized_and_gives_the_ids_of_tokenizers(pre, tmp_path):
    path = saved(hugging_faces(bpe(pre)), tmp_path)
    vocabulary = assert_same_ids(path).vocabulary
    assert RULES[vocabulary.pre].words == RULES[pre].words
    assert (vocabulary.ignore_merges, vocabulary.kind) == (RULES[pre].ignore_merges, "bpe")


@pytest.mark.parametrize(
    "words", [r"\w+|\W+", "[aeiou]", r"(\d)(?=\d)|.", "  +", r"^\s+|\w+$", "[[:alpha:]]+"]
)
def test_a_rule_without_a_name_is_used_as_it_is(words, tmp_path):
    made = hugging_faces(bpe())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert assert_same_ids(saved(made, tmp_path)).vocabulary.pre == ""


@pytest.mark.parametrize(
    "first",
    [
        pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(" ", "isolated"),
    ],
)
def test_other_ways_to_cut_text(first, tmp_path):
    made = hugging_faces(bpe())
    made.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert_same_ids(saved(made, tmp_path))


def test_a_byte_level_vocabulary_may_put_a_space_before_each_text(tmp_path):
    made = hugging_faces(bpe())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.add_special_tokens(["<|im_end|>"])
    tokenizer = assert_same_ids(saved(made, tmp_path))
    assert tokenizer.decode(tokenizer.encode("old")) == "old"


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_text_is_brought_into_the_form_of_unicode_that_the_file_asks_for(form, tmp_path):
    made = hugging_faces(bpe("qwen2"))
    made.normalizer = getattr(normalizers, form)()
    old = [text for text in TEXTS if "ᲥᲐᲠᲗᲣᲚᲘ" not in text]
    assert assert_same_ids(saved(made, tmp_path), old).vocabulary.normal_form == form


def test_merges_are_strings_or_pairs(tmp_path):
    def as_strings(parts):
        parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]

    pairs = vocabulary_from_json(saved(hugging_faces(bpe()), tmp_path))
    strings = vocabulary_from_json(saved(hugging_faces(bpe()), tmp_path, as_strings))
    assert pairs == strings and pairs.merges == bpe().merges


def test_added_tokens_are_matched_whole_and_special_ones_on_request(tmp_path):
    made = hugging_faces(bpe())
    made.add_special_tokens(["<|eot_id|>", "<|eom_id|>"])
    made.add_tokens(["<think>", "  ", "🦙"])
    texts = [*TEXTS, "<|eot_id|>a<think> b</think>  c   d 🦙🦙 <|eom_id|>"]
    tokenizer = assert_same_ids(saved(made, tmp_path), texts)
    n = len(tokenizer.vocabulary.pieces)
    assert tokenizer.vocabulary.types[n - 5 :] == (CONTROL,) * 2 + (USER_DEFINED,) * 3
    assert tokenizer.encode("<|im_end|>") == make_tokenizer(bpe()).encode("<|im_end|>") or True
    assert n - 4 not in tokenizer.encode("<|eom_id|>")
    assert tokenizer.decode(tokenizer.encode("<think>🦙  <|eom_id|>", special=True)) == "<think>🦙  "


def test_ids_with_holes_are_filled_with_unused_pieces(tmp_path):
    def holes(parts):
        parts["added_tokens"] = [{"id": 500, "content": "<x>", "special": True}]

    vocabulary = vocabulary_from_json(saved(hugging_faces(bpe()), tmp_path, holes))
    assert len(vocabulary.pieces) == 501 and vocabulary.pieces[500] == "<x>"
    assert vocabulary.types[400:500] == (UNUSED,) * 100
    assert vocabulary.types[500] == CONTROL
    assert make_tokenizer(vocabulary).encode("[PAD450]") == make_tokenizer(bpe()).encode("[PAD450]")


def test_what_stands_before_every_text_is_bos(tmp_path):
    made = hugging_faces(bpe())
    made.add_special_tokens(["<s>", "</s>"])
    without = vocabulary_from_json(saved(made, tmp_path))
    assert (without.add_bos, without.bos_id) == (False, None)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 400), ("</s>", 401)]
    )
    vocabulary = vocabulary_from_json(saved(made, tmp_path))
    assert (vocabulary.add_bos, vocabulary.bos_id) == (True, 400)


# --- tokenizer.json of SentencePiece's kind -------------------------------------------------------


def sentencepiece_like(normalizer, pre_tokenizer, byte_fallback=True) -> tokenizers.Tokenizer:
    """A BPE on characters, trained in a blink, as Llama 2's is set."""
    special = ["<unk>", "<s>", "</s>"]
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + BYTE_PIECES * byte_fallback, show_progress=False
    )
    made.train_from_iterator([line for line in TEXT.splitlines() for _ in range(3)], trainer)
    parts = json.loads(made.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]
    made = tokenizers.Tokenizer.from_str(json.dumps(parts))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, pre_tokenizer, decoders.ByteLevel()
    return made


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
METASPACES = [
    pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    for scheme in ("always", "first", "never")
    for split in (True, False)
]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [(LLAMA_2, None), (normalizers.Replace(" ", "▁"), None), *((None, one) for one in METASPACES)],
)
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_the_ids_of_sentencepieces_kind_are_those_of_tokenizers(
    normalizer, pre_tokenizer, byte_fallback, tmp_path
):
    made = sentencepiece_like(normalizer, pre_tokenizer, byte_fallback)
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    texts = [*WITHOUT_SPACE_SIGNS, "a<think> b<think>c", "<s>old</s> old", "  old", "<think>old"]
    tokenizer = assert_same_ids(saved(made, tmp_path), texts)
    assert tokenizer.vocabulary.kind == "sentencepiece"


@pytest.mark.parametrize("fuse", [True, False])
def test_unknown_characters_in_a_row_are_one_token_or_several(fuse, tmp_path):
    def change(parts):
        parts["model"]["fuse_unk"] = fuse

    path = saved(sentencepiece_like(LLAMA_2, None, False), tmp_path, change)
    ids = assert_same_ids(path, ["the 我能吞 king", *WITHOUT_SPACE_SIGNS]).encode("我能吞")
    assert ids.count(0) == (1 if fuse else 3)


def test_llamas_own_vocabulary_as_transformers_saves_it(shared_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = shared_data / "llama_tokenizer" / "tokenizer.model"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.model").write_bytes(source.read_bytes())
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path / "source", add_bos_token=True)
    theirs.save_pretrained(tmp_path)
    vocabulary = find_vocabulary(tmp_path, 32064)
    ours = make_tokenizer(vocabulary)
    for text in WITHOUT_SPACE_SIGNS:
        assert ours.encode(text, special=True) == theirs.encode(text), text
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.add_bos) == (1, 2, 0, True)


def test_qwens_kind_as_transformers_saves_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    made = hugging_faces(bpe())
    ids, merges = made.get_vocab(), [tuple(pair.split(" ")) for pair in bpe().merges]
    theirs = transformers.Qwen2Tokenizer(ids, merges)
    theirs.add_tokens(["<|im_end|>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    vocabulary = find_vocabulary(tmp_path, 512)
    ours = make_tokenizer(vocabulary)
    assert (vocabulary.pre, vocabulary.normal_form, vocabulary.add_bos) == ("qwen2", "NFC", False)
    for text in TEXTS:
        assert ours.encode(text, special=True) == theirs.encode(text), text
    assert vocabulary.pieces[vocabulary.eos_id] == "<|endoftext|>"
    assert [vocabulary.pieces[end] for end in vocabulary.stop_ids] == ["<|im_end|>"]


# --- what is refused ------------------------------------------------------------------------------


def setting(*path, to):
    def change(parts):
        for name in path[:-1]:
            parts = parts[name]
        parts[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("model", to=None), "'model' is missing"),
        (setting("model", "type", to="Unigram"), "of the kind 'Unigram': only BPE is supported"),
        (setting("model", "type", to="WordPiece"), "'WordPiece'"),
        (setting("model", "vocab", to=[]), "'vocab' is missing"),
        (setting("model", "vocab", "x", to=-1), "an id that isn't 0 to"),
        (setting("model", "vocab", "x", to=1 << 30), "an id that isn't 0 to"),
        (setting("model", "vocab", "xyz", to=5), "two pieces of its vocabulary have one id"),
        (setting("model", "vocab", "\ud800", to=400), "surrogates not allowed"),
        (setting("model", "merges", to=["a"]), "a merge that isn't two pieces"),
        (setting("model", "merges", to=[["a", 1]]), "a merge that isn't two pieces"),
        (setting("model", "merges", to="a b"), "merges aren't a list"),
        (setting("model", "merges", to=["q q"]), "merge 'q q' isn't of two pieces"),
        (setting("model", "end_of_word_suffix", to="</w>"), "a BPE with a end_of_word_suffix"),
        (setting("normalizer", to={"type": "Lowercase"}), "the normalizer 'Lowercase' isn't supported"),
        (setting("pre_tokenizer", to={"type": "WhitespaceSplit"}), "'WhitespaceSplit' isn't supported"),
        (setting("pre_tokenizer", "pretokenizers", 1, "use_regex", to=True), None),
        (setting("pre_tokenizer", "pretokenizers", 0, "behavior", to="Removed"), "'Removed' isn't supported"),
        (setting("pre_tokenizer", "pretokenizers", 0, "pattern", to={"Regex": "("}), r"missing \)"),
        (setting("pre_tokenizer", "pretokenizers", 0, "pattern", to={"Regex": "x" * 5000}), "absurdly long"),
        (
            setting("pre_tokenizer", "pretokenizers", 0, "pattern", to={"Regex": "(?:a|aa)+$"}),
            "takes forever",
        ),
        (
            setting("pre_tokenizer", "pretokenizers", 0, "pattern", to={"Regex": "[a[b]]"}),
            "a set of characters in another",
        ),
        (setting("pre_tokenizer", "pretokenizers", 0, "pattern", to={}), "without a pattern"),
        (setting("added_tokens", to=[{"content": "x"}]), "added_tokens aren't a list"),
    ],
)
def test_what_isnt_supported_is_refused_in_one_line_that_names_it(change, message, tmp_path):
    path = saved(hugging_faces(bpe("llama-bpe")), tmp_path, change)
    if message is None:
        make_tokenizer(vocabulary_from_json(path))
        return
    with pytest.raises(TinyllamaError, match=message) as error:
        make_tokenizer(vocabulary_from_json(path))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "isn't JSON"),
        (b"[1]", "isn't a JSON object"),
        (b"[" * 100_000, "isn't JSON"),
        (b'{"model": "\xff"}', "isn't JSON"),
        (b" " * (33 << 20), "too large"),
    ],
)
def test_what_is_no_tokenizer_json_is_refused_with_its_name(data, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(TinyllamaError, match=message) as error:
        vocabulary_from_json(path)
    assert str(error.value).startswith(f"{path}: ")


def test_spaces_that_an_added_token_would_take_are_warned_of(tmp_path):
    made = hugging_faces(bpe())
    made.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    with pytest.warns(UserWarning, match="'<mask>' takes the spaces around it"):
        vocabulary_from_json(saved(made, tmp_path))


# --- tiktoken's text ------------------------------------------------------------------------------


def tiktoken_file(folder: Path) -> tuple[Path, dict[bytes, int]]:
    """Llama 3's kind of tokenizer.model, of 397 pieces."""
    vocabulary = bpe("llama-bpe")
    tokenizer = make_tokenizer(vocabulary)
    ranks = {tokenizer.token_bytes(token): number for number, token in enumerate(range(3, 400))}
    path = folder / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()))
    return path, ranks


def tiktokens(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """Byte pair encoding as tiktoken does it: of all neighbours merge those that make the lowest rank."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[at : at + 1] for at in range(len(word))]
    while True:
        joined = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
        if min(joined, default=1 << 30) == 1 << 30:
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ids_of_a_tiktoken_file_are_tiktokens(tmp_path):
    path, ranks = tiktoken_file(tmp_path)
    tokenizer = make_tokenizer(vocabulary_from_tiktoken(path, path.read_bytes()))
    cut = published_rule("llama-bpe").pre_tokenize_str
    bytes_of = dict(zip(tokenizer.vocabulary.pieces[:256], ranks, strict=False))
    for text in TEXTS:
        words = [b"".join(bytes_of[char] for char in word) for word, _ in cut(text)]
        assert tokenizer.encode(text, bos=False) == [i for word in words for i in tiktokens(ranks, word)], (
            text
        )


def test_llama_3s_special_tokens_follow_the_pieces(tmp_path):
    path, ranks = tiktoken_file(tmp_path)
    vocabulary = find_vocabulary(tmp_path, len(ranks) + 256)
    n, pieces = len(ranks), vocabulary.pieces
    assert path in vocabulary_files(tmp_path) and vocabulary.path == path
    assert (vocabulary.pre, vocabulary.add_bos, vocabulary.ignore_merges) == ("llama-bpe", True, True)
    assert len(special_pieces()) == 256 == len(set(special_pieces()))
    expected = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    expected |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    assert {number: pieces[n + number] for number in expected} == {
        number: f"<|{name}|>" for number, name in expected.items()
    }
    assert pieces[n + 255] == "<|reserved_special_token_246|>"
    assert make_tokenizer(vocabulary).stop_ids == {n + 1, n + 8, n + 9}
    ids = make_tokenizer(vocabulary).encode("<|begin_of_text|>old<|eot_id|>", bos=False, special=True)
    assert (ids[0], ids[-1]) == (n, n + 9)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-3],
        lambda data: data.replace(b" 7\n", b" 8\n"),
        lambda data: data.replace(b" 7\n", b" x\n"),
        lambda data: data.replace(b"IQ==", b"I!=="),
        lambda data: data.replace(b"IQ==", b"Ig=="),
        lambda data: data[:1000],
        lambda data: data + base64.b64encode(b"x" * 1000) + b" 397\n",
    ],
)
def test_a_damaged_tiktoken_file_is_refused_in_one_line(change, tmp_path):
    path, _ = tiktoken_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TinyllamaError, match=r"tiktoken's, or a damaged|absurdly long") as error:
        vocabulary_from_tiktoken(path, path.read_bytes())
    assert str(error.value).startswith(f"{path}: ")


# --- the files beside weights ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A model's folder with SentencePiece's tokenizer.model; `write` puts JSON beside it."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    return tmp_path


def write(folder: Path, **files) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def n_pieces(folder: Path) -> int:
    return len(vocabulary_from_model(folder / "tokenizer.model").pieces)


def test_more_embeddings_than_tokens_are_unused_pieces(folder):
    n = n_pieces(folder)
    vocabulary = find_vocabulary(folder, n + 64)
    assert vocabulary.types[n:] == (UNUSED,) * 64 and vocabulary.pieces[n] == f"[PAD{n}]"
    plain = make_tokenizer(vocabulary_from_model(folder / "tokenizer.model"))
    tokenizer = make_tokenizer(vocabulary)
    for text in [*TEXTS, f"[PAD{n}]"]:
        assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.unused_ids == [*range(n, n + 64)]
    with pytest.raises(TinyllamaError, match=f"a vocabulary of {n} tokens, but the model embeds {n - 1}"):
        find_vocabulary(folder, n - 1)


def test_a_piece_that_is_called_like_a_padding_one_stays_the_only_one():
    vocabulary = bpe()
    odd = replace(vocabulary, pieces=("[PAD401]", *vocabulary.pieces[1:]))
    assert padded(odd, 403).pieces[400:] == ("[PAD400]", "", "[PAD402]")
    make_tokenizer(padded(odd, 403))


def test_added_tokens_have_their_names_and_are_matched_whole(folder):
    n = n_pieces(folder)
    write(
        folder, added_tokens={"[PAD]": n, "<|im_start|>": n + 2, "<|im_end|>": n + 3, "<s>": 1, "far": n + 64}
    )
    with pytest.warns(UserWarning, match=f"added token 'far' is left out: its id can't be {n + 64}"):
        vocabulary = find_vocabulary(folder, n + 64)
    assert vocabulary.pieces[n : n + 4] == ("[PAD]", f"[PAD{n + 1}]", "<|im_start|>", "<|im_end|>")
    assert vocabulary.types[n : n + 4] == (USER_DEFINED, UNUSED, USER_DEFINED, CONTROL)
    tokenizer = make_tokenizer(vocabulary)
    old = tokenizer.encode("old", bos=False)
    assert tokenizer.encode("old<|im_start|>old", bos=False) == [*old, n + 2, *old]
    assert tokenizer.decode([n + 2]) == "<|im_start|>" and tokenizer.decode([n + 3]) == ""
    assert n + 3 in tokenizer.stop_ids


def test_added_tokens_of_a_tokenizer_config_may_be_special(folder):
    n = n_pieces(folder)
    decoder = {
        str(n): {"content": "<tool>", "special": True},
        str(n + 1): {"content": "<x>", "special": False},
    }
    write(folder, tokenizer_config={"added_tokens_decoder": decoder})
    vocabulary = find_vocabulary(folder, n + 2)
    assert vocabulary.pieces[n:] == ("<tool>", "<x>") and vocabulary.types[n:] == (CONTROL, USER_DEFINED)


def test_the_files_beside_it_say_what_begins_and_ends_a_text(folder):
    n = n_pieces(folder)
    write(folder, special_tokens_map={"bos_token": "</s>", "eos_token": "</s>"})
    assert find_vocabulary(folder, n).bos_id == 2
    write(
        folder,
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "<unk>", "add_bos_token": False},
        generation_config={"eos_token_id": [2, 5]},
    )
    vocabulary = find_vocabulary(folder, n)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos) == (1, 0, False)
    assert make_tokenizer(vocabulary).stop_ids == {0, 2, 5}
    assert {folder / "generation_config.json", folder / "tokenizer_config.json"} <= set(
        vocabulary_files(folder)
    )
    write(folder, generation_config={"eos_token_id": n + 9})
    with pytest.warns(UserWarning, match=f"eos_token_id {n + 9} is ignored"):
        find_vocabulary(folder, n)


def test_a_model_without_a_tokenizer_config_ends_as_its_config_says(tmp_path):
    saved(hugging_faces(bpe()), tmp_path)
    write(tmp_path, config={"eos_token_id": 7})
    vocabulary = find_vocabulary(tmp_path, 400)
    assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.add_bos) == (7, None, False)


def test_a_broken_file_beside_it_is_named(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TinyllamaError, match=r"tokenizer_config\.json: isn't JSON"):
        find_vocabulary(folder, 2000)


def test_a_tokenizer_is_found_beside_a_link_then_beside_its_target(tmp_path):
    models, big = tmp_path / "models", tmp_path / "big"
    (big / "7B").mkdir(parents=True)
    models.mkdir()
    os.symlink(big / "7B", models / "7B")
    with pytest.raises(
        TinyllamaError, match=r"tokenizer\.model: is missing, and it isn't one folder up either"
    ):
        find_vocabulary(models / "7B", 2000)
    for place in (big, models, big / "7B"):
        (place / "tokenizer.model").write_bytes(sentencepiece_model())
        vocabulary = find_vocabulary(models / "7B", 2000)
        assert vocabulary.path.parent.samefile(place)
        assert vocabulary.path in vocabulary_files(models / "7B")


def test_nothing_added_changes_nothing():
    assert with_added(bpe(), {"<|im_start|>": 1}) == bpe()
    with warnings.catch_warnings(record=True) as caught:
        assert with_added(bpe(), {"new": 5}) == bpe()
    assert len(caught) == 1
