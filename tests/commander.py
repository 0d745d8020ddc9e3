"""Runs commands in processes that can be killed, a few milliseconds after they are asked for.

A Python that has imported everything forks for each; a new one would take half a second.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_FORK = """
import json, os, sys, traceback
import tinyllama.commands.convert, tinyllama.commands.run, tinyllama.formats.meta, tinyllama.machine.download
for line in sys.stdin:
    code, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        status = 1
        try:
            exec(code, {"__name__": "command"})
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Command:
    """A command that runs."""

    pid: int
    server: subprocess.Popen
    log: Path

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        return int(self.server.stdout.readline())

    def kill(self) -> None:
        """SIGKILL for it and for what it has started; it may have ended already."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """What stderr got, without the progress bar."""
        lines = self.log.read_text().replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line and "%|" not in line)


class Commander:
    """Forks for every command; one at a time."""

    def __init__(self, log: Path):
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, "-c", _FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, code: str) -> Command:
        """Run Python code in a process of its own, with stderr into the log."""
        self.server.stdin.write(json.dumps([code, str(self.log)]) + "\n")
        self.server.stdin.flush()
        return Command(int(self.server.stdout.readline()), self.server, self.log)

    def tinyllama(self, *arguments: object, before: str = "") -> Command:
        """The command line; `before` is code to run before it."""
        argv = ["tinyllama", *map(str, arguments)]
        run = f"import runpy, sys\nsys.argv = {argv!r}\nrunpy.run_module('tinyllama', run_name='__main__')"
        return self.start(f"{before}\n{run}")


@contextmanager
def commander(log: Path):
    """A Commander, ended at the end."""
    made = Commander(log)
    with made.server:  # which closes its pipes, so that it ends, and waits for it
        yield made


def seconds_of(command: Command) -> float:
    """How long it takes from now on; it must succeed."""
    began = time.perf_counter()
    status = command.wait()
    assert status == 0, command.said()
    return time.perf_counter() - began


KILLED = -signal.SIGKILL
