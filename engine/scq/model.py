"""The convolutional autoencoder around the SCQ quantizer, and its file format.

Encoder and decoder are small convolution stacks on pixel-unshuffled input; between them lies a
grid of latents that the quantizer and the lattice code turn into indices. A model file is one
safetensors file with its configuration as JSON metadata: network weights in float16, the codebook
as int16 with a power-of-two scale, so that decoding latents is integer arithmetic, and the entropy
tables of the bitstream when there are any. This module knows nothing of image files, bitstreams or
training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from scq.backbones import Backbone, NetworkShape, ResidualBlock, build_decoder, build_encoder
from scq.errors import (
    InvalidCodebook,
    InvalidImage,
    InvalidLatents,
    ScqError,
    UnsupportedOperation,
)
from scq.lattice import LatticeAssignment, LatticeCode, reconstruct, search
from scq.layer import SCQLayer

_FORMAT = "scq-model-2"
_CODEBOOK = "quantizer.codebook"
_ENTROPY_PREFIX = "entropy."
# What a receiver needs to turn codes into a picture; encoders may differ between senders.
_HASHED_PREFIXES = ("decoder.", _CODEBOOK, _ENTROPY_PREFIX)
# Named one by one, so that a config field added later does not rename every model there is.
_HASHED_FIELDS = (
    "name", "kind", "stride", "max_width", "max_height", "code_dim", "num_codes", "max_support",
    "denominator", "patch", "decoder_widths", "decoder_blocks",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a model's shape and its codes.

    `kind` is "frame" (any size, padded to the stride) or "crop" (always max_width x max_height).
    `encoder_widths` and `decoder_widths` are channels from the finest level to the coarsest, one
    level per halving; `patch` is the pixel-unshuffle in front of the finest, so that
    patch * 2^(levels - 1) = stride. `head_pooling` "mean" averages the head's features over any
    grid; "grid" keeps every position apart and so needs kind "crop". `head_levels` residual
    blocks on ever halved grids come before the pooling. Backbones: see `backbones`.

    Raises:
        ScqError: a field out of range, naming it.
    """

    name: str
    kind: Literal["frame", "crop"]
    stride: int
    max_width: int
    max_height: int
    code_dim: int = 16
    num_codes: int = 256
    max_support: int = 2
    denominator: int = 4
    lam: float = 0.1
    classes: tuple[str, ...] = ()
    patch: int = 4
    encoder_widths: tuple[int, ...] = (48, 80, 128)
    encoder_blocks: tuple[int, ...] = (1, 1, 1)
    decoder_widths: tuple[int, ...] = (64, 80, 128)
    decoder_blocks: tuple[int, ...] = (2, 2, 1)
    head_width: int = 96
    head_pooling: Literal["mean", "grid"] = "mean"
    head_levels: int = 0
    encoder_backbone: Backbone = "cnn"
    decoder_backbone: Backbone = "cnn"

    def __post_init__(self) -> None:
        if not self.name or self.kind not in ("frame", "crop"):
            raise ScqError(f"model needs a name and a kind of frame or crop, got {self.kind!r}")
        self._check_levels()
        for name in ("stride", "code_dim", "head_width", "max_width", "max_height"):
            if getattr(self, name) < 1:
                raise ScqError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_width % self.stride or self.max_height % self.stride:
            raise ScqError(
                f"{self.max_width}x{self.max_height} is not a multiple of stride {self.stride}"
            )
        if self.head_pooling != "mean" and (self.head_pooling, self.kind) != ("grid", "crop"):
            raise ScqError(
                f"head_pooling {self.head_pooling!r} does not fit kind {self.kind!r}; use 'mean'"
            )
        if self.head_levels < 0:
            raise ScqError(f"head_levels must be >= 0, got {self.head_levels}")
        if not self.lam >= 0:
            raise ScqError(f"lam must be >= 0, got {self.lam}")
        _ = self.lattice, self.encoder_shape, self.decoder_shape

    def _check_levels(self) -> None:
        levels = len(self.encoder_widths)
        for name in ("encoder_blocks", "decoder_widths", "decoder_blocks"):
            if len(getattr(self, name)) != levels:
                raise ScqError(f"{name} must have {levels} entries like encoder_widths")
        if levels < 1 or self.patch * 2 ** (levels - 1) != self.stride:
            raise ScqError(
                f"patch {self.patch} and {levels} levels give stride "
                f"{self.patch * 2 ** max(levels - 1, 0)}, not {self.stride}"
            )

    @property
    def encoder_shape(self) -> NetworkShape:
        """The encoder's layout."""
        return self._shape(self.encoder_backbone, self.encoder_widths, self.encoder_blocks)

    @property
    def decoder_shape(self) -> NetworkShape:
        """The decoder's layout."""
        return self._shape(self.decoder_backbone, self.decoder_widths, self.decoder_blocks)

    def _shape(
        self, backbone: Backbone, widths: tuple[int, ...], blocks: tuple[int, ...]
    ) -> NetworkShape:
        return NetworkShape(backbone, self.code_dim, self.patch, widths, blocks)

    @property
    def head_positions(self) -> int:
        """How many grid positions the head's last layer sees apart from each other."""
        if self.head_pooling == "mean":
            return 1
        across, down = self.max_width // self.stride, self.max_height // self.stride
        for _ in range(self.head_levels):
            across, down = -(-across // 2), -(-down // 2)
        return across * down

    @property
    def lattice(self) -> LatticeCode:
        """The transmittable assignments of one latent."""
        return LatticeCode(self.num_codes, self.max_support, self.denominator)

    def to_json(self) -> str:
        """Canonical JSON (sorted keys, no spaces): the form that is stored and hashed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Inverse of `to_json`. Raises ScqError for anything else."""
        try:
            values = json.loads(text)
            known = {field.name for field in fields(cls)}
            unknown = set(values) - known
            if unknown:
                raise ScqError(f"unknown model config fields: {', '.join(sorted(unknown))}")
            arguments: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            }
            return cls(**arguments)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ScqError(f"model config is not valid: {error}") from error


