import os
import random
import re
import struct
from dataclasses import replace

import families
import gguf as oracle
import numpy as np
import pytest
from vocabularies import bpe, sentencepiece_model

from tinyllama.config import Config, tensor_names
from tinyllama.errors import TinyllamaError
from tinyllama.formats import gguf, headers, open_checkpoint, stamp
from tinyllama.formats.tokenizer_model import vocabulary_from_model
from tinyllama.formats.vocabulary import ARRAYS
from tinyllama.quant import TYPES
from tinyllama.tensor import Tensor
from tinyllama.tokenizer import Vocabulary, make_tokenizer

ONES = np.ones((64, 64), np.float32)
STORED = {
    "q4_0": "Q4_0",
    "q4_1": "Q4_1",
    "q5_0": "Q5_0",
    "q5_1": "Q5_1",
    "q8_0": "Q8_0",
    "f16": "F16",
    "bf16": "BF16",
}


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return path


@pytest.fixture(scope="session")
def spm(model_file):
    return vocabulary_from_model(model_file)


def config_for(vocabulary: Vocabulary, dim: int = 64, hidden_dim: int = 96) -> Config:
    return Config(
        dim, 2, 4, len(vocabulary.pieces), hidden_dim, 2, norm_eps=2.0**-17, rope_theta=5e5, max_seq_len=512
    )


def weights(config: Config) -> dict[str, np.ndarray]:
    """By GGUF's names."""
    rng, shapes = np.random.default_rng(7), config.tensor_shapes()
    return {
        gguf_name: rng.normal(size=shapes[name]).astype(np.float32)
        for name, gguf_name, _ in tensor_names(config.n_layers)
    }


KEYS = {
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 2.0**-17,
    "llama.rope.freq_base": 5e5,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def write_with_oracle(path, vocabulary, tensors, keys=None, architecture="llama"):
    """A GGUF file by the gguf package. A key or a tensor that is None is left out."""
    writer = oracle.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (KEYS | (keys or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add[type(value)](key, value)
    if vocabulary.pieces:
        writer.add_token_list(list(vocabulary.pieces))
        writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write(tmp_path, spm):
    """Write a small model with some things otherwise, by the gguf package."""

    def write(keys=None, tensors=None, vocabulary=spm, **options):
        tensors = weights(config_for(vocabulary)) | (tensors or {})
        return write_with_oracle(tmp_path / "model.gguf", vocabulary, tensors, keys, **options)

    return write


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
def test_what_the_gguf_package_writes_reads_the_same(tmp_path, spm, kind):
    config, stored = config_for(spm), oracle.GGMLQuantizationType[STORED[kind]]
    plain = weights(config)
    blocks = {name: oracle.quants.quantize(x, stored) if x.ndim == 2 else x for name, x in plain.items()}
    tensors = {name: (x, stored) if x.ndim == 2 else x for name, x in blocks.items()}
    checkpoint = gguf.read(write_with_oracle(tmp_path / "model.gguf", spm, tensors))
    assert checkpoint.config == config
    assert checkpoint.tensors.keys() == config.tensor_shapes().keys()
    for name, gguf_name, _ in tensor_names(config.n_layers):
        tensor, is_norm = checkpoint.tensors[name], plain[gguf_name].ndim == 1
        assert (tensor.name, tensor.shape) == (name, plain[gguf_name].shape)
        assert tensor.type == ("f32" if is_norm else kind)
        expected = blocks[gguf_name] if is_norm else oracle.quants.dequantize(blocks[gguf_name], stored)
        np.testing.assert_array_equal(tensor.dequantize(), expected)


def test_q6_k_reads_as_the_gguf_package_reads_it(tmp_path, spm):
    config = config_for(spm, dim=256, hidden_dim=512)
    tensors = weights(config)
    blocks = np.random.default_rng(3).integers(0, 60, (config.vocab_size, 210), np.uint8)
    tensors["output.weight"] = blocks, oracle.GGMLQuantizationType.Q6_K
    keys = {"llama.embedding_length": 256, "llama.feed_forward_length": 512, "llama.rope.dimension_count": 64}
    tensor = gguf.read(write_with_oracle(tmp_path / "model.gguf", spm, tensors, keys)).tensors[
        "output.weight"
    ]
    assert tensor.type == "q6_k"
    expected = oracle.quants.dequantize(blocks, oracle.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(tensor.dequantize(), expected)


def test_weights_stay_in_the_file(write):
    checkpoint = gguf.read(write())
    (piece,) = checkpoint.tensors["output.weight"].pieces
    assert piece.data is checkpoint.files[0]
    assert not piece.blocks().flags.owndata and not piece.blocks().flags.writeable


def test_a_gguf_file_is_recognized_whatever_its_name(write, tmp_path):
    path = write().rename(tmp_path / "model.bin")
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format, checkpoint.path) == ("gguf", path)
    assert [file.path for file in checkpoint.files] == [path]


def test_a_sentencepiece_vocabulary_is_read_whole(write, spm):
    vocabulary = gguf.read(write()).vocabulary
    assert vocabulary == replace(spm, prefixed="part")
    assert make_tokenizer(vocabulary).decode(make_tokenizer(vocabulary).encode("a king")) == "a king"


def test_a_bpe_vocabulary_is_read_whole(write):
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.unknown_token_id": None,
        "tokenizer.ggml.eot_token_id": 1,
    }
    vocabulary = gguf.read(write(keys, vocabulary=bpe("smollm"))).vocabulary
    assert (vocabulary.pieces, vocabulary.types, vocabulary.merges) == (
        bpe().pieces,
        bpe().types,
        bpe().merges,
    )
    assert (vocabulary.kind, vocabulary.pre, vocabulary.add_bos) == ("bpe", "smollm", False)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.stop_ids) == (
        0,
        0,
        None,
        (1,),
    )


def test_keys_of_the_tokenizer_decide_over_its_defaults(write):
    keys = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    vocabulary = gguf.read(write(keys)).vocabulary
    assert not vocabulary.add_bos and not vocabulary.add_space_prefix


def test_llama3_puts_bos_first_unless_a_key_says_otherwise(write):
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}
    assert gguf.read(write(keys, vocabulary=bpe())).vocabulary.add_bos


