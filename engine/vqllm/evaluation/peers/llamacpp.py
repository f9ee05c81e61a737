"""llama.cpp's own quantizer on our reference weights.

Its file types are recipes, not bit widths: a tensor whose rows are no multiple of 256 falls back
to a wider type, so the storage types are counted in the file it wrote. Embedding and head are
kept in float16, because the table compares the linears.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vqllm.evaluation.peers.base import PeerJob, PeerResult, run_program
from vqllm.evaluation.peers.gguf_export import export_gguf, import_linears

QUANTIZE, IMATRIX = "llama-quantize", "llama-imatrix"

FILE_TYPES = (
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "Q2_K_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K_S",
    "Q3_K_M",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
)
_SHARED = ("--token-embedding-type", "f16", "--output-tensor-type", "f16")


@dataclass(frozen=True)
class LlamaCpp:
    """One file type of llama.cpp, with an importance matrix of the calibration text.

    Attributes:
        binaries: folder of llama-quantize and llama-imatrix.
        file_type: as llama-quantize spells it.
        cache: holds the exported file and the importance matrix, shared by all file types.

    Folders are no part of the representation, which names a row: what was measured once stays in
    the table where the programs are gone or elsewhere.
    """

    binaries: Path | None = field(repr=False)
    file_type: str
    cache: Path = field(repr=False)

    @property
    def name(self) -> str:
        return f"llama.cpp {self.file_type}"

    def missing(self) -> str | None:
        if self.binaries is None:
            return "no folder of llama.cpp programs was named"
        absent = [name for name in (QUANTIZE, IMATRIX) if not (self.binaries / name).is_file()]
        return f"{self.binaries} lacks {' and '.join(absent)}" if absent else None

    def run(self, job: PeerJob) -> PeerResult:
        exact, importance = self._prepare(job)
        path = job.work / f"{self.file_type}.gguf"
        words: list[str | Path] = [
            self._program(QUANTIZE),
            "--imatrix",
            importance,
            *_SHARED,
            exact,
            path,
        ]
        run_program([*words, self.file_type, str(job.num_threads)], path.with_suffix(".log"))
        folder = job.work / "dense"
        linears = import_linears(path, job.source, folder)
        return PeerResult(
            folder=folder,
            bpw=linears.bpw,
            file_bytes=path.stat().st_size,
            types=linears.types,
            note="importance matrix of the calibration text",
        )

    def _prepare(self, job: PeerJob) -> tuple[Path, Path]:
        """The exact GGUF file and the importance matrix, made by the first arm that asks."""
        self.cache.mkdir(parents=True, exist_ok=True)
        exact = self.cache / f"{job.source.resolve().name}.gguf"
        importance = self.cache / f"imatrix-{job.text.stem}.gguf"
        if not exact.is_file():
            scratch = self.cache / "partial.gguf"
            export_gguf(job.source, scratch)
            scratch.rename(exact)
        if not importance.is_file():
            num_windows, window_length = job.windows.shape
            scratch = self.cache / "partial-imatrix.gguf"
            words: list[str | Path] = [
                self._program(IMATRIX),
                "-m",
                exact,
                "-f",
                job.text,
                "-o",
                scratch,
            ]
            words += ["-c", str(window_length), "--chunks", str(num_windows)]
            run_program([*words, "-t", str(job.num_threads)], self.cache / "imatrix.log")
            scratch.rename(importance)
        return exact, importance

    def _program(self, name: str) -> Path:
        assert self.binaries is not None  # `missing` was asked first
        return self.binaries / name
