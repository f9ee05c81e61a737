"""A tiny model learns synthetic pictures through all phases; runs repeat, resume and refuse."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from scq.data import GTSRB_CLASSES, CropConfig, ImageSet
from scq.errors import ScqError
from scq.experiments import experiment_names, load_experiment
from scq.model import ModelConfig, ScqAutoencoder, load_model
from scq.training import (
    PRESETS,
    TrainConfig,
    Trainer,
    TrainOptions,
    TrainProgress,
    reference_of,
    split,
    support_sizes,
    train,
    validate,
    with_classes,
)
from scq.training_log import LogRow, RunLog
from scq.training_losses import mesh_loss
from scq.training_parallel import choose_device

TINY = TrainConfig(
    model=ModelConfig(
        "tiny",
        "frame",
        stride=8,
        max_width=64,
        max_height=64,
        code_dim=4,
        num_codes=16,
        encoder_widths=(12, 12),
        encoder_blocks=(1, 1),
        decoder_widths=(12, 12),
        decoder_blocks=(1, 1),
        head_width=8,
    ),
    crop=CropConfig(size=32, min_scale=0.8, max_scale=1.0),
    identity_steps=30,
    soft_steps=5,
    lattice_steps=35,
    finetune_steps=10,
    head_steps=5,
    batch_size=8,
    learning_rate=4e-3,
    class_weight=0.05,
    dead_code_interval=5,
    ema_decay=0.9,
    bfloat16=False,
    validate_interval=20,
    checkpoint_interval=40,
)


def two_colour_pictures(count: int = 24) -> ImageSet:
    """Noisy pictures of class "cold" (blue) or "warm" (red), bright above a random row."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(count):
        image = rng.integers(0, 30, (40, 48, 3))
        image[: rng.integers(8, 32)] += 80
        image[..., 2 if number % 2 == 0 else 0] += 120
        images.append(image.astype(np.uint8))
    names = tuple(f"{number:02d}" for number in range(count))
    labels = tuple(number % 2 for number in range(count))
    return ImageSet(tuple(images), names, labels, ("cold", "warm"))


def log_column(folder: Path, name: str) -> list[str]:
    with (folder / "log.csv").open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_all_phases_learn_pictures_and_classes(tmp_path: Path) -> None:
    heard: list[TrainProgress] = []
    result = train(TINY, two_colour_pictures(), tmp_path, progress=heard.append)
    assert [item.step for item in heard] == list(range(1, 86))
    phases = [heard[i].phase for i in (0, 29, 30, 34, 35, 69, 70, 79, 80, 84)]
    names = ["identity", "soft", "lattice", "finetune", "head"]
    assert phases == [name for name in names for _ in range(2)]
    assert all(math.isfinite(item.loss) for item in heard)
    assert result.validation_psnr_db > heard[0].psnr_db + 4
    assert result.validation_accuracy == 1
    model = load_model(result.model_path)
    assert model.model_hash == result.model_hash
    assert model.config.classes == ("cold", "warm")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
    assert log_column(tmp_path, "step") == [str(step) for step in range(1, 86)]


