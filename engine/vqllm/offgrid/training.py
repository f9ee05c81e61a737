"""Trains the off-grid llama on one text file and writes it as a Hugging Face folder.

Uses the reference forward pass of `vqllm.decoder`; knows no quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from vqllm.checkpoint import EMBEDDING, FINAL_NORM, write_json
from vqllm.decoder.block import forward_block
from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights
from vqllm.errors import CalibrationError, InvalidConfig, VqllmError
from vqllm.model_config import parse_config
from vqllm.offgrid.tokens import encode, save, train_tokenizer

Report = Callable[[int, float], None]
Parameters = dict[str, Tensor]

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class TrainingConfig:
    """A run of AdamW: `batch_size` windows of `window_length` tokens a step, cosine rate."""

    num_steps: int = 700
    batch_size: int = 4
    window_length: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    model: dict[str, object] = field(default_factory=lambda: dict(MODEL))

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "window_length", "warmup_steps"):
            if getattr(self, name) < 1:
                raise InvalidConfig(name, getattr(self, name), "at least 1")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def train(text: Path, target: Path, config: TrainingConfig, report: Report) -> Path:
    """Train on the UTF-8 file `text`, write the folder `target`, and return its path.

    `report(step, loss)` is called every 50 steps with the mean loss in nats per token.

    Raises:
        CalibrationError: the text is shorter than one batch.
        VqllmError: `target` exists.
    """
    if target.exists():
        raise VqllmError(f"{target} exists already; remove it or choose another folder")
    content = text.read_text(encoding="utf-8")
    shape = parse_config(config.model)
    tokenizer = train_tokenizer(content, shape.vocab_size)
    token_ids = encode(tokenizer, content)
    if len(token_ids) < config.batch_size * (config.window_length + 1):
        raise CalibrationError(f"{text} has {len(token_ids)} tokens, too few for one batch")
    torch.manual_seed(config.seed)
    parameters = initial_parameters(shape)
    _fit(parameters, shape, token_ids, config, report)
    target.mkdir(parents=True)
    halves = {name: value.detach().half().contiguous() for name, value in parameters.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", dict(config.model))
    save(tokenizer, target)
    return target


def initial_parameters(config: DecoderConfig) -> Parameters:
    """Normal weights of standard deviation 0.02, outputs of a block scaled down by its depth."""
    parameters = {
        EMBEDDING: torch.randn(config.vocab_size, config.hidden_size) * 0.02,
        FINAL_NORM: torch.ones(config.hidden_size),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            parameters[f"{prefix}.{norm}.weight"] = torch.ones(config.hidden_size)
        for part, shape in config.linear_shapes().items():
            deviation = 0.02
            if part.endswith(("o_proj", "down_proj")):
                deviation /= math.sqrt(2 * config.num_layers)
            parameters[f"{prefix}.{part}.weight"] = torch.randn(shape) * deviation
    return parameters


def logits(parameters: Parameters, config: DecoderConfig, token_ids: Tensor) -> Tensor:
    """Logits (b, t, vocab_size) of token ids (b, t)."""
    hidden = F.embedding(token_ids, parameters[EMBEDDING])
    rotary = RotaryTable.build(config, token_ids.shape[1])
    for layer in range(config.num_layers):
        hidden = forward_block(hidden, _block(parameters, config, layer), config, rotary)
    hidden = rms_norm(hidden, parameters[FINAL_NORM], config.rms_norm_eps)
    return F.linear(hidden, parameters[EMBEDDING])


def _block(parameters: Parameters, config: DecoderConfig, layer: int) -> BlockWeights:
    prefix = f"model.layers.{layer}"
    return BlockWeights(
        input_norm=parameters[f"{prefix}.input_layernorm.weight"],
        post_attention_norm=parameters[f"{prefix}.post_attention_layernorm.weight"],
        linears={part: parameters[f"{prefix}.{part}.weight"] for part in config.linear_shapes()},
    )


def _fit(
    parameters: Parameters,
    shape: DecoderConfig,
    token_ids: NDArray[np.int64],
    config: TrainingConfig,
    report: Report,
) -> None:
    """AdamW over random windows of the text; changes `parameters` in place."""
    optimizer = _optimizer(parameters, config)
    generator = np.random.default_rng(config.seed)
    recent: list[float] = []
    for step in range(config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        windows = _windows(token_ids, config, generator)
        scores = logits(parameters, shape, windows[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            report(step + 1, float(np.mean(recent)))
            recent.clear()


def _optimizer(parameters: Parameters, config: TrainingConfig) -> torch.optim.AdamW:
    for value in parameters.values():
        value.requires_grad_(True)
    matrices = [value for value in parameters.values() if value.ndim > 1]
    norms = [value for value in parameters.values() if value.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def _windows(
    token_ids: NDArray[np.int64], config: TrainingConfig, generator: np.random.Generator
) -> Tensor:
    """Random windows of one token more than is predicted, (batch_size, window_length + 1)."""
    last = len(token_ids) - config.window_length - 1
    starts = generator.integers(0, last + 1, config.batch_size)
    rows = [token_ids[start : start + config.window_length + 1] for start in starts]
    return torch.from_numpy(np.stack(rows))