def test_tied_embeddings_are_just_not_there(write):
    assert "output.weight" not in gguf.read(write(tensors={"output.weight": None})).tensors


def test_the_rope_factors_of_llama3_are_kept(write):
    factors = np.arange(1, 9, dtype=np.float32)
    tensors = gguf.read(write(tensors={"rope_freqs.weight": factors})).tensors
    np.testing.assert_array_equal(tensors["rope_freqs.weight"].dequantize(), factors)


def test_axes_of_length_1_around_a_tensor_and_copies_of_frequencies_do_not_matter(write, spm):
    plain, ones = weights(config_for(spm)), np.ones(8, np.float32)
    odd = {"output_norm.weight": plain["output_norm.weight"][None, None]}
    odd |= {"blk.0.attn_q.weight": plain["blk.0.attn_q.weight"][None], "blk.1.attn_rot_embd.weight": ones}
    checkpoint = gguf.read(write(tensors=odd))
    assert checkpoint.tensors.keys() == checkpoint.config.tensor_shapes().keys()
    norm = checkpoint.tensors["norm.weight"]
    np.testing.assert_array_equal(norm.dequantize(), plain["output_norm.weight"])


def test_missing_optional_keys_have_the_defaults_of_the_format(write):
    keys = {
        "llama.attention.head_count_kv": None,
        "llama.rope.freq_base": None,
        "llama.rope.dimension_count": None,
    }
    tensors = {f"blk.{layer}.attn_{name}.weight": ONES for layer in range(2) for name in ("k", "v")}
    read = gguf.read(write(keys, tensors)).config
    assert (read.n_kv_heads, read.rope_theta) == (4, 10000.0)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.block_count": None}, "key llama.block_count is missing"),
        ({"llama.block_count": 3}, "9 tensors are missing, blk.2.attn_k.weight among them"),
        ({"llama.block_count": 4_000_000_000}, "n_layers is 4000000000: more than 2048"),
        ({"llama.block_count": "two"}, "llama.block_count must be a positive whole number, not 'two'"),
        ({"llama.block_count": 2.5}, "llama.block_count must be a positive whole number, not 2.5"),
        ({"llama.embedding_length": 0}, "llama.embedding_length must be a positive whole number, not 0"),
        ({"llama.embedding_length": 63}, "doesn't divide into 4 heads"),
        ({"llama.attention.head_count": [4, 2]}, "must be a positive whole number, not an array of 2"),
        ({"llama.attention.head_count_kv": 3}, "can't share 3 key/value heads"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon must be a positive number"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base must be a positive number"),
        ({"llama.rope.dimension_count": 8}, "dimension_count is 8, but head_dim is 16"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope', which isn't supp"),
        ({"llama.rope.scaling.factor": -2.0}, "scaling.factor must be a positive number, not -2.0"),
        ({"llama.attention.value_length": 8}, "value_length is 8, but head_dim is 16"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8: a mixture of experts"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5: this changes what a model computes"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5: this changes what a model computes"),
        ({"split.count": 2}, "one of 2 parts of a model: the names of all must end in -00001-of-00002.gguf"),
        ({"split.count": "two"}, "one of 'two' parts of a model"),
        ({"general.alignment": 48}, "alignment is 48, not a power of two"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer of the kind 'bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer of the kind ''"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id must be a whole number, not"),
        ({"tokenizer.ggml.merges": "none"}, "tokenizer.ggml.merges isn't an array"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges isn't an array"),
        ({"nested": [[1], [2]]}, "the key nested has values of type 9"),
    ],
)
def test_a_wrong_key_is_refused_with_its_name(write, keys, message):
    assert_refused(write(keys), message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, "1 tensors are missing, blk.1.ffn_up.weight among them"),
        ({"blk.1.ffn_up.weight": ONES}, r"ffn_up.weight is \[64, 64\], it should be \[96, 64\]"),
        ({"blk.1.attn_q.bias": ONES[0]}, "the tensor blk.1.attn_q.bias is none of a LLaMA's"),
        ({"token_embd.weight": np.ones((399, 64), np.float32)}, r"token_embd.weight is \[399, 64\]"),
        ({"rope_freqs.weight": ONES[0]}, r"rope_freqs.weight is \[64\], it should be \[8\]"),
        ({"output_norm.weight": ONES[0].astype(np.int32)}, "output_norm.weight is of type number 26"),
    ],
)
def test_a_wrong_tensor_is_refused_with_its_name(write, tensors, message):
    assert_refused(write(tensors=tensors), message)


