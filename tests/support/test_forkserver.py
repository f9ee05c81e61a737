"""Forked services are processes like those that `python -m` starts."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest

from support.forkserver import ForkedProcess, start_module

SCRIPT = """
    import atexit, os, sys, threading, time

    sys.stderr.write(f"{__name__} {sys.argv[1:]} {os.getcwd()} {os.environ.get('MARK')}\\n")
    atexit.register(lambda: sys.stderr.write("exit function\\n"))
    threading.Thread(target=lambda: (time.sleep(0.1), sys.stderr.write("thread\\n"))).start()
    if sys.argv[1] == "wait":
        time.sleep(60)
    if sys.argv[1] == "raise":
        raise ValueError("told to")
    if sys.argv[1] == "text":
        sys.exit("goodbye")
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the script writes to; it can be started from the test's folder."""
    (tmp_path / "forked_script.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARK", "a mark")
    return tmp_path / "log"


def start(log: Path, *arguments: str) -> ForkedProcess:
    return start_module("forked_script", arguments, log)


def test_arguments_folder_environment_and_log_are_those_asked_for(log: Path) -> None:
    assert start(log, "0", "-x").wait(30) == 0
    first, *rest = log.read_text().splitlines()
    assert first == f"__main__ ['0', '-x'] {log.parent} a mark"
    assert rest == ["thread", "exit function"]


@pytest.mark.parametrize(
    ("argument", "status", "last"),
    [("3", 3, "exit function"), ("text", 1, "exit function"), ("raise", 1, "exit function")],
)
def test_exit_statuses_are_pythons(log: Path, argument: str, status: int, last: str) -> None:
    assert start(log, argument).wait(30) == status
    text = log.read_text()
    assert text.splitlines()[-1] == last
    assert ("ValueError: told to" in text) == (argument == "raise")
    assert ("goodbye" in text) == (argument == "text")


def test_a_signal_ends_it_and_is_its_status(log: Path) -> None:
    process = start(log, "wait")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM
    assert process.poll() == process.returncode == -signal.SIGTERM
    process.kill()  # It has ended: nothing is signalled.
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
