"""The models that are being served, and how their pictures are to be coded.

Knows no protobuf and no transport.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from scq.bitstream.frame import EntropyChoice
from scq.codec import EncodedFrame, FrameCodec, FrameEncoder
from scq.images import Pixels
from vqserve.tokenizer.artifacts import Artifacts
from vqserve.tokenizer.errors import LastModel, ModelNameTaken, UnknownModel

MIN_HASH_DIGITS = 8


@dataclass(frozen=True)
class Coding:
    """How pictures become codes.

    tile_side in latents, None for one tile; rate_weight in squared latent error per bit.
    """

    entropy: EntropyChoice = "auto"
    tile_side: int | None = None
    rate_weight: float = 0.0

    def encode(self, codec: FrameCodec, image: Pixels) -> EncodedFrame:
        """uint8 (H, W, 3) to a key frame."""
        return codec.encode(
            image, entropy=self.entropy, tile=self.tile_side, rate_weight=self.rate_weight
        )

    def encoder(self, codec: FrameCodec, keyframe_interval: int) -> FrameEncoder:
        """The encoder of a new stream."""
        return codec.frame_encoder(
            keyframe_interval=keyframe_interval,
            entropy=self.entropy,
            tile=self.tile_side,
            rate_weight=self.rate_weight,
        )


DEFAULT_CODING = Coding()


@dataclass(frozen=True)
class ModelCard:
    """What clients are told about a model; lengths and sizes as in tokenizer.proto."""

    name: str
    model_hash: str
    is_crop: bool
    stride: int
    code_dim: int
    num_codes: int
    max_support: int
    denominator: int
    bits_per_latent: float
    classes: tuple[str, ...]
    max_width: int
    max_height: int
    codebook_exponent: int = 0
    has_entropy_tables: bool = False


@dataclass(frozen=True)
class ServedModel:
    """A loaded model: its card, its codebook as little-endian float32, its codec and files."""

    card: ModelCard
    codebook: bytes = field(repr=False)
    codec: FrameCodec
    artifacts: Artifacts = field(default_factory=Artifacts, repr=False)

    @property
    def name(self) -> str:
        """Name that requests use."""
        return self.card.name


class ModelStore:
    """The one owner of the served models. Lookups see a consistent set while it changes."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._by_name: dict[str, ServedModel] = {}
        for model in models:
            self.add(model)

    @property
    def names(self) -> list[str]:
        """Names of the loaded models, sorted."""
        return sorted(self._by_name)

    def all(self) -> list[ServedModel]:
        """Loaded models in alphabetical order."""
        return [self._by_name[name] for name in self.names]

    def by_name(self, name: str) -> ServedModel:
        """The model called `name`; raises UnknownModel."""
        model = self._by_name.get(name)
        if model is None:
            raise self._unknown(f"unknown model {name[:100]!r}", "model")
        return model

    def by_name_or_hash(self, wanted: str) -> ServedModel:
        """By name, or by at least 8 leading hexadecimal digits of the hash."""
        if wanted not in self._by_name and len(wanted) >= MIN_HASH_DIGITS:
            for model in self._by_name.values():
                if model.card.model_hash.startswith(wanted.lower()):
                    return model
        return self.by_name(wanted)

    def by_hash(self, model_hash: bytes) -> ServedModel:
        """The model whose hash starts with these bytes of a frame's header."""
        prefix = model_hash.hex()
        for model in self._by_name.values():
            if model.card.model_hash.startswith(prefix):
                return model
        raise self._unknown(f"the codes were made by model {prefix}, which is not loaded", "codes")

    def add(self, model: ServedModel) -> None:
        """Serve one more model; raises ModelNameTaken."""
        if model.name in self._by_name:
            raise ModelNameTaken(
                f"a model called {model.name!r} is loaded; unload it or choose another name",
                field="name",
            )
        self._by_name = {**self._by_name, model.name: model}

    def remove(self, name: str) -> None:
        """Stop serving a model; requests that have it keep it until they end."""
        self.by_name(name)
        if len(self._by_name) == 1:
            raise LastModel(f"{name!r} is the only model; load another one before unloading it")
        self._by_name = {key: model for key, model in self._by_name.items() if key != name}

    def _unknown(self, problem: str, field: str) -> UnknownModel:
        return UnknownModel(f"{problem}; loaded: {', '.join(self.names) or 'none'}", field=field)
