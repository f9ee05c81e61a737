"""`vqclient chat`: one question, or a conversation on the terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

import typer

from vqclient.cli.config import LlmAddress, connections
from vqclient.cli.run import CliError, describe, with_exit_code
from vqclient.errors import VqError
from vqclient.generation import GenerationClient
from vqclient.types import Message, Sampling

_HELP = "Ask something. /clear forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops."


@dataclass(frozen=True)
class ChatOptions:
    """What stays the same from turn to turn."""

    model: str
    system: str
    sampling: Sampling

    def opening(self) -> list[Message]:
        """The turns every conversation begins with."""
        return [Message("system", self.system)] if self.system else []


def chat(
    context: typer.Context,
    question: Annotated[str | None, typer.Argument(help="Left out: a conversation.")] = None,
    model: Annotated[str, typer.Option(help="Model; may stay empty if there is one.")] = "",
    system: Annotated[str, typer.Option(help="Instruction before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.7,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeats an answer.")] = None,
    llm_address: LlmAddress = None,
) -> None:
    """Ask the language model; the answer streams to the terminal, its timing to stderr."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    options = ChatOptions(model, system, sampling)
    if question is None:
        with_exit_code(lambda: _converse(context, llm_address, options))
    else:
        with_exit_code(lambda: asyncio.run(_answer_once(context, llm_address, options, question)))


async def _answer_once(
    context: typer.Context, address: str | None, options: ChatOptions, question: str
) -> None:
    if not question.strip():
        raise CliError("the question is empty; write it in quotes after `chat`")
    async with connections(context).generation(address) as client:
        await _answer(client, options, [*options.opening(), Message("user", question)])


def _converse(context: typer.Context, address: str | None, options: ChatOptions) -> None:
    """Read questions and answer them until /quit or the end of the input."""
    with asyncio.Runner() as runner:
        client = runner.run(_connect(context, address))
        try:
            typer.echo(_HELP, err=True)
            _take_turns(runner, client, options)
        finally:
            runner.run(client.close())


def _take_turns(runner: asyncio.Runner, client: GenerationClient, options: ChatOptions) -> None:
    messages = options.opening()
    while (question := _read_question()) is not None:
        if question == "/clear":
            messages = options.opening()
        elif question:
            turn = [*messages, Message("user", question)]
            answer = _one_turn(runner, client, options, turn)
            messages = messages if answer is None else [*turn, Message("assistant", answer)]


async def _connect(context: typer.Context, address: str | None) -> GenerationClient:
    """The client, made inside the event loop that its channel belongs to."""
    return connections(context).generation(address)


def _one_turn(
    runner: asyncio.Runner,
    client: GenerationClient,
    options: ChatOptions,
    messages: Sequence[Message],
) -> str | None:
    """The answer; None when it failed or was stopped, and the conversation goes on without it."""
    try:
        return runner.run(_answer(client, options, messages))
    except KeyboardInterrupt:
        typer.echo("\n(stopped)", err=True)
    except VqError as error:
        typer.echo(f"vqclient: {describe(error)}", err=True)
    return None


def _read_question() -> str | None:
    """One line without surrounding blanks; None to leave."""
    if sys.stdin.isatty():
        typer.echo("> ", err=True, nl=False)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        return None
    question = line.strip()
    return None if not line or question in {"/quit", "/exit"} else question


async def _answer(
    client: GenerationClient, options: ChatOptions, messages: Sequence[Message]
) -> str:
    """Stream one answer to stdout and its timing to stderr."""
    text: list[str] = []
    start, first = time.perf_counter(), 0.0
    answer = client.chat(messages, model=options.model, sampling=options.sampling)
    async with aclosing(answer) as pieces:
        async for piece in pieces:
            first = first or time.perf_counter() - start
            text.append(piece.text)
            typer.echo(piece.text, nl=False)
    typer.echo()
    total = time.perf_counter() - start
    if piece.usage is not None:
        count = piece.usage.completion_tokens
        rate = (count - 1) / (total - first) if count > 1 and total > first else 0.0
        typer.echo(
            f"({piece.usage.prompt_tokens} prompt tokens, {count} new in {total:.1f} s, "
            f"first after {1000 * first:.0f} ms, {rate:.1f} tok/s, {piece.finish_reason})",
            err=True,
        )
    return "".join(text)
