"""Training an SCQ autoencoder in four phases, with the lattice coder in the loop.

1. identity  - encoder and decoder alone, to have latents; ends with a k-means / least-squares
               codebook fitted to them.
2. soft      - through the exact `SCQLayer`: true gradients to encoder and codebook.
3. lattice   - through the transmittable code: each latent is searched, decoded from its lattice
               point; the codebook learns from the picture's gradient, the encoder straight
               through plus commitment; a share of images uses one code only (nested dropout over
               the support), dead codes restart from latents.
4. finetune  - averaged encoder and codebook are frozen; decoder and head learn the coded latents.

Weights are averaged (EMA) throughout and the average is what is exported. Every step draws from
generators seeded by (seed, step), so that a resumed run continues as if it had not stopped. This
module knows nothing of command lines or services; progress is reported to a callback.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from scq.codebook_init import kmeans, refine
from scq.data import (
    GTSRB_CLASSES,
    CropConfig,
    ImageSet,
    hold_out_random,
    hold_out_tail,
    sample_batch,
    to_tensor,
)
from scq.errors import ScqError
from scq.lattice import reconstruct, search
from scq.model import ModelConfig, ScqAutoencoder, save_model

PhaseName = Literal["identity", "soft", "lattice", "finetune"]

_LR_WARMUP_STEPS = 100
_LR_FLOOR = 0.05
_SEED_LATENTS = 20_000
_PIXEL_VARIANCE = 0.05


@dataclass(frozen=True)
class TrainConfig:
    """One reproducible training run.

    Steps count optimizer updates. `hold_out` splits `hold_out_fraction` of the images off for
    validation: "tail" in the given order (video), "random", or "none". `single_code_share` is the
    share of images coded with one code in phase 3. `bfloat16` runs convolutions in bfloat16.

    Raises:
        ScqError: a field out of range, naming it.
    """

    model: ModelConfig
    crop: CropConfig
    identity_steps: int = 400
    soft_steps: int = 100
    lattice_steps: int = 7000
    finetune_steps: int = 1200
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    commitment: float = 1.0
    codebook_pull: float = 1.0
    codebook_rate_factor: float = 3.0
    class_weight: float = 0.0
    label_smoothing: float = 0.1
    single_code_share: float = 0.1
    dead_code_interval: int = 100
    ema_decay: float = 0.998
    bfloat16: bool = True
    hold_out: Literal["tail", "random", "none"] = "random"
    hold_out_fraction: float = 0.1
    validate_interval: int = 1000
    validation_images: int = 40
    checkpoint_interval: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("identity_steps", "lattice_steps", "batch_size", "dead_code_interval"):
            self._require(name, getattr(self, name) >= 1)
        for name in ("validate_interval", "validation_images", "checkpoint_interval"):
            self._require(name, getattr(self, name) >= 1)
        for name in ("soft_steps", "finetune_steps", "weight_decay", "commitment", "class_weight"):
            self._require(name, getattr(self, name) >= 0)
        for name in ("codebook_pull", "codebook_rate_factor"):
            self._require(name, getattr(self, name) >= 0)
        for name in ("single_code_share", "ema_decay", "hold_out_fraction", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) < 1)
        self._require("learning_rate", self.learning_rate > 0)
        self._require("hold_out", self.hold_out in ("tail", "random", "none"))
        self._require("crop", self.crop.size % self.model.stride == 0)

    def _require(self, name: str, valid: bool) -> None:
        if not valid:
            raise ScqError(f"{name} is out of range: {getattr(self, name)!r}")

    @property
    def total_steps(self) -> int:
        """Optimizer updates of all phases together."""
        return self.identity_steps + self.soft_steps + self.lattice_steps + self.finetune_steps

    def phase(self, step: int) -> PhaseName:
        """The phase that `step` (from 0) belongs to."""
        if step < self.identity_steps:
            return "identity"
        if step < self.identity_steps + self.soft_steps:
            return "soft"
        return "lattice" if step < self.total_steps - self.finetune_steps else "finetune"

    def step_learning_rate(self, step: int) -> float:
        """Linear warm-up and cosine to a floor; phase 4 starts again at 0.3 and ends at 0."""
        main = self.total_steps - self.finetune_steps
        if step < main:
            cosine = 0.5 * (1 + math.cos(math.pi * step / main))
            ramp = min(1.0, (step + 1) / _LR_WARMUP_STEPS)
            return self.learning_rate * ramp * (_LR_FLOOR + (1 - _LR_FLOOR) * cosine)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - main) / self.finetune_steps))
        return 0.3 * self.learning_rate * cosine

    def to_json(self) -> str:
        """Indented JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read a training configuration. Raises ScqError naming what is wrong."""
        try:
            values: dict[str, Any] = json.loads(text)
            unknown = set(values) - {item.name for item in fields(cls)}
            if unknown:
                raise ScqError(f"unknown training config fields: {', '.join(sorted(unknown))}")
            values["model"] = ModelConfig.from_json(json.dumps(values["model"]))
            values["crop"] = CropConfig(**values["crop"])
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ScqError(f"training config is not valid: {error!r}") from error


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
class _Validation:
    psnr_db: float = math.nan
    accuracy: float = math.nan


ProgressCallback = Callable[[TrainProgress], None]

_FRAME_CROP = CropConfig(size=128, min_scale=0.8, max_scale=2.2)

PRESETS: dict[str, TrainConfig] = {
    "nav": TrainConfig(
        model=ModelConfig("nav", "frame", stride=16, max_width=1280, max_height=720),
        crop=_FRAME_CROP,
        hold_out="tail",
    ),
    "food": TrainConfig(
        model=ModelConfig("food", "frame", stride=16, max_width=512, max_height=512),
        crop=replace(_FRAME_CROP, max_scale=1.75, jitter=0.1),
        lattice_steps=5000,
        finetune_steps=1000,
        class_weight=0.03,
    ),
    "sign32": TrainConfig(
        model=ModelConfig("sign32", "crop", stride=8, max_width=32, max_height=32, patch=2),
        crop=CropConfig(size=32, min_scale=0.85, max_scale=1.15, flip=False, pad=3, jitter=0.3),
        identity_steps=200,
        soft_steps=50,
        lattice_steps=2500,
        finetune_steps=600,
        batch_size=64,
        class_weight=0.1,
        hold_out="none",
    ),
}
"""Named defaults. Class names are added from the data by `with_classes`."""


def with_classes(config: TrainConfig, images: ImageSet) -> TrainConfig:
    """The config with the data's classes where it asks for a class loss and names none."""
    if config.class_weight == 0 or config.model.classes:
        return config
    if not images.classes:
        raise ScqError("class_weight is set but the images lie in no class folders")
    names = images.classes
    if names == tuple(f"{number:02d}" for number in range(len(GTSRB_CLASSES))):
        names = GTSRB_CLASSES
    return replace(config, model=replace(config.model, classes=names))


