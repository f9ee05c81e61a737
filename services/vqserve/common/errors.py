"""The one error hierarchy of the services' boundary, and its two wire forms.

    ServiceError
     ├─ InvalidArgument      INVALID_ARGUMENT     400
     ├─ NotFound             NOT_FOUND            404
     │   └─ NoSuchRoute                                (HTTP only)
     ├─ AlreadyExists        ALREADY_EXISTS       409
     ├─ FailedPrecondition   FAILED_PRECONDITION  400
     ├─ ResourceExhausted    RESOURCE_EXHAUSTED   429
     │   ├─ TooManyRequests
     │   └─ PayloadTooLarge  RESOURCE_EXHAUSTED   413
     ├─ Cancelled            CANCELLED            499
     ├─ DeadlineExceeded     DEADLINE_EXCEEDED    504
     ├─ Unavailable          UNAVAILABLE          503
     │   ├─ NotReady, Draining
     ├─ MethodNotAllowed     UNIMPLEMENTED        405  (HTTP only)
     └─ Internal             INTERNAL             500

A service adds subclasses that set `reason`; code and status follow from the parent.
This module knows no engine: each service's `convert.translate` turns engine errors into these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from starlette.responses import JSONResponse

DOMAIN = "vqstack"
STATUS_DETAILS_KEY = "grpc-status-details-bin"

# google.rpc.Code's own mapping; every HTTP status of the services comes from here.
HTTP_STATUS: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
}


class ServiceError(Exception):
    """A failure that a client is told about.

    Class attributes say what kind it is, the instance what happened: `message` names the
    value and the remedy, `field` the request field at fault, `retry_after_seconds` when a
    retry may succeed, `metadata` machine-readable facts (google.rpc.ErrorInfo.metadata).
    """

    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = HTTP_STATUS[grpc.StatusCode.INTERNAL]
    reason: ClassVar[str] = "INTERNAL"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "grpc_code" in cls.__dict__ and "http_status" not in cls.__dict__:
            cls.http_status = HTTP_STATUS[cls.grpc_code]

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata: dict[str, str] = dict(metadata or {})

    @property
    def code_number(self) -> int:
        """google.rpc.Code number, for example 3 for INVALID_ARGUMENT."""
        return int(self.grpc_code.value[0])


class InvalidArgument(ServiceError):
    """The request is wrong whatever the state of the server."""

    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"


class MalformedRequest(InvalidArgument):
    """Bytes that are not the message they should be, or a field of the wrong type."""

    reason = "MALFORMED_REQUEST"


class NotFound(ServiceError):
    """The request names something that is not here."""

    grpc_code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class AlreadyExists(ServiceError):
    """The name is taken."""

    grpc_code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class FailedPrecondition(ServiceError):
    """The request is sound, but not for what the server holds."""

    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class ResourceExhausted(ServiceError):
    """The server is full; carries when to retry."""

    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class TooManyRequests(ResourceExhausted):
    """More requests are open than the server has room for, whatever they want."""

    reason = "TOO_MANY_REQUESTS"


class PayloadTooLarge(ResourceExhausted):
    """A request above the byte limit; gRPC itself answers RESOURCE_EXHAUSTED to these."""

    http_status = 413
    reason = "PAYLOAD_TOO_LARGE"


class Cancelled(ServiceError):
    """The client went away or cancelled."""

    grpc_code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class DeadlineExceeded(ServiceError):
    """The client's deadline passed before the answer was ready."""

    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class Unavailable(ServiceError):
    """The server cannot serve now; another replica may."""

    grpc_code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class NotReady(Unavailable):
    """Models are still loading."""

    reason = "NOT_READY"


class Draining(Unavailable):
    """The server is shutting down and takes no new requests."""

    reason = "DRAINING"


class NoSuchRoute(NotFound):
    """HTTP path that nothing answers; gRPC reports unknown methods as UNIMPLEMENTED itself."""

    reason = "NO_SUCH_ROUTE"


class MethodNotAllowed(ServiceError):
    """HTTP method that the path does not take; `metadata["allow"]` lists those it does."""

    grpc_code = grpc.StatusCode.UNIMPLEMENTED
    http_status = 405
    reason = "METHOD_NOT_ALLOWED"


class Internal(ServiceError):
    """Our fault; details go to the log, never to the client."""

    grpc_code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


def all_error_types() -> Iterator[type[ServiceError]]:
    """Every defined error class; tests walk them, services add theirs by subclassing."""
    pending = list(ServiceError.__subclasses__())
    while pending:
        error_type = pending.pop()
        yield error_type
        pending.extend(error_type.__subclasses__())


def to_status(error: ServiceError, request_id: str) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, RequestInfo and, where they apply, BadRequest and
    RetryInfo."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata)
        ),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_seconds * 1000))
        details.append(retry)
    status = status_pb2.Status(code=error.code_number, message=error.message)
    status.details.extend(_packed(detail) for detail in details)
    return status


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def to_http(error: ServiceError, request_id: str) -> JSONResponse:
    """The same error as a JSON body, with Retry-After (whole seconds, rounded up)."""
    body: dict[str, Any] = {
        "code": error.grpc_code.name,
        "reason": error.reason,
        "message": error.message,
        "request_id": request_id,
    }
    if error.field is not None:
        body["field"] = error.field
    if error.metadata:
        body["metadata"] = error.metadata
    return JSONResponse({"error": body}, status_code=error.http_status, headers=http_headers(error))


def http_headers(error: ServiceError) -> dict[str, str]:
    """Headers that belong to an error whatever the shape of its body: Retry-After, Allow."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, MethodNotAllowed) and "allow" in error.metadata:
        headers["allow"] = error.metadata["allow"]
    return headers