class ClassifierHead(nn.Module):
    """Labels from a decoded grid: two 3x3 convolutions, coarser levels, pooling, linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.positions = config.head_width, config.head_positions
        self.first = nn.Conv2d(config.code_dim, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.levels = nn.Sequential(
            *(
                nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), ResidualBlock(width))
                for _ in range(config.head_levels)
            )
        )
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(width * self.positions, len(config.classes))

    def forward(self, grid: Tensor) -> Tensor:
        """(B, code_dim, h, w) -> (B, num_classes) logits."""
        hidden = functional.silu(self.first(grid))
        hidden = functional.silu(self.levels(self.second(hidden) + hidden))
        pooled = hidden.mean(dim=(2, 3)) if self.positions == 1 else hidden.flatten(1)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits


class ScqAutoencoder(nn.Module):
    """Images to a grid of latents and back, with the SCQ quantizer's codebook between.

    Images are float (B, 3, H, W) in [0, 1], H and W multiples of the stride; latents are
    (B, H/stride, W/stride, code_dim).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder_shape)
        self.quantizer = SCQLayer(config.code_dim, config.num_codes, config.lam)
        self.decoder = build_decoder(config.decoder_shape)
        self.head: ClassifierHead | None = None
        if config.classes:
            self.head = ClassifierHead(config)
        self.entropy_tensors: dict[str, Tensor] = {}

    def codebook_int16(self) -> tuple[NDArray[np.int16], int]:
        """The codebook as integers q (num_codes, code_dim) and exponent e: code = q * 2^-e.

        The exponent is the largest at which the largest entry fits. Exact for a loaded model;
        while training the parameter holds more digits than are stored. Raises InvalidCodebook
        for NaN or infinity.
        """
        codebook = self.quantizer.codebook.detach().double().cpu()
        if not bool(torch.isfinite(codebook).all()):
            raise InvalidCodebook("codebook holds NaN or infinity; the training diverged")
        exponent = _codebook_exponent(float(codebook.abs().max()))
        return (codebook * 2.0**exponent).round().to(torch.int16).numpy(), exponent

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, h, w, F). Raises InvalidImage on a wrong shape."""
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise InvalidImage(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if images.shape[2] % stride or images.shape[3] % stride:
            raise InvalidImage(
                f"{images.shape[3]}x{images.shape[2]} is not a multiple of stride {stride}; pad it"
            )
        # Channels last: an encoder took 13 ms instead of 18 for a 256x256 frame, loaded machine.
        pixels = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        latents: Tensor = self.encoder(pixels)
        return latents.permute(0, 2, 3, 1).contiguous()

    def quantize(self, latents: Tensor) -> LatticeAssignment:
        """Latents (B, h, w, F) -> their best lattice codes, raster order, N = B*h*w."""
        flat = latents.reshape(-1, self.config.code_dim)
        return search(flat, self.quantizer.codebook, self.config.lattice)

    def dequantize(self, assignment: LatticeAssignment, grid: tuple[int, int]) -> Tensor:
        """Codes in raster order -> latents (B, h, w, F), where `grid` is (h, w)."""
        flat = reconstruct(assignment, self.quantizer.codebook)
        return flat.reshape(-1, grid[0], grid[1], self.config.code_dim)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, h, w, F) -> images (B, 3, H, W) clamped to [0, 1]."""
        return self.decode_unclamped(latents).clamp(0, 1)

    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """`decode` without the clamp, whose gradient vanishes outside [0, 1]: for training."""
        image: Tensor = self.decoder(self._to_channels(latents))
        return image * 0.5 + 0.5

    def classify(self, latents: Tensor) -> Tensor:
        """Decoded latents (B, h, w, F) -> logits (B, classes).

        Raises UnsupportedOperation when the model has no head.
        """
        if self.head is None:
            raise UnsupportedOperation(f"model {self.config.name!r} has no classifier head")
        logits: Tensor = self.head(self._to_channels(latents))
        return logits

    @property
    def model_hash(self) -> str:
        """Content hash (hex SHA-256) of what `save_model` would store; see `model_id`."""
        tensors, exponent = _storage_tensors(self)
        return model_id(tensors, self.config, exponent)

    def _to_channels(self, latents: Tensor) -> Tensor:
        if latents.ndim != 4 or latents.shape[3] != self.config.code_dim:
            raise InvalidLatents(
                f"latents must be (B, h, w, {self.config.code_dim}), got {tuple(latents.shape)}"
            )
        return latents.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ModelFile:
    """A model file's contents: tensors as stored; codes are `quantizer.codebook` * 2^-exponent."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    codebook_exponent: int

    @property
    def model_hash(self) -> str:
        """The file's content id; see `model_id`."""
        return model_id(self.tensors, self.config, self.codebook_exponent)


