"""Where the command line connects to: options, their environment variables, their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from vqclient.channel import DEFAULT_TIMEOUT, ClientOptions, TlsOptions
from vqclient.cli.run import CliError, read_file
from vqclient.generation import (
    DEFAULT_GENERATION_ADDRESS,
    DEFAULT_GENERATION_TIMEOUT,
    GenerationClient,
)
from vqclient.tokenizer import DEFAULT_TOKENIZER_ADDRESS, TokenizerClient

TokenizerAddress = Annotated[
    str | None,
    typer.Option("--tokenizer-address", metavar="HOST:PORT", help="Where tokenizerd listens."),
]
LlmAddress = Annotated[
    str | None, typer.Option("--llm-address", metavar="HOST:PORT", help="Where llmd listens.")
]


@dataclass(frozen=True)
class Connections:
    """Addresses and the options of both clients; `timeout` None keeps each client's default."""

    tokenizer_address: str = DEFAULT_TOKENIZER_ADDRESS
    llm_address: str = DEFAULT_GENERATION_ADDRESS
    timeout: float | None = None
    api_key: str | None = field(default=None, repr=False)
    tls_ca: Path | None = None

    def tokenizer(self, address: str | None) -> TokenizerClient:
        """The tokenizer client at `address`, or at the configured one."""
        try:
            return TokenizerClient(
                address or self.tokenizer_address, self._options(DEFAULT_TIMEOUT)
            )
        except ValueError as error:
            raise CliError(str(error)) from error

    def generation(self, address: str | None) -> GenerationClient:
        """The generation client at `address`, or at the configured one."""
        try:
            return GenerationClient(
                address or self.llm_address, self._options(DEFAULT_GENERATION_TIMEOUT)
            )
        except ValueError as error:
            raise CliError(str(error)) from error

    def _options(self, default_timeout: float) -> ClientOptions:
        tls = None if self.tls_ca is None else TlsOptions(read_file(self.tls_ca))
        timeout = default_timeout if self.timeout is None else self.timeout
        return ClientOptions(timeout=timeout, api_key=self.api_key, tls=tls)


def connect(
    context: typer.Context,
    tokenizer_address: Annotated[
        str, typer.Option(envvar="VQCLIENT_TOKENIZER_ADDRESS", help="Where tokenizerd listens.")
    ] = DEFAULT_TOKENIZER_ADDRESS,
    llm_address: Annotated[
        str, typer.Option(envvar="VQCLIENT_LLM_ADDRESS", help="Where llmd listens.")
    ] = DEFAULT_GENERATION_ADDRESS,
    timeout: Annotated[
        float | None, typer.Option(envvar="VQCLIENT_TIMEOUT", help="Seconds per call.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VQCLIENT_API_KEY", help="Sent as a bearer token.")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(envvar="VQCLIENT_TLS_CA", help="PEM file of the trusted authority; uses TLS."),
    ] = None,
) -> None:
    """Talk to the vqstack services: images to codes and back, labels, video, chat."""
    context.obj = Connections(tokenizer_address, llm_address, timeout, api_key, tls_ca)


def connections(context: typer.Context) -> Connections:
    """The connections that `connect` made for this run."""
    if not isinstance(context.obj, Connections):
        raise TypeError("connect() must run before a command")
    return context.obj
