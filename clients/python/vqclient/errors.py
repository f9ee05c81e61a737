"""The errors that calls of this client raise, rebuilt from google.rpc.Status details.

VqError
├── InvalidArgumentError      a value of the request is wrong; `field` names it when known
├── NotFoundError             unknown model
├── AlreadyExistsError
├── FailedPreconditionError   the model cannot do this
├── ResourceExhaustedError    too busy (`retry_after` says how long) or too large (no `retry_after`)
├── UnavailableError          nobody answers, or the server is draining
├── DeadlineExceededError
├── CallCancelledError        cancelled by the server
├── UnauthenticatedError
├── PermissionDeniedError
├── UnimplementedError        the server is of another version
└── InternalError             anything else

Knows gRPC statuses; knows neither the services' messages nor the command line.
"""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

_DETAILS_KEY = "grpc-status-details-bin"
UNREACHABLE = "UNREACHABLE"
STREAM_BROKEN = "STREAM_BROKEN"


class VqError(Exception):
    """A call that the service refused or could not answer.

    `reason` is machine-readable (for example "CORRUPT_CODES"), `field` the path of the wrong
    request field or empty, `retry_after` the pause the server asks for in seconds or None,
    `request_id` the server's name of the call for looking it up in its logs, or empty, `service`
    "tokenizer" or "generation" where the call's status tells, or empty.
    """

    def __init__(
        self,
        message: str,
        *,
        code: StatusCode,
        reason: str = "",
        field: str = "",
        retry_after: float | None = None,
        request_id: str = "",
        service: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason or code.name
        self.field = field
        self.retry_after = retry_after
        self.request_id = request_id
        self.service = service

    def __str__(self) -> str:
        where = f" (field {self.field})" if self.field else ""
        return f"{self.reason}: {self.message}{where}"


class InvalidArgumentError(VqError):
    """A value of the request is wrong."""


class NotFoundError(VqError):
    """The model does not exist here."""


class AlreadyExistsError(VqError):
    """The thing to create exists."""


class FailedPreconditionError(VqError):
    """The request is well-formed, but the model cannot serve it."""


class ResourceExhaustedError(VqError):
    """The server is full, or the message is too large; retry only if `retry_after` is set."""


class UnavailableError(VqError):
    """Nobody answers at the address (reason UNREACHABLE), or the server is going away."""


class DeadlineExceededError(VqError):
    """No answer within the call's timeout."""


class CallCancelledError(VqError):
    """The server ended the call."""


class UnauthenticatedError(VqError):
    """Missing or wrong credentials."""


class PermissionDeniedError(VqError):
    """Valid credentials without this right."""


class UnimplementedError(VqError):
    """The server does not know the method: it speaks another version of the contract."""


class InternalError(VqError):
    """The server failed, or its answer breaks the contract."""


_CLASSES: dict[StatusCode, type[VqError]] = {
    StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    StatusCode.NOT_FOUND: NotFoundError,
    StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    StatusCode.UNAVAILABLE: UnavailableError,
    StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    StatusCode.CANCELLED: CallCancelledError,
    StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    StatusCode.UNIMPLEMENTED: UnimplementedError,
}
_CODES_BY_NUMBER: dict[int, StatusCode] = {code.value[0]: code for code in StatusCode}


def error_class(code: StatusCode) -> type[VqError]:
    """The exception class of a gRPC code; InternalError for codes without a class of their own."""
    return _CLASSES.get(code, InternalError)


def frame_error(code_number: int, reason: str, message: str) -> VqError:
    """The error of one frame of a stream, from its google.rpc.Code number."""
    code = _CODES_BY_NUMBER.get(code_number, StatusCode.UNKNOWN)
    return error_class(code)(message, code=code, reason=reason)


# What grpc.aio itself puts in place of the server's status when a write finds the call ended.
_LOST_STATUS = "Internal error from Core"


def from_rpc_error(error: grpc.aio.AioRpcError, *, service: str, address: str) -> VqError:
    """Rebuild the typed error of a failed call to `service` at `address`."""
    code = error.code()
    status = _status_of(error)
    if status is not None:
        return _from_status(code, status, service)
    if code is StatusCode.UNAVAILABLE:
        return UnavailableError(
            f"cannot reach the {service} service at {address}: {error.details() or 'no answer'}; "
            "start the service, or give the address it listens on",
            code=code,
            reason=UNREACHABLE,
            service=service,
        )
    if code is StatusCode.INTERNAL and error.details() == _LOST_STATUS:
        return UnavailableError(
            f"the {service} service at {address} ended the stream while a message was being "
            "sent, and its reason was lost; open a new stream",
            code=StatusCode.UNAVAILABLE,
            reason=STREAM_BROKEN,
            service=service,
        )
    message = error.details() or f"the {service} service at {address} gave no message"
    return error_class(code)(message, code=code, service=service)


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """The google.rpc.Status of the trailers; None when absent or not decodable."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _from_status(code: StatusCode, status: status_pb2.Status, service: str) -> VqError:
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, request = error_details_pb2.RetryInfo(), error_details_pb2.RequestInfo()
    has_retry = False
    for detail in status.details:
        has_retry |= detail.Unpack(retry)
        _ = detail.Unpack(info) or detail.Unpack(bad_request) or detail.Unpack(request)
    violations = bad_request.field_violations
    return error_class(code)(
        status.message,
        code=code,
        reason=info.reason,
        field=violations[0].field if violations else "",
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        request_id=request.request_id,
        service=service,
    )
