"""`make load`: both services, then every scenario of the load generator, with its thresholds."""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_path

from demo.errors import DemoError
from demo.preparation import prepare
from demo.serve import start_services

LOADTESTS = Path(__file__).parents[2] / "loadtests"


def main() -> int:
    """Run the scenarios; the generator's exit code, 1 when a threshold was breached."""
    parser = argparse.ArgumentParser(prog="demo.load", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for results")
    options = parser.parse_args()
    scenarios = [str(path) for path in sorted((LOADTESTS / "scenarios").glob("*.toml"))]
    try:
        model = prepare(user_cache_path("vqstack", appauthor=False))
        with contextlib.ExitStack() as stack:
            tokenizer, llm = start_services(stack, model, options.output, port=0)
            command = [sys.executable, str(LOADTESTS / "run.py"), *scenarios, "--check"]
            addresses = [
                *("--tokenizer-address", tokenizer.grpc_address),
                *("--llm-address", llm.grpc_address),
                *("--llm-http-address", llm.http_address),
                *("--json", str(options.output / "load.json")),
            ]
            return subprocess.run([*command, *addresses], check=False).returncode
    except DemoError as error:
        print(f"load failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
