"""The sparse form of an assignment: which codes, how much of each. Knows no solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseAssignment:
    """Convex weights over a few of `num_codes` codes, for latents of any leading shape.

    indices (..., W) int64 in 0..num_codes-1; weights (..., W), 0 in unused slots, whose indices
    mean nothing but are valid. Weights may carry a gradient; indices never do.
    """

    indices: Tensor
    weights: Tensor
    num_codes: int

    def dense(self) -> Tensor:
        """(..., num_codes) weights, differentiable in `weights`. Costs num_codes per latent."""
        empty = self.weights.new_zeros(*self.weights.shape[:-1], self.num_codes)
        return empty.scatter_add(-1, self.indices, self.weights)

    def support(self) -> Tensor:
        """(..., W) int64 indices with -1 in unused slots: a warm start for the next solve."""
        return self.indices.masked_fill(self.weights.detach() <= 0, -1)

    def reshape(self, *leading: int) -> SparseAssignment:
        """The same assignments with another leading shape."""
        shape = (*leading, self.weights.shape[-1])
        return SparseAssignment(
            self.indices.reshape(shape), self.weights.reshape(shape), self.num_codes
        )

    def detach(self) -> SparseAssignment:
        """Without the gradient's history."""
        return SparseAssignment(self.indices, self.weights.detach(), self.num_codes)


def from_dense(assignment: Tensor) -> SparseAssignment:
    """(..., K) weights as they are, every code in its slot; nothing is copied."""
    num_codes = assignment.shape[-1]
    indices = torch.arange(num_codes, device=assignment.device).expand(assignment.shape)
    return SparseAssignment(indices, assignment, num_codes)
