import os

import checkpoints
import pytest

from tinyllama.commands.convert import convert
from tinyllama.commands.outputs import require_new
from tinyllama.errors import TinyllamaError

REPLACES = "would replace what it is made from: name another file to write"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "f16.gguf"
    convert("small", "f16", path, "gguf")
    return path


def test_files_that_are_not_there_and_old_ones_are_new(model, tmp_path):
    (tmp_path / "old").touch()
    require_new([tmp_path / "old", None, tmp_path / "new"], [model, "small", None, "hf:no/model", "nowhere"])


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_input_is_not_replaced_under_another_name_either(model, tmp_path, link):
    (tmp_path / "text").touch()
    for path in (model, tmp_path / "text"):
        link(path, tmp_path / f"{path.name}.linked")
        for output in (path, tmp_path / f"{path.name}.linked"):
            with pytest.raises(TinyllamaError, match=f"{output}: {REPLACES}"):
                require_new([output], [model, str(tmp_path / "text")])


def test_no_file_of_a_model_in_a_folder_is_replaced(tmp_path):
    folder = checkpoints.write(tmp_path / "tiny")
    with pytest.raises(TinyllamaError, match=REPLACES):
        require_new([folder / "params.json"], [folder])


def test_two_outputs_are_two_files(tmp_path):
    with pytest.raises(TinyllamaError, match="page: is to be written twice: name another file to write"):
        require_new([tmp_path / "page", f"{tmp_path}/./page"])


def test_what_has_no_place_is_named_as_the_user_named_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TinyllamaError, match=r"^no/page: there is no folder no$"):
        require_new(["no/page"])
    for path in ("", ".", os.devnull):
        with pytest.raises(TinyllamaError, match="is a folder, a link, a pipe or a device"):
            require_new([path])
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(TinyllamaError, match=r"^page: nothing can be written to the folder \.$"):
        require_new(["page"])
