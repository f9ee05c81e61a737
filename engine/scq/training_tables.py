"""Entropy tables for a trained model, fitted to its codes of training pictures.

The tables are part of the model and of its id, so this comes last. Knows models, pictures and the
bitstream's fitting, nothing of losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scq.bitstream.fitting import CodedGrid, fit_tables
from scq.bitstream.tables import EntropyTables
from scq.data import ImageSet
from scq.images import Pixels, fit_frame
from scq.model import ScqAutoencoder, load_model, save_model

# More latents than this sharpen the tables little and cost minutes.
_LATENTS = 400_000


@dataclass(frozen=True)
class TableData:
    """Training pictures for key frames; clips, frames in order, for delta frames."""

    stills: ImageSet
    clips: tuple[ImageSet, ...] = ()


def fit_model_tables(model: ScqAutoencoder, data: TableData) -> EntropyTables:
    """Tables from the model's codes of `data`, evenly spaced pictures if there are very many.

    Without clips the delta frames' tables are guesses.
    """
    code = model.config.lattice
    first = code_picture(model, data.stills.images[0])
    wanted = min(len(data.stills), math.ceil(_LATENTS / len(first.assignment)))
    positions = np.linspace(0, len(data.stills) - 1, wanted).round().astype(int)
    stills = [code_picture(model, data.stills.images[i]) for i in positions]
    videos = [[code_picture(model, frame) for frame in clip.images] for clip in data.clips]
    return fit_tables(stills, code, videos=videos)


def add_tables(path: Path, data: TableData) -> str:
    """Fit tables for the model file and store them in it; returns the new model id."""
    model = load_model(path)
    model.entropy_tensors = fit_model_tables(model, data).to_tensors()
    return _replace_model(path, model)


def take_tables(path: Path, source: Path) -> str | None:
    """Store `source`'s tables in the model file that codes alike; None where it has none."""
    model = load_model(path)
    model.entropy_tensors = load_model(source).entropy_tensors
    return _replace_model(path, model) if model.entropy_tensors else None


def _replace_model(path: Path, model: ScqAutoencoder) -> str:
    partial = path.with_suffix(".partial")
    model_hash = save_model(model, partial)
    partial.replace(path)
    return model_hash


def code_picture(model: ScqAutoencoder, image: Pixels) -> CodedGrid:
    """A picture's codes, fitted to the model's size as the codec does it."""
    pixels, _ = fit_frame(image, model.config)
    with torch.inference_mode():
        latents = model.encode(pixels)
        grid = (int(latents.shape[1]), int(latents.shape[2]))
        return CodedGrid(model.quantize(latents), grid)
