"""`make soak`: llmd on the demonstration's model, and clients that give up for half an hour."""

import argparse
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_path

from demo.errors import DemoError
from demo.preparation import prepare
from demo.processes import running

SOAK = Path(__file__).parents[2] / "loadtests" / "soak.py"


def main() -> int:
    """Run the soak; its exit code, 1 when something was left behind."""
    parser = argparse.ArgumentParser(prog="demo.soak", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for the log")
    parser.add_argument("--seconds", type=float, default=1800.0)
    options = parser.parse_args()
    try:
        model = prepare(user_cache_path("vqstack", appauthor=False))
        flags = ["--model", str(model.path), "--grpc-port", "0", "--http-port", "0"]
        with running("llmd", ["vqserve.generation", *flags], options.output) as llm:
            addresses = ["--address", llm.grpc_address, "--http", llm.http_address]
            limits = ["--pid", str(llm.process.pid), "--seconds", str(options.seconds)]
            command = [sys.executable, str(SOAK), *addresses, *limits]
            return subprocess.run(command, check=False).returncode
    except DemoError as error:
        print(f"soak failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
