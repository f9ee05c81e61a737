"""The language model of the demonstration: fetched and quantized once, then kept in the cache."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError

MODEL = "smollm2"
DEFAULT_BITS = 4

# Less text, one damping and little tuning: a few minutes instead of twenty, for a guest who waits.
_QUICK = ("--windows", "16", "--damping", "0.01")


@dataclass(frozen=True)
class Recipe:
    """Name of a prepared model, and the options of `vqllm quantize` that make it."""

    name: str
    options: tuple[str, ...]


RECIPES: Mapping[int, Recipe] = {
    4: Recipe("gptq4", ("--bits", "4", "--asymmetric", "--tune-steps", "0")),
    2: Recipe("tcq2", ("--method", "tcq", "--bpw", "2.25", "--tune-steps", "20")),
}


@dataclass(frozen=True)
class LanguageModelFolder:
    """A quantized checkpoint on disk and the name it is served under."""

    name: str
    path: Path


def prepare(cache: Path, bits: int = DEFAULT_BITS) -> LanguageModelFolder:
    """Return the model quantized to `bits`, making it first where the cache does not hold it.

    `vqllm quantize` names the folder only when it is complete; a preparation that was interrupted
    goes on where it was.

    Raises:
        DemoError: no model of these bits is offered, or making it failed.
    """
    model = folder_of(cache, bits)
    if not model.path.exists():
        _quantize(cache, model.path, RECIPES[bits])
    return model


def folder_of(cache: Path, bits: int) -> LanguageModelFolder:
    """Where the model of so many bits is kept, there or not.

    Raises:
        DemoError: no model of these bits is offered.
    """
    if bits not in RECIPES:
        raise DemoError(f"BITS is {bits}; a model of {' or '.join(map(str, RECIPES))} is offered")
    name = f"{MODEL}-{RECIPES[bits].name}"
    return LanguageModelFolder(name=name, path=cache / "models" / name)


def _quantize(cache: Path, target: Path, recipe: Recipe) -> None:
    print(f"Preparing the language model (once; some minutes): {target}", flush=True)
    _vqllm(["fetch", MODEL, "--cache", str(cache)])
    options = [*recipe.options, *_QUICK, "--cache", str(cache)]
    hint = f"; if another version began it, remove {target}.partial"
    _vqllm(["quantize", MODEL, *options, "-o", str(target)], hint)


def _vqllm(arguments: list[str], hint: str = "") -> None:
    finished = subprocess.run([sys.executable, "-m", "vqllm", *arguments], check=False)
    if finished.returncode != 0:
        code = finished.returncode
        raise DemoError(f"`vqllm {arguments[0]}` failed with exit code {code}{hint}")
