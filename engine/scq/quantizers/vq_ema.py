"""Vector quantization with a moving-average codebook, by vector-quantize-pytorch.

van den Oord et al., 2017, appendix A.1: codes are averages of the latents assigned to them, which
learns faster than a codebook loss.
"""

from __future__ import annotations

from dataclasses import replace

from scq.quantizers.base import QuantizerConfig
from scq.quantizers.rvq import ResidualQuantizer


class MovingAverageQuantizer(ResidualQuantizer):
    """Residual quantization of a single stage: the same training, expiry and coding."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(replace(config, num_stages=1, beam_size=1))
