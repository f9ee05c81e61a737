"""Runs studies: one shared autoencoder per picture set and seed, then every variant from it.

Finished runs are rows of results.csv and are not repeated; pretrained autoencoders are kept as
safetensors. Must not know what the numbers mean.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from scq.errors import ScqError
from scq.quantizers import Quantizer, build_quantizer
from scq.study.autoencoder import GRID, StudyAutoencoder, load_autoencoder, save_autoencoder
from scq.study.measure import Measurement, QuantizedAutoencoder, encode_pictures, measure
from scq.study.pictures import Pictures, load_pictures
from scq.study.rate_aware import can_choose
from scq.study.results import ResultRow, TraceRow, append_rows, read_rows
from scq.study.spec import Run, Settings, Study, runs
from scq.study.trace import Trace
from scq.study.training import batches, optimise, pretrain, to_float

RESULTS = "results.csv"
TRACES = "traces.csv"
# Dead codes stop moving after this share of the steps.
_SETTLE_SHARE = 0.7

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Workplace:
    """Where a study reads pictures and keeps its results."""

    out: Path
    data: Path
    settings: Settings

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        path, text = self.out / "settings.json", json.dumps(asdict(self.settings), indent=1)
        if not path.exists():
            path.write_text(text + "\n")
        elif path.read_text().strip() != text:
            raise ScqError(f"{path}: these results have other settings; use a new --out")


def run_study(
    study: Study,
    place: Workplace,
    seeds: tuple[int, ...],
    sets: tuple[str, ...] = (),
    progress: Progress = lambda line: None,
) -> int:
    """Do the runs of a study that are not done yet; returns how many were done now.

    Raises ScqError for missing pictures or settings that differ from those of the results.
    """
    finished = {row.key for row in read_rows(place.out / RESULTS, ResultRow)}
    todo = [run for run in runs(study, seeds, sets) if run.key not in finished]
    # Consecutive runs share their pictures and autoencoder; one pair is held at a time.
    limits = place.settings.num_train, place.settings.num_test
    pictures = functools.lru_cache(maxsize=1)(lambda name: load_pictures(name, place.data, *limits))
    start = functools.lru_cache(maxsize=1)(lambda name, seed: prepare(pictures(name), seed, place))
    for number, run in enumerate(todo):
        shared = start(run.pictures, run.seed % place.settings.autoencoders)
        results, traces = execute(run, place.settings, shared, study)
        append_rows(place.out / TRACES, traces)
        append_rows(place.out / RESULTS, results)
        result = results[0]
        progress(
            f"{number + 1}/{len(todo)} {run.pictures} {run.variant.label} seed {run.seed}: "
            f"{result.psnr_db:.2f} dB, {result.raw_bytes:.1f} bytes, {result.seconds:.0f} s"
        )
    return len(todo)


@dataclass(frozen=True)
class Start:
    """What all runs of a set and a pretrained autoencoder share.

    latents: of the training pictures, (N * 16, F).
    """

    pictures: Pictures
    autoencoder: StudyAutoencoder
    latents: Tensor


def prepare(pictures: Pictures, number: int, place: Workplace) -> Start:
    """The unquantized autoencoder `number` of this set, pretrained once and then kept."""
    settings = place.settings
    folder = place.out / "autoencoders"
    folder.mkdir(exist_ok=True)
    path = folder / f"{pictures.name}-{number}.safetensors"
    if not path.exists():
        trained = pretrain(pictures.train, settings.autoencoder, settings.pretraining, number)
        save_autoencoder(trained, path)
    model = load_autoencoder(path, settings.autoencoder)
    return Start(pictures, model, encode_pictures(model, pictures.train))


def execute(
    run: Run, settings: Settings, start: Start, study: Study
) -> tuple[list[ResultRow], list[TraceRow]]:
    """Train one run and measure it, with an encoder that minds the rate as well if it can."""
    started = time.perf_counter()
    trace = Trace(run) if study.traced else None
    model = Job(run, start, settings, study.end_to_end).train(trace)
    seconds = time.perf_counter() - started
    tables_from = start.pictures.train[: settings.table_pictures]
    weights = (0.0, *(study.rate_weights if can_choose(model.quantizer) else ()))
    results = [
        _row(run, weight, measure(model, tables_from, start.pictures.test, weight), seconds)
        for weight in weights
    ]
    steps = settings.finetuning.steps
    return [replace(row, steps=steps) for row in results], trace.rows if trace else []


@dataclass(frozen=True)
class Job:
    """Training of one run.

    The loss is the mean squared error over the pictures' variance plus the quantizer's own loss.
    """

    run: Run
    start: Start
    settings: Settings
    end_to_end: bool

    def train(self, trace: Trace | None) -> QuantizedAutoencoder:
        """Quantizer and decoder, and the encoder if asked for, from the shared autoencoder."""
        torch.manual_seed(self.run.seed)
        budget, pictures = self.settings.finetuning, self.start.pictures.train
        model = QuantizedAutoencoder(copy.deepcopy(self.start.autoencoder), self._quantizer())
        model.autoencoder.encoder.requires_grad_(self.end_to_end)
        model.quantizer.initialize(self.start.latents[: self.settings.initial_latents])
        variance = float(to_float(pictures[:1000]).var())

        def loss(chosen: Tensor, step: int) -> Tensor:
            if step == int(_SETTLE_SHARE * budget.steps):
                model.quantizer.settle()
            images = to_float(pictures[chosen])
            latents = self._latents(model, images, chosen)
            output = model.quantizer(latents)
            if trace is not None:
                trace.record(step, model.quantizer, latents)
            with torch.autocast("cpu", torch.bfloat16, enabled=budget.bfloat16):
                decoded = model.autoencoder.decode(output.quantized)
            total: Tensor = functional.mse_loss(decoded.float(), images) / variance + output.loss
            return total

        return optimise(model, loss, batches(len(pictures), budget, self.run.seed), budget)

    def _latents(self, model: QuantizedAutoencoder, images: Tensor, chosen: Tensor) -> Tensor:
        """(B, 4, 4, F): of the encoder in training, or known ones of the frozen encoder."""
        if not self.end_to_end:
            grids = self.start.latents.reshape(-1, GRID, GRID, self.start.latents.shape[1])
            return grids[chosen]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.finetuning.bfloat16):
            return model.autoencoder.encode(images).float()

    def _quantizer(self) -> Quantizer:
        variant = self.run.variant
        return build_quantizer(variant.quantizer, replace(variant.config, seed=self.run.seed))


def _row(run: Run, rate_weight: float, measured: Measurement, seconds: float) -> ResultRow:
    return ResultRow(
        study=run.study,
        pictures=run.pictures,
        label=run.variant.label + (f" w={rate_weight:g}" if rate_weight else ""),
        quantizer=run.variant.quantizer,
        seed=run.seed,
        steps=0,
        rate_weight=rate_weight,
        raw_bits_per_latent=measured.raw_bits_per_latent,
        raw_bytes=measured.raw_bytes,
        rans_bytes=measured.rans_bytes,
        mse=measured.mse,
        psnr_db=measured.psnr_db,
        forward_mse=measured.forward_mse,
        latent_mse=measured.latent_mse,
        top1_usage=measured.top1_usage,
        perplexity=measured.perplexity,
        mass_perplexity=measured.mass_perplexity,
        seconds=seconds,
    )
