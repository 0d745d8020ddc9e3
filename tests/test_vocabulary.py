import pytest
import sentencepiece
from vocabularies import sentencepiece_model

from tinyllama.errors import TinyllamaError
from tinyllama.formats import ggml
from tinyllama.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, vocabulary_from_model


def test_pieces_scores_types_and_special_ids_are_the_models(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    vocabulary = vocabulary_from_model(tmp_path / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert len(vocabulary.pieces) == model.vocab_size()
    for token_id, piece in enumerate(vocabulary.pieces):
        assert piece == model.id_to_piece(token_id)
        assert vocabulary.scores[token_id] == model.get_score(token_id)
    assert vocabulary.types == (UNKNOWN, CONTROL, CONTROL) + (BYTE,) * 256 + (NORMAL,) * (
        model.vocab_size() - 259
    )
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id) == (0, 1, 2)
    assert vocabulary.add_bos and vocabulary.add_space_prefix


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n\n  <html>", "a web page"),
        (b"", "no SentencePiece model"),
        (b"\xff" * 100, "no SentencePiece model"),
        (b"GGUF\3\0\0\0", "no SentencePiece model"),
        (sentencepiece_model()[:1000], "no SentencePiece model"),
        (sentencepiece_model("unigram"), "of the unigram kind"),
    ],
)
def test_what_is_no_tokenizer_model_is_refused_with_its_name(tmp_path, capfd, data, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TinyllamaError, match=message) as error:
        vocabulary_from_model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_pieces_that_are_no_text_are_refused_with_their_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model().replace(b"<0x41>", b"<0x\xd71>"))
    for read in (vocabulary_from_model, ggml.token_texts):
        with pytest.raises(TinyllamaError, match=str(path)):
            read(path)


def test_a_missing_tokenizer_model_is_refused_with_its_name(tmp_path):
    with pytest.raises(TinyllamaError, match=r"nowhere\.model: No such file"):
        vocabulary_from_model(tmp_path / "nowhere.model")
