"""The demonstration's services in the background: started, found again, and stopped.

They outlive the demonstration for a while, so that its metrics can be looked at, and then stop by
themselves. `make stop` stops them at once.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError
from demo.processes import STOP_TIMEOUT_SECONDS, is_ready
from demo.serve import SERVICES_FILE

START_TIMEOUT_SECONDS = 240.0
DEFAULT_PORTS = (50051, 50052, 8080, 8081)


@dataclass(frozen=True)
class Addresses:
    """host:port of a running service's two listeners."""

    grpc: str
    http: str


@dataclass(frozen=True)
class Background:
    """Both services, and the process that watches over them."""

    pid: int
    tokenizer: Addresses
    llm: Addresses


def start(output: Path, cache: Path, bits: int, seconds: float) -> Background:
    """Start both services for `seconds`, in place of earlier ones; at default ports if free."""
    stop(output)
    output.mkdir(parents=True, exist_ok=True)
    ports = [] if _default_ports_are_free() else ["--port", "0"]
    folders = ["--output", str(output), "--cache", str(cache)]
    options = ["--bits", str(bits), "--seconds", str(seconds), *folders, *ports]
    command = [sys.executable, "-m", "demo.serve", *options]
    with (output / "serve.log").open("wb") as log:
        watcher = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and watcher.poll() is None:
        if (found := find(output)) is not None:
            return found
        time.sleep(0.1)
    watcher.terminate()
    raise DemoError(f"the services did not start: {(output / 'serve.log').read_text()[-500:]}")


def find(output: Path) -> Background | None:
    """The services that an earlier run left up, if they answer."""
    try:
        content = json.loads((output / SERVICES_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    found = Background(
        pid=content["pid"],
        tokenizer=Addresses(**content["tokenizerd"]),
        llm=Addresses(**content["llmd"]),
    )
    answers = is_ready(found.tokenizer.http) and is_ready(found.llm.http)
    return found if answers else None


def stop(output: Path) -> bool:
    """Drain and stop what `find` finds; whether there was anything."""
    found = find(output)
    if found is None:
        return False
    os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * STOP_TIMEOUT_SECONDS
    while (output / SERVICES_FILE).exists():
        if time.monotonic() > deadline:
            raise DemoError(f"the services did not stop; end the process {found.pid} by hand")
        time.sleep(0.1)
    return True


def _default_ports_are_free() -> bool:
    return all(_is_free(port) for port in DEFAULT_PORTS)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def main() -> int:
    """`make stop`."""
    parser = argparse.ArgumentParser(prog="demo.background", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder of the demo")
    stopped = stop(parser.parse_args().output)
    print("stopped both services" if stopped else "no services of the demonstration are up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