def model_id(tensors: Mapping[str, Tensor], config: ModelConfig, codebook_exponent: int) -> str:
    """Hex SHA-256 over what a receiver decodes with, as stored: codebook, decoder, entropy tables.

    Encoder and head are left out on purpose: a better encoder for the same decoder and codebook
    writes codes that every receiver of the old model can read.
    """
    values = asdict(config)
    hashed = [values[name] for name in _HASHED_FIELDS] + [codebook_exponent]
    digest = hashlib.sha256(json.dumps(hashed, separators=(",", ":")).encode())
    for name in sorted(name for name in tensors if name.startswith(_HASHED_PREFIXES)):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save_model(model: ScqAutoencoder, path: Path | str) -> str:
    """Write the model's file and return its id.

    Raises InvalidCodebook for a codebook with NaN or infinity.
    """
    tensors, exponent = _storage_tensors(model)
    metadata = {
        "format": _FORMAT,
        "config": model.config.to_json(),
        "codebook_exponent": str(exponent),
    }
    save_file(tensors, str(path), metadata=metadata)
    return model_id(tensors, model.config, exponent)


def load_model(path: Path | str) -> ScqAutoencoder:
    """Read a model written by `save_model`, as float32 in eval mode.

    Raises:
        ScqError: no such file, not a model file, or tensors that do not fit the config.
    """
    stored = read_model_file(path)
    model = ScqAutoencoder(stored.config)
    entropy = {n: t for n, t in stored.tensors.items() if n.startswith(_ENTROPY_PREFIX)}
    weights = {n: t.float() for n, t in stored.tensors.items() if n not in entropy}
    weights[_CODEBOOK] = weights[_CODEBOOK] * 2.0**-stored.codebook_exponent
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ScqError(f"{path}: tensors do not fit the model config: {error}") from error
    model.entropy_tensors = {n.removeprefix(_ENTROPY_PREFIX): t for n, t in entropy.items()}
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def read_model_file(path: Path | str) -> ModelFile:
    """Config and stored tensors of a model file, without building the network.

    Raises ScqError for a missing file or one that is not a model of this format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ScqError(f"{path}: cannot read a model file: {error}") from error
    if metadata.get("format") != _FORMAT:
        found = metadata.get("format", "something else")
        raise ScqError(
            f"{path}: holds {found}, not {_FORMAT}; train or download one of the zoo's models"
        )
    codebook = tensors.get(_CODEBOOK)
    if codebook is None or codebook.dtype != torch.int16:
        raise ScqError(f"{path}: {_CODEBOOK} is missing or not int16; save it with save_model")
    try:
        exponent = int(metadata["codebook_exponent"])
    except (KeyError, ValueError) as error:
        raise ScqError(f"{path}: codebook_exponent is missing or not a number") from error
    return ModelFile(ModelConfig.from_json(metadata["config"]), tensors, exponent)


def _codebook_exponent(largest: float) -> int:
    if largest == 0:
        return 0
    exponent = 14 - math.floor(math.log2(largest))
    # 32767.5 and more would round up to 32768, which int16 does not hold.
    return exponent - 1 if round(largest * 2.0**exponent) > 32767 else exponent


def _storage_tensors(model: ScqAutoencoder) -> tuple[dict[str, Tensor], int]:
    tensors = {name: tensor.detach().half() for name, tensor in _contiguous(model).items()}
    codebook, exponent = model.codebook_int16()
    tensors[_CODEBOOK] = torch.from_numpy(codebook)
    for name, tensor in model.entropy_tensors.items():
        tensors[_ENTROPY_PREFIX + name] = tensor.contiguous()
    return tensors, exponent


def _contiguous(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
