"""How a command runs and fails: one line on stderr and exit code 2, never a traceback.

Knows files, consoles and errors; knows no command.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

import typer
from rich.console import Console

from vqclient.errors import UNREACHABLE, VqError
from vqclient.video import VideoError

P = ParamSpec("P")

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

console = Console(highlight=False)

_REMEDIES = {
    "tokenizer": "start it with `python -m vqserve.tokenizer` or pass --tokenizer-address",
    "generation": "start it with `python -m vqserve.generation --model FOLDER` or pass "
    "--llm-address",
}


class CliError(Exception):
    """A mistake of the user's; the message is one line."""


def command(function: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a coroutine function a command: run it, turn its errors into one line and exit 2."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with_exit_code(lambda: asyncio.run(function(*args, **kwargs)))

    return run


def with_exit_code(action: Callable[[], None]) -> None:
    """Run `action`; its expected errors end the process with one line."""
    try:
        action()
    except (VqError, CliError, VideoError) as error:
        fail(describe(error))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def fail(message: str) -> NoReturn:
    """Print one line and exit with code 2."""
    typer.echo(f"vqclient: {message}", err=True)
    raise typer.Exit(EXIT_ERROR)


def describe(error: Exception) -> str:
    """One line for `error`, with the command that helps when nobody answers."""
    text = " ".join(str(error).split())
    if isinstance(error, VqError) and error.reason == UNREACHABLE and error.service:
        return f"{error.message.partition(';')[0]}; {_REMEDIES[error.service]}"
    return text


def read_file(path: Path) -> bytes:
    """The bytes of a file; CliError when it cannot be read or is empty."""
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    if not payload:
        raise CliError(f"{path} is empty; give a file with content")
    return payload


def write_file(path: Path, payload: bytes) -> None:
    """Write a file; CliError when it cannot be written."""
    try:
        path.write_bytes(payload)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}") from error
