"""Finite scalar quantization: a few bounded channels, each rounded to a few levels.

Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023; bounding and rounding by
vector-quantize-pytorch. There is no codebook to learn or to collapse: two linear maps lead from
the latent to the channels and back. They start on the principal axes of the first latents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scq.errors import InvalidCodebook
from scq.metrics import CodebookUsage
from scq.quantizers.base import Quantizer, QuantizerConfig
from scq.quantizers.library import load_library

# Channels coded together share one table, like the index of a product code, up to this size.
_MAX_GROUP = 1024
# Product codes up to this size are counted code by code.
_MAX_COUNTED = 1 << 22
# A channel of unit variance enters the tanh at this scale, so that outer levels are used too.
_SPREAD = 0.8


class FiniteScalarQuantizer(Quantizer):
    """`levels` channels; symbols are groups of neighbouring channels in mixed radix."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        if min(config.levels) < 3 or len(config.levels) > config.code_dim:
            raise InvalidCodebook(
                f"levels {config.levels} need at least 3 steps a channel and at most "
                f"code_dim = {config.code_dim} channels"
            )
        self.core: Any = load_library("fsq").FSQ(
            levels=list(config.levels), dim=config.code_dim, return_indices=False
        )
        self._groups = _group(config.levels)

    @property
    def alphabets(self) -> tuple[int, ...]:
        """One symbol per group of channels."""
        levels = self.config.levels
        return tuple(math.prod(levels[start:end]) for start, end in self._groups)

    def encode(self, latents: Tensor) -> Tensor:
        """(N, F) -> (N, S) mixed-radix digits of the rounded channels."""
        self.check_latents(latents)
        with torch.no_grad():
            return self._symbols(self._channels(latents))

    def decode(self, symbols: Tensor) -> Tensor:
        """(N, S) -> (N, F), differentiable in the linear map back."""
        self.check_symbols(symbols)
        levels = torch.tensor(self.config.levels, device=symbols.device)
        half = levels // 2
        decoded: Tensor = self.core.project_out(((self._digits(symbols) - half) / half).float())
        return decoded

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """Uses of the product code, or of the groups' codes where it is too large to count."""
        sizes = torch.tensor(self.alphabets)
        if sizes.double().prod() <= _MAX_COUNTED:
            strides = torch.cumprod(torch.cat([torch.ones(1, dtype=torch.int64), sizes[:-1]]), 0)
            codes = (symbols.cpu() * strides).sum(dim=1, keepdim=True)
            usage = CodebookUsage(int(sizes.prod()))
        else:
            codes = (symbols.cpu() + sizes.cumsum(0) - sizes).reshape(-1, 1)
            usage = CodebookUsage(int(sizes.sum()))
        usage.add(codes, torch.ones(codes.shape))
        return usage

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        channels = self._channels(latents)
        quantized: Tensor = self.core.project_out(channels)
        # The paper needs no loss. Here the latent's other channels would drift without one,
        # since the maps see only a subspace of them.
        loss = self.config.commitment * functional.mse_loss(latents, quantized.detach())
        return quantized, loss, self._symbols(channels.detach())

    def _channels(self, latents: Tensor) -> Tensor:
        """(N, C) rounded channels in units of half their number of levels, straight-through."""
        channels: Tensor = self.core.quantize(self.core.project_in(latents))
        return channels

    def _symbols(self, channels: Tensor) -> Tensor:
        half = torch.tensor(self.config.levels, device=channels.device) // 2
        digits = (channels * half + half).round().long()
        parts = []
        for start, end in self._groups:
            symbol = torch.zeros_like(digits[:, 0])
            for channel in reversed(range(start, end)):
                symbol = symbol * self.config.levels[channel] + digits[:, channel]
            parts.append(symbol)
        return torch.stack(parts, dim=1)

    def _digits(self, symbols: Tensor) -> Tensor:
        digits = []
        for (start, end), symbol in zip(self._groups, symbols.unbind(dim=1), strict=True):
            for channel in range(start, end):
                digits.append(symbol % self.config.levels[channel])
                symbol = symbol // self.config.levels[channel]
        return torch.stack(digits, dim=1)

    def _fit(self, latents: Tensor) -> None:
        """Maps onto the leading principal axes; channels with more levels take wider axes."""
        if not isinstance(self.core.project_in, torch.nn.Linear):
            return
        mean = latents.mean(dim=0)
        centred = (latents - mean).double()
        _, axes = torch.linalg.eigh(centred.T @ centred)
        leading = axes.flip(1)[:, : len(self.config.levels)]
        order = sorted(range(len(self.config.levels)), key=lambda c: -self.config.levels[c])
        axis_of = torch.tensor([order.index(c) for c in range(len(order))])
        leading = leading[:, axis_of.to(leading.device)]
        spread = (centred @ leading).square().mean(dim=0).sqrt().clamp(min=1e-6)
        into = (leading / spread * _SPREAD).T.to(latents.dtype)
        self.core.project_in.weight.copy_(into)
        self.core.project_in.bias.copy_(-into @ mean)
        self._fit_map_back(latents)

    def _fit_map_back(self, latents: Tensor) -> None:
        """Least squares from the rounded channels to the latents."""
        channels = self._channels(latents).double()
        ones = torch.ones_like(channels[:, :1])
        design = torch.cat([channels, ones], dim=1)
        normal = design.T @ design
        normal.diagonal().add_(1e-6 * len(latents))
        solution = torch.linalg.solve(normal, design.T @ latents.double())
        self.core.project_out.weight.copy_(solution[:-1].T)
        self.core.project_out.bias.copy_(solution[-1])


def _group(levels: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, end) of runs of channels whose product stays within one table."""
    groups, start = [], 0
    for channel in range(1, len(levels) + 1):
        full = channel == len(levels) or math.prod(levels[start : channel + 1]) > _MAX_GROUP
        if full:
            groups.append((start, channel))
            start = channel
    return tuple(groups)