def test_equal_seeds_give_equal_models(tmp_path: Path) -> None:
    short = replace(TINY, identity_steps=4, soft_steps=2, lattice_steps=6, finetune_steps=2)
    images = two_colour_pictures()
    hashes = [train(short, images, tmp_path / name).model_hash for name in ("a", "b")]
    other = train(replace(short, seed=1), images, tmp_path / "c").model_hash
    assert hashes[0] == hashes[1] != other


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = replace(
        TINY,
        identity_steps=4,
        soft_steps=2,
        lattice_steps=8,
        finetune_steps=2,
        head_steps=2,
        checkpoint_interval=9,
    )
    images = two_colour_pictures()
    whole = train(config, images, tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop_after(step: int) -> None:
        def watch(progress: TrainProgress) -> None:
            if progress.step == step:
                raise StopError

        with pytest.raises(StopError):
            train(config, images, tmp_path / "parts", progress=watch)

    stop_after(10)
    resumed = train(config, images, tmp_path / "parts", options=TrainOptions(resume=True))
    assert resumed.model_hash == whole.model_hash
    assert log_column(tmp_path / "parts", "step") == [str(step) for step in range(1, 19)]


def test_resuming_needs_a_checkpoint_of_the_same_config(tmp_path: Path) -> None:
    images = two_colour_pictures()
    with pytest.raises(ScqError, match="no checkpoint to resume"):
        train(TINY, images, tmp_path, options=TrainOptions(resume=True))
    short = replace(TINY, identity_steps=2, soft_steps=0, lattice_steps=1, finetune_steps=0)
    train(short, images, tmp_path)
    with pytest.raises(ScqError, match="different training config"):
        train(replace(short, seed=5), images, tmp_path, options=TrainOptions(resume=True))


def test_pictures_without_classes_train_a_model_without_head(tmp_path: Path) -> None:
    labelled = two_colour_pictures()
    images = ImageSet(labelled.images, labelled.names)
    config = replace(
        TINY,
        identity_steps=2,
        soft_steps=0,
        lattice_steps=2,
        finetune_steps=1,
        head_steps=0,
        class_weight=0.0,
    )
    result = train(config, images, tmp_path)
    assert load_model(result.model_path).head is None
    assert math.isnan(result.validation_accuracy)


def test_a_class_loss_needs_class_folders(tmp_path: Path) -> None:
    labelled = two_colour_pictures()
    with pytest.raises(ScqError, match="no class folders"):
        train(TINY, ImageSet(labelled.images, labelled.names), tmp_path)
    named = replace(TINY, model=replace(TINY.model, classes=("only",)))
    with pytest.raises(ScqError, match="do not fit the model's 1 classes"):
        train(named, labelled, tmp_path)


def test_validation_pictures_need_the_same_class_folders(tmp_path: Path) -> None:
    images = two_colour_pictures()
    other = ImageSet(images.images, images.names, images.labels, ("warm", "cold"))
    with pytest.raises(ScqError, match="give both the same ones"):
        train(TINY, images, tmp_path, validation=other)


def test_numbered_sign_folders_get_their_names() -> None:
    images = two_colour_pictures(4)
    folders = tuple(f"{number:02d}" for number in range(43))
    signs = ImageSet(images.images, images.names, images.labels, folders)
    assert with_classes(PRESETS["sign32"], signs).model.classes == GTSRB_CLASSES
    assert with_classes(TINY, images).model.classes == ("cold", "warm")
    assert with_classes(PRESETS["nav"], signs).model.classes == ()


def test_learning_rate_warms_up_falls_and_restarts_for_finetuning() -> None:
    config = replace(TINY, lattice_steps=965, finetune_steps=200, head_steps=0)
    rates = [config.step_learning_rate(step) for step in range(config.total_steps)]
    assert rates[0] == pytest.approx(config.learning_rate / 100)
    assert max(rates) == pytest.approx(config.learning_rate, rel=0.03)
    assert rates[999] < 0.06 * config.learning_rate
    assert rates[1000] == pytest.approx(0.3 * config.learning_rate)
    assert rates[-1] < 1e-3 * config.learning_rate
    longer = replace(config, head_steps=100)
    assert [longer.step_learning_rate(step) for step in range(1200)] == rates
    assert longer.step_learning_rate(1200) == config.learning_rate


@pytest.mark.parametrize("mode", ["tail", "random", "none"])
def test_hold_out_modes(mode: Literal["tail", "random", "none"]) -> None:
    images = two_colour_pictures(20)
    training, validation = split(replace(TINY, hold_out=mode), images)
    if mode == "none":
        assert validation is None
        assert len(training) == 20
    else:
        assert validation is not None
        assert set(training.names).isdisjoint(validation.names)
        assert len(validation) == 2


def test_configs_survive_json() -> None:
    for config in (TINY, *PRESETS.values(), *map(load_experiment, experiment_names())):
        assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "{}", '{"colour": 1}', '{"model": {}, "crop": {}}'])
