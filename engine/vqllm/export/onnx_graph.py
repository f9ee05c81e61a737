"""A checkpoint as one ONNX graph that serves prefill, batched decode and scoring.

Built node by node with `onnx.helper`: no tracing, no torch. Quantized linears become
MatMulNBits, attention becomes GroupQueryAttention with the rotary embedding inside, so one block
is nine nodes. Knows the ONNX Runtime contrib operators; does not import ONNX Runtime.

Inputs and outputs (b sequences, s new tokens each, r rows of logits, L cache length):

    input_ids int64 (b, s)            last_position int32 (b,): tokens in the cache after, less one
    total_length int32 (): the longest of them      logit_rows int64 (r,): rows of (b * s) to score
    past_key.i, past_value.i and present_key.i, present_value.i float32 (b, kv_heads, L, head_dim)
    logits float32 (r, vocab_size)

Past and present are meant to be bound to the same memory, which is then updated in place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vqllm.checkpoint import EMBEDDING, FINAL_NORM, Checkpoint
from vqllm.errors import CorruptCheckpoint, InvalidConfig, UnsupportedModel
from vqllm.quantization.base import GroupedLinear, GroupedSpec, QuantizedLinear

GRAPH_VERSION = 1  # part of the cache key; raise it when the graph changes
_CONTRIB = "com.microsoft"
_OPSET = 20
_IR_VERSION = 10

HeadPrecision = Literal["int8", "float32"]


@dataclass(frozen=True)
class GraphOptions:
    """Choices that change the graph, and hence its place in the cache.

    Attributes:
        accuracy_level: of MatMulNBits; 4 multiplies int8 activations and is fast, 0 computes in
            float32 and is for comparing with the reference.
        head: `int8` stores the output projection in 8 bits with a scale per 32 weights,
            `float32` keeps it as it is in the checkpoint.
    """

    accuracy_level: int = 4
    head: HeadPrecision = "int8"

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4):
            raise InvalidConfig("accuracy_level", self.accuracy_level, "0 or 4")
        if self.head not in ("int8", "float32"):
            raise InvalidConfig("head", self.head, "int8 or float32")

    @property
    def key(self) -> str:
        """Short hash of these options and of the graph's version."""
        content = json.dumps({**asdict(self), "version": GRAPH_VERSION}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def export_onnx(
    checkpoint: Checkpoint, path: Path, options: GraphOptions, num_positions: int
) -> None:
    """Write the graph to `path` and its weights beside it as `<name>.data`.

    Args:
        num_positions: length of the rotary tables, at least the longest sequence to run.

    Raises:
        UnsupportedModel: quantized groups that are not runs of neighbouring columns, or a head
            size that GroupQueryAttention does not take.
        CorruptCheckpoint: a tensor is missing, misshapen or not finite.
    """
    head_dim = checkpoint.config.head_dim
    if head_dim % 16:
        raise UnsupportedModel(
            f"head_dim is {head_dim}; GroupQueryAttention of ONNX Runtime takes multiples of 16"
        )
    builder = _GraphBuilder(checkpoint, options, num_positions)
    onnx.save_model(
        builder.build(),
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=path.name + ".data",
        size_threshold=1024,
    )


class _GraphBuilder:
    def __init__(self, checkpoint: Checkpoint, options: GraphOptions, num_positions: int) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._options = options
        self._num_positions = num_positions
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def build(self) -> onnx.ModelProto:
        config = self._config
        self._rotary_tables()
        residual = self._embed()
        update: str | None = None
        for layer in range(config.num_layers):
            residual, update = self._block(layer, residual, update)
        normed, _ = self._norm(FINAL_NORM, residual, update)
        self._head(normed)
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs(), self._outputs(), self._weights
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="vqstack"
        )

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"]),
            helper.make_tensor_value_info("last_position", TensorProto.INT32, ["b"]),
            helper.make_tensor_value_info("total_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("logit_rows", TensorProto.INT64, ["r"]),
            *self._caches("past"),
        ]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        shape: list[str | int | None] = ["r", self._config.vocab_size]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        return [logits, *self._caches("present")]

    def _caches(self, when: str) -> list[onnx.ValueInfoProto]:
        shape: list[str | int | None] = ["b", self._config.num_kv_heads, "L", self._config.head_dim]
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name in cache_names(when, self._config.num_layers)
        ]

    def _rotary_tables(self) -> None:
        head_dim = self._config.head_dim
        frequencies = self._config.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
        angles = np.outer(np.arange(self._num_positions), frequencies)
        self._weight("cos", np.cos(angles).astype(np.float32))
        self._weight("sin", np.sin(angles).astype(np.float32))

    def _embed(self) -> str:
        """A float16 table stays float16: gathering is cheap, and it halves the memory."""
        table = self._checkpoint.embedding()
        is_half = self._checkpoint.store.dtype(EMBEDDING) == "F16"
        self._weight("embedding", table.astype(np.float16) if is_half else table)
        rows = self._node("Gather", ["embedding", "input_ids"], ["embedding.rows"])
        return self._node("Cast", [rows], ["embedding.out"], to=TensorProto.FLOAT)

    def _block(self, layer: int, residual: str, update: str | None) -> tuple[str, str]:
        """One block; the second result is still to be added to the first."""
        prefix = f"model.layers.{layer}"
        normed, residual = self._norm(f"{prefix}.input_layernorm.weight", residual, update)
        context = self._attention(layer, normed)
        update = self._linear([f"{prefix}.self_attn.o_proj"], context)
        name = f"{prefix}.post_attention_layernorm.weight"
        normed, residual = self._norm(name, residual, update)
        gates = self._linear([f"{prefix}.mlp.gate_proj"], normed)
        ups = self._linear([f"{prefix}.mlp.up_proj"], normed)
        # QuickGelu with alpha 1 is x * sigmoid(x), which is SiLU, in one node.
        silu = self._node("QuickGelu", [gates], [f"{prefix}.silu"], _CONTRIB, alpha=1.0)
        gated = self._node("Mul", [silu, ups], [f"{prefix}.gated"])
        return residual, self._linear([f"{prefix}.mlp.down_proj"], gated)

    def _norm(self, name: str, residual: str, update: str | None) -> tuple[str, str]:
        """RMS norm of residual + update; returns the normed value and the sum."""
        self._weight(name, self._checkpoint.norm(name))
        normed, epsilon = f"{name}.out", self._config.rms_norm_eps
        if update is None:
            self._node(
                "SimplifiedLayerNormalization", [residual, name], [normed], epsilon=epsilon, axis=-1
            )
            return normed, residual
        total = f"{name}.sum"
        self._node(
            "SkipSimplifiedLayerNormalization",
            [residual, update, name],
            [normed, "", "", total],
            _CONTRIB,
            epsilon=epsilon,
        )
        return normed, total

    def _attention(self, layer: int, normed: str) -> str:
        names = [f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        packed = self._linear(names, normed)
        context = f"model.layers.{layer}.context"
        past = (f"past_key.{layer}", f"past_value.{layer}")
        self._node(
            "GroupQueryAttention",
            [packed, "", "", *past, "last_position", "total_length", "cos", "sin"],
            [context, f"present_key.{layer}", f"present_value.{layer}"],
            _CONTRIB,
            num_heads=self._config.num_heads,
            kv_num_heads=self._config.num_kv_heads,
            do_rotary=1,
        )
        return context

    def _linear(self, names: Sequence[str], inputs: str) -> str:
        """Linears that share their input as one product; outputs lie side by side."""
        linears = [self._checkpoint.linear(name) for name in names]
        grouped = [linear for linear in linears if isinstance(linear, GroupedLinear)]
        if len(grouped) == len(linears):
            return self._grouped_linear(names[0], grouped, inputs)
        dense = [
            linear.dequantize() if isinstance(linear, QuantizedLinear) else linear
            for linear in linears
        ]
        return self._dense_linear(names[0], np.concatenate(dense), inputs)

    def _dense_linear(self, name: str, weight: NDArray[np.float32], inputs: str) -> str:
        self._weight(f"{name}.weight", np.ascontiguousarray(weight.T))
        return self._node("MatMul", [inputs, f"{name}.weight"], [f"{name}.out"])

    def _grouped_linear(self, name: str, linears: list[GroupedLinear], inputs: str) -> str:
        for linear in linears:
            if not linear.has_contiguous_groups:
                raise UnsupportedModel(
                    f"{name}: the groups are permuted (act-order without static groups), which "
                    "ONNX Runtime runs about a hundred times slower; use the torch executor"
                )
            size = linear.spec.group_size
            if size < 16 or size & (size - 1):
                raise UnsupportedModel(
                    f"{name}: ONNX Runtime runs groups of a power of two from 16 on, this layer "
                    f"has {size}; quantize with another group size or use the torch executor"
                )
        blocks = np.concatenate([blocked_codes(linear) for linear in linears])
        scales = np.concatenate([linear.scales.T.astype(np.float32) for linear in linears])
        zeros = None
        if not all(linear.is_symmetric for linear in linears):
            zeros = np.concatenate([blocked_zeros(linear) for linear in linears])
        spec = linears[0].spec
        return self._matmul_nbits(name, inputs, linears[0].in_features, spec, blocks, scales, zeros)

    def _matmul_nbits(
        self,
        name: str,
        inputs: str,
        in_features: int,
        spec: GroupedSpec,
        blocks: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8] | None = None,
    ) -> str:
        operands = [inputs, self._weight(f"{name}.codes", blocks)]
        operands.append(self._weight(f"{name}.scales", np.ascontiguousarray(scales)))
        if zeros is not None:
            operands.append(self._weight(f"{name}.zeros", zeros))
        return self._node(
            "MatMulNBits",
            operands,
            [f"{name}.out"],
            _CONTRIB,
            K=in_features,
            N=blocks.shape[0],
            bits=container_bits(spec.bits),
            block_size=spec.group_size,
            accuracy_level=self._options.accuracy_level,
        )

    def _head(self, normed: str) -> None:
        """Logits of the asked rows only: at prefill that is one row instead of all."""
        hidden_size = self._config.hidden_size
        self._weight("flat_shape", np.array([-1, hidden_size], dtype=np.int64))
        self._node("Reshape", [normed, "flat_shape"], ["flat"])
        self._node("Gather", ["flat", "logit_rows"], ["scored"], axis=0)
        weight = self._checkpoint.head()
        if self._options.head == "float32":
            logits = self._dense_linear("head", weight, "scored")
        else:
            head = quantize_rows_int8(weight)
            logits = self._grouped_linear("head", [head], "scored")
        self._node("Identity", [logits], ["logits"])

    def _node(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> str:
        self._nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def _weight(self, name: str, values: NDArray[Any]) -> str:
        self._weights.append(numpy_helper.from_array(values, name))
        return name


def cache_names(when: str, num_layers: int) -> list[str]:
    """Names of the key and value caches of every layer; `when` is past or present."""
    return [f"{when}_{part}.{layer}" for layer in range(num_layers) for part in ("key", "value")]


def container_bits(bits: int) -> int:
    """Width that holds a code in MatMulNBits, which has 2, 4 and 8 bits."""
    return next(width for width in (2, 4, 8) if width >= bits)


def blocked_codes(linear: GroupedLinear) -> NDArray[np.uint8]:
    """Codes as MatMulNBits wants them: uint8 (out, groups, group_size * bits / 8).

    Within a byte the first column is lowest. Columns that pad the last group hold the zero point.
    """
    spec, bits = linear.spec, container_bits(linear.spec.bits)
    num_groups = spec.num_groups(linear.in_features)
    padding = num_groups * spec.group_size - linear.in_features
    codes = np.pad(
        _container_codes(linear).T, ((0, 0), (0, padding)), constant_values=1 << (bits - 1)
    )
    return _pack_bytes(codes, bits).reshape(linear.out_features, num_groups, -1)


def blocked_zeros(linear: GroupedLinear) -> NDArray[np.uint8]:
    """Zero points as MatMulNBits wants them: packed bytes, flat, each output row padded."""
    bits = container_bits(linear.spec.bits)
    zeros = linear.zeros.T + np.uint8((1 << (bits - 1)) - linear.spec.symmetric_zero)
    codes_per_byte = 8 // bits
    padding = -zeros.shape[1] % codes_per_byte
    return _pack_bytes(np.pad(zeros, ((0, 0), (0, padding))), bits)


def _container_codes(linear: GroupedLinear) -> NDArray[np.uint8]:
    """Codes moved so that the symmetric zero point of a narrow code is that of its container."""
    container_zero = 1 << (container_bits(linear.spec.bits) - 1)
    return linear.codes + np.uint8(container_zero - linear.spec.symmetric_zero)


def _pack_bytes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack along the last axis, first code in the lowest bits."""
    codes_per_byte = 8 // bits
    lanes = codes.reshape(codes.shape[0], -1, codes_per_byte)
    packed = np.zeros(lanes.shape[:2], dtype=np.uint8)
    for lane in range(codes_per_byte):
        packed |= lanes[..., lane] << np.uint8(lane * bits)
    return packed


def quantize_rows_int8(weight: NDArray[np.float32], group_size: int = 32) -> GroupedLinear:
    """Round to nearest, 8 bits, symmetric, a float16-rounded scale per 32 weights of a row.

    Raises:
        CorruptCheckpoint: the input width is not a multiple of 32.
    """
    num_rows, num_columns = weight.shape
    if num_columns % group_size:
        raise CorruptCheckpoint(f"head width {num_columns} is not a multiple of {group_size}")
    spec = GroupedSpec(8, group_size)
    groups = weight.reshape(num_rows, -1, group_size)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    scales = np.maximum(largest / 127, 2.0**-24).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(groups / scales), -127, 127).astype(np.int16) + spec.symmetric_zero
    return GroupedLinear(
        codes=np.ascontiguousarray(codes.reshape(num_rows, num_columns).astype(np.uint8).T),
        scales=np.ascontiguousarray(scales[..., 0].T.astype(np.float16)),
        zeros=np.full((num_columns // group_size, num_rows), spec.symmetric_zero, np.uint8),
        group_index=(np.arange(num_columns) // group_size).astype(np.int32),
        spec=spec,
    )
