"""Which norm a linear reads from, by its name within the block: what folding needs to know."""

from __future__ import annotations

BLOCK_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
LATENT_NORMS = ("self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight")
ROUTER = "mlp.gate.weight"
OUTPUT = "self_attn.o_proj"


def norm_before(part: str) -> str | None:
    """The norm whose output the linear (or the router) reads; None for o_proj and down_proj."""
    if part.endswith(("o_proj", "down_proj")):
        return None
    if part.startswith("mlp."):
        return BLOCK_NORMS[1]
    if part.endswith("q_b_proj"):
        return LATENT_NORMS[0]
    return LATENT_NORMS[1] if part.endswith("kv_b_proj") else BLOCK_NORMS[0]
