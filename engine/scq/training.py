"""Training an SCQ autoencoder in five phases, with the lattice coder in the loop.

1. identity  - encoder and decoder alone, to have latents; ends with a k-means / least-squares
               codebook fitted to them.
2. soft      - through the exact `SCQLayer`: true gradients to encoder and codebook.
3. lattice   - through the transmittable code: each latent is searched, decoded from its lattice
               point; the codebook learns from the picture's gradient, the encoder straight
               through plus commitment; a share of images uses one code only (nested dropout over
               the support), dead codes restart from latents.
4. finetune  - averaged encoder and codebook are frozen; decoder and head learn the coded latents.
5. head      - the decoder is frozen too: only the classifier head goes on, at a third of the cost.

Weights are averaged (EMA) throughout and the average is what is exported. Every step draws from
generators seeded by (seed, step), so that a resumed run continues as if it had not stopped. This
module knows nothing of command lines or services; progress is reported to a callback.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scq.checkpoint import new_state, restore_state, save_state
from scq.codebook_init import kmeans, refine
from scq.data import ImageSet, sample_batch, to_tensor
from scq.errors import ScqError
from scq.lattice import reconstruct, search
from scq.model import ScqAutoencoder, save_model
from scq.training_config import PRESETS, PhaseName, TrainConfig, split, with_classes

_SEED_LATENTS = 20_000
_PIXEL_VARIANCE = 0.05

__all__ = [
    "PRESETS",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "Validation",
    "split",
    "train",
    "validate",
    "with_classes",
]


@dataclass(frozen=True)
class TrainProgress:
    """State after one step. `psnr_db` is of the training batch; NaN values: not measured yet."""

    step: int
    total_steps: int
    phase: PhaseName
    loss: float
    psnr_db: float
    class_accuracy: float
    validation_psnr_db: float
    validation_accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """Where the exported model lies, its id, and its last validation figures (NaN: none)."""

    model_path: Path
    model_hash: str
    validation_psnr_db: float
    validation_accuracy: float


@dataclass(frozen=True)
class _StepLosses:
    total: Tensor
    squared_error: float
    quantization_error: float
    class_loss: float
    class_accuracy: float


@dataclass
class _LogRow:
    step: int
    phase: str
    learning_rate: float
    loss: float
    psnr_db: float
    quantization_error: float
    class_loss: float
    class_accuracy: float
    codes_restarted: int
    validation_psnr_db: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Validation:
    """Mean PSNR and top-1 accuracy of coded pictures; NaN where there was nothing to measure."""

    psnr_db: float = math.nan
    accuracy: float = math.nan


ProgressCallback = Callable[[TrainProgress], None]


def train(
    config: TrainConfig,
    images: ImageSet,
    output: Path,
    *,
    validation: ImageSet | None = None,
    progress: ProgressCallback | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train and export `output`/model.safetensors; checkpoints, log.csv and config.json beside.

    Without `validation` the config's hold-out is used. Each checkpoint also exports the model, so
    stopping at any time leaves a usable one.

    Raises:
        ScqError: a checkpoint of another run, or labels that do not fit the classes.
    """
    config = with_classes(config, images)
    if validation is None:
        images, validation = split(config, images)
    _check_labels(config, images, validation)
    output.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(config, images, validation, output)
    if resume:
        trainer.restore()
    else:
        (output / "config.json").write_text(config.to_json())
        (output / "log.csv").unlink(missing_ok=True)
    return trainer.run(progress or (lambda _: None))


def _check_labels(config: TrainConfig, images: ImageSet, validation: ImageSet | None) -> None:
    classes = len(config.model.classes)
    if config.class_weight and (not images.labels or max(images.labels) >= classes):
        raise ScqError(f"labels do not fit the model's {classes} classes")
    if validation is not None and validation.labels and validation.classes != images.classes:
        raise ScqError(
            f"validation pictures have {len(validation.classes)} class folders, training pictures "
            f"{len(images.classes)}; give both the same ones"
        )


