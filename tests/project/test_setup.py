"""What a wheel holds, and that an installed package finds the model it ships."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ["params.json", "consolidated.00.pth", "tokenizer.model"]


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, in which files that must not ship lie about."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ["pyproject.toml", "setup.py", "README.md", "LICENSE"]:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    for name in ["tinyllama", "ext", "data", "tests"]:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "models", "*.so")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    strays = [
        "data/models/big.gguf",
        "data/notes.txt",
        "data/small/held_out.txt",
        "data/small/ggml-model-f16.bin",
    ]
    for stray in strays:
        (source / stray).parent.mkdir(exist_ok=True)
        (source / stray).write_text("must not ship")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_the_code_and_the_small_model_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "widgets/*.js", "widgets/*.css", "widgets/*.txt", "serve/page.*", "commands/*.html")
    paths = [path for kind in kinds for path in (ROOT / "tinyllama").rglob(kind)]
    code = {path.relative_to(ROOT).as_posix() for path in paths}
    extensions = {name for name in held if name.endswith(".so")}
    assert held - extensions == code | {f"tinyllama/data/small/{name}" for name in SHIPPED}


def test_a_wheel_carries_the_licence_and_the_console_script(wheel):
    archive = zipfile.ZipFile(wheel)
    (licence,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    (scripts,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "tinyllama = tinyllama.commands:main" in archive.read(scripts).decode()


def test_an_installed_package_finds_its_small_model_and_keeps_downloads_in_the_cache(
    wheel, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from tinyllama.machine import download as d; "
    code += "print(d.small_folder()); print(d.models_folder())"
    small, models = run(sys.executable, "-I", "-c", code, cwd=tmp_path).splitlines()
    assert Path(small) == site / "tinyllama" / "data" / "small"
    assert (Path(small) / "params.json").read_bytes() == (
        ROOT / "data" / "small" / "params.json"
    ).read_bytes()
    assert Path(models) == tmp_path / "cache" / "tinyllama" / "models"


def test_an_editable_install_leads_to_the_checkout(tmp_path):
    code = "import tinyllama; from tinyllama.machine.download import small_folder as small; "
    code += "print(tinyllama.__file__, small())"
    package, small = run(sys.executable, "-I", "-c", code, cwd=tmp_path).split()
    assert Path(package) == ROOT / "tinyllama" / "__init__.py"
    assert Path(small) == ROOT / "data" / "small"
