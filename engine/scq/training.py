"""Training an SCQ autoencoder in up to six phases, with the lattice coder in the loop.

1. identity  - encoder and decoder alone, to have latents; ends with a k-means / least-squares
               codebook fitted to them.
2. soft      - through the exact `SCQLayer`: true gradients to encoder and codebook, while lambda
               rises to the model's.
3. lattice   - through the transmittable code: each latent is searched, decoded from its lattice
               point; the codebook learns from the picture's gradient, the encoder straight
               through plus commitment; a share of pictures uses fewer codes (nested dropout over
               the support), dead codes restart from latents.
4. finetune  - averaged encoder and codebook are frozen; decoder and head learn the coded latents.
5. head      - the decoder is frozen too: only the classifier head goes on, at a third of the cost.
6. polish    - the decoder alone goes on, with crops that are not varied.

Weights are averaged (EMA) throughout and the average is what is exported. Every step draws from
generators seeded by (seed, step), so that a resumed run continues as if it had not stopped. This
module knows nothing of command lines or services; progress is reported to a callback.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scq.checkpoint import new_state, restore_state, save_state, start_from
from scq.data import ImageSet, to_tensor
from scq.errors import ScqError
from scq.lattice import reconstruct, search
from scq.model import ScqAutoencoder, save_model
from scq.training_augment import Varied, augment
from scq.training_batches import Mixed, balanced, cutmix, sample_slots
from scq.training_codebook import fit_codebook, place_codes
from scq.training_config import (
    PRESETS,
    PhaseName,
    TrainConfig,
    reference_of,
    split,
    with_classes,
)
from scq.training_log import LogRow, RunLog
from scq.training_losses import Features, class_loss, feature_loss, mesh_loss, picture_loss
from scq.training_parallel import choose_device, current_team

_PIXEL_VARIANCE = 0.05
# What still learns once encoder and codebook are frozen.
_TRAINED = {"finetune": ("decoder", "head"), "head": ("head",), "polish": ("decoder",)}

__all__ = [
    "PRESETS",
    "TrainConfig",
    "TrainOptions",
    "TrainProgress",
    "TrainResult",
    "Trainer",
    "Validation",
    "reference_of",
    "split",
    "support_sizes",
    "train",
    "validate",
    "with_classes",
]


@dataclass(frozen=True)
class TrainOptions:
    """How a run is carried out, apart from what it is.

    `device`: auto, cpu, cuda or cuda:N. `features`: frozen network of the feature loss, needed
    when the config weighs it. `start`: a model file whose weights the run starts from. `resume`:
    continue from the output folder's checkpoint.
    """

    device: str = "auto"
    features: Features | None = None
    start: Path | None = None
    resume: bool = False


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
    psnr_db: float = math.nan
    quantization_error: float = math.nan
    class_loss: float = math.nan
    class_accuracy: float = math.nan


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
    options: TrainOptions | None = None,
) -> TrainResult:
    """Train and export `output`/model.safetensors; checkpoints, log.csv and config.json beside.

    Without `validation` the config's hold-out is used. Each checkpoint also exports the model, so
    stopping at any time leaves a usable one. Inside an initialised torch.distributed process
    group every process trains on its part of each batch and rank 0 writes the files.

    Raises:
        ScqError: a checkpoint of another run, labels that do not fit the classes, a device that
            is not there, a feature loss without features, a run without identity steps and
            without a model to start from, or one to start from that is of another shape.
    """
    options = options or TrainOptions()
    config = with_classes(config, images)
    if validation is None:
        images, validation = split(config, images)
    _check_labels(config, images, validation)
    if config.feature_weight and options.features is None:
        raise ScqError("feature_weight is set; give TrainOptions.features, or set it to 0")
    if config.identity_steps == 0 and options.start is None:
        raise ScqError("identity_steps is 0; give a model to start from, or some identity steps")
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(config, images, validation, output, options).run(progress or (lambda _: None))


def _check_labels(config: TrainConfig, images: ImageSet, validation: ImageSet | None) -> None:
    classes = len(config.model.classes)
    if config.class_weight and (not images.labels or max(images.labels) >= classes):
        raise ScqError(f"labels do not fit the model's {classes} classes")
    if validation is not None and validation.labels and validation.classes != images.classes:
        raise ScqError(
            f"validation pictures have {len(validation.classes)} class folders, training pictures "
            f"{len(images.classes)}; give both the same ones"
        )


class Trainer:
    """Model, averaged model and optimizer of one run, and the step that advances them."""

    def __init__(
        self,
        config: TrainConfig,
        images: ImageSet,
        validation: ImageSet | None,
        output: Path,
        options: TrainOptions,
    ) -> None:
        self.config, self.validation, self.output = config, validation, output
        self.images = balanced(images, config.class_balance)
        self.features, self.team = options.features, current_team()
        self.slots = self.team.slots(config.batch_size)
        self.device = choose_device(options.device)
        self.state = new_state(config, self.device)
        self.validated = Validation()
        if options.resume:
            restore_state(self.state, config, output / "checkpoint.safetensors")
        elif options.start is not None:
            start_from(self.state, config, options.start)

    @property
    def phase(self) -> PhaseName:
        return self.config.phase(self.state.step)

    def run(self, progress: ProgressCallback) -> TrainResult:
        log = RunLog(self.output, keep=self.state.step) if self.team.leads else None
        if log is not None and self.state.step == 0:
            (self.output / "config.json").write_text(self.config.to_json())
        while self.state.step < self.config.total_steps:
            row = self.step()
            if log is not None:
                log.write(row)
                progress(_progress(row, self.config))
                if row.step % self.config.checkpoint_interval == 0:
                    self.save()
        if log is not None:
            log.close()
        return self._result()

    def step(self) -> LogRow:
        """One optimizer update with all that belongs to it."""
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

    def _result(self) -> TrainResult:
        model_hash = self.save() if self.team.leads else self.state.average.model_hash
        return TrainResult(
            self.output / "model.safetensors",
            model_hash,
            self.validated.psnr_db,
            self.validated.accuracy,
        )

    def _enter_phase(self) -> None:
        config, state = self.config, self.state
        if config.coded and 0 < config.identity_steps == state.step:
            fit_codebook(state, config, self.images)
            self._share_codebook()
        if self.phase in _TRAINED:
            if config.phase(state.step - 1) != self.phase:
                state.model.load_state_dict(state.average.state_dict())
            state.model.requires_grad_(False)
            for part in _TRAINED[self.phase]:
                if (module := getattr(state.model, part)) is not None:
                    module.requires_grad_(True)
        for group in state.optimizer.param_groups:
            group["lr"] = config.step_learning_rate(state.step) * group["rate_factor"]

    def _update(self) -> _StepLosses:
        rng = np.random.default_rng((self.config.seed, self.state.step))
        torch.manual_seed(int(rng.integers(2**31)) + self.team.rank)
        self.state.model.train()
        losses = self._losses(rng)
        if not bool(torch.isfinite(losses.total)):
            raise ScqError(f"loss is not finite at step {self.state.step}; lower learning_rate")
        self.state.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.state.model.parameters())
        self.team.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.state.optimizer.step()
        self._average_weights()
        return losses

    def _losses(self, rng: np.random.Generator) -> _StepLosses:
        config, model = self.config, self.state.model
        mixed = self._batch(rng)
        with self._autocast():
            latents = model.encode(mixed.seen).float()
        quantized, penalty = self._quantize(latents, rng)
        recognition = self._recognition(quantized, mixed)
        if self.phase == "head" or not config.reconstruction_weight:
            return replace(recognition, total=recognition.total + penalty)
        with self._autocast():
            decoded = model.decode_unclamped(quantized).float()
        total = self._picture_loss(decoded, mixed.target) + penalty
        return replace(
            recognition,
            total=total + config.class_weight * recognition.total,
            psnr_db=_psnr_db(functional.mse_loss(decoded.detach(), mixed.target).item()),
            quantization_error=float(penalty.detach()),
        )

    def _batch(self, rng: np.random.Generator) -> Mixed:
        config, crop = self.config, self.config.crop
        if self.phase == "head" and config.head_crop:
            crop = config.head_crop
        if self.phase == "polish":
            crop = replace(crop, jitter=0.0, colour=0.0)
        batch = sample_slots(self.images, crop, self.slots, (config.seed, self.state.step))
        images = batch.images.to(self.device, memory_format=torch.channels_last)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        if self.phase == "polish":
            return cutmix(Varied(images, images), None, 0, rng)
        varied = augment(images, config.augment, torch.default_generator)
        return cutmix(varied, labels, config.cutmix, rng)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    def _picture_loss(self, decoded: Tensor, target: Tensor) -> Tensor:
        config = self.config
        loss = picture_loss(decoded, target, config.saturation_weight) / _PIXEL_VARIANCE
        if config.feature_weight and self.features is not None:
            loss = loss + config.feature_weight * feature_loss(decoded, target, self.features)
            loss = loss + config.mesh_weight * mesh_loss(decoded, target) / _PIXEL_VARIANCE
        return config.reconstruction_weight * loss

    def _recognition(self, quantized: Tensor, mixed: Mixed) -> _StepLosses:
        """The class loss alone as total; zero without one."""
        if mixed.labels is None or self.config.class_weight == 0:
            return _StepLosses(torch.zeros((), device=self.device))
        logits = self.state.model.classify(quantized)
        loss = class_loss(logits, mixed, self.config.label_smoothing)
        hits = logits.argmax(dim=1) == mixed.labels
        return _StepLosses(loss, class_loss=loss.item(), class_accuracy=float(hits.float().mean()))

    def _quantize(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Latents as the phase's decoder sees them, and the quantization error to penalise."""
        config = self.config
        if self.phase == "identity":
            return latents, latents.new_zeros(())
        if self.phase == "soft":
            self._warm_up_lambda()
            quantized, _, _ = self.state.model.quantizer(latents)
            return quantized, config.commitment * functional.mse_loss(quantized, latents)
        quantized = self._lattice_points(latents, rng)
        pull_codes = config.codebook_pull * functional.mse_loss(quantized, latents.detach())
        pull_latents = config.commitment * functional.mse_loss(latents, quantized.detach())
        return quantized + latents - latents.detach(), pull_codes + pull_latents

    def _warm_up_lambda(self) -> None:
        """From a tenth of the model's lambda to all of it over the soft phase."""
        config, layer = self.config, self.state.model.quantizer
        share = (self.state.step - config.identity_steps + 1) / config.soft_steps
        layer.config = replace(layer.config, lam=config.model.lam * (0.1 + 0.9 * share))

    def _lattice_points(self, latents: Tensor, rng: np.random.Generator) -> Tensor:
        code, codebook = self.config.model.lattice, self.state.model.quantizer.codebook
        sizes = support_sizes(rng.random(self.config.batch_size), self.config)
        own = torch.from_numpy(sizes[list(self.slots)]).to(self.device)
        points = torch.empty_like(latents)
        for size in range(1, code.max_support + 1):
            images = own == size
            if not bool(images.any()):
                continue
            flat = latents[images].flatten(0, 2)
            assignment = search(flat, codebook, replace(code, max_support=size))
            used = assignment.indices[assignment.numerators > 0]
            self.state.usage += torch.bincount(used, minlength=code.num_codes)
            points[images] = reconstruct(assignment, codebook).reshape(latents[images].shape)
        return points

    def _restart_dead_codes(self) -> int:
        """Move codes that were (almost) unused since the last check onto current latents.

        Only in the first 70 % of phase 3, so that the last codes placed have time to settle.
        """
        config, state = self.config, self.state
        first = config.identity_steps + config.soft_steps
        inside = config.coded and first <= state.step < first + 0.7 * config.lattice_steps
        if not inside or (state.step + 1 - first) % config.dead_code_interval:
            return 0
        self.team.add_up(state.usage)
        dead = (state.usage < 0.05 * state.usage.float().mean()).nonzero().flatten()
        state.usage.zero_()
        if len(dead):
            place_codes(state, config, self.images, dead)
            self._share_codebook()
        return len(dead)

    def _share_codebook(self) -> None:
        for model in (self.state.model, self.state.average):
            self.team.follow(model.quantizer.codebook.data)

    def _average_weights(self) -> None:
        # Early in a run the average must forget the initial weights quickly.
        decay = min(self.config.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        with torch.no_grad():
            for average, weight in zip(
                self.state.average.parameters(), self.state.model.parameters(), strict=True
            ):
                average.lerp_(weight, 1 - decay)

    def _validate(self) -> Validation:
        config = self.config
        too_early = config.coded and self.state.step <= config.identity_steps
        if self.validation is None or too_early or not self.team.leads:
            return Validation()
        return validate(
            self.state.average, self.validation, config.validation_images, coded=config.coded
        )

    def _row(self, losses: _StepLosses, restarted: int, seconds: float) -> LogRow:
        return LogRow(
            step=self.state.step,
            phase=self.config.phase(self.state.step - 1),
            learning_rate=self.config.step_learning_rate(self.state.step - 1),
            loss=losses.total.item(),
            psnr_db=losses.psnr_db,
            quantization_error=losses.quantization_error,
            class_loss=losses.class_loss,
            class_accuracy=losses.class_accuracy,
            codes_restarted=restarted,
            validation_psnr_db=self.validated.psnr_db,
            validation_accuracy=self.validated.accuracy,
            seconds=seconds,
        )


def validate(
    model: ScqAutoencoder, images: ImageSet, limit: int, *, coded: bool = True
) -> Validation:
    """PSNR and accuracy on up to `limit` evenly spaced images, cropped to the stride.

    `coded`: through the lattice code; otherwise from the encoder's latents as they are.
    """
    stride, device = model.config.stride, model.quantizer.codebook.device
    errors, hits = [], []
    positions = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
    with torch.inference_mode():
        for position in positions:
            image = to_tensor(images.images[position]).to(device)
            image = image[..., : image.shape[2] // stride * stride, :]
            image = image[..., : image.shape[3] // stride * stride]
            latents = model.encode(image)
            if coded:
                grid = (latents.shape[1], latents.shape[2])
                latents = model.dequantize(model.quantize(latents), grid)
            errors.append(float((model.decode(latents) - image).square().mean()))
            if images.labels and model.head is not None:
                label = int(model.classify(latents).argmax())
                hits.append(label == images.labels[position])
    accuracy = sum(hits) / len(hits) if hits else math.nan
    return Validation(float(np.mean([_psnr_db(error) for error in errors])), accuracy)


def support_sizes(draws: NDArray[np.float64], config: TrainConfig) -> NDArray[np.int64]:
    """Support limits from uniform draws: mostly all codes, else evenly 1 to max_support - 1."""
    largest, share = config.model.max_support, config.nested_dropout
    if largest == 1 or share == 0:
        return np.full(draws.shape, largest)
    fewer = 1 + np.minimum(draws / share * (largest - 1), largest - 2).astype(int)
    return np.where(draws < share, fewer, largest)


def _psnr_db(squared_error: float) -> float:
    return -10 * math.log10(squared_error) if squared_error else math.inf


def _progress(row: LogRow, config: TrainConfig) -> TrainProgress:
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
