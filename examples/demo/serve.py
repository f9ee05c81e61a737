"""`make serve`: both services at their default ports until Ctrl-C."""

import argparse
import contextlib
import sys
import time
from pathlib import Path

from platformdirs import user_cache_path

from demo.__main__ import start_services
from demo.errors import DemoError
from demo.preparation import prepare


def main() -> int:
    """Serve until interrupted; 0 after a clean drain."""
    parser = argparse.ArgumentParser(prog="demo.serve", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for logs")
    options = parser.parse_args()
    try:
        model = prepare(user_cache_path("vqstack", appauthor=False))
        with contextlib.ExitStack() as stack:
            services = start_services(stack, model, options.output, port=None)
            for service in services:
                address = f"gRPC {service.grpc_address}, HTTP http://{service.http_address}"
                print(f"{service.name}: {address} (/docs, /metrics), log {service.log}", flush=True)
            while all(service.process.poll() is None for service in services):
                time.sleep(0.5)
            print("a service ended; see its log", file=sys.stderr)
            return 1
    except DemoError as error:
        print(f"serve failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
