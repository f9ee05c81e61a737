"""VQ-VAE and VQ-VAE-2: the loss is the paper's, bytes round trip, training and files work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from scq.cli_vqvae import vqvae_app
from scq.data import ImageSet
from scq.errors import CorruptCodes, InvalidImage, InvalidLatents, ScqError
from scq.quantizers import QuantizerConfig
from scq.quantizers.vq import VectorQuantizer
from scq.vqvae import CodePrior, PriorConfig, VqVae, VqVaeConfig
from scq.vqvae.files import VqVaeBundle, load_bundle, save_bundle
from scq.vqvae.training import VqVaeTraining, train_priors, train_vqvae, training_grids

CODES = QuantizerConfig(code_dim=4, num_codes=8, levels=(5, 4, 3), dead_code_interval=4)
CONFIG = VqVaeConfig("vq", CODES, width=8, blocks=1)


def pictures(seed: int = 0, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return functional.interpolate(coarse, size=(16, 16), mode="nearest")


def trained(config: VqVaeConfig = CONFIG) -> VqVae:
    torch.manual_seed(0)
    model = VqVae(config).train()
    model(pictures())
    return model.eval()


def image_set() -> ImageSet:
    arrays = (pictures(5, 6) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return ImageSet(tuple(arrays), tuple(map(str, range(6))), (0, 1, 0, 1, 0, 1), ("a", "b"))


def test_the_loss_has_the_three_terms_of_the_paper() -> None:
    config = replace(CONFIG, quantization=replace(CODES, commitment=0.3), pixel_variance=0.1)
    model = trained(config).train()
    quantizer = model.level_quantizer(0)
    assert isinstance(quantizer, VectorQuantizer)
    images = pictures(1)
    latents = model.bottom_latents(model.encoder(images * 2 - 1)).permute(0, 2, 3, 1)
    flat = latents.reshape(-1, 4)
    codes = quantizer.codebook[torch.cdist(flat, quantizer.codebook).argmin(1)]
    straight = (flat + (codes - flat).detach()).reshape(latents.shape).permute(0, 3, 1, 2)
    reconstruction = functional.mse_loss(model.decoder(straight) * 0.5 + 0.5, images)
    codebook = functional.mse_loss(codes, flat.detach())
    commitment = functional.mse_loss(flat, codes.detach())
    losses = model(images)
    torch.testing.assert_close(losses.reconstruction, reconstruction)
    torch.testing.assert_close(losses.total, reconstruction / 0.1 + codebook + 0.3 * commitment)


@pytest.mark.parametrize("levels", [1, 2])
def test_every_parameter_learns(levels: int) -> None:
    model = trained(replace(CONFIG, levels=levels)).train()
    model(pictures(1)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        # The second convolution of a residual block starts at zero and holds back the first.
        if ".first." not in name:
            assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("quantizer", ["vq", "rvq", "scq_sparse"])
def test_bytes_decode_to_what_the_model_shows(quantizer: str, levels: int) -> None:
    model = trained(replace(CONFIG, quantizer=quantizer, levels=levels))
    images = pictures(1, 1)
    grids = model.encode(images)
    assert [grid.shape[1:3] for grid in grids] == [(4, 4)] if levels == 1 else [(2, 2), (4, 4)]
    for tables in (None, model.fit_tables(grids)):
        data = model.pack(grids, tables)
        assert all(map(torch.equal, model.unpack(data, tables), grids))
        with pytest.raises(CorruptCodes):
            model.unpack(data[:-1], tables)
    with torch.no_grad():
        shown = model(images).images.clamp(0, 1)
    torch.testing.assert_close(model.decode(grids), shown, atol=1e-5, rtol=0)


def test_bottom_codes_and_picture_depend_on_the_top() -> None:
    model = trained(replace(CONFIG, levels=2))
    features = model.encoder(pictures(1) * 2 - 1)
    tops = torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2)
    first, second = (model._bottom_latents(features, top) for top in tops)
    assert not torch.allclose(first, second)
    top, bottom = model.encode(pictures(1))
    other = (top + 1) % 8
    assert not torch.equal(model.decode((top, bottom)), model.decode((other, bottom)))
    assert not torch.equal(model.decode((top, bottom)), model.decode((top, (bottom + 1) % 8)))


def test_headers_that_cannot_be_are_corrupt() -> None:
    model = trained(replace(CONFIG, levels=2))
    data = model.pack(model.encode(pictures(1, 1)))
    for broken in (
        b"",
        data[:7],
        b"\0\0" + data[2:],
        b"\3" + data[1:],
        b"\xfe\xff\xfe\xff" + data[4:],
    ):
        with pytest.raises(CorruptCodes):
            model.unpack(broken)


def test_wrong_pictures_and_grids_are_refused() -> None:
    model = trained(replace(CONFIG, levels=2))
    with pytest.raises(InvalidImage, match="multiple of 8"):
        model.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(InvalidImage, match="must be"):
        model.encode(torch.zeros(3, 16, 16))
    top, bottom = model.encode(pictures())
    with pytest.raises(InvalidLatents, match="not twice"):
        model.decode((bottom, bottom))
    with pytest.raises(InvalidLatents, match="one picture"):
        model.pack((top, bottom))


def test_configs_survive_json_and_name_what_is_wrong() -> None:
    config = replace(CONFIG, levels=2)
    assert VqVaeConfig.from_json(config.to_json()) == config
    with pytest.raises(ScqError, match="unknown config fields: depth"):
        VqVaeConfig.from_json(config.to_json().replace('"width"', '"depth"'))
    with pytest.raises(ScqError, match="not valid"):
        VqVaeConfig.from_json("[]")
    with pytest.raises(ScqError, match="levels is out of range: 3"):
        replace(CONFIG, levels=3)
    with pytest.raises(ScqError, match="'none' has no codes"):
        replace(CONFIG, quantizer="none")


def test_training_lowers_the_error_and_bundles_survive_files(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    training = VqVaeTraining(
        steps=80, batch_size=4, learning_rate=1e-2, crop=16, prior_steps=2, prior_channels=4
    )
    config = replace(CONFIG, levels=2)
    before = VqVae(config).train()(pictures(5, 6)).reconstruction.detach()
    model = train_vqvae(config, training, image_set(), lambda *a: heard.append((a[2], a[0])))
    assert float(model(pictures(5, 6)).reconstruction) < 0.85 * float(before)
    priors = train_priors(model, image_set(), training, lambda *a: heard.append((a[2], a[0])))
    assert heard[-5:] == [
        ("pictures", 80), ("prior 1", 1), ("prior 1", 2), ("prior 2", 1), ("prior 2", 2),
    ]  # fmt: skip
    grids, labels = training_grids(model, image_set(), training, 2)
    assert labels is not None
    tables = model.fit_tables(grids)
    bundle = VqVaeBundle(model, tables, priors, (2, 2), ("a", "b"))
    save_bundle(bundle, tmp_path)
    loaded = load_bundle(tmp_path)
    assert (loaded.grid, loaded.classes) == ((2, 2), ("a", "b"))
    one = model.encode(pictures(5, 1))
    assert loaded.model.pack(one, loaded.tables) == model.pack(one, tables)
    assert [prior.config for prior in loaded.priors] == [prior.config for prior in priors]
    assert VqVaeConfig.from_json((tmp_path / "config.json").read_text()) == config
    save_bundle(VqVaeBundle(model), tmp_path)
    assert load_bundle(tmp_path).priors == ()


def test_files_that_are_no_bundle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScqError, match="cannot read"):
        load_bundle(tmp_path)
    save_bundle(VqVaeBundle(trained(), (), (CodePrior(PriorConfig((8,), channels=2)),)), tmp_path)
    (tmp_path / "model.safetensors").replace(tmp_path / "prior.safetensors")
    with pytest.raises(ScqError, match="cannot read"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"prior_steps": -1}, "-1"),
    ],
)
def test_training_settings_out_of_range_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ScqError, match=message):
        VqVaeTraining(**changes)  # type: ignore[arg-type]


def test_the_command_trains_samples_and_reconstructs(tmp_path: Path) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    for number, array in enumerate(image_set().images):
        Image.fromarray(array).save(data / f"{number}.png")
    runner = CliRunner()

    def run(*arguments: object) -> str:
        result = runner.invoke(vqvae_app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    tiny = ("--num-codes", 8, "--width", 8, "--size", 16, "--batch-size", 4)
    run("train", "--data", data, "-o", model, *tiny, "--steps", 3, "--prior-steps", 2)
    assert {path.name for path in model.iterdir()} == {
        "config.json", "model.safetensors", "prior.safetensors",
    }  # fmt: skip
    sheet = tmp_path / "sheet.png"
    assert "3 pictures" in run("sample", model, "-o", sheet, "--count", 3)
    first = sheet.read_bytes()
    assert np.asarray(Image.open(sheet)).shape == (32, 32, 3)
    run("sample", model, "-o", sheet, "--count", 3)
    assert sheet.read_bytes() == first
    said = run("reconstruct", model, data / "0.png", "-o", tmp_path / "back.png")
    assert "16x16" in said
    assert "with priors" in said
    with pytest.raises(ScqError, match="knows no classes"):
        run("sample", model, "-o", sheet, "--label", "a")
