"""Moving the scale of outlier channels between a linear's input and its weights.

SmoothQuant (arXiv 2211.10438): input channel j is divided by s_j and column j of the weights is
multiplied by it, s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). The division goes into whatever
produces the channel, so nothing is computed online and the function stays the same:

- a norm's weight, for every linear that reads the norm (and the router);
- the rows of v_proj (or the value rows of kv_b_proj) for o_proj; query heads that share a value
  head share its scales;
- the rows of up_proj for down_proj: the gated product is linear in it.

Alpha is chosen per input by the output error of rounded weights and activations, measured on
calibration tokens; no scale at all is a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.calibration import Windows
from vqllm.decoder.block import trace_block
from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.trace import Tap, Trace
from vqllm.decoder.weights import BlockWeights
from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.outlier.structure import BLOCK_NORMS, OUTPUT, ROUTER, norm_before
from vqllm.outlier.transform import ModelTransform
from vqllm.sources import Tensors, WeightSource, as_float32, layer_of

_TINY = 1e-5
_MAX_SCALE = 1e3  # keeps what is stored in float16 far from its limits, dead channels or not
_MAX_JUDGES = 8  # experts whose error decides the scale of the norm they all read
_BATCH_WINDOWS = 4

Scales = dict[str, Tensor]
"""Scale (in,) by input: a norm's name, or the linear itself for o_proj and down_proj."""


