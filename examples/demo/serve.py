"""`make serve`: both services until Ctrl-C. `make demo` keeps its services up with it for a while.

Writes `services.json` into the output folder while the services are up; `demo.background` reads it.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from platformdirs import user_cache_path

from demo.errors import DemoError
from demo.preparation import DEFAULT_BITS, RECIPES, LanguageModelFolder, prepare
from demo.processes import Service, running

SERVICES_FILE = "services.json"


def main() -> int:
    """Serve until interrupted or until the time is over; 0 after a clean drain."""
    options = _parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        model = prepare(options.cache, options.bits)
        with contextlib.ExitStack() as stack:
            file = options.output / SERVICES_FILE
            # Registered first, so done last: once the file is gone, the services are.
            stack.callback(lambda: file.unlink(missing_ok=True))
            services = start_services(stack, model, options.output, port=options.port)
            _announce(services, file)
            return _watch(services, options.seconds)
    except DemoError as error:
        print(f"serve failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
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
    parser = argparse.ArgumentParser(prog="demo.serve", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for logs")
    parser.add_argument("--port", type=int, help="0 takes free ports; default ports otherwise")
    parser.add_argument(
        "--bits", type=int, choices=RECIPES, default=DEFAULT_BITS, help="of the language model"
    )
    parser.add_argument("--seconds", type=float, help="stop by itself after so long")
    parser.add_argument(
        "--cache", type=Path, default=user_cache_path("vqstack", appauthor=False), help="models"
    )
    return parser.parse_args(arguments)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _announce(services: tuple[Service, Service], file: Path) -> None:
    content = {
        service.name: {"grpc": service.grpc_address, "http": service.http_address}
        for service in services
    }
    for service in services:
        address = f"gRPC {service.grpc_address}, HTTP http://{service.http_address}"
        print(f"{service.name}: {address} (/docs, /metrics), log {service.log}", flush=True)
    file.write_text(json.dumps({"pid": os.getpid(), **content}))


def _watch(services: tuple[Service, Service], seconds: float | None) -> int:
    deadline = None if seconds is None else time.monotonic() + seconds
    while all(service.process.poll() is None for service in services):
        if deadline is not None and time.monotonic() > deadline:
            return 0
        time.sleep(0.2)
    print("a service ended; see its log", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
