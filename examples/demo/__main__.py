"""`make demo`: two photographs, a sign, a dish and a question through both services."""

import argparse
import asyncio
import sys
import urllib.request
from pathlib import Path

from platformdirs import user_cache_path
from rich.console import Console
from rich.table import Table

from demo import background
from demo.errors import DemoError
from demo.pictures import Photograph, default_photographs, users_photographs
from demo.preparation import DEFAULT_BITS, RECIPES, prepare
from demo.side_by_side import compose
from demo.walk import Answer, FrameReport, ask, recognize_dish, recognize_sign, send_frame
from vqclient import GenerationClient, Recognized, TokenizerClient, VqError

KEPT_SECONDS = 600
SHOWN_METRICS = (
    "scq_coded_bytes_total",
    "scq_frame_latency_seconds_count",
    "llm_generation_tokens_total",
    "llm_time_to_first_token_seconds_count",
)


def main() -> int:
    """Run the demonstration; 0 when everything worked."""
    options = _parse(sys.argv[1:])
    console = Console()
    try:
        photographs = (
            users_photographs(options.images)
            if options.images
            else default_photographs(options.cache / "demo")
        )
        prepare(options.cache, options.bits)
        console.print("Starting tokenizerd and llmd ...")
        services = background.start(options.output, options.cache, options.bits, KEPT_SECONDS)
        asyncio.run(_walk(console, photographs, services, options.output))
    except (DemoError, VqError) as error:
        background.stop(options.output)
        console.print(f"[red]demo failed:[/red] {error}")
        return 1
    if options.stop:
        background.stop(options.output)
    else:
        minutes = KEPT_SECONDS // 60
        console.print(f"Both services stay up for {minutes} minutes; `make stop` stops them.")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--images", nargs="+", type=Path, help="photographs to use instead")
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for results")
    parser.add_argument(
        "--bits", type=int, choices=RECIPES, default=DEFAULT_BITS, help="of the language model"
    )
    parser.add_argument("--stop", action="store_true", help="stop the services at the end")
    parser.add_argument(
        "--cache",
        type=Path,
        default=user_cache_path("vqstack", appauthor=False),
        help="folder that keeps the prepared model and the photographs",
    )
    return parser.parse_args(arguments)


async def _walk(
    console: Console, photographs: list[Photograph], services: background.Background, output: Path
) -> None:
    async with TokenizerClient(services.tokenizer.grpc) as client:
        reports = [await send_frame(client, photograph) for photograph in photographs]
        picture = output / "side-by-side.png"
        compose([list(report.panels) for report in reports]).save(picture)
        sign = await recognize_sign(client)
        dish = await recognize_dish(client, _dish_photograph(photographs))
    _show_labels(console, "sign (drawn, not photographed)", sign)
    _show_labels(console, "dish (of the ten the model knows)", dish)

    async with GenerationClient(services.llm.grpc) as generation:
        answers = [await _answer(console, generation, text) for text in _questions(sign, dish)]
    console.print()
    _show_metrics(console, services)
    console.print(f"\nside by side: {picture}")
    console.print(_table(reports, answers, services))


def _dish_photograph(photographs: list[Photograph]) -> Photograph:
    return next((p for p in photographs if p.model == "food"), photographs[-1])


def _questions(sign: Recognized, dish: Recognized) -> tuple[str, str]:
    sign_name, dish_name = (r.labels[0].name.replace("_", " ") for r in (sign, dish))
    return (
        f"What does a '{sign_name}' traffic sign tell a driver to do?",
        f"What are the main ingredients of {dish_name}?",
    )


async def _answer(console: Console, generation: GenerationClient, question: str) -> Answer:
    console.print(f"\n[bold]{question}[/bold]")
    answer = await ask(generation, question, lambda text: console.print(text, end=""))
    console.print()
    return answer


def _show_labels(console: Console, what: str, recognized: Recognized) -> None:
    labels = ", ".join(f"{label.name} {label.score:.0%}" for label in recognized.labels)
    console.print(f"{what}, from {recognized.coded_bytes} bytes of codes: {labels}")


def _table(
    reports: list[FrameReport], answers: list[Answer], services: background.Background
) -> Table:
    table = Table(title="What went through (times as the client saw them)", show_header=False)
    table.add_column("what", no_wrap=True)
    for _ in range(max(len(reports), len(answers))):
        table.add_column(justify="right", no_wrap=True)
    for rows in (_frame_rows(reports), _answer_rows(answers), _metrics_rows(services)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _frame_rows(reports: list[FrameReport]) -> list[list[str]]:
    return [
        ["frame (model)", *(f"{r.subject} ({r.model})" for r in reports)],
        ["size", *(f"{r.width} x {r.height}" for r in reports)],
        ["image file", *(f"{r.source_bytes:,} bytes" for r in reports)],
        ["codes", *(f"{r.coded_bytes:,} bytes" for r in reports)],
        ["bits per pixel", *(f"{r.bpp:.3f} bpp" for r in reports)],
        ["PSNR", *(f"{r.psnr_db:.1f} dB" for r in reports)],
        ["encode", *(f"{r.encode_ms:.0f} ms" for r in reports)],
        ["decode", *(f"{r.decode_ms:.0f} ms" for r in reports)],
        ["nearest JPEG", *(f"{r.jpeg_bytes:,} bytes" for r in reports)],
        ["its PSNR", *(f"{r.jpeg_psnr_db:.1f} dB" for r in reports)],
    ]


def _answer_rows(answers: list[Answer]) -> list[list[str]]:
    return [
        ["question", *(f"{a.usage.prompt_tokens} tokens" for a in answers)],
        ["answer", *(f"{a.usage.completion_tokens} tokens" for a in answers)],
        ["first token", *(f"{1000 * a.usage.time_to_first_token:.0f} ms" for a in answers)],
        ["decoding", *(f"{a.tokens_per_second:.0f} tok/s" for a in answers)],
    ]


def _metrics_rows(services: background.Background) -> list[list[str]]:
    addresses = (services.tokenizer.http, services.llm.http)
    return [["see metrics at", *(f"{address}/metrics" for address in addresses)]]


def _show_metrics(console: Console, services: background.Background) -> None:
    for addresses in (services.tokenizer, services.llm):
        with urllib.request.urlopen(f"http://{addresses.http}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if line.startswith(SHOWN_METRICS):
                console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
