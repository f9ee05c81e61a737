"""Runs the arms of a comparison, scores every one on the same tokens, and keeps the rows.

A row is a JSON file that is written when its arm is scored, so a stopped comparison goes on where
it was; a row of other texts, another reference or other options is made anew. Rows hold the loss
and the divergence of every window, which is what paired intervals between arms need.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vqllm.calibration import CalibrationConfig, calibration_windows
from vqllm.checkpoint import Checkpoint, write_json
from vqllm.errors import CorruptCheckpoint, InvalidConfig, VqllmError
from vqllm.evaluation.compare_arms import Arm, Calibration, Made, Stopwatch
from vqllm.evaluation.evaluate import EvaluationOptions, open_executor, summarize
from vqllm.evaluation.peers.base import PeerJob
from vqllm.evaluation.perplexity import PairedScores, compare_windows
from vqllm.evaluation.reference import StoredReference
from vqllm.evaluation.windows import EvaluationText, WindowConfig, read_windows
from vqllm.runtime.tokenizer import ChatTokenizer
from vqllm.sources import PlainSource

Report = Callable[[str], None]


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared on what.

    Attributes:
        reference: folder of the full-precision model.
        texts: UTF-8 files to score, by the name they have in the table.
        output: folder of rows and tables.
        calibration: text every arm calibrates on; None is the one in the package.
        calibration_windows, calibration_length: how much of it.
        windows: which windows of each text are scored.
        seeds: each takes other windows of the calibration text.
        num_threads: threads of every arm and of scoring.

    Raises:
        InvalidConfig: no text, or no seed.
    """

    reference: Path
    texts: dict[str, Path]
    output: Path
    calibration: Path | None = None
    calibration_windows: int = 64
    calibration_length: int = 512
    windows: WindowConfig = field(default_factory=WindowConfig)
    seeds: tuple[int, ...] = (0,)
    num_threads: int = 1

    def __post_init__(self) -> None:
        if not self.texts:
            raise InvalidConfig("texts", self.texts, "one or more")
        if not self.seeds or min(self.seeds) < 0:
            raise InvalidConfig("seeds", self.seeds, "one or more numbers from 0 on")


@dataclass(frozen=True)
class Row:
    """One arm at one seed.

    Attributes:
        arm, family, seed: which.
        bpw, file_bytes, types, note, peak_bytes: as in `Made`.
        seconds: wall clock of quantizing, the arm's own loading and saving included; 0 where it
            was stopped in between.
        results: by text, what `summarize` gives, with `window_nll`, `window_reference_nll` and
            `window_kl`, one mean per window.
        failure: why there are no results; empty otherwise.
        fingerprint: of everything the row depends on.
    """

    arm: str
    family: str
    seed: int
    bpw: float = 0.0
    file_bytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    note: str = ""
    peak_bytes: int = 0
    seconds: float = 0.0
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: str = ""
    fingerprint: str = ""


