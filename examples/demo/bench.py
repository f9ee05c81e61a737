"""`make bench-llm`: our models beside ONNX Runtime, and beside llama.cpp on the files given.

Other options go to `vqllm bench`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_path

from demo.errors import DemoError
from demo.preparation import RECIPES, prepare


def main() -> int:
    """Prepare the models and run `vqllm bench`; its exit code."""
    parser = argparse.ArgumentParser(prog="demo.bench", description=__doc__)
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="files for llama.cpp")
    parser.add_argument("--bits", nargs="*", type=int, choices=RECIPES, default=list(RECIPES))
    options, others = parser.parse_known_args()
    try:
        cache = user_cache_path("vqstack", appauthor=False)
        folders = [str(prepare(cache, bits).path) for bits in options.bits]
    except DemoError as error:
        print(f"bench failed: {error}", file=sys.stderr)
        return 1
    engines = ["native", "onnx", *(["llama.cpp"] if options.gguf else [])]
    command = [sys.executable, "-m", "vqllm", "bench", *folders, "--engines", ",".join(engines)]
    for path in options.gguf:
        command += ["--gguf", str(path)]
    return subprocess.run([*command, *others], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
