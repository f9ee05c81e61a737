"""A small autoregressive model over code grids: gated masked convolutions, PixelCNN style.

van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016. Two stacks see
the past: the vertical one all rows above, the horizontal one the current row to the left; inputs
are shifted by one row or column at the start, so no convolution may see its own position. The S
symbols of one position follow each other: the head of symbol k also sees symbols 0..k-1.

A class label and a coarser grid (VQ-VAE-2's top codes, for the bottom prior) are optional
conditions. Knows nothing of pictures, and of quantizers only what a symbol may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from scq.errors import InvalidLatents, ScqError

_MAX_ALPHABET = 32768


@dataclass(frozen=True)
class PriorConfig:
    """alphabets: sizes of the S symbols of a position. condition_alphabets: those of the coarser
    grid, half the sides, or empty. num_classes: 0 for no labels. kernel: odd side of the
    convolutions. channels, layers: size of the network.

    Raises:
        ScqError: a field out of range, naming it.
    """

    alphabets: tuple[int, ...]
    condition_alphabets: tuple[int, ...] = ()
    num_classes: int = 0
    channels: int = 64
    layers: int = 6
    kernel: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("alphabets", "condition_alphabets"):
            sizes = getattr(self, name)
            self._require(name, all(1 <= size <= _MAX_ALPHABET for size in sizes))
        self._require("alphabets", len(self.alphabets) >= 1)
        self._require("num_classes", self.num_classes >= 0)
        self._require("channels", self.channels >= 1)
        self._require("layers", self.layers >= 1)
        self._require("kernel", self.kernel >= 3 and self.kernel % 2 == 1)
        self._require("dropout", 0 <= self.dropout < 1)

    def _require(self, name: str, valid: bool) -> None:
        if not valid:
            raise ScqError(f"{name} is out of range: {getattr(self, name)!r}")


@dataclass(frozen=True)
class Conditions:
    """What a batch of grids is conditioned on.

    grid: (B, h/2, w/2, S') int64 coarser codes. labels: (B,) int64. None where the prior has none.
    """

    grid: Tensor | None = None
    labels: Tensor | None = None


NO_CONDITIONS = Conditions()

# (N, k) symbols of a position so far -> (N, alphabets[k]) bool, what symbol k may be; None: all.
Allowed = Callable[[Tensor], Tensor | None]


def allow_all(before: Tensor) -> None:
    """No symbol is impossible."""
    return


class CodePrior(nn.Module):
    """p(grid) as a product over positions in raster order and symbols within a position."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        self.embeddings = _embeddings(config.alphabets, width)
        self.head_embeddings = _embeddings(config.alphabets[:-1], width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in config.alphabets)
        self.layers = nn.ModuleList(_GatedLayer(config) for _ in range(config.layers))
        self.condition_embeddings = _embeddings(config.condition_alphabets, width)
        self.condition_network = nn.Conv2d(width, width, 3, padding=1)
        self.label_embedding = nn.Embedding(max(config.num_classes, 1), width)

    def features(self, grid: Tensor, conditions: Conditions = NO_CONDITIONS) -> Tensor:
        """(B, h, w, S) -> (B, h, w, C): what the past says about each position."""
        self._check(grid, conditions)
        embedded = _embed(self.embeddings, grid)
        vertical = functional.pad(embedded, (0, 0, 1, 0))[:, :, :-1]
        horizontal = functional.pad(embedded, (1, 0))[..., :-1]
        context = self._context(grid, conditions)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, context)
        return functional.silu(horizontal).permute(0, 2, 3, 1)

    def features_at(
        self, grid: Tensor, row: int, column: int, conditions: Conditions = NO_CONDITIONS
    ) -> Tensor:
        """(B, C) features of one position; codes at or after it are not looked at."""
        # Rows below cannot matter; leaving them out halves the work of a whole grid.
        past = self.features(grid[:, : row + 1], _top_rows(conditions, row))
        return past[:, row, column]

    def head(self, features: Tensor, before: Tensor, allowed: Allowed = allow_all) -> Tensor:
        """(N, C) features, (N, k) symbols before -> (N, alphabets[k]) logits of symbol k.

        Symbols that are not allowed get -infinity.
        """
        hidden = features
        for earlier in range(before.shape[1]):
            hidden = hidden + self.head_embeddings[earlier](before[:, earlier])
        logits: Tensor = self.heads[before.shape[1]](hidden)
        mask = allowed(before)
        return logits if mask is None else logits.masked_fill(~mask, -math.inf)

    def bits(
        self,
        grid: Tensor,
        conditions: Conditions = NO_CONDITIONS,
        allowed: Allowed = allow_all,
    ) -> Tensor:
        """Information content (B,) of each grid in bits, differentiable."""
        features = self.features(grid, conditions).flatten(0, 2)
        symbols = grid.flatten(0, 2)
        total = torch.zeros(len(symbols), device=grid.device)
        for position in range(symbols.shape[1]):
            logits = self.head(features, symbols[:, :position], allowed)
            target = symbols[:, position]
            total = total + functional.cross_entropy(logits, target, reduction="none")
        return total.reshape(len(grid), -1).sum(dim=1) / math.log(2)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        conditions: Conditions = NO_CONDITIONS,
        *,
        temperature: float = 1.0,
        allowed: Allowed = allow_all,
    ) -> Tensor:
        """Grids (B, h, w, S) of `shape` (B, h, w), symbol by symbol from `generator` (CPU).

        temperature < 1 prefers likely codes. Raises ScqError for a temperature not above 0.
        """
        if not temperature > 0:
            raise ScqError(f"temperature is {temperature}, it must be above 0")
        was_training = self.training
        self.eval()
        device = self.label_embedding.weight.device
        grid = torch.zeros(*shape, len(self.config.alphabets), dtype=torch.int64, device=device)
        for row in range(shape[1]):
            for column in range(shape[2]):
                here = self.features_at(grid, row, column, conditions)
                for position in range(grid.shape[-1]):
                    before = grid[:, row, column, :position]
                    logits = self.head(here, before, allowed) / temperature
                    chosen = torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator)
                    grid[:, row, column, position] = chosen[:, 0].to(device)
        self.train(was_training)
        return grid

    def _context(self, grid: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, h, w) conditions, zeros where there are none."""
        batch, rows, columns = grid.shape[:3]
        context = torch.zeros(
            batch, self.config.channels, rows, columns, device=grid.device, dtype=torch.float32
        )
        if conditions.grid is not None:
            coarse = functional.silu(_embed(self.condition_embeddings, conditions.grid))
            fine = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
            context = context + self.condition_network(fine)[:, :, :rows, :columns]
        if conditions.labels is not None:
            context = context + self.label_embedding(conditions.labels)[:, :, None, None]
        return context

    def _check(self, grid: Tensor, conditions: Conditions) -> None:
        if grid.ndim != 4 or grid.shape[-1] != len(self.config.alphabets):
            raise InvalidLatents(
                f"grid must be (B, h, w, {len(self.config.alphabets)}), got {tuple(grid.shape)}"
            )
        if (conditions.grid is None) != (not self.config.condition_alphabets):
            raise InvalidLatents("a coarser grid must be given exactly if the prior has one")
        if (conditions.labels is None) != (not self.config.num_classes):
            raise InvalidLatents("labels must be given exactly if the prior has classes")


class _GatedLayer(nn.Module):
    """One step of both stacks; every convolution sees its own row or column and earlier ones."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width, reach = config.channels, config.kernel // 2
        self.reach = reach
        self.vertical = nn.Conv2d(width, 2 * width, (reach + 1, config.kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, reach + 1))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.context = nn.Conv2d(width, 4 * width, 1)
        self.output = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, vertical: Tensor, horizontal: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        reach = self.reach
        above = self.vertical(functional.pad(vertical, (reach, reach, reach, 0)))
        left = self.horizontal(functional.pad(horizontal, (reach, 0)))
        for_vertical, for_horizontal = self.context(context).chunk(2, dim=1)
        gated = _gate(left + self.link(above) + for_horizontal)
        horizontal = horizontal + self.output(self.dropout(gated))
        return _gate(above + for_vertical), horizontal


def _gate(features: Tensor) -> Tensor:
    values, gates = features.chunk(2, dim=1)
    return torch.tanh(values) * torch.sigmoid(gates)


def _embeddings(alphabets: tuple[int, ...], width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Embedding(size, width) for size in alphabets)


def _embed(tables: nn.ModuleList, grid: Tensor) -> Tensor:
    """(B, h, w, S) symbols -> (B, C, h, w), the sum of their embeddings."""
    total = sum(table(grid[..., position]) for position, table in enumerate(tables))
    assert isinstance(total, Tensor)
    return total.permute(0, 3, 1, 2)


def _top_rows(conditions: Conditions, row: int) -> Conditions:
    if conditions.grid is None:
        return conditions
    # One coarse row more than needed: the condition's convolution reaches one fine row down.
    return Conditions(conditions.grid[:, : (row + 1) // 2 + 1], conditions.labels)