def test_other_json_is_no_training_config(text: str) -> None:
    with pytest.raises(ScqError, match="config"):
        TrainConfig.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("ema_decay", 1.0),
        ("hold_out", "half"),
        ("soft_steps", -1),
        ("class_weight", 0.0),
        ("crop", CropConfig(size=30)),
    ],
)
def test_configs_name_the_bad_field(name: str, value: object) -> None:
    with pytest.raises(ScqError, match="head_steps" if name == "class_weight" else name):
        replace(TINY, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*PRESETS, *experiment_names()])
def test_every_preset_and_experiment_trains(name: str, tmp_path: Path) -> None:
    config = PRESETS[name] if name in PRESETS else load_experiment(name)
    assert config.model.name == name.removesuffix("_polish")
    size = config.model.stride * 2 if config.model.kind == "frame" else config.crop.size
    pictures = two_colour_pictures(6)
    short = replace(
        config,
        crop=replace(config.crop, size=size),
        head_crop=None if config.head_crop is None else replace(config.head_crop, size=size),
        model=slim(config.model),
        identity_steps=2,
        soft_steps=1,
        lattice_steps=2,
        finetune_steps=1,
        head_steps=min(config.head_steps, 1),
        polish_steps=min(config.polish_steps, 1),
        bfloat16=False,
        batch_size=4,
        hold_out="none",
    )
    result = train(short, pictures, tmp_path, options=TrainOptions(features=lambda seen: seen))
    assert load_model(result.model_path).config.classes == short_classes(config)


