"""Options of a client and the gRPC channel they stand for.

Knows addresses, credentials and message sizes; knows no method of any service and reads no
environment.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from vqclient.retry import RetryPolicy

MetadataHook = Callable[[], Sequence[tuple[str, str]]]

DEFAULT_TIMEOUT = 30.0
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_ADDRESS = re.compile(r"^(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]/:\s]+):(?P<port>\d{1,5})$")


@dataclass(frozen=True)
class TlsOptions:
    """PEM bytes; the system's root certificates when `root_certificates` is None.

    `private_key` and `certificate_chain` identify the client (mutual TLS) and come together.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("mutual TLS needs both private_key and certificate_chain")


@dataclass(frozen=True)
class ClientOptions:
    """How a client talks: `timeout` in seconds per call, sizes in bytes.

    `api_key` is sent as a bearer token, only over TLS or to this machine. `metadata` is asked
    before every attempt, for tokens that expire. `tls` None means plain text.
    """

    timeout: float = DEFAULT_TIMEOUT
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    tls: TlsOptions | None = None
    api_key: str | None = field(default=None, repr=False)
    metadata: MetadataHook | None = None

    def __post_init__(self) -> None:
        require_timeout(self.timeout)
        if self.max_message_bytes < 1:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}; give at least 1")

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of one attempt."""
        pairs = tuple(self.metadata()) if self.metadata is not None else ()
        if self.api_key is not None:
            pairs += (("authorization", f"Bearer {self.api_key}"),)
        return pairs


def require_timeout(timeout: float) -> float:
    """`timeout` itself; ValueError unless it is a positive number of seconds."""
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}; give a positive number of seconds")
    return timeout


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port"; ValueError for anything else."""
    match = _ADDRESS.match(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"address {address!r} is not HOST:PORT, for example 127.0.0.1:50051")
    return match["host"].strip("[]"), int(match["port"])


def is_loopback(host: str) -> bool:
    """Whether `host` is "localhost" or a literal loopback address; names are not resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_channel(address: str, options: ClientOptions) -> grpc.aio.Channel:
    """A lazy channel to `address`; ValueError for a bad address or a key in the clear."""
    host, _ = split_address(address)
    if options.api_key is not None and options.tls is None and not is_loopback(host):
        raise ValueError(f"refusing to send an API key to {address} in plain text; set tls")
    arguments = _channel_arguments(options, is_loopback(host))
    if options.tls is None:
        return grpc.aio.insecure_channel(address, options=arguments)
    credentials = grpc.ssl_channel_credentials(
        options.tls.root_certificates, options.tls.private_key, options.tls.certificate_chain
    )
    return grpc.aio.secure_channel(address, credentials, options=arguments)


def _channel_arguments(options: ClientOptions, loopback: bool) -> list[tuple[str, int]]:
    arguments = [
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        # The service config cannot honour google.rpc.RetryInfo, so vqclient.retry does it alone.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if loopback:  # A proxy of the environment cannot reach this machine's loopback.
        arguments.append(("grpc.enable_http_proxy", 0))
    return arguments