def split(config: TrainConfig, images: ImageSet) -> tuple[ImageSet, ImageSet | None]:
    """Training and validation images as the config's `hold_out` says."""
    if config.hold_out == "tail":
        return hold_out_tail(images, config.hold_out_fraction)
    if config.hold_out == "random":
        return hold_out_random(images, config.hold_out_fraction, config.seed)
    return images, None


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
        ScqError: `output` holds another run's checkpoint, or labels do not fit the classes.
    """
    config = with_classes(config, images)
    if validation is None:
        images, validation = split(config, images)
    _check_labels(config, images)
    output.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(config, images, validation, output)
    if resume:
        trainer.restore()
    else:
        (output / "config.json").write_text(config.to_json())
        (output / "log.csv").unlink(missing_ok=True)
    return trainer.run(progress or (lambda _: None))


def _check_labels(config: TrainConfig, images: ImageSet) -> None:
    classes = len(config.model.classes)
    if config.class_weight and (not images.labels or max(images.labels) >= classes):
        raise ScqError(f"labels do not fit the model's {classes} classes")


class _Trainer:
    """Model, averaged model and optimizer of one run, and the step that advances them."""

    def __init__(
        self, config: TrainConfig, images: ImageSet, validation: ImageSet | None, output: Path
    ) -> None:
        self.config, self.images, self.validation, self.output = config, images, validation, output
        torch.manual_seed(config.seed)
        self.model = _channels_last(ScqAutoencoder(config.model))
        self.average = _channels_last(ScqAutoencoder(config.model)).eval().requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        codebook = self.model.quantizer.codebook
        others = [item for item in self.model.parameters() if item is not codebook]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": others, "weight_decay": config.weight_decay, "rate_factor": 1.0},
                {
                    "params": [codebook],
                    "weight_decay": 0.0,
                    "rate_factor": config.codebook_rate_factor,
                },
            ]
        )
        self.step = 0
        self.validated = _Validation()
        self.usage = torch.zeros(config.model.num_codes, dtype=torch.int64)

    def run(self, progress: ProgressCallback) -> TrainResult:
        config = self.config
        while self.step < config.total_steps:
            started = time.perf_counter()
            self._enter_phase()
            losses = self._update()
            restarted = self._restart_dead_codes()
            self.step += 1
            if self.step % config.validate_interval == 0 or self.step == config.total_steps:
                self.validated = self._validate()
            row = self._row(losses, restarted, time.perf_counter() - started)
            self._log(row)
            progress(_progress(row, config))
            if self.step % config.checkpoint_interval == 0:
                self.save()
        model_hash = self.save()
        return TrainResult(
            self.output / "model.safetensors",
            model_hash,
            self.validated.psnr_db,
            self.validated.accuracy,
        )

    def save(self) -> str:
        """Write the checkpoint and the exported average; each file appears whole or not at all."""
        tensors = dict(_named_tensors(self.model, self.average, self.optimizer))
        tensors["usage"] = self.usage
        metadata = {"step": str(self.step), "config": self.config.to_json()}
        partial = self.output / "partial.safetensors"
        save_file(tensors, str(partial), metadata=metadata)
        partial.replace(self.output / "checkpoint.safetensors")
        model_hash = save_model(self.average, partial)
        partial.replace(self.output / "model.safetensors")
        return model_hash

    def restore(self) -> None:
        """Continue from `output`/checkpoint.safetensors."""
        path = self.output / "checkpoint.safetensors"
        if not path.exists():
            raise ScqError(f"{path}: no checkpoint to resume; start without resume")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            if metadata["config"] != self.config.to_json():
                raise ScqError(f"{path}: written by a different training config")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step = int(metadata["step"])
        self.usage = tensors.pop("usage")
        self.model.load_state_dict(_with_prefix(tensors, "model."))
        self.average.load_state_dict(_with_prefix(tensors, "average."))
        _load_moments(self.optimizer, tensors)

    def _enter_phase(self) -> None:
        config, step = self.config, self.step
        if step == config.identity_steps:
            self._fit_codebook()
        if config.phase(step) == "finetune":
            if config.phase(step - 1) != "finetune":
                self.model.load_state_dict(self.average.state_dict())
            self.model.encoder.requires_grad_(False)
            self.model.quantizer.requires_grad_(False)
        for group in self.optimizer.param_groups:
            group["lr"] = config.step_learning_rate(step) * group["rate_factor"]

    def _update(self) -> _StepLosses:
        rng = np.random.default_rng((self.config.seed, self.step))
        torch.manual_seed(int(rng.integers(2**31)))
        self.model.train()
        losses = self._losses(rng)
        if not bool(torch.isfinite(losses.total)):
            raise ScqError(f"loss is not finite at step {self.step}; lower learning_rate")
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._average_weights()
        return losses

    def _losses(self, rng: np.random.Generator) -> _StepLosses:
        config, model = self.config, self.model
        batch = sample_batch(self.images, config.crop, config.batch_size, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            latents = model.encode(batch.images).float()
        quantized, penalty = self._quantize(latents, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            decoded = model.decode_unclamped(quantized).float()
        squared_error = functional.mse_loss(decoded, batch.images)
        total = squared_error / _PIXEL_VARIANCE + penalty
        class_loss, accuracy = torch.zeros(()), math.nan
        if batch.labels is not None and model.head is not None:
            logits = model.classify(quantized)
            class_loss = functional.cross_entropy(
                logits, batch.labels, label_smoothing=config.label_smoothing
            )
            accuracy = float((logits.argmax(dim=1) == batch.labels).float().mean())
            total = total + config.class_weight * class_loss
        return _StepLosses(
            total, squared_error.item(), float(penalty.detach()), class_loss.item(), accuracy
        )

    def _quantize(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Latents as the phase's decoder sees them, and the quantization error to penalise."""
        config, phase = self.config, self.config.phase(self.step)
        if phase == "identity":
            return latents, torch.zeros(())
        if phase == "soft":
            quantized, _, _ = self.model.quantizer(latents)
            return quantized, config.commitment * functional.mse_loss(quantized, latents)
        quantized = self._lattice_points(latents, rng)
        pull_codes = config.codebook_pull * functional.mse_loss(quantized, latents.detach())
        pull_latents = config.commitment * functional.mse_loss(latents, quantized.detach())
        return quantized + latents - latents.detach(), pull_codes + pull_latents

    def _lattice_points(self, latents: Tensor, rng: np.random.Generator) -> Tensor:
        model, code = self.model, self.config.model.lattice
        single = torch.from_numpy(rng.random(latents.shape[0]) < self.config.single_code_share)
        codebook = model.quantizer.codebook
        points = torch.empty_like(latents)
        for images, coder in ((~single, code), (single, replace(code, max_support=1))):
            if not bool(images.any()):
                continue
            flat = latents[images].flatten(0, 2)
            assignment = search(flat, codebook, coder)
            used = assignment.indices[assignment.numerators > 0]
            self.usage += torch.bincount(used, minlength=code.num_codes)
            points[images] = reconstruct(assignment, codebook).reshape(latents[images].shape)
        return points

    def _fit_codebook(self) -> None:
        """Codebook from the latents of random crops: k-means, then lattice least squares."""
        config, model = self.config, self.model
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
            self.average.quantizer.codebook.copy_(codebook)

    def _restart_dead_codes(self) -> int:
        """Move codes that were (almost) unused since the last check onto current latents.

        Only in the first 70 % of phase 3, so that the last codes placed have time to settle.
        """
        config = self.config
        first = config.identity_steps + config.soft_steps
        inside = first <= self.step < first + 0.7 * config.lattice_steps
        if not inside or (self.step + 1 - first) % config.dead_code_interval:
            return 0
        dead = (self.usage < 0.05 * self.usage.float().mean()).nonzero().flatten()
        self.usage.zero_()
        if len(dead):
            self._place_codes(dead)
        return len(dead)

    def _place_codes(self, dead: Tensor) -> None:
        config = self.config
        rng = np.random.default_rng((config.seed, self.step, 1))
        crops = sample_batch(self.images, config.crop, config.batch_size, rng).images
        codebook = self.model.quantizer.codebook
        with torch.no_grad():
            latents = self.model.encode(crops).flatten(0, 2)
            points = reconstruct(search(latents, codebook, config.model.lattice), codebook)
            errors = (latents - points).square().sum(dim=1).double().numpy()
            count = min(len(dead), len(latents))
            chosen = rng.choice(len(latents), count, replace=False, p=errors / errors.sum())
            codebook[dead[:count]] = latents[chosen]
            self.average.quantizer.codebook[dead[:count]] = latents[chosen]
        for moment in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[codebook][moment][dead[:count]] = 0

    def _average_weights(self) -> None:
        # Early in a run the average must forget the initial weights quickly.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, weight in zip(
                self.average.parameters(), self.model.parameters(), strict=True
            ):
                average.lerp_(weight, 1 - decay)

    def _validate(self) -> _Validation:
        if self.validation is None or self.step <= self.config.identity_steps:
            return _Validation()
        return validate(self.average, self.validation, self.config.validation_images)

    def _row(self, losses: _StepLosses, restarted: int, seconds: float) -> _LogRow:
        return _LogRow(
            step=self.step,
            phase=self.config.phase(self.step - 1),
            learning_rate=self.config.step_learning_rate(self.step - 1),
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


def validate(model: ScqAutoencoder, images: ImageSet, limit: int) -> _Validation:
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
    return _Validation(float(np.mean([_psnr_db(error) for error in errors])), accuracy)


def _psnr_db(squared_error: float) -> float:
    return -10 * math.log10(max(squared_error, 1e-12))


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


def _channels_last(model: ScqAutoencoder) -> ScqAutoencoder:
    # Half the time of the default layout in backward on AVX-512 cores.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _named_tensors(
    model: ScqAutoencoder, average: ScqAutoencoder, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in (("model.", model), ("average.", average)):
        for name, tensor in module.state_dict().items():
            yield prefix + name, tensor.contiguous()
    for number, state in optimizer.state_dict()["state"].items():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            yield f"optimizer.{number}.{moment}", state[moment].contiguous()


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _with_prefix(tensors, "optimizer.").items():
        number, moment = name.split(".")
        state.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
