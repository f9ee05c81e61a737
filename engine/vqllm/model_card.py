"""Model cards (README.md) of the folders that vqllm writes."""

from __future__ import annotations

from statistics import mean

from vqllm.model_info import ModelInfo

_METHODS = {
    "gptq": "GPTQ",
    "rtn": "rounding to nearest",
    "vptq": "VPTQ (vector quantization)",
    "tcq": "trellis-coded quantization",
}


def quantized_card(info: ModelInfo, source: str, recipe: str, errors: dict[str, float]) -> str:
    """Card of a quantized folder; `errors` are the relative output errors by linear."""
    method = " and ".join(_METHODS.get(name, name) for name in info.method.split("+"))
    groups = f", groups of {info.group_size}" if info.group_size else ""
    return f"""---
base_model: {source}
tags: [{", ".join(dict.fromkeys([*info.method.split("+"), "vqstack"]))}]
---

# {info.name}

`{source}` with the linear layers of its decoder quantized to {info.bpw:.2f} bits per weight.

| | |
|---|---|
| architecture | {info.architecture}, {info.num_parameters:,} parameters |
| method | {method}{groups} |
| rotated | {"yes, by seeded Hadamard matrices" if info.is_rotated else "no"} |
| bits per weight of the linears, all bytes counted | {info.bpw:.3f} |
| bits per weight of the embedding | {info.embedding_bpw:.3f} |
| bits per weight of the whole model | {info.total_bpw:.3f} |
| weight files | {info.file_bytes:,} bytes |
| format (`quant_method`) | {info.format} |
| revision | `{info.revision}` |

**Recipe.** {recipe or "Not recorded."}

{_errors_line(errors)}

**Limits.** Everything the original model gets wrong, this one gets wrong too, and rounding adds
to it. The licence is that of the original.

{_readers_line(info)} With vqstack: `vqllm generate FOLDER "your prompt"`.
"""


def _errors_line(errors: dict[str, float]) -> str:
    if not errors:
        return "**Error on the calibration inputs.** Not recorded."
    worst = max(errors, key=errors.__getitem__)
    return (
        "**Error on the calibration inputs**, tr(D H D') / tr(W H W') per linear: mean\n"
        f"{mean(errors.values()):.5f}, worst {errors[worst]:.5f} at `{worst}`."
    )


def _readers_line(info: ModelInfo) -> str:
    if info.format == "vqstack":
        return (
            "The format is vqstack's own; `import vqllm.integrations.transformers` lets\n"
            "`AutoModelForCausalLM.from_pretrained` load the folder."
        )
    name = {"gptq": "GPTQ", "vptq": "VPTQ"}.get(info.format, info.format)
    return (
        f"The files follow the {name} checkpoint format, so other readers of that format can load\n"
        "the folder."
    )


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
