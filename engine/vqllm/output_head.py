"""The end of a model for work that needs gradients: final norm, rotation back, output projection.

Reads what a `WeightSource` stores, so that it fits rotated models too. Knows no file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.checkpoint import EMBEDDING, FINAL_NORM, HEAD
from vqllm.decoder.norm import rms_norm
from vqllm.outlier.transform import HadamardRotation, rotation
from vqllm.sources import WeightSource, as_float32


@dataclass(frozen=True)
class OutputHead:
    """Attributes:
    norm: (d,) float32, weight of the final norm.
    table: (vocab, d), in the dtype to multiply in.
    residual: R1, undone before the norm; None where there is none.
    """

    norm: Tensor
    table: Tensor
    residual: HadamardRotation | None
    eps: float

    @classmethod
    def of(
        cls, source: WeightSource, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> OutputHead:
        """The head of a model, with its weights cast to `dtype`."""
        tensors, config = source.other_tensors(), source.config
        name = EMBEDDING if HEAD not in tensors else HEAD
        seed = source.transform.residual_seed
        return cls(
            norm=as_float32(np.array(tensors[FINAL_NORM])).to(device),
            table=as_float32(np.array(tensors[name])).to(device, dtype),
            residual=None if seed is None else rotation(config.hidden_size, seed),
            eps=config.rms_norm_eps,
        )

    def normed(self, hidden: Tensor, norm: Tensor | None = None) -> Tensor:
        """What the output projection reads, (..., d); `norm` replaces the stored weight."""
        if self.residual is not None:
            hidden = self.residual.invert(hidden)
        return rms_norm(hidden, self.norm if norm is None else norm, self.eps)

    def project(self, normed: Tensor) -> Tensor:
        """Logits (..., vocab) float32 of `normed` (..., d)."""
        return F.linear(normed.to(self.table.dtype), self.table).float()
