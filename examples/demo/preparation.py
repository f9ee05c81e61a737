"""The language model of the demonstration: fetched and quantized once, then kept in the cache."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError

MODEL = "smollm2"
BITS = 4
GROUP_SIZE = 128


@dataclass(frozen=True)
class LanguageModelFolder:
    """A quantized checkpoint on disk and the name it is served under."""

    name: str
    path: Path


def prepare(cache: Path) -> LanguageModelFolder:
    """Return the quantized model, making it first where the cache does not hold it.

    `vqllm quantize` names the folder only when it is complete, so an interrupted preparation is
    simply done again.
    """
    model = LanguageModelFolder(
        name=f"{MODEL}-gptq{BITS}", path=cache / "models" / f"{MODEL}-gptq{BITS}-g{GROUP_SIZE}"
    )
    if not model.path.exists():
        _quantize(cache, model.path)
    return model


def _quantize(cache: Path, target: Path) -> None:
    print(f"Preparing the language model (once; some minutes): {target}", flush=True)
    _vqllm(["fetch", MODEL, "--cache", str(cache)])
    # Less text and one damping: two or three minutes instead of ten, for a guest who waits.
    quick = ["--windows", "16", "--damping", "0.01"]
    sizes = ["--bits", str(BITS), "--group-size", str(GROUP_SIZE)]
    options = [*sizes, *quick, "--cache", str(cache)]
    _vqllm(["quantize", MODEL, *options, "-o", str(target)])


def _vqllm(arguments: list[str]) -> None:
    finished = subprocess.run([sys.executable, "-m", "vqllm", *arguments], check=False)
    if finished.returncode != 0:
        raise DemoError(f"`vqllm {arguments[0]}` failed with exit code {finished.returncode}")
