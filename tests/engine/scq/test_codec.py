"""FrameCodec and CodecRegistry: pictures through bytes, on models small and random."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scq.bitstream import FrameHeader, payload_bytes
from scq.codec import CodecRegistry, FrameCodec
from scq.errors import (
    CorruptCodes,
    ImageTooLarge,
    InvalidImage,
    InvalidLatents,
    ScqError,
    UnknownModel,
    UnsupportedOperation,
)
from scq.model import ModelConfig, ScqAutoencoder, load_model, save_model

Pixels = NDArray[np.uint8]


MakeModel = Callable[..., ScqAutoencoder]


def resealed(codes: bytes, offset: int, value: bytes) -> bytes:
    """The frame with some bytes replaced and its checksum made right again."""
    start = bytearray(codes)
    start[offset : offset + len(value)] = value
    body = bytes(start[:12]) + bytes(start[16:])
    return bytes(start[:12]) + zlib.crc32(body).to_bytes(4, "little") + bytes(start[16:])


@pytest.mark.parametrize(("height", "width"), [(40, 56), (1, 1), (31, 17), (48, 64), (200, 300)])
def test_a_picture_comes_back_at_its_own_size(
    tiny_model: ScqAutoencoder, height: int, width: int
) -> None:
    codec = FrameCodec(tiny_model)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    encoded = codec.encode(image)
    decoded = codec.decode(encoded.codes)
    assert decoded.shape == image.shape
    assert decoded.dtype == np.uint8
    header = codec.inspect(encoded.codes)
    assert (header.width, header.height) == (width, height)
    assert header.letterboxed == (width > 64 or height > 48)


def test_stats_describe_the_measured_bytes_and_the_codes(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    encoded = FrameCodec(tiny_model).encode(photograph)
    stats = encoded.stats
    assert stats.coded_bytes == len(encoded.codes)
    assert stats.coded_bytes == 16 + payload_bytes(tiny_model.config.lattice, 5 * 7)
    assert stats.bpp == 8 * stats.coded_bytes / (40 * 56)
    assert set(stats.seconds) == {"preprocess", "encoder", "quantize", "entropy"}
    assert all(seconds >= 0 for seconds in stats.seconds.values())
    assert stats.indices.shape == stats.numerators.shape == (35, 2)
    np.testing.assert_array_equal(stats.support_sizes, (stats.numerators > 0).sum(1))


def test_the_bytes_carry_exactly_what_the_encoder_chose(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(tiny_model)
    encoded = codec.encode(photograph)
    assignment, placement = codec.unpack(encoded.codes)
    np.testing.assert_array_equal(assignment.indices.numpy(), encoded.stats.indices)
    np.testing.assert_array_equal(assignment.numerators.numpy(), encoded.stats.numerators)
    assert codec.pack(assignment, placement) == encoded.codes


def test_labels_are_sorted_probabilities(tiny_model: ScqAutoencoder, photograph: Pixels) -> None:
    codec = FrameCodec(tiny_model)
    labels = codec.recognize(codec.encode(photograph).codes)
    assert sorted(label.name for label in labels) == ["no entry", "stop", "yield"]
    assert [label.score for label in labels] == sorted((x.score for x in labels), reverse=True)
    assert sum(label.score for label in labels) == pytest.approx(1.0)
    assert all(tiny_model.config.classes[x.class_index] == x.name for x in labels)


def test_recognizing_without_a_head_is_unsupported(
    make_model: MakeModel, photograph: Pixels
) -> None:
    codec = FrameCodec(make_model("plain"))
    with pytest.raises(UnsupportedOperation, match="plain"):
        codec.recognize(codec.encode(photograph).codes)


def test_saved_and_loaded_models_read_each_others_frames_bit_exactly(
    make_model: MakeModel, tmp_path: Path, photograph: Pixels
) -> None:
    save_model(make_model("one"), tmp_path / "one.safetensors")
    first, second = (FrameCodec(load_model(tmp_path / "one.safetensors")) for _ in range(2))
    codes = first.encode(photograph).codes
    assert codes == second.encode(photograph).codes
    np.testing.assert_array_equal(first.decode(codes), second.decode(codes))


def test_threads_share_a_codec_and_agree(tiny_model: ScqAutoencoder, photograph: Pixels) -> None:
    codec = FrameCodec(tiny_model)
    expected = codec.encode(photograph).codes
    picture = codec.decode(expected)
    agree: list[bool] = []

    def work() -> None:
        codes = codec.encode(photograph).codes
        agree.append(codes == expected and bool((codec.decode(codes) == picture).all()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agree == [True] * 4


def test_nan_in_the_encoder_is_reported_as_invalid_latents(
    make_model: MakeModel, photograph: Pixels
) -> None:
    broken = make_model("broken")
    with torch.no_grad():
        next(broken.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(InvalidLatents, match="NaN"):
        FrameCodec(broken).encode(photograph)


def test_arrays_that_are_no_pictures_are_refused(tiny_model: ScqAutoencoder) -> None:
    codec = FrameCodec(tiny_model)
    for shape in ((0, 4, 3), (4, 0, 3), (4, 4), (4, 4, 4)):
        with pytest.raises(InvalidImage, match="uint8"):
            codec.encode(np.zeros(shape, np.uint8))
    with pytest.raises(InvalidImage, match="65536"):
        codec.encode(np.zeros((1, 65536, 3), np.uint8))


def test_a_header_cannot_ask_for_more_pixels_than_the_limit(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codes = FrameCodec(tiny_model).encode(photograph).codes
    huge = resealed(codes, 4, b"\xff\xff\xff\xff")
    with pytest.raises(ImageTooLarge, match="65535x65535"):
        FrameCodec(tiny_model).decode(huge)
    with pytest.raises(ImageTooLarge):
        FrameCodec(tiny_model, max_pixels=100).decode(codes)


def test_a_size_that_does_not_fit_the_payload_is_corrupt(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(tiny_model)
    codes = codec.encode(photograph).codes
    with pytest.raises(CorruptCodes, match="grid takes"):
        codec.decode(resealed(codes, 4, b"\x08\x00\x08\x00"))
    with pytest.raises(CorruptCodes, match="letterboxed"):
        codec.decode(resealed(codes, 3, b"\x01"))
    with pytest.raises(CorruptCodes, match="checksum"):
        codec.decode(codes[:-1] + bytes([codes[-1] ^ 1]))
    with pytest.raises(CorruptCodes, match="at least 16"):
        codec.recognize(b"")


def test_another_models_frame_is_an_unknown_model(
    make_model: MakeModel, photograph: Pixels
) -> None:
    mine, other = FrameCodec(make_model("mine", seed=0)), FrameCodec(make_model("other", seed=1))
    codes = other.encode(photograph).codes
    with pytest.raises(UnknownModel, match=f"{other.frame_hash.hex()}.*mine"):
        mine.decode(codes)


def test_the_registry_picks_the_model_from_the_header(
    make_model: MakeModel, photograph: Pixels
) -> None:
    registry = CodecRegistry([make_model("b", seed=1), make_model("a", seed=0, num_codes=16)])
    assert registry.names == ["a", "b"]
    for name in registry.names:
        codec = registry.get(name)
        codes = codec.encode(photograph).codes
        assert registry.for_codes(codes) is codec
        np.testing.assert_array_equal(registry.decode(codes), codec.decode(codes))
        with pytest.raises(UnsupportedOperation):
            registry.recognize(codes)


def test_the_registry_names_what_it_has_when_asked_for_more(
    make_model: MakeModel, photograph: Pixels
) -> None:
    registry = CodecRegistry([make_model("here")])
    with pytest.raises(UnknownModel, match="'gone'; available: here") as caught:
        registry.get("gone")
    assert caught.value.available == ("here",)
    stranger = FrameCodec(make_model("stranger", seed=5)).encode(photograph).codes
    with pytest.raises(UnknownModel, match="here"):
        registry.decode(stranger)


def test_the_registry_loads_files_and_refuses_doubles(
    make_model: MakeModel, tmp_path: Path
) -> None:
    save_model(make_model("one"), tmp_path / "one.safetensors")
    assert CodecRegistry.from_paths([tmp_path / "one.safetensors"]).names == ["one"]
    with pytest.raises(ScqError, match="loaded twice"):
        CodecRegistry.from_paths([tmp_path / "one.safetensors"] * 2)
    with pytest.raises(ScqError, match="missing"):
        CodecRegistry.from_paths([tmp_path / "missing.safetensors"])
    with pytest.raises(UnknownModel, match="no-such-model"):
        CodecRegistry.from_zoo(["no-such-model"])


def test_crop_models_code_any_picture_in_a_fixed_number_of_bytes() -> None:
    torch.manual_seed(0)
    crop = ScqAutoencoder(
        ModelConfig("sign", "crop", stride=8, max_width=32, max_height=32, code_dim=4, patch=2)
    )
    codec = FrameCodec(crop)
    sizes = set()
    for shape in ((32, 32), (90, 41), (5, 7)):
        image = np.full((*shape, 3), 120, np.uint8)
        codes = codec.encode(image).codes
        assert codec.decode(codes).shape == image.shape
        sizes.add(len(codes))
    assert sizes == {16 + 34}


def test_headers_are_equal_by_value() -> None:
    assert FrameHeader(1, 2, b"abcd") == FrameHeader(1, 2, b"abcd", False)
