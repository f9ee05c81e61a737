"""Reading pictures from every kind of source, splitting them, and drawing crops."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scq.data import (
    GTSRB_CLASSES,
    CropConfig,
    ImageSet,
    hold_out_random,
    hold_out_tail,
    load_images,
    sample_batch,
    to_tensor,
)
from scq.errors import InvalidImage, ScqError


def png(value: int, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def grey_levels(images: ImageSet) -> list[int]:
    return [int(image[0, 0, 0]) for image in images.images]


def ramp(count: int, side: int = 24) -> ImageSet:
    images = tuple(np.full((side, side, 3), i, np.uint8) for i in range(count))
    return ImageSet(images, tuple(f"{i:03d}" for i in range(count)))


def test_flat_zips_are_read_in_name_order_without_labels(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "flat.zip", {"b.png": png(2), "a.png": png(1), "x.txt": b"no"})
    images = load_images([path])
    assert images.names == ("a.png", "b.png")
    assert grey_levels(images) == [1, 2]
    assert images.images[0].shape == (4, 6, 3)
    assert (images.labels, images.classes) == ((), ())


def test_class_folders_become_sorted_classes_in_zips_and_folders(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "classes.zip", {"yield/1.png": png(1), "stop/1.png": png(2)})
    (tmp_path / "more" / "yield").mkdir(parents=True)
    (tmp_path / "more" / "yield" / "2.png").write_bytes(png(3))
    images = load_images([path, tmp_path / "more"])
    assert images.classes == ("stop", "yield")
    assert images.labels == (0, 1, 1)
    assert grey_levels(images) == [2, 1, 3]


def test_a_source_without_class_folders_makes_the_whole_set_unlabelled(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "classes.zip", {"stop/1.png": png(1)})
    (tmp_path / "single.png").write_bytes(png(2))
    assert load_images([path, tmp_path / "single.png"]).labels == ()


def test_video_clips_become_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in (0, 120, 240):
            pixels = np.full((16, 32, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    images = load_images([path])
    assert images.names == ("clip_00000", "clip_00001", "clip_00002")
    assert [image.shape for image in images.images] == [(16, 32, 3)] * 3
    np.testing.assert_allclose(grey_levels(images), [0, 120, 240], atol=12)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScqError, match=r"nowhere: no such file"):
        load_images([tmp_path / "nowhere"])
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ScqError, match=r"notes\.txt: not a zip"):
        load_images([tmp_path / "notes.txt"])
    (tmp_path / "fake.zip").write_bytes(b"not a zip")
    with pytest.raises(ScqError, match=r"fake\.zip: not a readable zip"):
        load_images([tmp_path / "fake.zip"])
    with pytest.raises(ScqError, match="no images found"):
        load_images([write_zip(tmp_path / "empty.zip", {"readme.txt": b""})])


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip", {"cut.png": png(1, (64, 64))[:60]})
    with pytest.raises(InvalidImage, match=r"cut\.png: cannot decode"):
        load_images([path])


def test_tail_split_keeps_neighbouring_frames_together() -> None:
    training, validation = hold_out_tail(ramp(20), 0.1)
    assert grey_levels(training) == list(range(18))
    assert grey_levels(validation) == [18, 19]


def test_random_split_is_a_partition_and_repeats() -> None:
    training, validation = hold_out_random(ramp(20), 0.25, seed=1)
    assert sorted(grey_levels(training) + grey_levels(validation)) == list(range(20))
    assert len(validation) == 5
    assert hold_out_random(ramp(20), 0.25, seed=1)[1].names == validation.names
    assert hold_out_random(ramp(20), 0.25, seed=2)[1].names != validation.names


@pytest.mark.parametrize("fraction", [0.0, 0.01, 1.0])
def test_splits_with_an_empty_side_are_refused(fraction: float) -> None:
    with pytest.raises(ScqError, match="leaves one side empty"):
        hold_out_tail(ramp(10), fraction)


@pytest.mark.parametrize(("scale", "pad"), [(0.5, 0), (1.0, 0), (2.0, 0), (9.0, 0), (1.1, 3)])
def test_crops_have_the_size_asked_for(scale: float, pad: int) -> None:
    crop = CropConfig(16, min_scale=scale, max_scale=scale, pad=pad, jitter=0.3, colour=0.5)
    batch = sample_batch(ramp(5), crop, 7, np.random.default_rng(0))
    assert batch.images.shape == (7, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert float(batch.images.min()) >= 0
    assert float(batch.images.max()) <= 1
    assert batch.labels is None


def test_crops_carry_their_own_label() -> None:
    plain = ramp(4)
    images = ImageSet(plain.images, plain.names, (0, 1, 2, 3), ("a", "b", "c", "d"))
    batch = sample_batch(images, CropConfig(size=8), 16, np.random.default_rng(0))
    assert batch.labels is not None
    levels = (batch.images[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(levels, batch.labels)


def test_recolouring_changes_saturation_both_ways_and_leaves_the_rest() -> None:
    reddish = np.full((8, 8, 3), (140, 100, 100), np.uint8)
    images = ImageSet((reddish,), ("red",))
    crop = CropConfig(size=8, min_scale=1, max_scale=1, colour=0.8)
    colours = sample_batch(images, crop, 200, np.random.default_rng(0)).images[:, :, 0, 0]
    redness = colours[:, 0] / colours[:, 1:].mean(dim=1)
    assert float(redness.max()) > 1.7
    assert float(redness.min()) < 1.15
    assert float(colours.mean()) == pytest.approx(113 / 255, abs=0.01)


def test_batches_repeat_for_equal_generators() -> None:
    images, crop = ramp(9), CropConfig(size=8, jitter=0.2)
    first, second = (sample_batch(images, crop, 4, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"min_scale": 0}, {"min_scale": 3}, {"pad": -1}, {"jitter": 1}, {"colour": 2}],
)
def test_impossible_crops_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ScqError, match=r"crop size|min_scale"):
        CropConfig(**({"size": 16} | change))  # type: ignore[arg-type]


def test_tensors_are_planar_and_scaled() -> None:
    image = np.zeros((2, 3, 3), np.uint8)
    image[1, 2] = (255, 51, 0)
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 2, 3)
    torch.testing.assert_close(tensor[0, :, 1, 2], torch.tensor([1.0, 0.2, 0.0]))


def test_labels_must_match_the_images() -> None:
    with pytest.raises(ScqError, match="1 labels for 2 images"):
        ImageSet(ramp(2).images, ("a", "b"), (0,), ("x",))


def test_gtsrb_has_43_different_class_names() -> None:
    assert len(set(GTSRB_CLASSES)) == 43
    assert GTSRB_CLASSES[1] == "speed limit 30"
    assert (GTSRB_CLASSES[13], GTSRB_CLASSES[14]) == ("yield", "stop")
    assert GTSRB_CLASSES[38] == "keep right"