def slim(model: ModelConfig) -> ModelConfig:
    """The same layout with a quarter of the channels and few codes."""
    return replace(
        model,
        num_codes=8,
        encoder_widths=tuple(width // 4 for width in model.encoder_widths),
        decoder_widths=tuple(width // 4 for width in model.decoder_widths),
        head_width=model.head_width // 4,
    )


def short_classes(config: TrainConfig) -> tuple[str, ...]:
    return ("cold", "warm") if config.class_weight else config.model.classes


@pytest.mark.parametrize("name", ["nav", "food", "sign32"])
def test_presets_stay_small(name: str) -> None:
    classes = {"nav": 0, "food": 10, "sign32": 43}[name]
    config = replace(PRESETS[name].model, classes=tuple(f"c{i}" for i in range(classes)))
    parameters = sum(item.numel() for item in ScqAutoencoder(config).parameters())
    assert 2 * parameters <= 5_300_000


def test_validation_sees_uneven_sizes_and_limits(tmp_path: Path) -> None:
    short = replace(TINY, identity_steps=2, soft_steps=0, lattice_steps=1, finetune_steps=0)
    result = train(short, two_colour_pictures(), tmp_path)
    model = load_model(result.model_path)
    ragged = ImageSet((np.zeros((19, 33, 3), np.uint8),) * 3, ("a", "b", "c"))
    figures = validate(model, ragged, limit=2)
    assert math.isfinite(figures.psnr_db)
    assert math.isnan(figures.accuracy)


def test_a_reference_classifier_learns_from_unquantized_latents(tmp_path: Path) -> None:
    config = reference_of(TINY)
    assert config.phase(config.total_steps - 1) == "identity"
    result = train(config, two_colour_pictures(), tmp_path)
    assert result.validation_accuracy == 1
    with pytest.raises(ScqError, match="no class loss"):
        reference_of(PRESETS["nav"])


def test_a_feature_loss_needs_and_uses_features(tmp_path: Path) -> None:
    config = replace(
        TINY, identity_steps=3, soft_steps=1, lattice_steps=2, finetune_steps=0, head_steps=0
    )
    config = replace(config, feature_weight=0.5)
    images = two_colour_pictures()
    with pytest.raises(ScqError, match="feature_weight is set"):
        train(config, images, tmp_path)
    edges = torch.nn.Conv2d(3, 4, 3, stride=2).requires_grad_(False)
    losses: list[list[float]] = []
    for features in (edges, lambda pictures: [pictures, pictures.mean(dim=(2, 3))]):
        heard: list[TrainProgress] = []
        options = TrainOptions(features=features)
        train(config, images, tmp_path, progress=heard.append, options=options)
        losses.append([item.loss for item in heard])
    assert all(map(math.isfinite, (*losses[0], *losses[1])))
    assert losses[0] != losses[1]


def test_nested_dropout_uses_every_smaller_support() -> None:
    model = replace(TINY.model, max_support=4)
    sizes = support_sizes(np.linspace(0, 0.999, 1000), replace(TINY, model=model))
    assert [int((sizes == size).sum()) for size in (1, 2, 3, 4)] == pytest.approx(
        [33, 33, 33, 900], abs=2
    )
    single = replace(TINY, model=replace(TINY.model, max_support=1))
    assert set(support_sizes(np.zeros(3), single)) == {1}


def test_lambda_rises_over_the_soft_phase(tmp_path: Path) -> None:
    config = replace(TINY, identity_steps=2, soft_steps=4, class_weight=0.0, head_steps=0)
    trainer = Trainer(config, two_colour_pictures(), None, tmp_path, TrainOptions())
    seen = []
    for _ in range(6):
        trainer.step()
        seen.append(trainer.state.model.quantizer.config.lam)
    assert seen[2:] == pytest.approx([0.0325, 0.055, 0.0775, 0.1])


def test_devices_that_are_not_there_are_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ScqError, match="unknown device 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ScqError, match="no CUDA device"):
            choose_device("cuda")


def test_tensorboard_events_hold_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    row = LogRow(1, "soft", 0.1, 2.5, 20.0, 0.2, math.nan, math.nan, 0, math.nan, math.nan, 0.5)
    log = RunLog(tmp_path)
    log.write(row)
    log.write(replace(row, step=2, loss=1.5))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [2.5, 1.5]
    assert "class_loss" not in events.Tags()["scalars"]
    RunLog(tmp_path, keep=1).close()
    assert log_column(tmp_path, "step") == ["1"]


def test_a_run_goes_on_from_a_model_and_changes_what_it_trains_only(tmp_path: Path) -> None:
    images = two_colour_pictures()
    first = train(replace(TINY, lattice_steps=4), images, tmp_path / "first").model_path
    polish = replace(
        TINY, identity_steps=0, soft_steps=0, lattice_steps=0, finetune_steps=0, head_steps=0,
        polish_steps=3,
    )  # fmt: skip
    with pytest.raises(ScqError, match="identity_steps is 0"):
        train(polish, images, tmp_path / "second")
    options = TrainOptions(start=first)
    second = train(polish, images, tmp_path / "second", options=options).model_path
    before, after = load_model(first).state_dict(), load_model(second).state_dict()
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"decoder"}
    wider = replace(polish, model=replace(polish.model, denominator=8))
    with pytest.raises(ScqError, match="differs from the config in denominator"):
        train(wider, images, tmp_path / "third", options=options)


def test_the_mesh_loss_sees_repeated_dots_and_no_noise() -> None:
    target = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = 0.05 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    dots = torch.zeros(1, 3, 64, 64)
    dots[..., ::4, ::4] = 0.2  # the same mean square as the noise
    assert float(dots.square().mean()) == pytest.approx(float(noise.square().mean()), rel=0.05)
    assert mesh_loss(target + dots, target) > 10 * mesh_loss(target + noise, target)
    assert mesh_loss(target + 0.1, target) < 1e-9
    assert mesh_loss(target[..., :8, :8] + 0.1, target[..., :8, :8]) < 1e-9
