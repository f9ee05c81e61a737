"""`make demo`: two photographs, a sign, a dish and a question through both services."""

import argparse
import asyncio
import contextlib
import sys
import urllib.request
from pathlib import Path

from platformdirs import user_cache_path
from rich.console import Console
from rich.table import Table

from demo.errors import DemoError
from demo.pictures import Photograph, default_photographs, users_photographs
from demo.preparation import LanguageModelFolder, prepare
from demo.processes import Service, running
from demo.side_by_side import compose
from demo.walk import Answer, FrameReport, ask, recognize_dish, recognize_sign, send_frame
from vqclient import GenerationClient, Recognized, TokenizerClient, VqError

SHOWN_METRICS = (
    "scq_coded_bytes_total",
    "scq_source_bytes_total",
    "scq_frame_latency_seconds_count",
    "llm_generation_tokens_total",
    "llm_time_to_first_token_seconds_count",
)


def main() -> int:
    """Run the demonstration; 0 when everything worked."""
    options = _parse(sys.argv[1:])
    console = Console()
    try:
        cache = options.cache
        if options.images:
            photographs = users_photographs(options.images)
        else:
            photographs = default_photographs(cache / "demo")
        model = prepare(cache)
        with contextlib.ExitStack() as stack:
            tokenizer, llm = start_services(stack, model, options.output, port=0)
            asyncio.run(_walk(console, photographs, tokenizer, llm, options.output))
            _show_metrics(console, tokenizer, llm)
    except (DemoError, VqError) as error:
        console.print(f"[red]demo failed:[/red] {error}")
        return 1
    return 0


def start_services(
    stack: contextlib.ExitStack, model: LanguageModelFolder, output: Path, *, port: int | None
) -> tuple[Service, Service]:
    """Start both services; `port` 0 takes free ports, None their defaults."""
    ports = [] if port is None else ["--grpc-port", str(port), "--http-port", str(port)]
    tokenizer = stack.enter_context(running("tokenizerd", ["vqserve.tokenizer", *ports], output))
    arguments = ["vqserve.generation", "--model", str(model.path), "--model-name", model.name]
    llm = stack.enter_context(running("llmd", [*arguments, *ports], output))
    return tokenizer, llm


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--images", nargs="+", type=Path, help="photographs to use instead")
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for results")
    parser.add_argument(
        "--cache",
        type=Path,
        default=user_cache_path("vqstack", appauthor=False),
        help="folder that keeps the prepared model and the photographs",
    )
    return parser.parse_args(arguments)


async def _walk(
    console: Console, photographs: list[Photograph], tokenizer: Service, llm: Service, output: Path
) -> None:
    async with TokenizerClient(tokenizer.grpc_address) as client:
        reports = [await send_frame(client, photograph) for photograph in photographs]
        picture = output / "side-by-side.png"
        compose([list(report.panels) for report in reports]).save(picture)
        sign = await recognize_sign(client)
        dish = await recognize_dish(client, _dish_photograph(photographs))
    _show_labels(console, "sign (drawn)", sign)
    _show_labels(console, "dish", dish)

    question = _question(sign, dish)
    console.print(f"\n[bold]{question}[/bold]\n")
    async with GenerationClient(llm.grpc_address) as generation:
        answer = await ask(generation, question, lambda text: console.print(text, end=""))
    console.print("\n")
    console.print(_frames_table(reports))
    console.print(_answer_table(answer))
    console.print(f"side by side: {picture}")


def _dish_photograph(photographs: list[Photograph]) -> Photograph:
    return next((p for p in photographs if p.model == "food"), photographs[-1])


def _question(sign: Recognized, dish: Recognized) -> str:
    sign_name, dish_name = (r.labels[0].name.replace("_", " ") for r in (sign, dish))
    return (
        f"I am driving to lunch. My camera sees the traffic sign '{sign_name}' and, later, "
        f"the dish '{dish_name}'. In two sentences: what should I do at the sign, "
        "and what is the dish made of?"
    )


def _show_labels(console: Console, what: str, recognized: Recognized) -> None:
    labels = ", ".join(f"{label.name} {label.score:.0%}" for label in recognized.labels)
    console.print(f"{what}, from {recognized.coded_bytes} bytes of codes: {labels}")


def _frames_table(reports: list[FrameReport]) -> Table:
    table = Table(title="Frames: codes beside the nearest JPEG (times as the client saw them)")
    for name in ("frame", "size", "file", "codes", "bpp", "PSNR", "encode", "decode", "JPEG"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(
            f"{report.subject}/{report.model}",
            f"{report.width}x{report.height}",
            f"{report.source_bytes:,} B",
            f"{report.coded_bytes:,} B",
            f"{report.bpp:.3f}",
            f"{report.psnr_db:.1f} dB",
            f"{report.encode_ms:.0f} ms",
            f"{report.decode_ms:.0f} ms",
            f"{report.jpeg_bytes:,} B {report.jpeg_psnr_db:.1f} dB",
        )
    return table


def _answer_table(answer: Answer) -> Table:
    table = Table(title="Answer")
    for name in ("prompt", "generated", "time to first token", "speed"):
        table.add_column(name, justify="right")
    usage = answer.usage
    table.add_row(
        f"{usage.prompt_tokens} tokens",
        f"{usage.completion_tokens} tokens",
        f"{1000 * usage.time_to_first_token:.0f} ms",
        f"{answer.tokens_per_second:.0f} tok/s",
    )
    return table


def _show_metrics(console: Console, tokenizer: Service, llm: Service) -> None:
    for service in (tokenizer, llm):
        url = f"http://{service.http_address}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        shown = [line for line in lines if line.startswith(SHOWN_METRICS)]
        console.print(f"{service.name} metrics were at {url}, among them:")
        for line in shown:
            console.print(f"  {line}", highlight=False, markup=False)
    console.print("`make serve` keeps both services running, at their default ports.")


if __name__ == "__main__":
    sys.exit(main())
