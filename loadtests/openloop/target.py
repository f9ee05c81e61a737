"""Where load may go: this machine, nowhere else."""

from __future__ import annotations

from vqclient.channel import is_loopback, split_address


class ForbiddenTarget(ValueError):
    """An address that is not on loopback."""


def require_loopback(address: str) -> str:
    """`address` (HOST:PORT) itself; ForbiddenTarget unless it is on this machine's loopback."""
    host, _ = split_address(address)
    if not is_loopback(host):
        raise ForbiddenTarget(
            f"refusing to send load to {address}: only loopback is allowed; run the generator on "
            "the server's machine and give 127.0.0.1:PORT"
        )
    return address
