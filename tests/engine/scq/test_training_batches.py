"""Augmentation, balance and mixing: ranges, repeatability, and what labels become."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from scq.data import CropConfig, ImageSet
from scq.errors import ScqError
from scq.training_augment import AugmentConfig, Varied, augment
from scq.training_batches import balanced, cutmix, sample_slots
from scq.training_losses import class_loss, feature_loss, picture_loss

ALL = AugmentConfig(
    **{item.name: 20.0 if item.name == "rotation" else 0.3 for item in fields(AugmentConfig)}
)


def batch(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def varied(config: AugmentConfig, seed: int = 0) -> Varied:
    return augment(batch(), config, torch.Generator().manual_seed(seed))


def test_nothing_asked_nothing_changed() -> None:
    result = varied(AugmentConfig())
    assert torch.equal(result.seen, batch())
    assert torch.equal(result.target, batch())


@pytest.mark.parametrize("name", [item.name for item in fields(AugmentConfig)])
def test_each_variation_acts_stays_in_range_and_repeats(name: str) -> None:
    config = replace(AugmentConfig(), **{name: getattr(ALL, name)})
    result = varied(config)
    assert not torch.equal(result.seen, batch())
    assert result.seen.shape == batch().shape
    assert 0 <= float(result.seen.min()) <= float(result.seen.max()) <= 1
    assert torch.equal(varied(config).seen, result.seen)
    assert not torch.equal(varied(config, seed=1).seen, result.seen)
    if name in ("blur", "noise", "cutout"):
        assert torch.equal(result.target, batch())
    else:
        assert torch.equal(result.target, result.seen)


def test_a_warp_moves_what_it_should() -> None:
    picture = torch.zeros(1, 3, 9, 9)
    picture[..., 4, 4] = 1
    turned = augment(picture, AugmentConfig(rotation=180), torch.Generator().manual_seed(0)).target
    assert float(turned[0, 0, 4, 4]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("value", [-0.1, 2.5, math.nan])
def test_wild_variations_are_refused(value: float) -> None:
    with pytest.raises(ScqError, match=r"augment\.gamma"):
        AugmentConfig(gamma=value)


def pictures(labels: tuple[int, ...]) -> ImageSet:
    images = tuple(np.full((8, 8, 3), 20 * i, np.uint8) for i in range(len(labels)))
    names = tuple(f"{i}" for i in range(len(labels)))
    return ImageSet(images, names, labels, ("a", "b"))


@pytest.mark.parametrize(("strength", "rare"), [(0.0, 1), (0.5, 2), (1.0, 4)])
def test_rare_classes_are_repeated(strength: float, rare: int) -> None:
    even = balanced(pictures((0, 0, 0, 0, 1)), strength)
    assert even.labels.count(0) == 4
    assert even.labels.count(1) == rare


def test_a_slot_draws_the_same_in_any_company() -> None:
    images, crop = pictures((0, 1, 0, 1)), CropConfig(size=4)
    together = sample_slots(images, crop, range(4), (7, 3))
    alone = sample_slots(images, crop, [2], (7, 3))
    assert torch.equal(together.images[2:3], alone.images)
    assert together.labels is not None
    assert alone.labels is not None
    assert together.labels[2] == alone.labels[0]


def test_cutmix_shares_labels_by_area() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 10, 10) / 4
    labels = torch.arange(4)
    mixed = cutmix(Varied(images, images), labels, 1.0, np.random.default_rng(0))
    own = (mixed.target == images).float().mean(dim=(1, 2, 3))
    assert torch.allclose(own, mixed.share, atol=1e-6)
    assert mixed.partner_labels is not None
    assert mixed.partner_labels.tolist() == [3, 0, 1, 2]
    never = cutmix(Varied(images, images), labels, 0.0, np.random.default_rng(0))
    assert torch.equal(never.seen, images)


def test_class_losses_weigh_both_labels() -> None:
    images = batch(2)
    mixed = cutmix(Varied(images, images), torch.tensor([0, 1]), 1.0, np.random.default_rng(2))
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    sure = class_loss(logits, replace(mixed, share=torch.ones(2)), 0.0)
    assert float(sure) == pytest.approx(math.log(1 + math.exp(-4)), abs=1e-6)
    assert float(class_loss(logits, mixed, 0.0)) > float(sure)
    with pytest.raises(ScqError, match="needs labels"):
        class_loss(logits, replace(mixed, labels=None), 0.0)


def test_saturated_pixels_weigh_more() -> None:
    target = torch.zeros(1, 3, 1, 2)
    target[0, 0, 0, 0] = 1
    grey_wrong, red_wrong = target.clone(), target.clone()
    grey_wrong[..., 1] += 0.5
    red_wrong[..., 0] -= 0.5
    assert float(picture_loss(grey_wrong, target)) == float(picture_loss(red_wrong, target))
    ratio = picture_loss(red_wrong, target, 3.0) / picture_loss(grey_wrong, target, 3.0)
    assert float(ratio) == pytest.approx(4)


def test_feature_distance_is_zero_for_equal_pictures_and_has_gradients() -> None:
    layer = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)
    pictures = batch().requires_grad_(True)
    assert float(feature_loss(batch(), batch(), layer)) == pytest.approx(0, abs=1e-12)
    loss = feature_loss(pictures, batch().flip(3), lambda x: [layer(x), x])
    loss.backward()  # type: ignore[no-untyped-call]
    assert pictures.grad is not None
    assert bool(pictures.grad.abs().sum() > 0)
