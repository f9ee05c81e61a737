"""The `gptqmodel` package on our reference weights, in an environment of its own.

Its settings are its own defaults (symmetric, group-aware column order); group size 64 because it
asks for groups that divide the row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from vqllm.checkpoint import Checkpoint
from vqllm.evaluation.peers.base import PeerJob, PeerResult, run_program
from vqllm.evaluation.peers.dense import DenseFolder
from vqllm.evaluation.sizes import measure_sizes

SCRIPT = Path(__file__).with_name("gptqmodel_script.py")


@dataclass(frozen=True)
class GptqModel:
    """One width of gptqmodel.

    Attributes:
        python: interpreter of an environment that has gptqmodel; no part of the representation,
            which names a row.
        bits: width of a code.
        group_size: columns that share a scale.
    """

    python: Path | None = field(repr=False)
    bits: int
    group_size: int = 64

    @property
    def name(self) -> str:
        return f"gptqmodel {self.bits} bits, groups of {self.group_size}"

    def missing(self) -> str | None:
        if self.python is None:
            return "no Python with gptqmodel was named"
        return None if self.python.is_file() else f"{self.python} is not there"

    def run(self, job: PeerJob) -> PeerResult:
        assert self.python is not None  # `missing` was asked first
        windows, target = job.work / "windows.json", job.work / "quantized"
        windows.write_text(json.dumps(job.windows.tolist()), encoding="utf-8")
        content = {
            "source": str(job.source.resolve()),
            "target": str(target.resolve()),
            "bits": self.bits,
            "group_size": self.group_size,
            "windows": str(windows.resolve()),
            "num_threads": job.num_threads,
        }
        job_file = job.work / "job.json"
        job_file.write_text(json.dumps(content), encoding="utf-8")
        run_program([self.python, "-I", SCRIPT, job_file], job.work / "gptqmodel.log")
        checkpoint = Checkpoint(target)
        with DenseFolder(Checkpoint(job.source), job.work / "dense") as dense:
            for name in checkpoint.linear_names():
                dense.put(name, checkpoint.dense_linear(name))
        sizes = measure_sizes(checkpoint)
        types = {f"GPTQ {self.bits} bits": len(checkpoint.linear_names())}
        note = "its own defaults, symmetric, group-aware column order"
        return PeerResult(job.work / "dense", sizes.bpw, sizes.file_bytes, types, note)