def test_a_quantized_norm_is_refused(write):
    norm = (
        oracle.quants.quantize(ONES[:1], oracle.GGMLQuantizationType.Q8_0)[0],
        oracle.GGMLQuantizationType.Q8_0,
    )
    assert_refused(
        write(tensors={"output_norm.weight": norm}), r"output_norm.weight is \[64\], which can't be of type"
    )


def test_another_architecture_is_refused_with_its_name(write):
    assert_refused(write(architecture="gemma"), "architecture 'gemma'")


def test_a_model_without_a_vocabulary_is_refused(write, spm):
    path = write()
    data = path.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz")
    path.write_bytes(data)
    assert_refused(path, "no vocabulary")


def replaced(data: bytes, at: int, code: str, value) -> bytes:
    patch = struct.pack("<" + code, value)
    return data[:at] + patch + data[at + len(patch) :]


def at_key(data: bytes, key: bytes) -> int:
    """Where the type of a key's value is."""
    return data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"<!DOCTYPE html>", "not a GGUF file"),
        (lambda data: b"GGUF", "the version at offset 0 takes 8 bytes, but the file ends at 4: truncated"),
        (lambda data: replaced(data, 16, "Q", 40), "truncated or damaged"),
        (lambda data: replaced(data, 8, "Q", 22), "tensor has 0 axes"),
        (lambda data: replaced(data, 4, "I", 1), "version 1 of GGUF isn't supported"),
        (lambda data: replaced(data, 4, "I", 4), "version 4 of GGUF isn't supported"),
        (lambda data: data[:4] + data[4:8][::-1] + data[8:], "big-endian"),
        (lambda data: data[:100], "in a file of 100 bytes"),
        (lambda data: data[:5000], "truncated or damaged"),
        (lambda data: data[:-1000], "truncated or damaged: the tensor .* at offset"),
        (lambda data: data + bytes(100), "100 bytes too many after the last tensor"),
        (
            lambda data: replaced(data, 8, "Q", 2**63),
            "9223372036854775808 tensors and .* can't be in a file of",
        ),
        (lambda data: replaced(data, 16, "Q", 2**63), "9223372036854775808 key-values can't be in a file of"),
        (
            lambda data: replaced(data, 24, "Q", 2**64 - 1),
            "key 0 of .*, string 0 at offset 24 takes 18446744073709551623 bytes",
        ),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_c\xffunt"), "can't decode byte 0xff"),
        (
            lambda data: data.replace(b"tokenizer.ggml.eos", b"tokenizer.ggml.bos"),
            "bos_token_id is there twice",
        ),
        (
            lambda data: data.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"),
            "tensor blk.0.ffn_up.weight is there twice",
        ),
        (
            lambda data: replaced(data, at_key(data, b"llama.block_count"), "I", 13),
            "block_count has values of type 13",
        ),
        (
            lambda data: replaced(data, at_key(data, b"tokenizer.ggml.tokens") + 8, "Q", 2**62),
            "tokenizer.ggml.tokens",
        ),
        (
            lambda data: replaced(data, at_key(data, b"tokenizer.ggml.scores") + 8, "Q", 2**62),
            "tokenizer.ggml.scores",
        ),
        (
            lambda data: replaced(data, at_key(data, b"output_norm.weight"), "I", 9),
            "output_norm.weight has 9 axes",
        ),
        (
            lambda data: replaced(data, at_key(data, b"output_norm.weight") + 4, "Q", 2**40),
            r"is \[1099511627776\]",
        ),
        (
            lambda data: replaced(data, at_key(data, b"output_norm.weight") + 12, "I", 18),
            "of type iq3_xxs, which isn't supported: it would need tables of patterns",
        ),
        (lambda data: replaced(data, at_key(data, b"output_norm.weight") + 12, "I", 99), "of type number 99"),
        (
            lambda data: replaced(data, at_key(data, b"output_norm.weight") + 16, "Q", 2**63),
            "damaged: the tensor .* should begin at",
        ),
        (
            lambda data: replaced(data, at_key(data, b"output_norm.weight") + 16, "Q", 8),
            "should begin at",
        ),
        (
            lambda data: replaced(data, at_key(data, b"output_norm.weight") + 16, "Q", 32),
            "should begin at",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(write, damage, message):
    path = write()
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(path, message)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    assert_refused(tmp_path / "nowhere.gguf", "No such file")


def test_whatever_is_damaged_a_file_is_read_or_refused_in_one_line(write):
    path = write()
    data, chance = path.read_bytes(), random.Random(11)
    start = data.index(b"output_norm.weight") + 100
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(start)] = chance.choice([0, 1, 9, 255, chance.randrange(256)])
        path.write_bytes(damaged[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            gguf.read(path)
        except TinyllamaError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def assert_refused(path, message):
    with pytest.raises(TinyllamaError, match=message) as error:
        gguf.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


# --- writing --------------------------------------------------------------------------------------


def write_ours(path, config, vocabulary, tensors: list[Tensor], metadata=None, file_type="q4_0"):
    infos = [(tensor.name, tensor.type, tensor.shape) for tensor in tensors]
    head, offsets, size = headers.gguf_header(
        config, vocabulary, infos, TYPES[file_type].file_type, "tiny", metadata
    )
    with open(path, "wb") as file:
        file.write(head)
        for tensor, offset in zip(tensors, offsets, strict=True):
            file.seek(offset)
            file.write(tensor.pieces[0].blocks().tobytes())
        file.truncate(size)
    return path


def quantized(config: Config, kind: str) -> list[Tensor]:
    meta_names = {gguf_name: name for name, gguf_name, _ in tensor_names(config.n_layers)}
    return [
        Tensor.from_array(meta_names[name], x, kind if x.ndim == 2 else "f32")
        for name, x in weights(config).items()
    ]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_the_gguf_package_reads_what_we_write(tmp_path, spm, kind):
    config = config_for(spm, dim=72 if kind in ("f32", "f16", "bf16") else 64)
    tensors = quantized(config, kind)
    reader = oracle.GGUFReader(write_ours(tmp_path / "model.gguf", config, spm, tensors, file_type=kind))
    gguf_names = {name: gguf_name for name, gguf_name, _ in tensor_names(config.n_layers)}
    assert [tensor.name for tensor in reader.tensors] == [gguf_names[tensor.name] for tensor in tensors]
    for theirs, ours in zip(reader.tensors, tensors, strict=True):
        assert theirs.data_offset % 32 == 0
        assert theirs.tensor_type == TYPES[ours.type].gguf_id
        assert tuple(reversed(theirs.shape.tolist())) == ours.shape
        assert theirs.data.tobytes() == ours.pieces[0].blocks().tobytes()
        decoded = oracle.quants.dequantize(theirs.data, theirs.tensor_type).reshape(ours.shape)
        np.testing.assert_array_equal(decoded, ours.dequantize())


def test_the_gguf_package_reads_the_keys_that_we_write(tmp_path, spm):
    config = config_for(spm)
    reader = oracle.GGUFReader(write_ours(tmp_path / "model.gguf", config, spm, quantized(config, "f16")))
    kinds = {key: field.types[-1].name for key, field in reader.fields.items()}
    values = {key: field.contents() for key, field in reader.fields.items()}
    for key, value in KEYS.items():
        assert values[key] == value
        assert kinds[key] == {int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
    assert values["general.architecture"] == "llama"
    assert (values["general.name"], values["general.file_type"]) == ("tiny", 2)
    assert values["general.quantization_version"] == 2
    assert values["llama.vocab_size"] == 400
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert tuple(values["tokenizer.ggml.tokens"]) == spm.pieces
    assert tuple(values["tokenizer.ggml.scores"]) == spm.scores
    assert tuple(values["tokenizer.ggml.token_type"]) == spm.types
    assert kinds["tokenizer.ggml.scores"] == "FLOAT32"
    assert kinds["tokenizer.ggml.token_type"] == "INT32"


def test_we_read_what_we_write(tmp_path, spm):
    config = config_for(spm, dim=72)
    tensors = quantized(config, "f16")
    checkpoint = gguf.read(write_ours(tmp_path / "model.gguf", config, spm, tensors))
    assert (checkpoint.config, checkpoint.vocabulary) == (config, replace(spm, prefixed="part"))
    for tensor in tensors:
        np.testing.assert_array_equal(checkpoint.tensors[tensor.name].dequantize(), tensor.dequantize())


def test_a_bpe_vocabulary_survives_writing_and_reading(tmp_path):
    vocabulary = replace(bpe("llama-bpe"), stop_ids=(1,))
    config = config_for(vocabulary)
    checkpoint = gguf.read(write_ours(tmp_path / "model.gguf", config, vocabulary, quantized(config, "f16")))
    assert checkpoint.vocabulary == replace(vocabulary, prefixed="part")


def test_every_key_and_its_type_survives_reading_and_writing(tmp_path, spm):
    config, path = config_for(spm), tmp_path / "first.gguf"
    writer = oracle.GGUFWriter(path, "llama")
    for key, value in KEYS.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    kinds = ["UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64"]
    for kind in kinds:
        writer.add_key_value(f"test.{kind}", 100, oracle.GGUFValueType[kind])
        writer.add_key_value(
            f"test.array.{kind}", [1, 2, 3], oracle.GGUFValueType.ARRAY, oracle.GGUFValueType[kind]
        )
    writer.add_float64("test.double", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_array("test.bools", [True, False])
    writer.add_array("test.floats", [0.1, -1e30])
    writer.add_array("test.strings", ["", "é🦙", "a b"])
    writer.add_file_type(1)
    writer.add_chat_template("{{ messages }}")
    writer.add_token_list(list(spm.pieces))
    writer.add_token_types(list(spm.types))
    writer.add_token_scores(list(spm.scores))
    writer.add_custom_alignment(64)
    for name, x in weights(config).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = gguf.read(path)
    second = write_ours(
        tmp_path / "second.gguf", config, read.vocabulary, quantized(config, "q4_0"), read.metadata
    )
    before, after = oracle.GGUFReader(path).fields, oracle.GGUFReader(second).fields
    assert after.keys() - before.keys() == {"general.quantization_version"}
    assert not before.keys() - after.keys()
    for key in before.keys() - {"general.file_type", "GGUF.kv_count"}:
        assert after[key].types == before[key].types
        assert after[key].contents() == before[key].contents()
    assert after["general.file_type"].contents() == 2
    assert gguf.read(path).metadata == read.metadata
    assert "general.quantization_version" not in read.metadata
    assert all(tensor.data_offset % 64 == 0 for tensor in oracle.GGUFReader(second).tensors)


# --- a real one -----------------------------------------------------------------------------------


def test_smollm2_reads_as_the_gguf_package_reads_it(smollm2_file):
    checkpoint, reader = gguf.read(smollm2_file), oracle.GGUFReader(smollm2_file)
    assert checkpoint.config == Config(
        576, 30, 9, 49152, 1536, 3, norm_eps=np.float32(1e-5).item(), rope_theta=1e5, max_seq_len=8192
    )
    vocabulary = checkpoint.vocabulary
    assert (vocabulary.kind, vocabulary.pre, vocabulary.add_bos) == ("bpe", "smollm", False)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.stop_ids) == (1, 2, 0, (0,))
    arrays = {key: list(getattr(vocabulary, field)) for key, (field, _) in ARRAYS.items()}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert (checkpoint.metadata | arrays)[key] == field.contents()
    assert len(checkpoint.tensors) == len(reader.tensors) == 272
    gguf_names = {name: gguf_name for name, gguf_name, _ in tensor_names(30)}
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in checkpoint.tensors.items():
        assert TYPES[tensor.type].gguf_id == theirs[gguf_names[name]].tensor_type
        assert tensor.pieces[0].blocks().tobytes() == theirs[gguf_names[name]].data.tobytes()


def test_smollm2s_header_survives_reading_and_writing(smollm2_file, tmp_path):
    read = gguf.read(smollm2_file)
    infos = [(tensor.name, tensor.type, tensor.shape) for tensor in read.tensors.values()]
    head, offsets, size = headers.gguf_header(read.config, read.vocabulary, infos, 3, "", read.metadata)
    assert (len(head), offsets[0], size) == (offsets[0], offsets[0], smollm2_file.stat().st_size)
    with open(tmp_path / "copy.gguf", "wb") as file:
        file.write(head)
        file.truncate(size)
    copy = gguf.read(tmp_path / "copy.gguf")
    assert copy.vocabulary == read.vocabulary
    assert (copy.metadata, copy.metadata.types) == (read.metadata, read.metadata.types)


# --- split models ---------------------------------------------------------------------------------


def split_model(folder, n_tensors=9):
    """The parts of a model, and the same in one file."""
    families.write_gguf("qwen3", folder / "whole.gguf")
    families.write_gguf("qwen3", folder / "parts" / "model.gguf", split=n_tensors)
    return sorted((folder / "parts").iterdir()), folder / "whole.gguf"


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "parts").mkdir()
    return split_model(tmp_path)[0]


def test_a_split_model_is_whole_whichever_part_is_opened(tmp_path):
    (tmp_path / "parts").mkdir()
    parts, path = split_model(tmp_path)
    whole = gguf.read(path)
    assert [part.name for part in parts] == [f"model-{i:05}-of-00004.gguf" for i in range(1, 5)]
    for part in parts:
        checkpoint = open_checkpoint(part)
        assert (checkpoint.config, checkpoint.vocabulary) == (whole.config, whole.vocabulary)
        assert [file.path for file in checkpoint.files] == parts and checkpoint.path == parts[0]
        assert checkpoint.tensors.keys() == whole.tensors.keys()
        for name, tensor in whole.tensors.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].dequantize(), tensor.dequantize())


