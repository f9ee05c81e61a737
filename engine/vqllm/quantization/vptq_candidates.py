"""Which codebooks a linear of a given shape could have, and what each would cost in quality.

This is the dynamic codebook size: codebooks count as bits of the layer that owns them, so small
layers are never offered large ones. Knows shapes, no weights.
"""

from __future__ import annotations

from dataclasses import replace

from vqllm.quantization.allocation import Candidate
from vqllm.quantization.vptq import VptqOptions

# Held-out output error of (vector length, main entries, residual entries) relative to (4, 256, 0):
# geometric mean over the q and v projection of block 10 of SmolLM2-135M, calibrated on 8192 tokens
# of Brown, measured on 3072 of BoolQ passages. Real weights are heavier in the tails than Gaussian
# ones, so short vectors with few entries serve them worse than Gaussian figures say: (2, 64) has
# .54 instead of .31 and is not offered. Nor are vectors of 3, which no native kernel reads: one
# such linear would leave the whole model to torch, and only (3, 512, 0) with .289 was worth having.
_RELATIVE_ERRORS = {
    (4, 64, 0): 2.057,
    (4, 128, 0): 1.434,
    (4, 256, 0): 1.0,
    (4, 512, 0): 0.650,
    (4, 256, 4): 0.596,
    (4, 1024, 0): 0.418,
    (4, 256, 16): 0.329,
    (4, 256, 64): 0.173,
    (4, 256, 256): 0.084,
}
_GAUSSIAN_ERROR = 0.100  # mean squared error of (4, 256, 0) on unit Gaussian weights
_WITHOUT_NORM = 1.06  # q_proj 1.05, v_proj 1.07 of the error with column scales and biases


def vptq_candidates(
    out_features: int, in_features: int, options: VptqOptions | None = None
) -> list[Candidate]:
    """Options worth having for a linear (out, in), by rising bits and falling distortion.

    Distortion is the expected squared error relative to the weights, as a Gaussian layer would
    have it. What does not concern the codebooks is taken from `options`.
    """
    base = options or VptqOptions()
    found = []
    for (length, main, residual), relative in _RELATIVE_ERRORS.items():
        for has_norm in (True, False):
            chosen = replace(
                base,
                vector_length=length,
                num_centroids=main,
                num_res_centroids=residual,
                has_norm=has_norm,
            )
            distortion = _GAUSSIAN_ERROR * relative * (1.0 if has_norm else _WITHOUT_NORM)
            bits = chosen.bits_of(out_features, in_features)
            found.append(Candidate(chosen, bits, distortion))
    return _worthwhile(found)


def _worthwhile(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other one beats in bits and distortion."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.bits, c.distortion)):
        if not kept or candidate.distortion < kept[-1].distortion:
            kept.append(candidate)
    return kept
