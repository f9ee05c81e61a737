"""Classifiers trained on ORIGINAL pictures only, to be shown what each codec gives back.

They know nothing of any codec, ours included, so they favour none. "features" is a multinomial
logistic regression on EfficientNet-Lite0's pooled features; "convolutions" is a small network for
32x32 crops. Both are trained once per training set and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from scq.data import ImageSet, load_images
from scq.errors import ScqError
from scq.features import FeatureExtractor, PictureFeatures
from scq.images import Pixels, fit_frame
from scq.model import ScqAutoencoder

RecognizerKind = Literal["features", "convolutions"]
Report = Callable[[str], None]

# Part of the cache's key: raise it when training changes.
_RECIPE = 2
_CROP_SIDE = 32
_EPOCHS, _BATCH, _RATE = 6, 64, 4e-3
_RIDGE = 1e-3
_CHUNK = 32


class Recognizer(Protocol):
    """Names the class of pictures, given with their features where there is an extractor."""

    @property
    def description(self) -> str: ...
    def classify(
        self, pictures: Sequence[Pixels], features: Sequence[PictureFeatures]
    ) -> list[int]: ...


class FeatureRecognizer:
    """Logistic regression on pooled features, standardised over the training pictures."""

    description = "logistic regression on EfficientNet-Lite0 features, trained on originals"

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def classify(
        self, pictures: Sequence[Pixels], features: Sequence[PictureFeatures]
    ) -> list[int]:
        """Classes from the features alone."""
        pooled = torch.stack([found.pooled for found in features])
        inputs = (pooled - self._weights["mean"]) / self._weights["deviation"]
        logits = inputs @ self._weights["weight"].T + self._weights["bias"]
        return [int(label) for label in logits.argmax(1)]


class ConvRecognizer:
    """A small convolutional network on crops, each brought to mean 0 and deviation 1."""

    description = "a small convolutional network trained on originals"

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._network = _crop_network(len(weights[_LAST_BIAS])).eval()
        self._network.load_state_dict(weights)
        self._network.requires_grad_(False)

    @torch.inference_mode()
    def classify(
        self, pictures: Sequence[Pixels], features: Sequence[PictureFeatures]
    ) -> list[int]:
        """Classes from the pixels alone. Raises ScqError for other sizes than 32x32."""
        logits = self._network(_standardised(_crops(pictures)))
        return [int(label) for label in logits.argmax(1)]


class ModelRecognizer:
    """Encoder and head of a model file, its latents left unquantized.

    Made for the reference classifiers of `scq train --reference`, which saw originals alone.
    """

    def __init__(self, model: ScqAutoencoder, name: str) -> None:
        if model.head is None:
            raise ScqError(f"{name} has no classifier head, so it cannot recognize")
        self._model = model
        self.description = f"the reference classifier {name}, trained on originals, no codes"

    @torch.inference_mode()
    def classify(
        self, pictures: Sequence[Pixels], features: Sequence[PictureFeatures]
    ) -> list[int]:
        """Classes from the pixels alone."""
        named = []
        for picture in pictures:
            canvas, _ = fit_frame(picture, self._model.config)
            named.append(int(self._model.classify(self._model.encode(canvas)).argmax()))
        return named


def trained_recognizer(
    kind: RecognizerKind,
    sources: Sequence[Path],
    extractor: FeatureExtractor | None,
    report: Report,
) -> Recognizer:
    """The classifier trained on these originals, from the cache where it was trained before.

    Raises:
        ScqError: pictures without class folders, crops of other sizes, or "features" without an
            extractor.
    """
    path = _cache_path(kind, sources)
    if not path.is_file():
        weights = _train(kind, load_images(sources), extractor, report)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{id(weights)}.part")
        save_file(weights, str(partial))
        partial.replace(path)
    weights = load_file(path)
    return FeatureRecognizer(weights) if kind == "features" else ConvRecognizer(weights)


def _train(
    kind: RecognizerKind, originals: ImageSet, extractor: FeatureExtractor | None, report: Report
) -> dict[str, Tensor]:
    if not originals.labels:
        raise ScqError("the training pictures lie in no class folders; a recognizer needs classes")
    labels, classes = torch.tensor(originals.labels), len(originals.classes)
    if kind == "convolutions":
        return train_convolutions(_crops(originals.images), labels, classes, report)
    if extractor is None:
        raise ScqError("recognition of dishes needs EfficientNet-Lite0; run `scq features fetch`")
    report(f"reading features of {len(originals)} original training pictures (once)")
    return train_regression(_pooled(originals, extractor), labels, classes)


def _pooled(originals: ImageSet, extractor: FeatureExtractor) -> Tensor:
    """(N, 1280), reading pictures of one size together."""
    pooled: list[Tensor] = [torch.empty(0)] * len(originals)
    for group in same_shape_groups(originals.images):
        found = extractor.extract([originals.images[i] for i in group])
        for position, features in zip(group, found, strict=True):
            pooled[position] = features.pooled
    return torch.stack(pooled)


def same_shape_groups(pictures: Sequence[Pixels]) -> list[list[int]]:
    """Positions of pictures of one size, at most 32 together and about a megapixel."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for position, picture in enumerate(pictures):
        by_shape.setdefault(picture.shape, []).append(position)
    groups = []
    for shape, positions in by_shape.items():
        size = max(1, min(_CHUNK, (1 << 20) // (shape[0] * shape[1])))
        groups += [positions[i : i + size] for i in range(0, len(positions), size)]
    return groups


def train_regression(inputs: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Weights of the multinomial logistic regression with a ridge of 1e-3, by L-BFGS."""
    mean, deviation = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    standard = (inputs - mean) / deviation
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(standard @ weight.T + bias, labels)
        value = value + _RIDGE * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return {"mean": mean, "deviation": deviation,
            "weight": weight.detach(), "bias": bias.detach()}  # fmt: skip


def train_convolutions(
    crops: Tensor, labels: Tensor, classes: int, report: Report, epochs: int = _EPOCHS
) -> dict[str, Tensor]:
    """Weights of the crop network after `epochs` over uint8 crops (N, 3, 32, 32); seed 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _crop_network(classes).train()
        steps = epochs * -(-len(crops) // _BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for epoch in range(epochs):
            report(f"training on {len(crops)} original crops, epoch {epoch + 1} of {epochs} (once)")
            for batch in torch.split(torch.randperm(len(crops), generator=generator), _BATCH):
                inputs = _augmented(crops[batch], generator)
                loss = functional.cross_entropy(network(inputs), labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return {name: value.contiguous() for name, value in network.state_dict().items()}


_LAST_BIAS = "linear.bias"


def _crop_network(classes: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {}
    inputs = 3
    for level, (width, stride) in enumerate(((32, 1), (48, 2), (96, 2), (160, 2))):
        layers[f"conv{level}"] = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        layers[f"norm{level}"] = nn.BatchNorm2d(width)
        layers[f"relu{level}"] = nn.ReLU()
        inputs = width
    layers |= {"flatten": nn.Flatten(), "dropout": nn.Dropout(0.5)}
    layers["linear"] = nn.Linear(inputs * 16, classes)
    return nn.Sequential(OrderedDict(layers))


def _augmented(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Standardised crops, each turned, scaled, sheared and shifted a little, with some noise.

    Up to about 15 degrees, 20 %, 0.15 and 4 pixels; training tracks are few, so this matters.
    """
    count = len(crops)
    draws = torch.rand(count, 6, generator=generator) * 2 - 1
    turn, scale, shear = 0.26 * draws[:, 0], 1 + 0.2 * draws[:, 1], 0.15 * draws[:, 2]
    cosine, sine = turn.cos() / scale, turn.sin() / scale
    moves = 0.25 * draws[:, 3:5]
    rows = torch.stack((cosine, shear - sine, moves[:, 0], sine, cosine, moves[:, 1]), 1)
    grid = functional.affine_grid(rows.view(count, 2, 3), list(crops.shape), align_corners=False)
    moved = functional.grid_sample(crops.float(), grid, padding_mode="border", align_corners=False)
    levels = 8 * (draws[:, 5] + 1).view(-1, 1, 1, 1)
    return _standardised(moved + levels * torch.randn(moved.shape, generator=generator))


def _standardised(crops: Tensor) -> Tensor:
    values = crops.float()
    mean = values.mean((1, 2, 3), keepdim=True)
    deviation = values.std((1, 2, 3), keepdim=True)
    return (values - mean) / (deviation + 8)


def _crops(pictures: Sequence[Pixels]) -> Tensor:
    sizes = {picture.shape[:2] for picture in pictures}
    if sizes != {(_CROP_SIDE, _CROP_SIDE)}:
        raise ScqError(f"recognition of crops needs 32x32 pictures, got sizes {sorted(sizes)[:3]}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _cache_path(kind: str, sources: Sequence[Path]) -> Path:
    digest = hashlib.sha256(f"{kind} {_RECIPE}".encode())
    for source in sources:
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for file in files:
            if file.is_file():
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    folder = user_cache_path("vqstack", appauthor=False) / "compare"
    return folder / f"{kind}-{digest.hexdigest()[:16]}.safetensors"