def test_a_split_model_is_loaded_anew_when_any_part_changes(parts):
    before = stamp(parts[1])
    os.utime(parts[2], ns=(1, 1))
    assert stamp(parts[1]) != before


def test_parts_behind_links_are_found_beside_the_links(parts, tmp_path):
    for number, part in enumerate(parts):
        (tmp_path / part.name).symlink_to(part.rename(part.with_name(f"blob-{number}")))
    path = tmp_path / parts[2].name
    assert len(open_checkpoint(path).files) == 4 and len(stamp(path)) == 5


def test_a_missing_part_is_named(parts):
    parts[2].unlink()
    assert_refused(parts[0], f"one of 4 parts of a model, and {re.escape(str(parts[2]))} is missing")
    assert_refused(parts[3], f"{re.escape(str(parts[2]))} is missing")
    parts[0].unlink()
    assert_refused(parts[1], re.escape(f"{parts[0]}, {parts[2]} is missing"))


def test_parts_under_other_names_are_refused(parts):
    renamed = parts[0].rename(parts[0].with_name("first.gguf"))
    assert_refused(renamed, "one of 4 parts of a model: the names of all must end in -00001-of-00002.gguf")


def test_parts_that_are_swapped_or_cut_short_are_refused_with_their_names(parts):
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[2].write_bytes(second)
    assert_refused(parts[0], f"{parts[2].name} says it's another part")
    parts[2].write_bytes(third[:-5000])
    assert_refused(parts[0], "truncated or damaged: the tensor .* at offset")
    parts[2].write_bytes(third[:20])
    assert_refused(parts[0], rf"{parts[2].name}: .*20")
