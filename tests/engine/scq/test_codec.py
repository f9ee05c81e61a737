"""FrameCodec and CodecRegistry: pictures through bytes, on models small and random."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scq.bitstream import KeyHeader, pack_key
from scq.bitstream.raw import base_bytes, enhancement_bytes
from scq.codec import CodecRegistry, FrameCodec
from scq.errors import (
    CorruptCodes,
    ImageTooLarge,
    InvalidImage,
    InvalidLatents,
    ReferenceMismatch,
    ScqError,
    UnknownModel,
    UnsupportedOperation,
)
from scq.model import ModelConfig, ScqAutoencoder, load_model, save_model
from support.lattices import random_tables

Pixels = NDArray[np.uint8]


MakeModel = Callable[..., ScqAutoencoder]


def resized(codec: FrameCodec, codes: bytes, header: KeyHeader) -> bytes:
    """The frame under another header, its checks made right."""
    picture = codec.read(codes)
    return pack_key(header, picture.assignment, codec.config.lattice, picture.placement.grid)


def with_tables(model: ScqAutoencoder) -> ScqAutoencoder:
    """The same model with entropy tables."""
    model.entropy_tensors = random_tables(model.config.lattice).to_tensors()
    return model


def film(photograph: Pixels, count: int) -> list[Pixels]:
    """The picture with a square that moves."""
    frames = []
    for number in range(count):
        frame = photograph.copy()
        frame[8:16, 8 * number : 8 * number + 8] = 255
        frames.append(frame)
    return frames


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
    assert (stats.frame_type, stats.entropy, stats.modes) == ("key", "raw", {})
    base = base_bytes(35, tiny_model.config.lattice)
    assert stats.base_bytes == 12 + base
    rest = enhancement_bytes(stats.indices[:, 0], tiny_model.config.lattice)
    assert stats.coded_bytes == 12 + base + rest
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
    picture = codec.read(encoded.codes)
    assert picture.complete
    np.testing.assert_array_equal(picture.assignment.indices.numpy(), encoded.stats.indices)
    np.testing.assert_array_equal(picture.assignment.numerators.numpy(), encoded.stats.numerators)
    assert codec.pack(picture.assignment, picture.placement).codes == encoded.codes


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
    codec = FrameCodec(tiny_model)
    codes = codec.encode(photograph).codes
    huge = resized(codec, codes, KeyHeader(65535, 65535, codec.frame_hash))
    with pytest.raises(ImageTooLarge, match="65535x65535"):
        codec.decode(huge)
    with pytest.raises(ImageTooLarge):
        FrameCodec(tiny_model, max_pixels=100).decode(codes)


def test_a_size_that_does_not_fit_the_payload_is_corrupt(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(tiny_model)
    codes = codec.encode(photograph).codes
    with pytest.raises(CorruptCodes, match="base check"):
        codec.decode(resized(codec, codes, KeyHeader(8, 8, codec.frame_hash)))
    with pytest.raises(CorruptCodes, match="base layer ends"):
        codec.decode(
            resized(codec, codes, KeyHeader(64, 48, codec.frame_hash))[:36], allow_partial=True
        )
    with pytest.raises(CorruptCodes, match="letterboxed"):
        codec.decode(resized(codec, codes, KeyHeader(56, 40, codec.frame_hash, True)))
    with pytest.raises(CorruptCodes, match="full check"):
        codec.decode(codes[:-1] + bytes([codes[-1] ^ 1]))
    with pytest.raises(CorruptCodes, match="not an SCQ1 frame"):
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


def test_crop_models_code_any_picture_in_forty_bytes() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        "sign", "crop", stride=8, max_width=32, max_height=32, code_dim=4, num_codes=90, patch=2
    )
    codec = FrameCodec(ScqAutoencoder(config))
    for shape in ((32, 32), (90, 41), (5, 7)):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        codes = codec.encode(image).codes
        assert codec.decode(codes).shape == image.shape
        assert len(codes) <= 40


def test_cut_frames_show_their_base_layer_when_asked(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(tiny_model)
    encoded = codec.encode(photograph)
    cut = encoded.codes[: encoded.stats.base_bytes + 3]
    with pytest.raises(CorruptCodes, match="allow_partial"):
        codec.decode(cut)
    picture = codec.read(cut, allow_partial=True)
    assert not picture.complete
    np.testing.assert_array_equal(picture.assignment.indices[:, 0], encoded.stats.indices[:, 0])
    assert codec.decode(cut, allow_partial=True).shape == photograph.shape
    assert len(codec.recognize(cut, allow_partial=True)) == 3
    registry = CodecRegistry([tiny_model])
    np.testing.assert_array_equal(
        registry.decode(cut, allow_partial=True), codec.decode(cut, allow_partial=True)
    )
    assert registry.recognize(cut, allow_partial=True)[0].score > 0


def test_models_with_tables_take_the_shorter_coder(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(with_tables(tiny_model))
    raw, rans = (codec.encode(photograph, entropy=e, tile=2) for e in ("raw", "rans"))
    auto = codec.encode(photograph, tile=2)
    assert (raw.stats.entropy, rans.stats.entropy) == ("raw", "rans")
    assert auto.codes in (raw.codes, rans.codes)
    assert len(auto.codes) == min(len(raw.codes), len(rans.codes))
    for encoded in (raw, rans):
        assert codec.inspect(encoded.codes).tile == 2
        np.testing.assert_array_equal(codec.decode(encoded.codes), codec.decode(auto.codes))


def test_streams_send_changes_and_show_what_pictures_of_their_own_would(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(with_tables(tiny_model))
    encoder, decoder = codec.frame_encoder(keyframe_interval=4), codec.frame_decoder()
    types = []
    for frame in film(photograph, 6):
        encoded = encoder.encode(frame)
        types.append(encoded.stats.frame_type)
        alone = codec.decode(codec.encode(frame).codes)
        np.testing.assert_array_equal(decoder.decode(encoded.codes), alone)
        # Reading the same bytes twice is no second change.
        assert decoder.recognize(encoded.codes)[0].score > 0
        if types[-1] == "delta":
            assert sum(encoded.stats.modes.values()) == 35
            assert encoded.stats.entropy == "rans"
    assert types == ["key", "delta", "delta", "delta", "key", "delta"]


def test_streams_start_over_where_a_change_makes_no_sense(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(with_tables(tiny_model))
    encoder = codec.frame_encoder()
    noise = np.random.default_rng(0).integers(0, 256, photograph.shape, np.uint8)
    assert encoder.encode(photograph).stats.frame_type == "key"
    assert encoder.encode(photograph).stats.modes["skip"] == 35
    assert encoder.encode(photograph, force_key=True).stats.frame_type == "key"
    assert encoder.encode(photograph[:32]).stats.frame_type == "key"
    assert encoder.encode(photograph[:32]).stats.frame_type == "delta"
    encoder.reset()
    assert encoder.encode(photograph[:32]).stats.frame_type == "key"
    lengths = [len(encoder.encode(picture).codes) for picture in (photograph, noise)]
    assert lengths[1] <= len(codec.encode(noise).codes)
    assert lengths[0] == len(codec.encode(photograph).codes)
    with pytest.raises(ScqError, match="keyframe_interval"):
        codec.frame_encoder(keyframe_interval=0)


def test_streams_of_models_without_tables_are_key_frames(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    encoder = FrameCodec(tiny_model).frame_encoder()
    assert {encoder.encode(photograph).stats.frame_type for _ in range(3)} == {"key"}


def test_a_lost_frame_is_noticed_and_a_key_frame_mends_the_stream(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(with_tables(tiny_model))
    encoder, decoder = codec.frame_encoder(), codec.frame_decoder()
    frames = [encoder.encode(frame).codes for frame in film(photograph, 4)]
    with pytest.raises(ReferenceMismatch, match="ask for a key frame"):
        decoder.decode(frames[1])
    decoder.decode(frames[0])
    with pytest.raises(ReferenceMismatch, match="ask for a key frame"):
        decoder.decode(frames[2])
    decoder.decode(frames[1])
    with pytest.raises(CorruptCodes):
        decoder.decode(frames[2][:-1])
    partial = decoder.read(frames[2][:-1], allow_partial=True)
    assert not partial.complete
    with pytest.raises(ReferenceMismatch, match="none is at hand"):
        decoder.decode(frames[3])
    key = encoder.encode(photograph, force_key=True).codes
    np.testing.assert_array_equal(decoder.decode(key), codec.decode(key))
    decoder.reset()
    with pytest.raises(ReferenceMismatch):
        decoder.decode(encoder.encode(photograph).codes)
    with pytest.raises(ReferenceMismatch):
        codec.decode(frames[1])


def test_a_stream_is_pinned_to_its_model(make_model: MakeModel, photograph: Pixels) -> None:
    mine = FrameCodec(with_tables(make_model("mine")))
    other = FrameCodec(with_tables(make_model("other", seed=1)))
    encoder, decoder = other.frame_encoder(), mine.frame_decoder()
    with pytest.raises(UnknownModel, match="mine"):
        decoder.decode(encoder.encode(photograph).codes)
    decoder.decode(mine.encode(photograph).codes)
    with pytest.raises(UnknownModel, match="mine"):
        decoder.decode(encoder.encode(photograph).codes)


def test_rate_weight_trades_error_for_bytes(tiny_model: ScqAutoencoder, photograph: Pixels) -> None:
    codec = FrameCodec(with_tables(tiny_model))
    nearest = codec.encode(photograph, entropy="rans")
    cheaper = codec.encode(photograph, entropy="rans", rate_weight=10.0)
    assert codec.encode(photograph, entropy="rans", rate_weight=0.0).codes == nearest.codes
    assert len(cheaper.codes) < len(nearest.codes)
    assert codec.decode(cheaper.codes).shape == photograph.shape
    frames = film(photograph, 3)
    skipped = []
    for weight in (None, 10.0):
        encoder, decoder = codec.frame_encoder(rate_weight=weight), codec.frame_decoder()
        coded = [encoder.encode(frame) for frame in frames]
        for frame in coded:
            decoder.decode(frame.codes)
        skipped.append(coded[-1].stats.modes["skip"])
    assert skipped[1] > skipped[0]


def test_rate_weight_needs_tables_and_a_sane_number(
    tiny_model: ScqAutoencoder, photograph: Pixels
) -> None:
    codec = FrameCodec(tiny_model)
    with pytest.raises(UnsupportedOperation, match="needs entropy tables"):
        codec.encode(photograph, rate_weight=0.1)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ScqError, match="rate_weight"):
            codec.encode(photograph, rate_weight=weight)
