"""How much arithmetic a network takes: multiply-adds, parameters, and an estimate for a phone.

Counts are of torch's convolutions, matrix products and attention as they run on given inputs;
activations, normalisations and element-wise sums are not counted, as is usual. Knows nothing of
data sets and benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from scq.backbones import Backbone, build_encoder
from scq.model import ModelConfig, ScqAutoencoder

# What one big core of a middle-class phone is assumed to sustain in float32, in 1e9 operations a
# second (two a multiply-add). An assumption, not a measurement.
PHONE_GFLOPS = 20.0


@dataclass(frozen=True)
class ModelCost:
    """One picture of width x height pixels. Parts are encoder, search, decoder and head.

    macs: multiply-adds by part. parameters: numbers by part; "search" are the codebook's. The
    search is n scans of the codebook for every latent, as the on-device pursuit does.
    """

    width: int
    height: int
    macs: dict[str, int]
    parameters: dict[str, int]

    @property
    def sender_macs(self) -> int:
        """What the sending side works: encoder and search."""
        return self.macs["encoder"] + self.macs["search"]


def count_macs(call: Callable[..., Any], *inputs: Tensor) -> int:
    """Multiply-adds of one call, counted while it runs."""
    with torch.no_grad(), _Counter() as counter:
        call(*inputs)
    return int(counter.macs)


class _Counter(TorchFunctionMode):
    """Sees every torch function called; adds up those that multiply matrices.

    Torch's own counter misses attention on CPUs and takes seconds to import.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func)
        if count is not None:
            self.macs += count(args, result)
        return result


def _convolution(arguments: Any, result: Tensor) -> int:
    """Every output position meets the filter of its group."""
    return result.numel() * int(arguments[1][0].numel())


def _transposed_convolution(arguments: Any, _result: Tensor) -> int:
    """Every input position meets the filter of its group."""
    return int(arguments[0].numel()) * int(arguments[1][0].numel())


def _product(arguments: Any, result: Tensor) -> int:
    return result.numel() * int(arguments[0].shape[-1])


def _attention(arguments: Any, _result: Any) -> int:
    """Queries by keys and weights by values; shapes are (batch, heads, tokens, channels)."""
    query, key, value = arguments[:3]
    return int(query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


_COUNTS: dict[Any, Callable[[Any, Any], int]] = {
    torch.conv2d: _convolution,
    torch.conv_transpose2d: _transposed_convolution,
    functional.linear: _product,
    torch.matmul: _product,
    torch.bmm: _product,
    functional.scaled_dot_product_attention: _attention,
}


def count_parameters(module: nn.Module | None) -> int:
    """Numbers that a module learns; 0 for none."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def model_cost(model: ScqAutoencoder, width: int, height: int) -> ModelCost:
    """What a model costs on pictures of one size, a multiple of its stride."""
    config = model.config
    grid = height // config.stride, width // config.stride
    latents = torch.zeros(1, *grid, config.code_dim)
    scan = config.num_codes * config.code_dim * config.denominator
    macs = {
        "encoder": count_macs(model.encode, torch.zeros(1, 3, height, width)),
        "search": grid[0] * grid[1] * scan,
        "decoder": count_macs(model.decode, latents),
        "head": 0 if model.head is None else count_macs(model.classify, latents),
    }
    parameters = {
        "encoder": count_parameters(model.encoder),
        "search": config.num_codes * config.code_dim,
        "decoder": count_parameters(model.decoder),
        "head": count_parameters(model.head),
    }
    return ModelCost(width, height, macs, parameters)


def encoder_costs(config: ModelConfig, width: int, height: int) -> dict[str, tuple[int, int]]:
    """Multiply-adds and parameters of an encoder of this layout, for every backbone."""
    pixels = torch.zeros(1, 3, height, width)
    costs = {}
    for backbone in get_args(Backbone):
        encoder = build_encoder(replace(config.encoder_shape, backbone=backbone))
        costs[backbone] = count_macs(encoder, pixels), count_parameters(encoder)
    return costs


def estimated_ms(macs: int, gflops: float = PHONE_GFLOPS) -> float:
    """Milliseconds that so many multiply-adds take at an assumed rate."""
    return 2 * macs / (gflops * 1e9) * 1e3
