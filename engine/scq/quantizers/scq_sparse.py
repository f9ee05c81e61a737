"""SCQ as it is transmitted: at most s codes with weights in multiples of 1/n, searched exactly.

The lattice search stands in the training loop (reference notes 2.2 and 2.4): the latent becomes
its best lattice point, the codebook learns from the picture's own gradient through that point as
well as from the pull towards latents, the encoder gets the straight-through gradient.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scq.codebook_init import refine
from scq.lattice import LatticeAssignment, LatticeCode, reconstruct, search
from scq.metrics import CodebookUsage
from scq.quantizers.base import QuantizerConfig, pull_losses, to_array
from scq.quantizers.codebook import CodebookQuantizer, seed_pool
from scq.quantizers.coding import Bools, Ints, SymbolTables, pack_digits, unpack_digits
from scq.quantizers.lattice_symbols import (
    coded,
    from_ranks,
    from_symbols,
    partitions,
    to_ranks,
    to_symbols,
)
from scq.quantizers.set_coding import fit_set_tables, pack_sets, set_bits, unpack_sets


class SparseConvexQuantizer(CodebookQuantizer):
    """Lattice codes of one codebook; RAW packs the exact combinatorial rank, rANS sets of codes."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.code = LatticeCode(config.num_codes, config.max_support, config.denominator)

    @property
    def alphabets(self) -> tuple[int, ...]:
        """Heaviest index, partition of the weights, the other indices."""
        others = (self.code.num_codes,) * (self.code.max_support - 1)
        return (self.code.num_codes, len(partitions(self.code).parts), *others)

    @property
    def raw_bits_per_latent(self) -> float:
        """log2 of the number of assignments."""
        return self.code.bits_per_latent

    def encode(self, latents: Tensor) -> Tensor:
        """(N, F) -> (N, s + 1) symbols of the nearest lattice points."""
        self.check_latents(latents)
        return self._symbols(search(latents.detach(), self.codebook.detach(), self.code))

    def decode(self, symbols: Tensor) -> Tensor:
        """(N, s + 1) -> (N, F) lattice points, differentiable in the codebook."""
        return reconstruct(self.assignment(symbols), self.codebook)

    def assignment(self, symbols: Tensor) -> LatticeAssignment:
        """(N, s + 1) symbols -> codes and numerators, on the codebook's device."""
        self.check_symbols(symbols)
        found = from_symbols(to_array(symbols), self.code)
        device = self.codebook.device
        return LatticeAssignment(found.indices.to(device), found.numerators.to(device))

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """Uses of the codes, by heaviest code and by weight."""
        assignment = self.assignment(symbols)
        usage = CodebookUsage(self.code.num_codes)
        usage.add(assignment.indices, assignment.numerators / self.code.denominator)
        return usage

    def allowed(self, before: Tensor) -> Tensor | None:
        """Other indices differ from those before them, and are 0 where there are not as many."""
        position = before.shape[1]
        if position < 2:
            return None
        mask = torch.ones(len(before), self.code.num_codes, dtype=torch.bool, device=before.device)
        mask.scatter_(1, torch.cat([before[:, :1], before[:, 2:]], dim=1), False)
        sizes = torch.from_numpy(partitions(self.code).sizes).to(before.device)
        absent = sizes[before[:, 1]] < position
        mask[absent] = torch.arange(self.code.num_codes, device=before.device) == 0
        return mask

    def _fit(self, latents: Tensor) -> None:
        super()._fit(latents)
        pool = seed_pool(latents, self.config.num_codes, self.config.seed)
        self.codebook.copy_(refine(pool, self.codebook.detach(), self.code))

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        self._begin_step(latents)
        assignment = self._search_parts(latents.detach(), pictures)
        self._count(assignment.indices[assignment.numerators > 0])
        points = reconstruct(assignment, self.codebook)
        loss = pull_losses(latents, points, self.config)
        return points + latents - latents.detach(), loss, self._symbols(assignment)

    def _search_parts(self, latents: Tensor, pictures: int) -> LatticeAssignment:
        """Search, with a share of the pictures limited to one code while training."""
        share = self.config.single_code_share if self.training else 0.0
        codebook = self.codebook.detach()
        if not share or self.code.max_support == 1:
            return search(latents, codebook, self.code)
        single = (torch.rand(pictures) < share).repeat_interleave(len(latents) // pictures)
        single = single.to(latents.device)
        indices = latents.new_empty((len(latents), self.code.max_support), dtype=torch.int64)
        numerators = torch.zeros_like(indices)
        for rows, support in ((~single, self.code.max_support), (single, 1)):
            if bool(rows.any()):
                found = search(latents[rows], codebook, replace(self.code, max_support=support))
                indices[rows] = _widened(found.indices, self.code.max_support, repeat=True)
                numerators[rows] = _widened(found.numerators, self.code.max_support, repeat=False)
        return LatticeAssignment(indices, numerators)

    def _symbols(self, assignment: LatticeAssignment) -> Tensor:
        symbols = torch.from_numpy(to_symbols(assignment, self.code))
        return symbols.to(assignment.indices.device)

    def _coded(self, position: int, symbols: Ints) -> Bools:
        return coded(position, symbols, self.code)

    def _fit_tables(self, symbols: Ints) -> SymbolTables:
        return fit_set_tables(symbols, self.alphabets, self.code)

    def _symbol_bits(self, symbols: Ints, tables: SymbolTables) -> NDArray[np.float64]:
        return set_bits(symbols, tables, self.code)

    def _pack_rans(self, symbols: Ints, tables: SymbolTables) -> bytes:
        return pack_sets(symbols, tables, self.code)

    def _unpack_rans(self, data: bytes, count: int, tables: SymbolTables) -> Ints:
        return unpack_sets(data, count, tables, self.code)

    def _pack_raw(self, symbols: Ints) -> bytes:
        return pack_digits(
            to_ranks(from_symbols(symbols, self.code), self.code), self.code.num_states
        )

    def _unpack_raw(self, data: bytes, count: int) -> Ints:
        ranks = unpack_digits(data, count, self.code.num_states)
        return to_symbols(from_ranks(ranks, self.code), self.code)


def _widened(slots: Tensor, width: int, *, repeat: bool) -> Tensor:
    """(N, t) -> (N, width): unused slots repeat slot 0, or hold 0."""
    missing = width - slots.shape[1]
    filler = slots[:, :1] if repeat else torch.zeros_like(slots[:, :1])
    return torch.cat([slots, filler.expand(-1, missing)], dim=1)
