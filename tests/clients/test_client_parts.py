"""The client's parts that need no server: options, addresses, retries, exported names."""

from __future__ import annotations

import grpc
import pytest
from grpc import StatusCode

import vqclient
from vqclient import (
    ClientOptions,
    Frame,
    ResourceExhaustedError,
    RetryPolicy,
    StreamOptions,
    TlsOptions,
    TokenizerClient,
    UnavailableError,
    VqError,
)
from vqclient.channel import is_loopback, split_address
from vqclient.errors import error_class, frame_error, from_rpc_error


def unavailable(retry_after: float | None = None) -> VqError:
    return UnavailableError("down", code=StatusCode.UNAVAILABLE, retry_after=retry_after)


def test_every_exported_name_exists_and_none_is_missing() -> None:
    public = {name for name, value in vars(vqclient).items() if isinstance(value, type)}
    assert public <= set(vqclient.__all__)
    assert all(hasattr(vqclient, name) for name in vqclient.__all__)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("localhost:1", ("localhost", 1)),
        ("[::1]:50051", ("::1", 50051)),
        ("tokenizer.svc:443", ("tokenizer.svc", 443)),
    ],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "host", "host:", "host:0", "host:70000", "http://h:1"])
def test_bad_addresses_are_named(address: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        TokenizerClient(address)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a.b", False)],
)
def test_loopback_is_told_without_resolving_names(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_timeout_must_be_positive(timeout: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        ClientOptions(timeout=timeout)


def test_key_is_never_sent_in_plain_text_to_another_machine() -> None:
    with pytest.raises(ValueError, match="refusing to send an API key"):
        TokenizerClient("tokenizer.example:50051", ClientOptions(api_key="secret"))
    assert "secret" not in repr(ClientOptions(api_key="secret"))


def test_mutual_tls_needs_key_and_certificate() -> None:
    with pytest.raises(ValueError, match="both private_key and certificate_chain"):
        TlsOptions(private_key=b"pem")


@pytest.mark.parametrize(
    "values",
    [{"max_attempts": 0}, {"initial_backoff": 9.0, "max_backoff": 1.0}, {"jitter": 1.0}],
)
def test_senseless_retry_policies_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(**values)  # type: ignore[arg-type]


def test_pauses_grow_and_are_bounded() -> None:
    policy = RetryPolicy(max_attempts=10, initial_backoff=1.0, max_backoff=3.0, jitter=0.0)
    assert [policy.pause_after(attempt, unavailable()) for attempt in (1, 2, 3, 10)] == [
        1.0,
        2.0,
        3.0,
        None,
    ]


def test_the_servers_pause_is_a_lower_bound() -> None:
    policy = RetryPolicy(initial_backoff=0.1, jitter=0.0)
    assert policy.pause_after(1, unavailable(retry_after=2.5)) == 2.5


def test_exhaustion_without_a_pause_is_final() -> None:
    error = ResourceExhaustedError("too large", code=StatusCode.RESOURCE_EXHAUSTED)
    assert RetryPolicy().pause_after(1, error) is None


@pytest.mark.parametrize("code", [code for code in StatusCode if code is not StatusCode.OK])
def test_every_code_has_an_error_class(code: StatusCode) -> None:
    error = error_class(code)("message", code=code)
    assert error.reason == code.name


def test_unknown_code_number_of_a_frame_is_still_an_error() -> None:
    error = frame_error(99, "NEW_REASON", "from the future")
    assert (error.code, error.reason) == (StatusCode.UNKNOWN, "NEW_REASON")


def test_undecodable_details_leave_code_and_message() -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    raw = grpc.aio.AioRpcError(StatusCode.INTERNAL, trailing_metadata=metadata, details="broken")
    error = from_rpc_error(raw, service="tokenizer", address="127.0.0.1:1")
    assert str(error) == "INTERNAL: broken"


def test_a_status_that_grpc_lost_in_a_write_says_to_open_a_new_stream() -> None:
    raw = grpc.aio.AioRpcError(
        StatusCode.INTERNAL,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(),
        details="Internal error from Core",
        debug_error_string='Failed "execute_batch": (SendMessageOperation,)',
    )
    error = from_rpc_error(raw, service="tokenizer", address="127.0.0.1:1")
    assert isinstance(error, UnavailableError)
    assert error.reason == "STREAM_BROKEN"
    assert "open a new stream" in str(error)


def test_frame_needs_one_payload() -> None:
    with pytest.raises(ValueError, match="exactly one of image and codes"):
        Frame(seq=1)


def test_stream_window_must_hold_a_frame() -> None:
    with pytest.raises(ValueError, match="max_in_flight is 0"):
        StreamOptions(max_in_flight=0)
