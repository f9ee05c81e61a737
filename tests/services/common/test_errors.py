"""One error table for both protocols."""

from __future__ import annotations

import importlib
import json
import pkgutil

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

import vqserve
from vqserve.common.errors import (
    HTTP_STATUS,
    InvalidArgument,
    MethodNotAllowed,
    PayloadTooLarge,
    ResourceExhausted,
    ServiceError,
    all_error_types,
    to_http,
    to_status,
)


def error_types() -> list[type[ServiceError]]:
    """Every error class of every service, once all their modules are imported."""
    for module in pkgutil.walk_packages(vqserve.__path__, "vqserve."):
        if module.name.endswith((".errors", ".admin")):
            importlib.import_module(module.name)
    return sorted(set(all_error_types()), key=lambda error_type: error_type.__qualname__)


@pytest.mark.parametrize("error_type", error_types(), ids=lambda error_type: error_type.__name__)
def test_status_follows_from_the_code(error_type: type[ServiceError]) -> None:
    exceptions = {PayloadTooLarge: 413, MethodNotAllowed: 405}
    expected = HTTP_STATUS[error_type.grpc_code]
    for special, status in exceptions.items():
        if issubclass(error_type, special):
            expected = status
    assert error_type.http_status == expected


@pytest.mark.parametrize("error_type", error_types(), ids=lambda error_type: error_type.__name__)
def test_both_forms_carry_the_same_facts(error_type: type[ServiceError]) -> None:
    error = error_type("what and why", field="image", retry_after_seconds=1.2)
    status = to_status(error, "id-1")
    response = to_http(error, "id-1")
    body = json.loads(bytes(response.body))["error"]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert code_pb2.Code.Name(status.code) == body["code"]
    assert (info.reason, info.domain) == (body["reason"], "vqstack")
    assert status.message == body["message"] == "what and why"
    assert body["field"] == "image"
    assert body["request_id"] == "id-1"
    assert response.headers["retry-after"] == "2"
    assert response.status_code == error_type.http_status


def test_every_grpc_code_has_a_status() -> None:
    assert set(HTTP_STATUS) == set(grpc.StatusCode)


def test_details_say_field_request_and_delay() -> None:
    status = to_status(ResourceExhausted("full", retry_after_seconds=0.25), "r")
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.RequestInfo", "google.rpc.RetryInfo"]
    retry = error_details_pb2.RetryInfo()
    status.details[2].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250

    status = to_status(InvalidArgument("bad", field="top_k"), "r")
    violation = error_details_pb2.BadRequest()
    status.details[2].Unpack(violation)
    assert violation.field_violations[0].field == "top_k"


def test_a_wrong_method_says_which_are_right() -> None:
    response = to_http(MethodNotAllowed("no", metadata={"allow": "GET"}), "r")
    assert response.headers["allow"] == "GET"


def test_a_new_kind_of_error_needs_only_its_reason() -> None:
    class TooBlue(InvalidArgument):
        reason = "TOO_BLUE"

    assert (TooBlue.grpc_code, TooBlue.http_status) == (grpc.StatusCode.INVALID_ARGUMENT, 400)
