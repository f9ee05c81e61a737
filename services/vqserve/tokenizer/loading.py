"""Model files to served models. Knows the engine, no protobuf and no transport."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from scq import zoo
from scq.codec import FrameCodec
from scq.errors import ScqError
from scq.model import ScqAutoencoder, load_model
from vqserve.tokenizer import artifacts
from vqserve.tokenizer.artifacts import Artifact, Artifacts
from vqserve.tokenizer.codecs import ModelCard, ServedModel
from vqserve.tokenizer.convert import translated_errors
from vqserve.tokenizer.errors import InvalidModel

# Along each side of the picture that a model is tried with.
WARM_UP_LATENTS = 4
# Names become metric labels and parts of URLs.
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def load_served(spec: str, max_image_pixels: int) -> ServedModel:
    """A zoo model by name, or a model file by path (anything with a slash or a suffix)."""
    with translated_errors():
        is_path = "/" in spec or spec.endswith(".safetensors")
        model = load_model(spec) if is_path else zoo.load(spec)
    return warmed_up(serve(model, max_image_pixels))


def load_served_file(path: Path, name: str, max_image_pixels: int) -> ServedModel:
    """A model file, served under `name` or under its own name when that is empty."""
    with translated_errors():
        model = load_model(path)
    return warmed_up(serve(model, max_image_pixels, name))


def warmed_up(model: ServedModel) -> ServedModel:
    """The model after it has coded one small picture; raises InvalidModel when it cannot.

    The first frame otherwise pays for what torch sets up lazily, and a model with NaN weights
    would be found out by a client.
    """
    side = WARM_UP_LATENTS * model.card.stride
    picture = np.full((side, side, 3), 128, np.uint8)
    try:
        codes = model.codec.encode(picture).codes
        model.codec.decode(codes)
        if model.card.classes:
            model.codec.recognize(codes)
    except ScqError as error:
        raise InvalidModel(f"model {model.name!r} cannot code a plain picture: {error}") from error
    return model


def zoo_names() -> list[str]:
    """Names of the models that are shipped."""
    return [info.name for info in zoo.list_models()]


def serve(model: ScqAutoencoder, max_image_pixels: int, name: str = "") -> ServedModel:
    """A model ready to be served; raises InvalidModel for a name that cannot be."""
    card = _card(model, name or model.config.name)
    if not NAME_PATTERN.fullmatch(card.name):
        raise InvalidModel(
            f"{card.name[:100]!r} cannot be served; a model name matches {NAME_PATTERN.pattern}",
            field="name",
        )
    codec = FrameCodec(model, max_pixels=max_image_pixels)
    return ServedModel(card, _codebook_bytes(model), codec, Artifacts(_own_files(model)))


def with_bundle(model: ServedModel, bundle_root: Path | None) -> ServedModel:
    """The model with the files of its export bundle, if `bundle_root` has one of its name.

    Raises InvalidModel for a bundle of another model, for one that is damaged, and for a root that
    is no folder.
    """
    if bundle_root is not None and not bundle_root.is_dir():
        raise InvalidModel(
            f"bundle_root {bundle_root} is not a folder; name the one that holds a bundle of "
            "`scq export` in a folder of each model's name, or leave it out"
        )
    if bundle_root is None or not (folder := bundle_root / model.name).is_dir():
        return model
    # The exporter is not needed for serving; it is imported only where there is a bundle.
    from scq.export.bundle import read_bundle

    with translated_errors():
        bundle = read_bundle(folder)
        files = [Artifact.of(entry.name, bundle.read(entry.name)) for entry in bundle.artifacts]
    made_for, held = str(bundle.model["model_id"]), model.card.model_hash
    if made_for != held:
        raise InvalidModel(
            f"{folder} was exported from model {made_for[:12]}, {model.name!r} is {held[:12]}; "
            "export it again"
        )
    manifest = Artifact.of(artifacts.MANIFEST, (folder / artifacts.MANIFEST).read_bytes())
    own = model.artifacts.all()
    return replace(model, artifacts=Artifacts([*own, manifest, *files]))


def _card(model: ScqAutoencoder, name: str) -> ModelCard:
    config = model.config
    return ModelCard(
        name=name,
        model_hash=model.model_hash,
        is_crop=config.kind == "crop",
        stride=config.stride,
        code_dim=config.code_dim,
        num_codes=config.num_codes,
        max_support=config.max_support,
        denominator=config.denominator,
        bits_per_latent=config.lattice.bits_per_latent,
        classes=config.classes,
        max_width=config.max_width,
        max_height=config.max_height,
        codebook_exponent=model.codebook_int16()[1],
        has_entropy_tables=bool(model.entropy_tensors),
    )


def _own_files(model: ScqAutoencoder) -> list[Artifact]:
    integers, _ = model.codebook_int16()
    files = [Artifact.of(artifacts.CODEBOOK, integers.astype("<i2").tobytes())]
    if model.entropy_tensors:
        tables = {name: tensor.contiguous() for name, tensor in model.entropy_tensors.items()}
        files.append(Artifact.of(artifacts.TABLES, safetensors.torch.save(tables)))
    return files


def _codebook_bytes(model: ScqAutoencoder) -> bytes:
    codebook = model.quantizer.codebook.detach().to(torch.float32).cpu().numpy()
    return np.ascontiguousarray(codebook, dtype="<f4").tobytes()
