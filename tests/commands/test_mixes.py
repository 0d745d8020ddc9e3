"""Mixes beside llama-quantize: its types and its bytes, recorded by golden/record_llama_quantize.py."""

import ctypes
import hashlib
import json
import re
from itertools import groupby
from pathlib import Path

import gguf
import mixed
import pytest
from checkpoints import refused

from tinyllama.commands import mixes
from tinyllama.commands.convert import quantize
from tinyllama.commands.mixes import MIXES, Choice, find_mix
from tinyllama.config import Config
from tinyllama.formats import open_checkpoint
from tinyllama.quant import TYPES

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llama_quantize.json").read_text())
OPTIONS = {
    "": {},
    "pure": {"pure": True},
    "output f16": {"output_type": "f16"},
    "embedding q8_0": {"embedding_type": "q8_0"},
    "pure, output q4_0, embedding q5_1": {"pure": True, "output_type": "q4_0", "embedding_type": "q5_1"},
    "importance": {"weighed": True},
}
NAMES = {
    "token_embd": "tok_embeddings.weight",
    "output": "output.weight",
    "attn_q": "layers.{}.attention.wq.weight",
    "attn_k": "layers.{}.attention.wk.weight",
    "attn_v": "layers.{}.attention.wv.weight",
    "attn_output": "layers.{}.attention.wo.weight",
    "ffn_gate": "layers.{}.feed_forward.w1.weight",
    "ffn_down": "layers.{}.feed_forward.w2.weight",
    "ffn_up": "layers.{}.feed_forward.w3.weight",
}


def chosen(choice: Choice) -> dict[str, str]:
    """The types of each kind of matrix, as the record has them."""
    config, found = choice.config, {}
    for name, meta_name in NAMES.items():
        if name == "output" and choice.tied:
            continue
        n_cols = config.hidden_dim if name == "ffn_down" else config.dim
        types = [choice.type_of(meta_name.format(i), n_cols) for i in range(config.n_layers)]
        runs = [(type, len(list(run))) for type, run in groupby(types if "{}" in meta_name else types[:1])]
        found[name] = runs[0][0] if len(runs) == 1 else ", ".join(f"{n} {type}" for type, n in runs)
    return found


@pytest.mark.parametrize("asked", GOLDEN["types"])
def test_each_tensor_gets_the_type_that_llama_quantize_gives_it(asked):
    case, _, options = asked.partition("; ")
    numbers = {"dim": 256, "n_layers": 4, "n_heads": 8, "hidden_dim": 256, "n_kv_heads": 8} | mixed.CASES[
        case
    ]
    tied = numbers.pop("tied", False)
    config = Config(vocab_size=mixed.VOCAB_SIZE, **numbers)
    for mix, record in GOLDEN["types"][asked].items():
        expected = {name: types for types, names in record.items() for name in names.split()}
        assert chosen(Choice(mix, config, tied, **OPTIONS[options])) == expected, mix


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return {
        case: Path(mixed.write(folder / f"{case}.gguf", **(mixed.CASES[case] | numbers)))
        for case, numbers in mixed.WHOLE.items()
    }


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", mixed.WHOLE)
def test_the_data_are_llama_quantizes_to_the_byte(sources, tmp_path, case, mix):
    if mix not in GOLDEN["sha256"][case]:
        refused(lambda: quantize(sources[case], tmp_path / "x", mix), "importance matrix", "Q2_K")
        return
    (path,) = quantize(sources[case], tmp_path / "out.gguf", mix)
    data = path.read_bytes()[gguf.GGUFReader(path).data_offset :]
    assert hashlib.sha256(data).hexdigest() == GOLDEN["sha256"][case][mix]
    assert open_checkpoint(path).metadata["general.file_type"] == MIXES[mix].number


@pytest.mark.filterwarnings("ignore:.* makes no use of an importance matrix")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", mixed.WHOLE)
def test_with_an_importance_matrix_the_data_are_llama_quantizes_too(sources, tmp_path, case, mix):
    source = sources[case]
    (path,) = quantize(source, tmp_path / "out.gguf", mix, imatrix=mixed.importance(source))
    data = path.read_bytes()[gguf.GGUFReader(path).data_offset :]
    assert hashlib.sha256(data).hexdigest() == GOLDEN["weighed"][case][mix]


@pytest.mark.parametrize("mix", MIXES)
def test_the_file_is_llama_quantizes_to_the_byte(sources, tmp_path, mix):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = MIXES[mix].number
    theirs, source = tmp_path / "theirs.gguf", sources["grouped"]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), ctypes.byref(params)):
        pytest.skip("llama-quantize doesn't without an importance matrix")
    (ours,) = quantize(source, tmp_path / "ours.gguf", mix)
    assert ours.read_bytes() == theirs.read_bytes()


def test_numbers_and_aliases_are_llama_quantizes():
    kinds = gguf.LlamaFileType
    for name, mix in MIXES.items():
        theirs = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert kinds[theirs] == mix.number
        assert find_mix(mix.number) == find_mix(str(mix.number)) == find_mix(name.lower()) == name
    assert [find_mix(alias) for alias in ("q3_k", "Q4_K", "q5_K")] == ["Q3_K_M", "Q4_K_M", "Q5_K_M"]
    refused(lambda: find_mix("q9_k"), "Q4_K_M", "q9_k")


def test_its_table_of_blocks_agrees_with_the_types():
    assert set(mixes.TYPES) == {name for name, kind in TYPES.items() if kind.gguf_id is not None}
    assert all(mixes.block(name) == TYPES[name].block for name in mixes.TYPES)


def test_it_says_which_tensor_became_what(sources, tmp_path, capsys):
    quantize(sources["rows of 288 and 512"], tmp_path / "out.gguf", "Q4_K_M", output_tensor_type="f16")
    said = capsys.readouterr().err
    assert re.search(r"q5_0 +\d tensors +\d+ kB  attention\.wk, attention\.wo", said)
    assert re.search(r"f16 +1 tensor +\d+ kB  tok_embeddings", said)
    assert "q5_0 stands in for q4_k" in said and "rows of 288 weights" in said
    assert re.search(r"\d+\.\d\d bits per weight", said)


def test_rows_that_no_block_fits_stay_f16_and_a_line_says_so(sources, tmp_path, capsys):
    (path,) = quantize(sources["rows of 172"], tmp_path / "out.gguf", "Q4_0")
    types = {name: tensor.type for name, tensor in open_checkpoint(path).tensors.items()}
    assert (
        types["layers.0.attention.wq.weight"] == "f16" and types["layers.0.feed_forward.w2.weight"] == "q4_0"
    )
    assert "f16 stands in for q4_0" in capsys.readouterr().err