@dataclass(frozen=True)
class SmoothOptions:
    """How alpha is chosen.

    Attributes:
        alphas: candidates besides "no scale".
        bits, group_size: grid that the weights are rounded to while alphas are compared.
        activation_bits: width of a token's activations then; 0 leaves them.
        num_rows: tokens, evenly spread, that the error is measured on.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    alphas: tuple[float, ...] = (0.3, 0.5, 0.65, 0.8)
    bits: int = 4
    group_size: int = 128
    activation_bits: int = 8
    num_rows: int = 256

    def __post_init__(self) -> None:
        if not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise InvalidConfig("alphas", self.alphas, "0 to 1 each")
        for name, low in (("bits", 2), ("group_size", 1), ("num_rows", 1)):
            if getattr(self, name) < low:
                raise InvalidConfig(name, getattr(self, name), f"{low} or more")
        if self.activation_bits and self.activation_bits < 2:
            raise InvalidConfig("activation_bits", self.activation_bits, "0, or 2 or more")


@dataclass(frozen=True)
class SmoothedLayer:
    """What was decided for one block.

    Attributes:
        scales: by input; inputs that stay are left out.
        alphas: by input; None is "no scale".
    """

    scales: Scales
    alphas: dict[str, float | None]


class SmoothedSource:
    """Another source's model with scales moved; the function it computes stays the same."""

    def __init__(self, source: WeightSource, layers: Sequence[SmoothedLayer]) -> None:
        """Raises UnsupportedModel: down projections' inputs are rotated; smooth first."""
        _refuse_rotated_down(source)
        self.source, self.layers = source, tuple(layers)

    @classmethod
    def calibrated(
        cls, source: WeightSource, windows: Windows, options: SmoothOptions | None = None
    ) -> SmoothedSource:
        """Choose scales on calibration tokens (num_windows, t), one block in memory at a time.

        Raises:
            UnsupportedModel: down projections' inputs are rotated; smooth first.
            CorruptCheckpoint: a tensor is missing, misshapen or not finite.
        """
        _refuse_rotated_down(source)
        return cls(source, list(_decide(source, windows, options or SmoothOptions())))

    @property
    def config(self) -> DecoderConfig:
        return self.source.config

    @property
    def transform(self) -> ModelTransform:
        return self.source.transform

    @property
    def config_changes(self) -> dict[str, Any]:
        return self.source.config_changes

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.source.embed(token_ids)

    def block(self, layer: int) -> BlockWeights:
        """Raises CorruptCheckpoint: a tensor is missing, misshapen or not finite."""
        weights, move = self.source.block(layer), self._move(layer)
        return replace(
            weights,
            input_norm=move.other(BLOCK_NORMS[0], weights.input_norm),
            post_attention_norm=move.other(BLOCK_NORMS[1], weights.post_attention_norm),
            linears={part: move.weight(part, w) for part, w in weights.linears.items()},
            biases={part: move.bias(part, b) for part, b in weights.biases.items()},
            inner={name: move.other(name, values) for name, values in weights.inner.items()},
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return self.source.logits(hidden)

    def linear_names(self) -> list[str]:
        return self.source.linear_names()

    def other_tensors(self) -> Tensors:
        tensors = self.source.other_tensors()
        for name in tensors:
            layer = layer_of(name)
            if layer >= 0:
                values = as_float32(tensors[name])
                moved = self._move(layer).other(name.split(".", 3)[3], values)
                if moved is not values:
                    tensors[name] = moved.numpy()
        return tensors

    def _move(self, layer: int) -> BlockScales:
        return BlockScales(self.config, self.layers[layer].scales)


class BlockScales:
    """How every tensor of one block changes; products are float64, results float32."""

    def __init__(self, config: DecoderConfig, scales: Scales) -> None:
        self._config, self._scales = config, scales

    def weight(self, part: str, weight: Tensor) -> Tensor:
        """A linear's weight (out, in), or the router's."""
        columns = self._scales.get(norm_before(part) or part)
        rows = self._rows(part)
        if columns is None and rows is None:
            return weight
        values = weight.double()
        if columns is not None:
            values = values * columns.double()
        return (values if rows is None else values / rows.double()[:, None]).float()

    def bias(self, part: str, bias: Tensor) -> Tensor:
        """A linear's bias (out,)."""
        rows = self._rows(part)
        return bias if rows is None else (bias.double() / rows.double()).float()

    def other(self, name: str, values: Tensor) -> Tensor:
        """A norm's weight, the router, a bias, or a tensor that stays."""
        if name in self._scales:
            return (values.double() / self._scales[name].double()).float()
        if name == ROUTER:
            return self.weight(ROUTER, values)
        return (
            self.bias(name.removesuffix(".bias"), values) if name.endswith("_proj.bias") else values
        )

    def _rows(self, part: str) -> Tensor | None:
        """Scale (out,) that divides a linear's outputs."""
        if part.endswith("up_proj"):
            return self._scales.get(f"{part.removesuffix('up_proj')}down_proj")
        scale, config = self._scales.get(OUTPUT), self._config
        if scale is None:
            return None
        if part == "self_attn.v_proj":
            heads = scale.view(config.num_kv_heads, -1, config.head_dim)
            return heads[:, 0].flatten()
        if config.mla is not None and part == "self_attn.kv_b_proj":
            values = scale.view(config.num_heads, config.mla.value_dim)
            keys = torch.ones(config.num_heads, config.mla.nope_dim)
            return torch.cat([keys, values], dim=1).flatten()
        return None


@dataclass
class _Seen:
    """What one input of a block looked like: channel maxima, and some rows of it."""

    peak: Tensor
    rows: list[Tensor]
    readers: list[str]


def _decide(
    source: WeightSource, windows: Windows, options: SmoothOptions
) -> Iterator[SmoothedLayer]:
    with torch.inference_mode():
        states = source.embed(torch.from_numpy(windows))
        rotary = RotaryTable.build(source.config, windows.shape[1])
        per_token = max(1, windows.size // options.num_rows)
        for layer in range(source.config.num_layers):
            weights = source.block(layer)
            seen: dict[str, _Seen] = {}
            for start in range(0, len(states), _BATCH_WINDOWS):
                batch = states[start : start + _BATCH_WINDOWS]
                trace = trace_block(batch, weights, source.config, rotary)
                states[start : start + _BATCH_WINDOWS] = _watch(trace, seen, per_token)
            yield _decide_block(weights, source.config, seen, options)


def _watch(trace: Trace, seen: dict[str, _Seen], step: int) -> Tensor:
    """Run a block to its end, noting each input; every `step`-th row is kept."""
    while True:
        try:
            tap: Tap = next(trace)
        except StopIteration as stop:
            result: Tensor = stop.value
            return result
        key = norm_before(tap.parts[0]) or tap.parts[0]
        rows = tap.inputs.reshape(-1, tap.inputs.shape[-1])
        if key not in seen:
            seen[key] = _Seen(torch.zeros(rows.shape[1]), [], [])
        note = seen[key]
        note.readers += [part for part in tap.parts if part not in note.readers]
        if len(rows):
            note.peak = torch.maximum(note.peak, rows.abs().amax(0))
            note.rows.append(rows[::step].clone())


def _decide_block(
    weights: BlockWeights, config: DecoderConfig, seen: dict[str, _Seen], options: SmoothOptions
) -> SmoothedLayer:
    scales: Scales = {}
    alphas: dict[str, float | None] = {}
    for key, note in seen.items():
        if not note.rows:  # an expert that no token chose
            continue
        shape = (config.num_kv_heads, -1, config.value_dim) if key == OUTPUT else None
        alphas[key], scale = _best(weights, note, shape, options)
        if scale is not None:
            scales[key] = scale
    return SmoothedLayer(scales, alphas)


def _best(
    weights: BlockWeights,
    note: _Seen,
    heads: tuple[int, int, int] | None,
    options: SmoothOptions,
) -> tuple[float | None, Tensor | None]:
    """The alpha with the least output error, and its scale.

    `heads` is the input's shape (value heads, query heads of each, elements) where channels come
    from values: query heads of one value head share its scales.
    """
    matrices = [weights.linears[part] for part in note.readers]
    judges, rows = matrices[:: max(1, len(matrices) // _MAX_JUDGES)], torch.cat(note.rows)
    inputs, columns = note.peak, torch.stack([m.abs().amax(0) for m in matrices]).amax(0)
    if heads is not None:
        inputs, columns = _shared(inputs, heads), _shared(columns, heads)
    exact = [F.linear(rows, matrix) for matrix in judges]
    choices: list[tuple[float | None, Tensor | None]] = [(None, None)]
    choices += [(alpha, _scale(inputs, columns, alpha)) for alpha in options.alphas]
    return min(choices, key=lambda choice: _error(rows, judges, exact, choice[1], options))


def _scale(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """s (in,) from the peaks of inputs and of weight columns, centred on one."""
    pull = columns.clamp(min=_TINY).pow(1 - alpha)
    scale = inputs.clamp(min=_TINY).pow(alpha) / pull
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / _MAX_SCALE, _MAX_SCALE)


def _shared(peaks: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Peaks of o_proj's channels, made equal over the query heads of one value head."""
    heads = peaks.view(shape)
    return heads.amax(1, keepdim=True).expand_as(heads).flatten()


def _error(
    rows: Tensor,
    matrices: list[Tensor],
    exact: list[Tensor],
    scale: Tensor | None,
    options: SmoothOptions,
) -> float:
    """Relative squared error of rounded weights on rounded inputs, summed over the readers."""
    scale = torch.ones(rows.shape[1]) if scale is None else scale
    inputs = rows / scale
    if options.activation_bits:
        inputs = _rounded(inputs, options.activation_bits, inputs.shape[1])
    error = 0.0
    for matrix, outputs in zip(matrices, exact, strict=True):
        rounded = _rounded(matrix * scale, options.bits, options.group_size)
        missed = (F.linear(inputs, rounded) - outputs).square().sum()
        error += float(missed / outputs.square().sum().clamp(min=_TINY))
    return error


def _rounded(values: Tensor, bits: int, group_size: int) -> Tensor:
    """Rows (n, columns) on a symmetric grid per row and run of `group_size` columns."""
    num_columns = values.shape[1]
    padded = F.pad(values, (0, -num_columns % group_size))
    groups = padded.view(len(values), -1, group_size)
    top = (1 << (bits - 1)) - 1
    step = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) / top
    rounded = (groups / step).round() * step
    return rounded.view(padded.shape)[:, :num_columns]


def _refuse_rotated_down(source: WeightSource) -> None:
    if source.transform.down_seed is not None:
        raise UnsupportedModel(
            "the inputs of down projections are rotated, so no scale can move there; "
            "smooth the model first and rotate it then"
        )
