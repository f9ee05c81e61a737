"""`scq vqvae`: train a VQ-VAE with its priors on pictures, sample new ones, reconstruct a picture.

Talks to people only; the work is done in `scq.vqvae`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from scq.data import load_images, to_tensor
from scq.errors import InvalidImage, ScqError, UnsupportedOperation
from scq.images import DEFAULT_MAX_PIXELS, Pixels, read_image, write_png
from scq.metrics import psnr_db
from scq.quantizers import QUANTIZERS, QuantizerConfig
from scq.vqvae import PriorCodec, VqVaeConfig
from scq.vqvae.files import VqVaeBundle, load_bundle, save_bundle
from scq.vqvae.prior import Conditions
from scq.vqvae.training import VqVaeTraining, train_priors, train_vqvae, training_grids

# Crops whose codes the static tables are fitted on, in batches.
_TABLE_BATCHES = 16

vqvae_app = typer.Typer(
    no_args_is_help=True, help="VQ-VAE and VQ-VAE-2 with any quantizer: train, sample, reconstruct."
)

FolderArgument = Annotated[Path, typer.Argument(help="Folder written by `scq vqvae train`.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")]


@vqvae_app.command("train")
def train_command(
    data: Annotated[list[Path], typer.Option(help="Training pictures: folders, zips or clips.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model.")],
    quantizer: Annotated[
        str, typer.Option(help=f"One of: {', '.join(n for n in QUANTIZERS if n != 'none')}.")
    ] = "vq",
    levels: Annotated[int, typer.Option(help="1: VQ-VAE, 2: VQ-VAE-2.")] = 1,
    num_codes: Annotated[int, typer.Option(help="Codes of a codebook.")] = 512,
    width: Annotated[int, typer.Option(help="Channels of the networks.")] = 64,
    size: Annotated[int, typer.Option(help="Side of the square training crops, pixels.")] = 64,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the model.")] = 2000,
    prior_steps: Annotated[int, typer.Option(help="Steps of each level's prior, 0: none.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Crops a step.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train a model and, unless told not to, the priors that can sample and compress its codes."""
    codes = QuantizerConfig(code_dim=32, num_codes=num_codes, seed=seed)
    config = VqVaeConfig(quantizer, codes, levels=levels, width=width)
    training = VqVaeTraining(
        steps, batch_size, crop=size, prior_steps=prior_steps, prior_channels=width, seed=seed
    )
    typer.echo("reading pictures", err=True)
    images = load_images(data)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    extra = (TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, *extra, console=Console(stderr=True)) as progress:
        task = progress.add_task("pictures", total=steps, note="")

        def show(step: int, total: int, phase: str, note: str) -> None:
            progress.update(task, completed=step, total=total, description=phase, note=note)

        model = train_vqvae(config, training, images, show)
        grids, _ = training_grids(model, images, training, _TABLE_BATCHES)
        priors = train_priors(model, images, training, show) if prior_steps else ()
    side = size // config.stride
    tables = model.fit_tables(grids)
    save_bundle(VqVaeBundle(model, tables, priors, (side, side), images.classes), output)
    typer.echo(f"{output}: {levels}-level {quantizer}, {num_codes} codes, {len(priors)} priors")


