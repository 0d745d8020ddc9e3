"""A JupyterLab of its own, a server of a model, and a browser that opens their pages."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKEN = "only-for-tests"
SECONDS = 60


class Lab:
    """A JupyterLab server on a free port, which knows nothing of the user's settings.

    Attributes:
        url: where it listens.
        folder: what it serves.
    """

    def __init__(self, home: Path, folder: Path, theme: str = "JupyterLab Light"):
        self.folder, self._home, self._log = folder, home, home / "server.log"
        for path, content in SETTINGS.items():
            _write(home / path, content)
        _write(home / THEME, {"theme": theme})
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += [f"--ServerApp.port={_free_port()}", f"--IdentityProvider.token={TOKEN}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=_environment(home), stdout=log, stderr=subprocess.STDOUT
            )
        self.url = self._wait()

    def _wait(self) -> str:
        """Its address, which it leaves in a file; the port may be another one than it was told."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            time.sleep(0.1)
            try:
                (file,) = (self._home / "runtime").glob("jpserver-*.json")
                url = json.loads(file.read_text())["url"].rstrip("/")
                with urllib.request.urlopen(f"{url}/api?token={TOKEN}"):
                    return url
            except (ValueError, OSError):  # not there yet, or not whole
                continue
        self.close()
        raise RuntimeError(f"JupyterLab doesn't start:\n{self.log()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def address(self, notebook: str) -> str:
        return f"{self.url}/doc/tree/{notebook}?token={TOKEN}&reset"

    def call(self, path: str, method: str = "GET"):
        """Ask its interface, /api."""
        request = urllib.request.Request(f"{self.url}/api/{path}?token={TOKEN}", method=method)
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read() or "null")

    def wait_for_kernel(self, notebook: str) -> None:
        """A notebook that is run before its kernel is there asks which one it is to take."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            kernels = {session["path"]: session["kernel"] for session in self.call("sessions")}
            if notebook in kernels and kernels[notebook]["execution_state"] == "idle":
                return
            time.sleep(0.1)
        raise RuntimeError(f"no kernel for {notebook}:\n{self.log()}")

    def shut_down_kernels(self) -> None:
        for session in self.call("sessions"):
            self.call(f"sessions/{session['id']}", "DELETE")

    def close(self) -> None:
        """Ask it to shut down, kernels included."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


#: Files below its home: no question about news, and no saving behind the test's back.
SETTINGS = {
    "config/labconfig/page_config.json": {
        "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}
    },
    "user-settings/@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
}
THEME = "user-settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _environment(home: Path) -> dict:
    """The variables of this process, with every place where Jupyter looks for settings below `home`."""
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    places |= {"IPYTHONDIR": "ipython", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "HOME": "home"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": "user-settings", "MPLCONFIGDIR": "matplotlib"}
    for place in places.values():
        (home / place).mkdir(parents=True, exist_ok=True)
    paths = {name: str(home / place) for name, place in places.items()}
    source = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return os.environ | paths | source


@contextmanager
def served(log: Path, *options: str):
    """`tinyllama serve`: its address and its process, and at the end none."""
    command = [sys.executable, "-m", "tinyllama", "serve", "--port", "0", *options]
    source = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=os.environ | source)
    try:
        while not (found := re.search(r"listens on (http\S+)", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"the server doesn't start:\n{log.read_text()}")
            time.sleep(0.05)
        yield found[1], process
    finally:
        process.kill()
        process.wait()


@contextmanager
def browser():
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


def run_all_cells(lab: Lab, page, notebook: str, awaited: str) -> None:
    """Run an open notebook until something with this selector is shown."""
    lab.wait_for_kernel(notebook)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(awaited).first.wait_for(timeout=SECONDS * 1000)
