"""What every quantizer takes, returns and promises: latents to symbols to measured bytes and back.

A latent of F numbers becomes S integers ("symbols"), position p of them in 0..alphabets[p]-1.
`forward` is for training (differentiable, with the loss that the method needs); `encode`,
`decode`, `pack` and `unpack` are the codec, exact and deterministic. All quantizers share one
entropy coder (see `coding`), so that their bytes can be compared. Knows no images and no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scq.errors import InvalidCodebook, InvalidLatents
from scq.metrics import CodebookUsage
from scq.quantizers.coding import (
    Bools,
    Ints,
    SymbolTables,
    fit_tables,
    pack_rans,
    pack_raw,
    symbol_bits,
    unpack_rans,
    unpack_raw,
)

# Latents searched at once: (4096, 1024) float32 distances are 16 MiB.
CHUNK_LATENTS = 4096


@dataclass(frozen=True)
class QuantizerConfig:
    """Settings of every quantizer in one place; each reads those that concern it.

    code_dim: F. num_codes: K, of each stage for rvq. num_stages, beam_size: rvq; the beam is the
    number of partial codes kept while encoding (1: greedy). levels: fsq, steps per channel.
    max_support, denominator: scq_sparse. lam, sweeps: scq_exact and scq_relaxed; weight_steps is
    what one weight of theirs is rounded to for coding. commitment, codebook_pull: weights of
    |z - sg(q)|^2 and |q - sg(z)|^2, means over all elements. decay: of moving averages.
    dead_code_interval: training steps between searches for dead codes, 0 for none; dead_code_share
    of the mean use is what a code needs to live. temperature, final_temperature,
    temperature_steps: gumbel's exponential annealing. entropy_weight: gumbel's pull towards
    uniform use. single_code_share: share of pictures coded with one code while scq_sparse trains.
    seed: of data-dependent initialization.

    Raises:
        InvalidCodebook: a field out of range, naming it.
    """

    code_dim: int = 16
    num_codes: int = 256
    num_stages: int = 2
    beam_size: int = 4
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    max_support: int = 2
    denominator: int = 4
    lam: float = 0.1
    sweeps: int = 20
    weight_steps: int = 256
    commitment: float = 0.25
    codebook_pull: float = 1.0
    decay: float = 0.99
    dead_code_interval: int = 100
    dead_code_share: float = 0.05
    temperature: float = 1.0
    final_temperature: float = 0.1
    temperature_steps: int = 5000
    entropy_weight: float = 1e-3
    single_code_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("code_dim", "num_stages", "beam_size", "max_support", "sweeps"):
            self._require(name, getattr(self, name) >= 1)
        self._require("num_codes", 2 <= self.num_codes <= 65536)
        self._require("levels", len(self.levels) >= 1 and min(self.levels, default=0) >= 2)
        self._require("denominator", self.denominator >= self.max_support)
        self._require("weight_steps", 2 <= self.weight_steps <= 65536)
        for name in ("lam", "commitment", "codebook_pull", "entropy_weight", "dead_code_share"):
            self._require(name, 0 <= getattr(self, name) < math.inf)
        for name in ("decay", "single_code_share"):
            self._require(name, 0 <= getattr(self, name) < 1)
        self._require("temperature", 0 < self.final_temperature <= self.temperature < math.inf)
        self._require("temperature_steps", self.temperature_steps >= 1)
        self._require("dead_code_interval", self.dead_code_interval >= 0)

    def _require(self, name: str, valid: bool) -> None:
        if not valid:
            raise InvalidCodebook(f"{name} is out of range: {getattr(self, name)!r}")


@dataclass(frozen=True)
class QuantizerOutput:
    """One differentiable pass.

    quantized: latents as the decoder gets them, shape of the input. loss: scalar to add to the
    reconstruction loss. symbols: (..., S) int64, S = 0 where the method has no code.
    """

    quantized: Tensor
    loss: Tensor
    symbols: Tensor


class Quantizer(nn.Module):
    """Base of all quantizers. Subclasses define `alphabets`, `encode`, `decode`, `_quantize`.

    A quantizer in training mode fits itself to the first latents it sees; call `initialize` with
    more latents than one batch holds for a better start. Averaged copies of a model must copy
    buffers as well as parameters: some quantizers keep their codebook in buffers.
    """

    initialized: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("initialized", torch.tensor(False))

    @property
    def alphabets(self) -> tuple[int, ...]:
        """Size of the alphabet at each symbol position."""
        raise NotImplementedError

    def encode(self, latents: Tensor) -> Tensor:
        """(N, F) -> (N, S) int64 symbols. Raises InvalidLatents."""
        raise NotImplementedError

    def decode(self, symbols: Tensor) -> Tensor:
        """(N, S) symbols -> (N, F) latents. Inverse of `encode` up to quantization."""
        raise NotImplementedError

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """How (N, S) symbols use the codes: share used, perplexity of the heaviest, of the mass."""
        raise NotImplementedError

    def _fit(self, latents: Tensor) -> None:
        """Set the parameters from (N, F) latents; the default has nothing to set."""

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        """(N, F) of `pictures` equal parts -> differentiable quantized (N, F), loss, symbols."""
        raise NotImplementedError

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """(B, h, w, F) float -> quantized, loss and symbols (B, h, w, S).

        Raises InvalidLatents for another shape, NaN or infinity.
        """
        if latents.ndim != 4:
            raise InvalidLatents(f"latents must be (B, h, w, F), got {tuple(latents.shape)}")
        flat = latents.reshape(-1, latents.shape[-1])
        self.check_latents(flat)
        if self.training and not bool(self.initialized):
            self.initialize(flat)
        quantized, loss, symbols = self._quantize(flat, latents.shape[0])
        return QuantizerOutput(
            quantized.reshape(latents.shape), loss, symbols.reshape(*latents.shape[:-1], -1)
        )

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Fit codebook or scales to (N, F) latents, deterministically for the config's seed."""
        self.check_latents(latents)
        self._fit(latents.detach())
        synchronize(self)
        self.initialized.fill_(True)

    def settle(self) -> None:
        """Stop moving dead codes, so that the last ones placed have time to find their place."""

    def take_moved_codes(self) -> Tensor:
        """Rows of `codebook` moved since the last call (int64), whose optimizer state is stale."""
        return torch.empty(0, dtype=torch.int64)

    @property
    def raw_bits_per_latent(self) -> float:
        """Bits of a latent in RAW mode, before rounding up to whole bytes."""
        return sum(math.log2(size) for size in self.alphabets)

    def fit_tables(self, symbols: Tensor) -> SymbolTables:
        """Static frequencies per symbol position from (N, S) training symbols."""
        return self._fit_tables(to_array(symbols))

    def pack(self, symbols: Tensor, tables: SymbolTables | None = None) -> bytes:
        """(N, S) symbols -> bytes: RAW mixed radix, or rANS under static `tables`."""
        array = to_array(symbols)
        return self._pack_raw(array) if tables is None else self._pack_rans(array, tables)

    def unpack(self, data: bytes, count: int, tables: SymbolTables | None = None) -> Tensor:
        """The `count` latents' symbols (count, S). Raises CorruptCodes."""
        if tables is None:
            return torch.from_numpy(self._unpack_raw(data, count))
        return torch.from_numpy(self._unpack_rans(data, count, tables))

    def bits(self, symbols: Tensor, tables: SymbolTables) -> Tensor:
        """(N,) float32: what each latent's (N, S) symbols take under `tables`, in bits."""
        return torch.from_numpy(self._symbol_bits(to_array(symbols), tables)).float()

    def check_latents(self, latents: Tensor) -> None:
        """Raise InvalidLatents unless (N, F), N >= 1 and finite."""
        width = self.config.code_dim
        if latents.ndim != 2 or latents.shape[1] != width or latents.shape[0] == 0:
            raise InvalidLatents(
                f"latents must be (N, {width}) with N >= 1, got {tuple(latents.shape)}"
            )
        if not bool(torch.isfinite(latents).all()):
            raise InvalidLatents("latents hold NaN or infinity; check the image or the encoder")

    def check_symbols(self, symbols: Tensor) -> None:
        """Raise InvalidLatents unless (N, S) int64 inside the alphabets."""
        sizes = torch.tensor(self.alphabets, device=symbols.device)
        if symbols.ndim != 2 or symbols.shape[1] != len(sizes) or symbols.dtype != torch.int64:
            raise InvalidLatents(
                f"symbols must be (N, {len(sizes)}) int64, got {tuple(symbols.shape)} "
                f"{symbols.dtype}"
            )
        if bool(((symbols < 0) | (symbols >= sizes)).any()):
            raise InvalidLatents(f"a symbol is outside its alphabet, sizes {self.alphabets}")

    def allowed(self, before: Tensor) -> Tensor | None:
        """(N, k) first symbols -> (N, alphabets[k]) bool, what symbol k may be; None for all.

        An absent symbol may only be 0. For models of symbols, such as autoregressive priors.
        """
        return None

    def _coded(self, position: int, symbols: Ints) -> Bools:
        """Which latents transmit `position`, told by the positions before it; all by default."""
        return np.ones(len(symbols), np.bool_)

    def _fit_tables(self, symbols: Ints) -> SymbolTables:
        return fit_tables(symbols, self.alphabets, self._coded)

    def _symbol_bits(self, symbols: Ints, tables: SymbolTables) -> NDArray[np.float64]:
        return symbol_bits(symbols, tables, self._coded)

    def _pack_rans(self, symbols: Ints, tables: SymbolTables) -> bytes:
        return pack_rans(symbols, tables, self._coded)

    def _unpack_rans(self, data: bytes, count: int, tables: SymbolTables) -> Ints:
        return unpack_rans(data, count, tables, self._coded)

    def _pack_raw(self, symbols: Ints) -> bytes:
        return pack_raw(symbols, self.alphabets, self._coded)

    def _unpack_raw(self, data: bytes, count: int) -> Ints:
        return unpack_raw(data, count, self.alphabets, self._coded)


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Value of `quantized`, gradient of the identity to `latents`."""
    return latents + (quantized - latents).detach()


def pull_losses(latents: Tensor, quantized: Tensor, config: QuantizerConfig) -> Tensor:
    """codebook_pull * |sg(z) - q|^2 + commitment * |z - sg(q)|^2, means over elements.

    The second and third term of the VQ-VAE loss (van den Oord et al., 2017, eq. 3).
    """
    codebook = nn.functional.mse_loss(quantized, latents.detach())
    commitment = nn.functional.mse_loss(latents, quantized.detach())
    return config.codebook_pull * codebook + config.commitment * commitment


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """(N, F), (K, F) -> (N,) int64 index of the L2-nearest code, lower index in a tie."""
    half_norms = 0.5 * codebook.square().sum(dim=1)
    parts = [
        (half_norms - chunk @ codebook.T).argmin(dim=1)
        for chunk in torch.split(latents, CHUNK_LATENTS)
    ]
    return torch.cat(parts)


def synchronize(module: nn.Module) -> None:
    """Give every process of a distributed run rank 0's parameters and buffers."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        distributed.broadcast(tensor.detach(), 0)


def to_array(symbols: Tensor) -> Ints:
    """(N, S) symbols as a numpy int64 array on the host."""
    return symbols.detach().cpu().numpy().astype(np.int64, copy=False)
