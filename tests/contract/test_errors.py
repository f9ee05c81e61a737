"""Every reason that a client can see means one gRPC code and one HTTP status, everywhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import defaultdict

import grpc

import vqserve
from vqserve.common.errors import ServiceError, all_error_types


def error_types() -> list[type[ServiceError]]:
    """The error classes of both services, once all modules that can hold one are imported."""
    for module in pkgutil.walk_packages(vqserve.__path__, "vqserve."):
        if module.name.endswith((".errors", ".admin")):
            importlib.import_module(module.name)
    return [kind for kind in all_error_types() if kind.__module__.startswith("vqserve.")]


def test_a_reason_has_one_code_and_one_status() -> None:
    answers: dict[str, set[tuple[grpc.StatusCode, int]]] = defaultdict(set)
    for error_type in error_types():
        answers[error_type.reason].add((error_type.grpc_code, error_type.http_status))
    assert {reason: given for reason, given in answers.items() if len(given) > 1} == {}
    assert {"CORRUPT_CODES", "UNKNOWN_MODEL", "QUEUE_FULL", "DRAINING"} <= set(answers)


def test_reasons_are_written_as_google_rpc_wants_them() -> None:
    pattern = re.compile(r"[A-Z][A-Z0-9_]{0,61}[A-Z0-9]")
    wrong = [kind.reason for kind in error_types() if not pattern.fullmatch(kind.reason)]
    assert wrong == []


def test_client_mistakes_are_never_server_errors() -> None:
    mistakes = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    statuses = {kind.http_status for kind in error_types() if kind.grpc_code in mistakes}
    assert statuses <= set(range(400, 500))
