"""`vqclient models`: what both services have loaded."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.table import Table

from vqclient.cli.config import LlmAddress, TokenizerAddress, connections
from vqclient.cli.run import CliError, command, console, describe
from vqclient.client import ServiceClient
from vqclient.errors import UnavailableError
from vqclient.types import LanguageModel, TokenizerModel


@command
async def models(
    context: typer.Context,
    tokenizer_address: TokenizerAddress = None,
    llm_address: LlmAddress = None,
) -> None:
    """List the models of both services; a service that is down is named on stderr."""
    down: list[str] = []
    async with connections(context).tokenizer(tokenizer_address) as tokenizer:
        try:
            console.print(_tokenizer_table(tokenizer, await tokenizer.models()))
        except UnavailableError as error:
            down.append(describe(error))
    async with connections(context).generation(llm_address) as generation:
        try:
            console.print(_language_table(generation, await generation.models()))
        except UnavailableError as error:
            down.append(describe(error))
    if len(down) == 2:
        raise CliError("; ".join(down))
    for message in down:
        typer.echo(f"vqclient: {message}", err=True)


def _tokenizer_table(client: ServiceClient, listed: Sequence[TokenizerModel]) -> Table:
    title = f"tokenizer service at {client.address}"
    table = Table(
        "model", "kind", "stride", "codebook", "bits/latent", "classes", "hash", title=title
    )
    for model in listed:
        table.add_row(
            model.name,
            model.kind,
            str(model.stride),
            f"{model.num_codes}x{model.code_dim}",
            f"{model.bits_per_latent:.2f}",
            str(len(model.classes)),
            model.model_hash[:8],
        )
    return table


def _language_table(client: ServiceClient, listed: Sequence[LanguageModel]) -> Table:
    title = f"generation service at {client.address}"
    table = Table(
        "model", "method", "bpw", "parameters", "context", "executor", "hash", title=title
    )
    for model in listed:
        table.add_row(
            model.name,
            f"{model.method} {model.bits} bit",
            f"{model.bpw:.2f}",
            f"{model.num_parameters / 1e6:.0f} M",
            str(model.context_length),
            model.executor,
            model.model_hash[:8],
        )
    return table
