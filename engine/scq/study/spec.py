"""What the studies run: literal grids of quantizer settings, named so that rows can be compared.

Data only. Most important runs come first, since a study may be stopped at any time and continued.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from scq.errors import ScqError
from scq.quantizers import QuantizerConfig
from scq.study.autoencoder import AutoencoderConfig
from scq.study.pictures import SOURCES
from scq.study.training import Budget

_SPARSE = "scq_sparse"


@dataclass(frozen=True)
class Variant:
    """One quantizer with its settings; `label` names it in tables."""

    label: str
    quantizer: str
    config: QuantizerConfig


@dataclass(frozen=True)
class Study:
    """A question and the runs that answer it, on picture sets in this order.

    rate_weights: also measure with encoders that choose by error plus weight * bits, where the
    quantizer has a choice. end_to_end: the encoder is trained along with quantizer and decoder;
    otherwise it is frozen, so that all variants code the very same latents. traced: also log KKT
    residual and support while training. A label means the same run in every study.
    """

    name: str
    question: str
    variants: tuple[Variant, ...]
    sets: tuple[str, ...] = ("cifar10",)
    rate_weights: tuple[float, ...] = ()
    end_to_end: bool = False
    traced: bool = False


@dataclass(frozen=True)
class Settings:
    """What every run of every study shares.

    autoencoders: how many are pretrained per picture set; seed s starts from number s modulo this.
    table_pictures: training pictures that entropy tables are fitted on. initial_latents: training
    latents that a quantizer is initialised on. num_train, num_test: limits on the pictures.
    """

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    pretraining: Budget = field(
        default_factory=lambda: Budget(1000, learning_rate=2e-3, average_decay=0.99)
    )
    finetuning: Budget = field(default_factory=lambda: Budget(200, 32, codebook_rate=4.0))
    autoencoders: int = 1
    table_pictures: int = 3000
    initial_latents: int = 24_000
    num_train: int = 12_000
    num_test: int = 1000


@dataclass(frozen=True)
class Run:
    """One row of the results: a variant trained on one set with one seed."""

    study: str
    pictures: str
    variant: Variant
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the row, whichever study asks for it."""
        return (self.pictures, self.variant.label, self.seed)


def _config(**changes: object) -> QuantizerConfig:
    base = QuantizerConfig(decay=0.97, dead_code_interval=25, temperature_steps=200)
    config = replace(base, **changes)  # type: ignore[arg-type]
    # A code must have had a chance to be used before it is called dead.
    return replace(config, dead_code_interval=100) if config.num_codes > 2048 else config


def _sparse(num_codes: int, max_support: int = 2, denominator: int = 4) -> Variant:
    label = f"SCQ K={num_codes} s={max_support} n={denominator}"
    config = _config(num_codes=num_codes, max_support=max_support, denominator=denominator)
    return Variant(label, _SPARSE, config)


def _rvq(num_codes: int, num_stages: int) -> Variant:
    config = _config(num_codes=num_codes, num_stages=num_stages)
    return Variant(f"RVQ {num_codes}x{num_stages}", "rvq", config)


def _single(name: str, title: str, num_codes: int) -> Variant:
    return Variant(f"{title} {num_codes}", name, _config(num_codes=num_codes))


def _fsq(levels: tuple[int, ...]) -> Variant:
    return Variant(f"FSQ {'x'.join(map(str, levels))}", "fsq", _config(levels=levels))


def _soft(name: str, lam: float, num_codes: int) -> Variant:
    title = {"scq_exact": "exact", "scq_relaxed": "relaxed"}[name]
    config = _config(num_codes=num_codes, lam=lam)
    return Variant(f"{title} K={num_codes} lam={lam:g}", name, config)


_UNQUANTIZED = Variant("unquantized", "none", _config())

STUDIES = {
    study.name: study
    for study in (
        Study(
            "rate",
            "Mean squared error at equal measured bytes, about 12 and 16 bits a latent.",
            (
                _sparse(361, 2, 2),
                _rvq(256, 2),
                _fsq((8, 8, 8, 5, 5, 5)),
                _single("vq", "VQ", 4096),
                _sparse(90, 2, 2),
                _UNQUANTIZED,
            ),
            ("cifar10", "gtsrb", "nav", "food"),
            rate_weights=(0.1,),
        ),
        Study(
            "curve",
            "Mean squared error over the rate, every quantizer.",
            (
                _sparse(512, 2, 2),
                _sparse(209, 2, 4),
                _sparse(137, 2, 8),
                _sparse(181, 2, 2),
                _sparse(256, 3, 4),
                _rvq(256, 3),
                _rvq(1024, 2),
                _single("vq_ema", "VQ-EMA", 16384),
                _single("simvq", "SimVQ", 16384),
                _single("vq", "VQ", 1024),
                _single("gumbel", "Gumbel", 1024),
                _single("vq", "VQ", 256),
                _fsq((8, 8, 8, 8, 5, 5, 5)),
            ),
            rate_weights=(0.1,),
        ),
        Study(
            "solver",
            "Exact or relaxed soft quantization, plain VQ and none, end to end.",
            (
                _soft("scq_exact", 0.1, 128),
                _soft("scq_relaxed", 0.1, 128),
                _single("vq", "VQ", 128),
                Variant("unquantized, end to end", "none", _config()),
            ),
            end_to_end=True,
            traced=True,
        ),
        Study(
            "lambda",
            "How hard the pull towards the nearest code should be.",
            tuple(_soft("scq_exact", lam, 128) for lam in (0.01, 0.1, 1.0, 10.0)),
            end_to_end=True,
            traced=True,
        ),
        Study(
            "codes",
            "How many codes soft quantization can use.",
            tuple(_soft("scq_exact", 0.1, count) for count in (128, 512, 2048, 16384)),
            end_to_end=True,
            traced=True,
        ),
    )
}


def runs(study: Study, seeds: tuple[int, ...], sets: tuple[str, ...] = ()) -> Iterator[Run]:
    """Every run of a study, seed by seed, then set by set.

    Raises ScqError for a set that does not exist.
    """
    for name in sets:
        if name not in SOURCES:
            raise ScqError(f"unknown picture set {name!r}; available: {', '.join(SOURCES)}")
    for seed in seeds:
        for name in sets or study.sets:
            for variant in study.variants:
                yield Run(study.name, name, variant, seed)


def find_study(name: str) -> Study:
    """The study of that name. Raises ScqError naming those there are."""
    if name not in STUDIES:
        raise ScqError(f"unknown study {name!r}; available: {', '.join(STUDIES)}")
    return STUDIES[name]
