"""What a training run is: its settings, its phases and learning rates, and the named presets.

Data only: knows how to check, store and schedule a run, not how to perform one.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from scq.data import GTSRB_CLASSES, CropConfig, ImageSet, hold_out_random, hold_out_tail
from scq.errors import ScqError
from scq.model import ModelConfig
from scq.training_augment import AugmentConfig

PhaseName = Literal["identity", "soft", "lattice", "finetune", "head", "polish"]

_LR_WARMUP_STEPS = 100
_LR_FLOOR = 0.05
_FINETUNE_RATE = 0.3


@dataclass(frozen=True)
class TrainConfig:
    """One reproducible training run.

    Steps count optimizer updates. `hold_out` splits `hold_out_fraction` of the images off for
    validation: "tail" in the given order (video), "random", or "none". `nested_dropout` is the
    share of pictures coded with fewer codes than the model allows, evenly among 1 to
    max_support - 1, in phase 3. `class_balance` repeats rare classes and `cutmix` is the share of
    batches that are mixed, see `training_batches`; `saturation_weight`, `feature_weight` and, with
    the latter, `mesh_weight` see `training_losses`. `head_crop` replaces `crop` in phase 5.
    `bfloat16` runs convolutions in bfloat16. With `coded` off, everything trains on unquantized
    latents in one long first phase: the bound, and with no reconstruction weight the reference
    classifier. A run without identity steps starts from a model and keeps its codebook.

    Raises:
        ScqError: a field out of range, naming it.
    """

    model: ModelConfig
    crop: CropConfig
    identity_steps: int = 400
    soft_steps: int = 100
    lattice_steps: int = 7000
    finetune_steps: int = 1200
    head_steps: int = 0
    polish_steps: int = 0
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    commitment: float = 1.0
    codebook_pull: float = 1.0
    codebook_rate_factor: float = 3.0
    class_weight: float = 0.0
    label_smoothing: float = 0.1
    reconstruction_weight: float = 1.0
    saturation_weight: float = 0.0
    feature_weight: float = 0.0
    mesh_weight: float = 0.0
    class_balance: float = 0.0
    cutmix: float = 0.0
    coded: bool = True
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    head_crop: CropConfig | None = None
    nested_dropout: float = 0.1
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
        for name in ("batch_size", "dead_code_interval"):
            self._require(name, getattr(self, name) >= 1)
        for name in ("identity_steps", "lattice_steps"):
            self._require(name, getattr(self, name) >= 0)
        for name in ("validate_interval", "validation_images", "checkpoint_interval"):
            self._require(name, getattr(self, name) >= 1)
        for name in ("soft_steps", "finetune_steps", "weight_decay", "commitment", "class_weight"):
            self._require(name, getattr(self, name) >= 0)
        for name in ("reconstruction_weight", "saturation_weight", "feature_weight", "mesh_weight"):
            self._require(name, getattr(self, name) >= 0)
        for name in ("class_balance", "cutmix"):
            self._require(name, 0 <= getattr(self, name) <= 1)
        for name in ("codebook_pull", "codebook_rate_factor", "head_steps", "polish_steps"):
            self._require(name, getattr(self, name) >= 0)
        for name in ("nested_dropout", "ema_decay", "hold_out_fraction", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) < 1)
        self._require("learning_rate", self.learning_rate > 0)
        self._require("hold_out", self.hold_out in ("tail", "random", "none"))
        self._require("head_steps", self.head_steps == 0 or self.class_weight > 0)
        self._require("crop", self.crop.size % self.model.stride == 0)
        if self.head_crop is not None:
            self._require("head_crop", self.head_crop.size % self.model.stride == 0)
        self._require("reconstruction_weight", self.reconstruction_weight + self.class_weight > 0)
        self._require("polish_steps", self.total_steps > 0)

    def _require(self, name: str, valid: bool) -> None:
        if not valid:
            raise ScqError(f"{name} is out of range: {getattr(self, name)!r}")

    @property
    def total_steps(self) -> int:
        """Optimizer updates of all phases together."""
        return self._head_end + self.polish_steps

    @property
    def keeps_codes(self) -> bool:
        """Whether pictures are coded as by the model that the run starts from."""
        return self.coded and self._lattice_end == 0

    @property
    def _lattice_end(self) -> int:
        return self.identity_steps + self.soft_steps + self.lattice_steps

    @property
    def _decoder_end(self) -> int:
        return self._lattice_end + self.finetune_steps

    @property
    def _head_end(self) -> int:
        return self._decoder_end + self.head_steps

    def phase(self, step: int) -> PhaseName:
        """The phase that `step` (from 0) belongs to."""
        if step < self.identity_steps or not self.coded:
            return "identity"
        if step < self.identity_steps + self.soft_steps:
            return "soft"
        if step < self._lattice_end:
            return "lattice"
        if step < self._decoder_end:
            return "finetune"
        return "head" if step < self._head_end else "polish"

    def step_learning_rate(self, step: int) -> float:
        """Phases 1-3: linear warm-up, then cosine to a floor. Later ones: cosine to zero each."""
        if step < self._lattice_end:
            ramp = min(1.0, (step + 1) / _LR_WARMUP_STEPS)
            falling = _LR_FLOOR + (1 - _LR_FLOOR) * _cosine(step / self._lattice_end)
            return self.learning_rate * ramp * falling
        if step < self._decoder_end:
            share = (step - self._lattice_end) / self.finetune_steps
            return _FINETUNE_RATE * self.learning_rate * _cosine(share)
        if step < self._head_end:
            return self.learning_rate * _cosine((step - self._decoder_end) / self.head_steps)
        share = (step - self._head_end) / self.polish_steps
        return _FINETUNE_RATE * self.learning_rate * _cosine(share)

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
            if values.get("head_crop"):
                values["head_crop"] = CropConfig(**values["head_crop"])
            values["augment"] = AugmentConfig(**values.get("augment", {}))
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ScqError(f"training config is not valid: {error!r}") from error


def _cosine(share: float) -> float:
    """From 1 at share 0 to 0 at share 1."""
    return 0.5 * (1 + math.cos(math.pi * share))


_FRAME_CROP = CropConfig(size=128, min_scale=0.8, max_scale=2.2)

_SIGN_AUGMENT = AugmentConfig(
    rotation=12, shear=0.15, scale=0.15, aspect=0.15, translation=0.08, contrast=0.4,
    brightness=0.2, gamma=0.5, saturation=0.5, colour=0.1, blur=0.9, noise=0.05, cutout=0.5,
)  # fmt: skip

_FOOD_AUGMENT = AugmentConfig(
    rotation=8, shear=0.05, aspect=0.15, contrast=0.2, brightness=0.1, gamma=0.15, saturation=0.2,
    colour=0.05, cutout=0.3,
)  # fmt: skip
_FRAME_MODEL: dict[str, Any] = {
    "stride": 16,
    "num_codes": 512,
    "denominator": 8,
    "encoder_widths": (48, 80, 144),
    "decoder_widths": (32, 64, 128),
    "decoder_blocks": (1, 1, 1),
}

PRESETS: dict[str, TrainConfig] = {
    "nav": TrainConfig(
        model=ModelConfig("nav", "frame", max_width=1280, max_height=720, **_FRAME_MODEL),
        crop=replace(_FRAME_CROP, jitter=0.1, colour=0.3),
        identity_steps=500,
        lattice_steps=11000,
        finetune_steps=1500,
        polish_steps=1500,
        saturation_weight=3.0,
        hold_out="tail",
    ),
    "food": TrainConfig(
        model=ModelConfig(
            "food",
            "frame",
            max_width=512,
            max_height=512,
            head_width=160,
            head_levels=2,
            encoder_blocks=(1, 1, 2),
            **_FRAME_MODEL,
        ),
        crop=CropConfig(size=128, min_scale=0.8, max_scale=1.75),
        head_crop=CropConfig(size=224, min_scale=0.6, max_scale=1.0),
        augment=_FOOD_AUGMENT,
        identity_steps=3000,
        lattice_steps=8000,
        finetune_steps=800,
        head_steps=1000,
        polish_steps=2000,
        class_weight=1.0,
        weight_decay=0.02,
        validation_images=200,
    ),
    "sign32": TrainConfig(
        model=ModelConfig(
            "sign32",
            "crop",
            stride=8,
            max_width=32,
            max_height=32,
            num_codes=90,
            patch=2,
            encoder_widths=(48, 96, 160),
            encoder_blocks=(1, 2, 1),
            decoder_widths=(48, 80, 128),
            decoder_blocks=(1, 1, 1),
            head_width=128,
            head_pooling="grid",
        ),
        crop=CropConfig(size=32, min_scale=1.0, max_scale=1.0, flip=False),
        augment=_SIGN_AUGMENT,
        identity_steps=800,
        soft_steps=100,
        lattice_steps=6000,
        finetune_steps=600,
        polish_steps=1500,
        batch_size=64,
        learning_rate=1.5e-3,
        class_weight=1.0,
        class_balance=0.5,
        validation_images=740,
        hold_out="none",
    ),
}
"""Named defaults. Class names are added from the data by `with_classes`."""


def reference_of(config: TrainConfig) -> TrainConfig:
    """The same recipe for a classifier on unquantized latents: what recognition could reach.

    Raises ScqError for a config without a class loss.
    """
    if not config.class_weight:
        raise ScqError(f"{config.model.name} has no class loss; there is no reference classifier")
    return replace(config, coded=False, reconstruction_weight=0.0, class_weight=1.0)


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
