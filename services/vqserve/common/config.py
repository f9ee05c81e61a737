"""Settings of a service process: flags first, then environment (VQSERVE_*), then defaults.

The defaults stand here once. Nothing else in the services reads the environment.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

LOG_LEVELS = ("debug", "info", "warning", "error")


class ServiceSettings(BaseSettings):
    """What both services can be told. Subclasses add their own fields."""

    model_config = SettingsConfigDict(
        env_prefix="VQSERVE_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        frozen=True,
        extra="ignore",
        protected_namespaces=(),
    )

    host: str = Field(
        default="127.0.0.1", description="Address both listeners bind; 0.0.0.0 in containers"
    )
    grpc_port: int = Field(default=0, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    http_port: int = Field(default=0, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    ports_file: Path | None = Field(
        default=None, description="JSON file with the real ports, written once the service is ready"
    )
    admin_port: int | None = Field(
        default=None, ge=0, le=65535, description="Port of the admin listener; off when unset"
    )
    admin_host: str = Field(default="127.0.0.1", description="Address of the admin listener")
    model_root: Path | None = Field(
        default=None,
        description="Folder that admin loads are confined to; loads are refused when unset",
    )
    max_request_bytes: int = Field(
        default=16 * 1024 * 1024, ge=1024, description="Largest request body or message, in bytes"
    )
    max_image_pixels: int = Field(
        default=24_000_000, ge=1, description="Largest image, in pixels, checked before decoding"
    )
    max_concurrent_requests: int = Field(
        default=64, ge=1, description="Requests admitted at once, waiting ones included"
    )
    max_open_requests: int = Field(
        default=256,
        ge=1,
        description="Requests open at once, streams included; bounds the memory of their bodies",
    )
    max_connection_age_seconds: int = Field(
        default=0,
        ge=0,
        description="gRPC connections are asked to reconnect after this, so that load balancers "
        "see them anew; 0 never",
    )
    drain_delay_seconds: float = Field(
        default=0.0, ge=0, description="Time between readiness off and refusing new requests"
    )
    drain_grace_seconds: float = Field(
        default=20.0, ge=0, description="Longest wait for running requests on shutdown"
    )
    build_commit: str = Field(
        default="unknown", description="Commit of this build, for the build_info metric"
    )
    log_level: str = Field(default="info", description="debug, info, warning or error")

    @field_validator("log_level")
    @classmethod
    def _known_log_level(cls, value: str) -> str:
        if value.lower() not in LOG_LEVELS:
            raise ValueError(f"unknown log level {value!r}; use one of {', '.join(LOG_LEVELS)}")
        return value.lower()

    @classmethod
    def from_args(cls, args: Sequence[str] | None = None) -> Self:
        """Read flags and the environment; on a bad value say which one and exit with status 2."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            return cls(  # type: ignore[call-arg]
                _cli_parse_args=arguments,
                _cli_prog_name=f"python -m {cls.__module__.rpartition('.')[0]}",
            )
        except ValidationError as error:
            sys.exit(_complain(_first_problem(error)))
        except SettingsError as error:
            sys.exit(_complain(str(error)))


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    name = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (got {problem['input']!r})"


def _complain(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2
