"""The two services as child processes: started, awaited, and drained by SIGTERM."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 40.0


@dataclass(frozen=True)
class Service:
    """A running service.

    Attributes:
        name: Short name for messages.
        process: The child process.
        grpc_address: host:port of the gRPC listener.
        http_address: host:port of the HTTP listener.
        log: File that holds the service's log lines.
    """

    name: str
    process: subprocess.Popen[bytes]
    grpc_address: str
    http_address: str
    log: Path


@contextlib.contextmanager
def running(name: str, arguments: list[str], folder: Path) -> Iterator[Service]:
    """Start `python -m ARGUMENTS`, wait until it is ready, stop it at the end.

    Raises:
        DemoError: The service ended or did not become ready; the message quotes its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ports_file = folder / f"{name}.ports.json"
    ports_file.unlink(missing_ok=True)
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", *arguments, "--ports-file", str(ports_file)]
    with log.open("wb") as log_file:
        process = subprocess.Popen(command, stderr=log_file, stdout=log_file)
        try:
            yield _await_ready(name, process, ports_file, log)
        finally:
            _stop(process)


def _await_ready(
    name: str, process: subprocess.Popen[bytes], ports_file: Path, log: Path
) -> Service:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"{name} ended with exit code {process.returncode}: {_tail(log)}")
        service = _read_ports(name, process, ports_file, log)
        if service is not None and is_ready(service.http_address):
            return service
        time.sleep(0.1)
    raise DemoError(f"{name} was not ready after {START_TIMEOUT_SECONDS:.0f} s: {_tail(log)}")


def _read_ports(
    name: str, process: subprocess.Popen[bytes], ports_file: Path, log: Path
) -> Service | None:
    if not ports_file.is_file():
        return None
    ports = json.loads(ports_file.read_text())
    return Service(
        name=name,
        process=process,
        grpc_address=f"127.0.0.1:{ports['grpc']}",
        http_address=f"127.0.0.1:{ports['http']}",
        log=log,
    )


def is_ready(http_address: str) -> bool:
    """Whether the service at this address says that it can serve."""
    try:
        with urllib.request.urlopen(f"http://{http_address}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no log lines"