@vqvae_app.command("sample")
def sample_command(
    folder: FolderArgument,
    output: OutputOption,
    count: Annotated[int, typer.Option(min=1, max=64, help="How many pictures.")] = 16,
    label: Annotated[str | None, typer.Option(help="Class to draw, where there are any.")] = None,
    temperature: Annotated[float, typer.Option(help="Below 1: likelier, less varied.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Draw new pictures from the priors, coarsest grid first, as one contact sheet."""
    bundle = load_bundle(folder)
    grids = _draw(bundle, count, _labels(bundle, label, count), temperature, seed)
    output.write_bytes(write_png(_sheet(bundle.model.decode(grids))))
    typer.echo(f"{output}: {count} pictures, seed {seed}")


@vqvae_app.command("reconstruct")
def reconstruct_command(
    folder: FolderArgument,
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP picture.")],
    output: OutputOption,
    label: Annotated[str | None, typer.Option(help="Its class, for priors with classes.")] = None,
) -> None:
    """Code a picture to bytes and back; say how many bytes each entropy coder takes."""
    bundle = load_bundle(folder)
    pixels = _cropped(read_image(image.read_bytes(), DEFAULT_MAX_PIXELS), bundle)
    grids = bundle.model.encode(to_tensor(pixels))
    data = bundle.model.pack(grids, bundle.tables)
    decoded = _pixels(bundle.model.decode(bundle.model.unpack(data, bundle.tables)))[0]
    output.write_bytes(write_png(decoded))
    sizes = [f"{len(bundle.model.pack(grids))} raw", f"{len(data)} with tables"]
    if bundle.priors:
        sizes.append(f"{_prior_bytes(bundle, grids, _labels(bundle, label, 1))} with priors")
    height, width = pixels.shape[:2]
    typer.echo(
        f"{output}: {width}x{height}, {psnr_db(pixels, decoded):.2f} dB, bytes: {', '.join(sizes)}"
    )


def _draw(
    bundle: VqVaeBundle, count: int, labels: Tensor | None, temperature: float, seed: int
) -> tuple[Tensor, ...]:
    if not bundle.priors:
        raise UnsupportedOperation("the model has no priors; train with --prior-steps above 0")
    generator = torch.Generator().manual_seed(seed)
    grids: list[Tensor] = []
    for level, prior in enumerate(bundle.priors):
        rows, columns = (side * 2**level for side in bundle.grid)
        conditions = Conditions(grids[0] if grids else None, labels)
        grids.append(
            prior.sample(
                (count, rows, columns),
                generator,
                conditions,
                temperature=temperature,
                allowed=bundle.model.level_quantizer(level).allowed,
            )
        )
    return tuple(grids)


def _prior_bytes(bundle: VqVaeBundle, grids: tuple[Tensor, ...], labels: Tensor | None) -> int:
    """Bytes of all levels under the priors, each checked to decode to the same symbols."""
    total = 0
    for level, prior in enumerate(bundle.priors):
        codec = PriorCodec(prior, bundle.model.level_quantizer(level).allowed)
        conditions = Conditions(grids[0] if level else None, labels)
        data = codec.encode(grids[level], conditions)
        if not torch.equal(codec.decode(data, conditions), grids[level]):
            raise ScqError(f"level {level} did not come back from its bytes; report this")
        total += len(data)
    return total


def _labels(bundle: VqVaeBundle, label: str | None, count: int) -> Tensor | None:
    if not bundle.classes:
        if label is not None:
            raise ScqError(f"the model knows no classes, so not {label!r}; leave out --label")
        return None
    if label is not None and label not in bundle.classes:
        raise ScqError(f"unknown class {label!r}; available: {', '.join(bundle.classes)}")
    if label is None:
        return torch.arange(count) % len(bundle.classes)
    return torch.full((count,), bundle.classes.index(label))


def _cropped(pixels: Pixels, bundle: VqVaeBundle) -> Pixels:
    """The largest centred part whose sides the model can take."""
    stride = bundle.model.config.stride
    height, width = (side // stride * stride for side in pixels.shape[:2])
    if not height or not width:
        raise InvalidImage(f"picture is smaller than {stride} pixels; take a larger one")
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _pixels(images: Tensor) -> list[Pixels]:
    scaled = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    return list(scaled.cpu().numpy())


def _sheet(images: Tensor) -> Pixels:
    """Pictures side by side, about as many rows as columns; unused places black."""
    pictures = _pixels(images)
    columns = int(np.ceil(np.sqrt(len(pictures))))
    blank = np.zeros_like(pictures[0])
    pictures += [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows, 0)
