"""What a training step minimises besides quantization error: pictures, features, classes.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scq.errors import ScqError
from scq.training_batches import Mixed

Features = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""A frozen network: pictures (B, 3, H, W) in [0, 1] -> features (B, C, ...), differentiable."""

_TINY = 1e-6
_MESH, _MESH_AREA = 4, 6
# Every phase of a stride of eight.
_MAX_SHIFT = 7


def picture_loss(decoded: Tensor, target: Tensor, saturation_weight: float = 0.0) -> Tensor:
    """Mean squared error; a pixel of saturation 1 (max - min channel) weighs 1 + weight times."""
    if not saturation_weight:
        return functional.mse_loss(decoded, target)
    saturation = target.amax(dim=1, keepdim=True) - target.amin(dim=1, keepdim=True)
    weight = 1 + saturation_weight * saturation
    return (weight * (decoded - target).square()).mean() / weight.mean()


def mesh_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean square of the error that repeats every `_MESH` pixels over `_MESH_AREA` repeats.

    A feature loss likes dots in place of texture, and squared error hardly sees them, being small
    everywhere; but a pattern that repeats has an average, which true texture has not.
    """
    phases = functional.pixel_unshuffle(decoded - target, _MESH)
    repeated = functional.avg_pool2d(phases, min(_MESH_AREA, *phases.shape[2:]), stride=1)
    by_phase = repeated.reshape(len(decoded), 3, _MESH * _MESH, -1)
    return functional.mse_loss(by_phase, by_phase.mean(dim=2, keepdim=True).expand_as(by_phase))


def feature_loss(decoded: Tensor, target: Tensor, features: Features) -> Tensor:
    """Mean squared distance of channel-normalised features, averaged over the layers given.

    Both pictures lose up to `_MAX_SHIFT` rows and columns at random (torch's generator), so that a
    network with strides sees them from every origin. That alone keeps no dots out: see `mesh_loss`.
    """
    top, left = torch.randint(0, _MAX_SHIFT + 1, (2,)).tolist()
    decoded, target = (picture[..., top:, left:] for picture in (decoded, target))
    with torch.no_grad():
        wanted = _layers(features(target))
    pairs = zip(_layers(features(decoded.clamp(0, 1))), wanted, strict=True)
    distances = [(_unit(a) - _unit(b)).square().sum(dim=1).mean() for a, b in pairs]
    return torch.stack(distances).mean()


def class_loss(logits: Tensor, mixed: Mixed, label_smoothing: float) -> Tensor:
    """Cross-entropy with both labels of every picture, by their shares.

    Raises ScqError for an unlabelled batch.
    """
    if mixed.labels is None or mixed.partner_labels is None:
        raise ScqError("a class loss needs labels; give pictures in class folders")
    own, partner = (
        functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        for labels in (mixed.labels, mixed.partner_labels)
    )
    return (mixed.share * own + (1 - mixed.share) * partner).mean()


def _layers(features: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [features] if isinstance(features, Tensor) else features


def _unit(features: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    scaled: Tensor = features / (lengths + _TINY)
    return scaled
