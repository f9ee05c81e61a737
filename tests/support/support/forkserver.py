"""Starts service processes by forking one process that has imported torch and gRPC already.

Importing them takes seconds of processor time, and a test run starts dozens of services. A forked
child is a process like any other (its own pid, ports, log, signals and exit status), set up as
`python -m MODULE ARGUMENTS` would be. Forking is safe because the server does nothing but import:
it refuses to serve once it has a second thread.

The first test process that needs the server starts it; all test processes of a run share it. It
ends when the run's folder goes away, or the process that the folder was made for.

    python -m support.forkserver SOCKET OWNER_PID
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import json
import os
import runpy
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from support import isa

FOLDER_VARIABLE = "VQSTACK_FORKSERVER"
PRELOADED = ("vqserve.tokenizer.app", "vqserve.generation.app")
START_SECONDS = 120
POLL_SECONDS = 0.02
OWNER_CHECK_SECONDS = 0.5
MAX_REQUEST_BYTES = 1 << 20


class ForkserverFailed(RuntimeError):
    """The server did not start, or ended before the processes that it forked."""


class ForkedProcess:
    """A process that the server forked for us, with what we use of subprocess.Popen."""

    def __init__(self, connection: socket.socket, pid: int, args: list[str]) -> None:
        self._connection = connection
        self.pid = pid
        self.args = args
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal; TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            self.returncode = self._read_status(timeout)
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal the process unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _read_status(self, timeout: float | None) -> int:
        self._connection.settimeout(max(timeout, 0.001) if timeout is not None else None)
        try:
            return _read_number(self._connection)
        except TimeoutError:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0) from None


def new_run() -> Path:
    """The folder of a new test run of this process, which its first service makes; the run is over
    when the folder is removed."""
    name = f"vqstack-tests-{os.getpid()}-{secrets.token_hex(8)}"
    folder = Path(tempfile.gettempdir()) / name
    os.environ[FOLDER_VARIABLE] = str(folder)
    return folder


def start_module(module: str, arguments: Sequence[str], log: Path) -> ForkedProcess:
    """`python -m module arguments`, with this process's environment and folder; stderr to `log`."""
    connection = _connect(Path(os.environ[FOLDER_VARIABLE]))
    request = {
        "module": module,
        "arguments": list(arguments),
        "log": str(log.resolve()),
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
    }
    connection.sendall(json.dumps(request).encode() + b"\n")
    connection.settimeout(START_SECONDS)
    return ForkedProcess(connection, _read_number(connection), [module, *arguments])


def _read_number(connection: socket.socket) -> int:
    """One line of the server's; it sends a pid, then an exit status, and each in one piece."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ForkserverFailed("the fork server ended; its log is beside its socket")
        line += byte
    return int(line)


def _connect(folder: Path) -> socket.socket:
    """A connection to this run's server, which is started if need be."""
    path = folder / "socket"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _start_server(path)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def _start_server(path: Path) -> None:
    log = path.with_name("forkserver.log")
    owner = path.parent.name.split("-")[2]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), owner],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=sink,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ForkserverFailed(f"exit status {process.poll()}; {log.read_text()[-3000:]}")
        time.sleep(POLL_SECONDS)
    # It outlives this test process and is nobody's to wait for; it watches the owner instead.
    process.returncode = 0


@dataclass(frozen=True)
class _Child:
    """What a forked process has to become."""

    module: str
    arguments: list[str]
    log: str
    folder: str
    environment: dict[str, str]

    def become(self) -> NoReturn:
        """Run the module as `python -m` would, and end with the status that Python would.

        Threads are joined and exit functions run; only the tearing down of modules is left out,
        which takes a second of processor time once torch is among them.
        """
        status = 1
        try:
            self._run()
            status = 0
        except SystemExit as error:
            status = _exit_status(error.code)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(status)

    def _run(self) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        os.chdir(self.folder)
        # `python -m` looks in the folder that it starts in; this was the server's.
        sys.path[0] = self.folder
        os.environ.clear()
        os.environ.update(self.environment)
        sys.argv = [self.module, *self.arguments]
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


def _exit_status(code: object) -> int:
    """What the interpreter makes of SystemExit's code."""
    if code is None or isinstance(code, int):
        return code or 0
    sys.stderr.write(f"{code}\n")
    return 1


class _Server:
    """Accepts requests, forks, and reports how the children ended."""

    def __init__(self, path: Path, owner: int) -> None:
        self._path = path
        self._owner = owner
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        temporary = path.with_suffix(".new")
        self._listener.bind(str(temporary))
        self._listener.listen()
        self._wakeup = socket.socketpair()
        for end in self._wakeup:
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup[1].fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ)
        temporary.rename(path)

    def serve(self) -> _Child | None:
        """Serve until the owner is gone, then None; in a forked child, what it has to become."""
        while self._is_owned():
            for key, _ in self._selector.select(OWNER_CHECK_SECONDS):
                if key.fileobj is self._listener:
                    child = self._accept()
                    if child is not None:
                        return child
                elif key.fileobj is self._wakeup[0]:
                    self._wakeup[0].recv(4096)
                else:
                    self._abandoned(key.data)
            self._reap()
        for pid in list(self._children):
            self._abandoned(pid)
        return None

    def _is_owned(self) -> bool:
        if not self._path.exists():
            return False
        try:
            os.kill(self._owner, 0)
        except ProcessLookupError:
            return False
        return True

    def _accept(self) -> _Child | None:
        connection, _ = self._listener.accept()
        connection.settimeout(START_SECONDS)
        request = json.loads(connection.makefile("rb").readline(MAX_REQUEST_BYTES))
        threads = os.listdir("/proc/self/task")
        if len(threads) > 1:
            raise ForkserverFailed(f"an import started threads; forking is unsafe: {threads}")
        pid = os.fork()
        if pid == 0:
            self._leave(connection)
            return _Child(**request)
        connection.sendall(b"%d\n" % pid)
        self._children[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, data=pid)
        return None

    def _leave(self, connection: socket.socket) -> None:
        """In the child: drop everything that belongs to the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for other in (connection, self._listener, *self._wakeup, *self._children.values()):
            other.close()

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._answer(pid, os.waitstatus_to_exitcode(status))

    def _answer(self, pid: int, code: int) -> None:
        connection = self._children.pop(pid, None)
        if connection is not None:
            self._selector.unregister(connection)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(b"%d\n" % code)
            connection.close()

    def _abandoned(self, pid: int) -> None:
        """The test process that wanted the child is gone."""
        connection = self._children.pop(pid)
        self._selector.unregister(connection)
        connection.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main(path: str, owner: str) -> None:
    """Import what is slow, then serve; a forked child leaves as its module ends."""
    for module in PRELOADED:
        importlib.import_module(module)
    isa.apply()  # the forked services run on the tier that the tests run on
    child = _Server(Path(path), int(owner)).serve()
    if child is not None:
        child.become()


if __name__ == "__main__":
    main(*sys.argv[1:])
