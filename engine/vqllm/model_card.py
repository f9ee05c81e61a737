"""Model cards (README.md) of the folders that vqllm writes."""

from __future__ import annotations

from statistics import mean

from vqllm.model_info import ModelInfo


def quantized_card(info: ModelInfo, source: str, recipe: str, errors: dict[str, float]) -> str:
    """Card of a quantized folder; `errors` are the relative output errors by linear."""
    worst = max(errors, key=errors.__getitem__)
    return f"""---
base_model: {source}
tags: [gptq, vqstack]
---

# {info.name}

`{source}` with the linear layers of its decoder quantized to {info.bits} bits by GPTQ.

| | |
|---|---|
| architecture | {info.architecture}, {info.num_parameters:,} parameters |
| method | GPTQ, symmetric, groups of {info.group_size}, act-order with static groups |
| bits per weight of the linears, all bytes counted | {info.bpw:.3f} |
| bits per weight of the whole model | {info.total_bpw:.3f} |
| embedding, head and norms | as in the original |
| revision | `{info.revision}` |

**Calibration.** {recipe}

**Error on the calibration inputs**, tr(D H D') / tr(W H W') per linear: mean
{mean(errors.values()):.5f}, worst {errors[worst]:.5f} at `{worst}`.

**Limits.** Everything the original model gets wrong, this one gets wrong too, and rounding adds
to it. The licence is that of the original.

The files follow the GPTQ checkpoint format (v1 zero points), so other readers of that format can
load the folder. With vqstack: `vqllm generate FOLDER "your prompt"`.
"""


def fetched_card(name: str, origin: str, file_name: str, file_sha256: str, license: str) -> str:
    """Card of a folder that was converted from a published GGUF file."""
    return f"""---
license: {license}
---

# {name}

Converted from `{file_name}` of {origin}: weights dequantized to float16, tokenizer and chat
template rebuilt from the file's metadata. SHA-256 of the source file: `{file_sha256}`.

**Limits.** The weights were rounded once already, to the grid of the source file: most linears to
4 bits in groups of 32, so a comparison at exactly that setting says nothing about a quantizer.
"""