class _Trainer:
    """Model, averaged model and optimizer of one run, and the step that advances them."""

    def __init__(
        self, config: TrainConfig, images: ImageSet, validation: ImageSet | None, output: Path
    ) -> None:
        self.config, self.images, self.validation, self.output = config, images, validation, output
        self.state = new_state(config)
        self.validated = Validation()

    def run(self, progress: ProgressCallback) -> TrainResult:
        while self.state.step < self.config.total_steps:
            row = self._step()
            self._log(row)
            progress(_progress(row, self.config))
            if row.step % self.config.checkpoint_interval == 0:
                self.save()
        model_hash = self.save()
        return TrainResult(
            self.output / "model.safetensors",
            model_hash,
            self.validated.psnr_db,
            self.validated.accuracy,
        )

    def _step(self) -> _LogRow:
        started = time.perf_counter()
        self._enter_phase()
        losses = self._update()
        restarted = self._restart_dead_codes()
        self.state.step += 1
        last = self.state.step == self.config.total_steps
        if last or self.state.step % self.config.validate_interval == 0:
            self.validated = self._validate()
        return self._row(losses, restarted, time.perf_counter() - started)

    def save(self) -> str:
        """Write the checkpoint and the exported average; return the export's model id."""
        save_state(self.state, self.config, self.output / "checkpoint.safetensors")
        partial = self.output / "model.partial"
        model_hash = save_model(self.state.average, partial)
        partial.replace(self.output / "model.safetensors")
        return model_hash

    def restore(self) -> None:
        """Continue from the checkpoint; the log forgets steps that are about to be repeated."""
        restore_state(self.state, self.config, self.output / "checkpoint.safetensors")
        path = self.output / "log.csv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: self.state.step + 1]))

    def _enter_phase(self) -> None:
        config, step = self.config, self.state.step
        if step == config.identity_steps:
            self._fit_codebook()
        if config.phase(step) in ("finetune", "head"):
            if config.phase(step - 1) == "lattice":
                self.state.model.load_state_dict(self.state.average.state_dict())
            self.state.model.encoder.requires_grad_(False)
            self.state.model.quantizer.requires_grad_(False)
            self.state.model.decoder.requires_grad_(config.phase(step) == "finetune")
        for group in self.state.optimizer.param_groups:
            group["lr"] = config.step_learning_rate(step) * group["rate_factor"]

    def _update(self) -> _StepLosses:
        rng = np.random.default_rng((self.config.seed, self.state.step))
        torch.manual_seed(int(rng.integers(2**31)))
        self.state.model.train()
        losses = self._losses(rng)
        if not bool(torch.isfinite(losses.total)):
            raise ScqError(f"loss is not finite at step {self.state.step}; lower learning_rate")
        self.state.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.state.model.parameters(), 1.0)
        self.state.optimizer.step()
        self._average_weights()
        return losses

    def _losses(self, rng: np.random.Generator) -> _StepLosses:
        config, model = self.config, self.state.model
        batch = sample_batch(self.images, config.crop, config.batch_size, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            latents = model.encode(batch.images).float()
        quantized, penalty = self._quantize(latents, rng)
        class_loss, accuracy = self._class_loss(quantized, batch.labels)
        if config.phase(self.state.step) == "head":
            return _StepLosses(class_loss, math.nan, math.nan, class_loss.item(), accuracy)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            decoded = model.decode_unclamped(quantized).float()
        squared_error = functional.mse_loss(decoded, batch.images)
        total = squared_error / _PIXEL_VARIANCE + penalty + config.class_weight * class_loss
        return _StepLosses(
            total, squared_error.item(), float(penalty.detach()), class_loss.item(), accuracy
        )

    def _class_loss(self, quantized: Tensor, labels: Tensor | None) -> tuple[Tensor, float]:
        if labels is None or self.config.class_weight == 0:
            return torch.zeros(()), math.nan
        logits = self.state.model.classify(quantized)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return loss, float((logits.argmax(dim=1) == labels).float().mean())

    def _quantize(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Latents as the phase's decoder sees them, and the quantization error to penalise."""
        config, phase = self.config, self.config.phase(self.state.step)
        if phase == "identity":
            return latents, torch.zeros(())
        if phase == "soft":
            quantized, _, _ = self.state.model.quantizer(latents)
            return quantized, config.commitment * functional.mse_loss(quantized, latents)
        quantized = self._lattice_points(latents, rng)
        pull_codes = config.codebook_pull * functional.mse_loss(quantized, latents.detach())
        pull_latents = config.commitment * functional.mse_loss(latents, quantized.detach())
        return quantized + latents - latents.detach(), pull_codes + pull_latents

    def _lattice_points(self, latents: Tensor, rng: np.random.Generator) -> Tensor:
        model, code = self.state.model, self.config.model.lattice
        single = torch.from_numpy(rng.random(latents.shape[0]) < self.config.single_code_share)
        codebook = model.quantizer.codebook
        points = torch.empty_like(latents)
        for images, coder in ((~single, code), (single, replace(code, max_support=1))):
            if not bool(images.any()):
                continue
            flat = latents[images].flatten(0, 2)
            assignment = search(flat, codebook, coder)
            used = assignment.indices[assignment.numerators > 0]
            self.state.usage += torch.bincount(used, minlength=code.num_codes)
            points[images] = reconstruct(assignment, codebook).reshape(latents[images].shape)
        return points

    def _fit_codebook(self) -> None:
        """Codebook from the latents of random crops: k-means, then lattice least squares."""
        config, model = self.config, self.state.model
        rng = np.random.default_rng((config.seed, config.total_steps))
        per_batch = config.batch_size * (config.crop.size // config.model.stride) ** 2
        batches = math.ceil(min(_SEED_LATENTS, 80 * config.model.num_codes) / per_batch)
        with torch.no_grad():
            crops = (
                sample_batch(self.images, config.crop, config.batch_size, rng).images
                for _ in range(batches)
            )
            latents = torch.cat([model.encode(crop).flatten(0, 2) for crop in crops])
            generator = torch.Generator().manual_seed(config.seed)
            codebook = kmeans(latents, config.model.num_codes, generator)
            codebook = refine(latents, codebook, config.model.lattice)
            model.quantizer.codebook.copy_(codebook)
            self.state.average.quantizer.codebook.copy_(codebook)

    def _restart_dead_codes(self) -> int:
        """Move codes that were (almost) unused since the last check onto current latents.

        Only in the first 70 % of phase 3, so that the last codes placed have time to settle.
        """
        config = self.config
        first = config.identity_steps + config.soft_steps
        inside = first <= self.state.step < first + 0.7 * config.lattice_steps
        if not inside or (self.state.step + 1 - first) % config.dead_code_interval:
            return 0
        dead = (self.state.usage < 0.05 * self.state.usage.float().mean()).nonzero().flatten()
        self.state.usage.zero_()
        if len(dead):
            self._place_codes(dead)
        return len(dead)

    def _place_codes(self, dead: Tensor) -> None:
        config = self.config
        rng = np.random.default_rng((config.seed, self.state.step, 1))
        crops = sample_batch(self.images, config.crop, config.batch_size, rng).images
        codebook = self.state.model.quantizer.codebook
        with torch.no_grad():
            latents = self.state.model.encode(crops).flatten(0, 2)
            points = reconstruct(search(latents, codebook, config.model.lattice), codebook)
            errors = (latents - points).square().sum(dim=1).double().numpy()
            count = min(len(dead), len(latents))
            chosen = rng.choice(len(latents), count, replace=False, p=errors / errors.sum())
            codebook[dead[:count]] = latents[chosen]
            self.state.average.quantizer.codebook[dead[:count]] = latents[chosen]
        for moment in ("exp_avg", "exp_avg_sq"):
            self.state.optimizer.state[codebook][moment][dead[:count]] = 0

    def _average_weights(self) -> None:
        # Early in a run the average must forget the initial weights quickly.
        decay = min(self.config.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        with torch.no_grad():
            for average, weight in zip(
                self.state.average.parameters(), self.state.model.parameters(), strict=True
            ):
                average.lerp_(weight, 1 - decay)

    def _validate(self) -> Validation:
        if self.validation is None or self.state.step <= self.config.identity_steps:
            return Validation()
        return validate(self.state.average, self.validation, self.config.validation_images)

    def _row(self, losses: _StepLosses, restarted: int, seconds: float) -> _LogRow:
        return _LogRow(
            step=self.state.step,
            phase=self.config.phase(self.state.step - 1),
            learning_rate=self.config.step_learning_rate(self.state.step - 1),
            loss=losses.total.item(),
            psnr_db=_psnr_db(losses.squared_error),
            quantization_error=losses.quantization_error,
            class_loss=losses.class_loss,
            class_accuracy=losses.class_accuracy,
            codes_restarted=restarted,
            validation_psnr_db=self.validated.psnr_db,
            validation_accuracy=self.validated.accuracy,
            seconds=seconds,
        )

    def _log(self, row: _LogRow) -> None:
        path = self.output / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [item.name for item in fields(_LogRow)])
            if new:
                writer.writeheader()
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            )


def validate(model: ScqAutoencoder, images: ImageSet, limit: int) -> Validation:
    """Coded PSNR and accuracy on up to `limit` evenly spaced images, cropped to the stride."""
    stride = model.config.stride
    errors, hits = [], []
    positions = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
    with torch.inference_mode():
        for position in positions:
            image = to_tensor(images.images[position])
            image = image[..., : image.shape[2] // stride * stride, :]
            image = image[..., : image.shape[3] // stride * stride]
            latents = model.encode(image)
            grid = (latents.shape[1], latents.shape[2])
            coded = model.dequantize(model.quantize(latents), grid)
            errors.append(float((model.decode(coded) - image).square().mean()))
            if images.labels and model.head is not None:
                label = int(model.classify(coded).argmax())
                hits.append(label == images.labels[position])
    accuracy = sum(hits) / len(hits) if hits else math.nan
    return Validation(float(np.mean([_psnr_db(error) for error in errors])), accuracy)


def _psnr_db(squared_error: float) -> float:
    return -10 * math.log10(squared_error) if squared_error else math.inf


def _progress(row: _LogRow, config: TrainConfig) -> TrainProgress:
    return TrainProgress(
        step=row.step,
        total_steps=config.total_steps,
        phase=config.phase(row.step - 1),
        loss=row.loss,
        psnr_db=row.psnr_db,
        class_accuracy=row.class_accuracy,
        validation_psnr_db=row.validation_psnr_db,
        validation_accuracy=row.validation_accuracy,
    )
