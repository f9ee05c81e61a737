"""Which arms a comparison runs: presets by name, each a list.

Knows the options of `vqllm quantize` and the peers' settings, runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqllm.errors import InvalidConfig
from vqllm.evaluation.compare_arms import Arm, OurArm, PeerArm, PublishedArm
from vqllm.evaluation.peers.gptqmodel import GptqModel
from vqllm.evaluation.peers.llamacpp import FILE_TYPES, LlamaCpp

BITS = (2, 3, 4)
PLAIN = ("--preprocess", "none", "--alpha", "0", "--damping", "0.01", "--tune-steps", "0")
BASELINE = "baseline"


@dataclass(frozen=True)
class PeerPaths:
    """Where other quantizers are; None skips them.

    Attributes:
        llama_cpp: folder of llama-quantize and llama-imatrix.
        gptqmodel_python: interpreter of an environment with gptqmodel.
        cache: folder for what llama.cpp's arms share.
    """

    llama_cpp: Path | None
    gptqmodel_python: Path | None
    cache: Path


def our_arm(method: str, bits: float, preprocess: str, *options: str) -> OurArm:
    """`vqllm quantize` with a method's defaults, and `options` on top.

    `preprocess` empty leaves it to the method.
    """
    budget = ("--bits", str(int(bits))) if bits == int(bits) else ("--bpw", str(bits))
    how = ("--preprocess", preprocess) if preprocess else ()
    words = ("--method", method, *budget, *how, *options)
    kind = "" if bits == int(bits) else "bpw"
    suffix = " ".join(options).replace("--", "")
    name = " ".join(part for part in (method, f"{bits:g}", kind, preprocess, suffix) if part)
    return OurArm(name, words, seeded=method != "rtn")


def our_grid(
    methods: tuple[str, ...], bits: tuple[float, ...], preprocess: tuple[str, ...]
) -> list[Arm]:
    """Every combination; rounding to nearest is a baseline, not ours."""
    return [
        our_arm(method, width, how) for width in bits for method in methods for how in preprocess
    ]


def baselines() -> list[Arm]:
    """Rounding to nearest, GPTQ without correction or rotation, VPTQ as published."""
    arms: list[Arm] = []
    for bits in BITS:
        width = ("--bits", str(bits))
        arms.append(
            OurArm(f"RTN {bits}", ("--method", "rtn", *width, *PLAIN), BASELINE, seeded=False)
        )
        arms.append(OurArm(f"plain GPTQ {bits}", ("--method", "gptq", *width, *PLAIN), BASELINE))
        arms.append(PublishedArm(bits))
    return arms


def peers(paths: PeerPaths) -> list[Arm]:
    """Every setting of every peer, runnable or not: the ones that are not say why."""
    arms: list[Arm] = [
        PeerArm(LlamaCpp(paths.llama_cpp, kind, paths.cache), "llama.cpp") for kind in FILE_TYPES
    ]
    return arms + [PeerArm(GptqModel(paths.gptqmodel_python, bits), "gptqmodel") for bits in BITS]


def parse_arm(text: str) -> OurArm:
    """An arm given on the command line as `NAME=options of vqllm quantize`.

    Raises:
        InvalidConfig: no name or no options.
    """
    name, _, options = text.partition("=")
    if not name.strip() or not options.strip():
        raise InvalidConfig("arm", text, "NAME=OPTIONS, as in 'mine=--method tcq --bits 2'")
    return OurArm(name.strip(), tuple(options.split()))
