"""A service as a real process, and what a failed call told its client."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from support.forkserver import ForkedProcess, start_module
from vqserve.common.errors import STATUS_DETAILS_KEY
from vqserve.common.lifecycle import Ports

POLL_SECONDS = 0.02


class ServiceDidNotStart(RuntimeError):
    """The process ended or did not become ready; carries the end of its log."""


@dataclass(frozen=True)
class ServiceProcess:
    """A running service: its process, its ports and the file that its log goes to."""

    process: ForkedProcess
    ports: Ports
    log: Path

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC listener."""
        return f"{self.ports.host}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP listener."""
        return f"http://{self.ports.host}:{self.ports.http}"

    def events(self) -> list[dict[str, Any]]:
        """The log so far, one dictionary per complete line."""
        complete, _, _ = self.log.read_text().rpartition("\n")
        return [json.loads(line) for line in complete.splitlines()]

    def wait_for_event(self, timeout_seconds: float = 10, **fields: Any) -> dict[str, Any]:
        """The first logged event with these fields: a line may be written after its answer.

        Raises:
            TimeoutError: none came in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            for event in self.events():
                if fields.items() <= event.items():
                    return event
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"no event with {fields} in {self.log}")


@contextmanager
def service_process(
    module: str, args: Sequence[str], folder: Path, *, timeout_seconds: float = 60
) -> Iterator[ServiceProcess]:
    """`python -m module` on free ports, ready to serve; stopped on the way out.

    The process is forked from one that has torch imported. `folder` receives ports.json and
    service.log.
    """
    ports_file, log = folder / "ports.json", folder / "service.log"
    ports_file.unlink(missing_ok=True)
    listeners = ["--grpc-port", "0", "--http-port", "0", "--ports-file", str(ports_file)]
    process = start_module(module, [*listeners, *args], log)
    try:
        ports = _wait_for_ports(process, ports_file, log, timeout_seconds)
        yield ServiceProcess(process, ports, log)
    finally:
        _stop(process)


def _wait_for_ports(
    process: ForkedProcess, ports_file: Path, log: Path, timeout_seconds: float
) -> Ports:
    deadline = time.monotonic() + timeout_seconds
    while not ports_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServiceDidNotStart(
                f"exit status {process.poll()}; log ends with:\n{log.read_text()[-3000:]}"
            )
        time.sleep(POLL_SECONDS)
    return Ports(**json.loads(ports_file.read_text()))


def _stop(process: ForkedProcess) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Failure:
    """What a failed call told its client, the same for both protocols."""

    code: str
    reason: str
    message: str
    field: str = ""
    retry_after_seconds: float = 0.0
    request_id: str = ""


def grpc_failure(error: grpc.aio.AioRpcError) -> Failure:
    """Read the status details of a failed RPC."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            status.ParseFromString(value)
    info = _detail(status, error_details_pb2.ErrorInfo())
    bad_request = _detail(status, error_details_pb2.BadRequest())
    retry = _detail(status, error_details_pb2.RetryInfo())
    request = _detail(status, error_details_pb2.RequestInfo())
    violations = list(bad_request.field_violations)
    return Failure(
        code=error.code().name,
        reason=info.reason,
        message=error.details() or "",
        field=violations[0].field if violations else "",
        retry_after_seconds=retry.retry_delay.ToNanoseconds() / 1e9,
        request_id=request.request_id,
    )


def _detail(status: Any, message: Any) -> Any:
    for packed in status.details:
        if packed.Unpack(message):
            return message
    return message


def http_failure(body: Mapping[str, Any], headers: Mapping[str, str]) -> Failure:
    """Read the JSON body of a failed HTTP request."""
    error = body["error"]
    return Failure(
        code=error["code"],
        reason=error["reason"],
        message=error["message"],
        field=error.get("field", ""),
        retry_after_seconds=float(headers.get("retry-after", 0)),
        request_id=error["request_id"],
    )