class Comparison:
    """Texts and reference of one comparison, ready to run arms."""

    def __init__(self, config: ComparisonConfig, report: Report = lambda line: None) -> None:
        """Reads the texts and runs the reference over them.

        Raises:
            VqllmError: a text is too short, or the reference cannot be run.
        """
        self._config, self._report = config, report
        self._tokenizer = ChatTokenizer.from_folder(config.reference)
        self.texts: dict[str, EvaluationText] = {
            name: read_windows(self._tokenizer, path, config.windows)
            for name, path in config.texts.items()
        }
        checkpoint = Checkpoint(config.reference)
        info = checkpoint.info()
        self.title, self._revision = info.name, info.revision
        self._size = info.num_parameters
        self._source = PlainSource(checkpoint)
        self._references: dict[str, StoredReference] = {}
        (config.output / "rows").mkdir(parents=True, exist_ok=True)

    @property
    def facts(self) -> str:
        """What the rows rest on, one paragraph."""
        config = self._config
        texts = "; ".join(
            f"{name}: `{text.name}` (SHA-256 {text.sha256[:12]}), {len(text.windows)} windows "
            f"({text.selection}) of {text.windows.shape[1]} tokens"
            for name, text in self.texts.items()
        )
        calibration = (
            "the package's text" if config.calibration is None else config.calibration.name
        )
        return (
            f"{self._size / 1e6:.1f} M parameters, revision {self._revision}. {texts}. All arms "
            f"calibrate on the same {config.calibration_windows} windows of "
            f"{config.calibration_length} tokens of {calibration}, other windows for every seed."
        )

    def kept(self, arms: Sequence[Arm]) -> list[Row]:
        """Rows of these arms that were made before and still hold, in the arms' order."""
        rows = []
        for arm in arms:
            for seed in self._config.seeds:
                path = self._path(arm, seed)
                row = read_row(path) if path.is_file() else None
                if row is not None and row.fingerprint == self._fingerprint(arm, seed):
                    rows.append(row)
        return rows

    def run(self, arms: Sequence[Arm]) -> list[Row]:
        """A row for every arm and seed; one that fails says why and stops nobody."""
        return [
            self._row(arm, seed)
            for arm in arms
            for seed in (self._config.seeds if arm.seeded else self._config.seeds[:1])
        ]

    def _row(self, arm: Arm, seed: int) -> Row:
        reason = arm.missing()
        if reason is not None:
            return Row(arm.name, arm.family, seed, failure=reason)
        path = self._path(arm, seed)
        fingerprint = self._fingerprint(arm, seed)
        kept = read_row(path) if path.is_file() else None
        if kept is not None and kept.fingerprint == fingerprint:
            self._report(f"{arm.name}, seed {seed}: kept")
            return kept
        try:
            row = self._make(arm, seed, fingerprint)
        except VqllmError as error:
            self._report(f"{arm.name}, seed {seed}: failed: {error}")
            return Row(arm.name, arm.family, seed, failure=str(error))
        write_json(path, asdict(row))
        shown = ", ".join(f"{name} {r['ratio']:.4f}" for name, r in row.results.items())
        self._report(f"{arm.name}, seed {seed}: {row.bpw:.3f} bpw, {row.seconds:.0f} s, {shown}")
        return row

    def _path(self, arm: Arm, seed: int) -> Path:
        return self._config.output / "rows" / f"{slug(arm.name)}-seed{seed}.json"

    def _make(self, arm: Arm, seed: int, fingerprint: str) -> Row:
        work = self._config.output / "work" / f"{slug(arm.name)}-seed{seed}-{fingerprint}"
        work.mkdir(parents=True, exist_ok=True)
        calibration = self.calibration(seed)
        job = PeerJob(
            source=self._config.reference,
            windows=self._calibration_tokens(calibration),
            text=calibration.path,
            work=work,
            num_threads=self._config.num_threads,
        )
        made, seconds = _make_once(arm, job, calibration)
        results = {name: self._score(made, name) for name in self.texts}
        shutil.rmtree(work)
        facts = {key: value for key, value in vars(made).items() if key != "folder"}
        return Row(
            arm=arm.name,
            family=arm.family,
            seed=seed,
            seconds=seconds,
            results=results,
            fingerprint=fingerprint,
            **facts,
        )

    def _score(self, made: Made, name: str) -> dict[str, Any]:
        windows = self.texts[name].windows
        options = EvaluationOptions(
            windows=WindowConfig(windows.shape[1]), num_threads=self._config.num_threads
        )
        runner = open_executor(Checkpoint(made.folder), options.executor, options)
        scores = compare_windows(runner, self._reference(name), windows)
        return {**summarize(scores), "tokens": scores.nll.size, **_window_means(scores)}

    def _reference(self, name: str) -> StoredReference:
        if name not in self._references:
            windows = self.texts[name].windows
            key = hashlib.sha256(self._revision.encode() + windows.tobytes()).hexdigest()[:16]
            cache = self._config.output / "cache" / f"reference-{key}.npy"
            self._references[name] = StoredReference(self._source, windows, cache)
        return self._references[name]

    def calibration(self, seed: int) -> Calibration:
        """The calibration text of a seed: a file of the windows that every arm gets."""
        config = self._config
        path = config.output / "cache" / f"calibration-{seed}.txt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._calibration_text(seed), encoding="utf-8")
        return Calibration(path, config.calibration_windows, config.calibration_length)

    def _calibration_text(self, seed: int) -> str:
        """Windows spread over the text, shifted by a part of their distance that no other seed has.

        One window more than asked for, because text that is cut and joined may tokenize shorter.
        """
        config = self._config
        every = CalibrationConfig(config.calibration, 2**31, config.calibration_length)
        windows = calibration_windows(self._tokenizer, every)
        count = min(config.calibration_windows + 1, len(windows))
        shift = seed * 0.6180339887 % 1.0
        chosen = ((np.arange(count) + shift) * len(windows) / count).astype(int) % len(windows)
        return "\n".join(self._tokenizer.decode(windows[i].tolist()) for i in chosen)

    def _calibration_tokens(self, calibration: Calibration) -> np.ndarray[Any, np.dtype[np.int64]]:
        spread = CalibrationConfig(
            calibration.path, calibration.num_windows, calibration.window_length
        )
        return calibration_windows(self._tokenizer, spread)

    def _fingerprint(self, arm: Arm, seed: int) -> str:
        config = self._config
        content = {
            "arm": repr(arm),
            "seed": seed,
            "reference": self._revision,
            "texts": {n: [t.sha256, t.selection, *t.windows.shape] for n, t in self.texts.items()},
            "calibration": [
                hashlib.sha256(self.calibration(seed).path.read_bytes()).hexdigest(),
                config.calibration_windows,
                config.calibration_length,
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _make_once(arm: Arm, job: PeerJob, calibration: Calibration) -> tuple[Made, float]:
    """What the arm makes, and its seconds; 0 when an earlier, stopped run did part of the work."""
    done, is_fresh = job.work / "made.json", not any(job.work.iterdir())
    if done.is_file():
        kept = json.loads(done.read_text(encoding="utf-8"))
        return Made(**{**kept, "folder": Path(kept["folder"])}), 0.0
    with Stopwatch() as watch:
        made = arm.make(job, calibration)
    write_json(done, {**vars(made), "folder": str(made.folder)})
    return made, watch.seconds if is_fresh else 0.0


def _window_means(scores: PairedScores) -> dict[str, list[float]]:
    arrays = {
        "window_nll": scores.nll,
        "window_reference_nll": scores.reference_nll,
        "window_kl": scores.kl,
    }
    return {
        name: [round(float(mean), 7) for mean in values.mean(axis=1, dtype=np.float64)]
        for name, values in arrays.items()
    }


def read_row(path: Path) -> Row:
    """A row from its file.

    Raises:
        CorruptCheckpoint: the file is no row; remove it to have it made anew.
    """
    try:
        return Row(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} holds no row of a comparison: {error}") from error


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
