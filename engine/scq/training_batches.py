"""What training sees of the pictures: sampling, balance between classes, mixing of neighbours.

A batch has numbered slots and each slot draws from a generator of its own, so that processes that
share a batch sample their parts only. Knows image sets and tensors, no models, losses or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scq.data import Batch, CropConfig, ImageSet, sample_batch
from scq.training_augment import Varied


@dataclass(frozen=True)
class Mixed:
    """A varied batch whose pictures may hold a patch of another picture.

    `share` (B,) is how much of a picture belongs to `labels`; the rest is `partner_labels`'.
    Labels (B,) int64 are None for unlabelled pictures.
    """

    seen: Tensor
    target: Tensor
    labels: Tensor | None
    partner_labels: Tensor | None
    share: Tensor


def sample_slots(
    images: ImageSet, crop: CropConfig, slots: Sequence[int], seed: tuple[int, ...]
) -> Batch:
    """One random crop for every slot number, the same for the same seed and slot."""
    parts = [sample_batch(images, crop, 1, np.random.default_rng((*seed, slot))) for slot in slots]
    labels = [part.labels for part in parts if part.labels is not None]
    pixels = torch.cat([part.images for part in parts])
    return Batch(pixels, torch.cat(labels) if labels else None)


def balanced(images: ImageSet, strength: float) -> ImageSet:
    """Repeat pictures of rare classes: `strength` 0 leaves the set alone, 1 evens classes out.

    A class of c pictures, the largest having m, counts (m / c)^strength times; the odd extra turn
    goes to its first pictures.
    """
    if not strength or not images.labels:
        return images
    labels = np.asarray(images.labels)
    largest = int(np.bincount(labels).max())
    positions: list[int] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        wanted = round(len(own) * (largest / len(own)) ** strength)
        positions.extend(np.resize(own, wanted).tolist())
    return images.subset(positions)


def cutmix(
    varied: Varied, labels: Tensor | None, probability: float, rng: np.random.Generator
) -> Mixed:
    """With `probability`, put one rectangle of each picture's neighbour into the whole batch.

    The rectangle's share of the picture is uniform in 0..1, and so is the labels' (CutMix, Yun et
    al. 2019).
    """
    seen, target = varied.seen, varied.target
    mixed = Mixed(seen, target, labels, labels, torch.ones(seen.shape[0], device=seen.device))
    if not probability or rng.random() >= probability:
        return mixed
    height, width = seen.shape[2:]
    side = np.sqrt(rng.random())
    tall, wide = round(height * side), round(width * side)
    top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    inside = (..., slice(top, top + tall), slice(left, left + wide))
    seen, target = seen.clone(), target.clone()
    seen[inside], target[inside] = varied.seen.roll(1, 0)[inside], target.roll(1, 0)[inside]
    return replace(
        mixed,
        seen=seen,
        target=target,
        partner_labels=None if labels is None else labels.roll(1, 0),
        share=mixed.share * (1 - tall * wide / (height * width)),
    )
