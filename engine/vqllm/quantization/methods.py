"""The table of quantization methods: by name for quantizing, by stored format for reading back.

One line per method; nothing else in the core loop names one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vqllm.errors import InvalidConfig
from vqllm.packing import unpack_columns, unpack_rows
from vqllm.quantization.base import Arrays, GroupedLinear, GroupedSpec, QuantizedLinear
from vqllm.quantization.gptq import GptqOptions, quantize_gptq
from vqllm.quantization.hessian import HessianFactor
from vqllm.quantization.rtn import RtnOptions, quantize_rtn
from vqllm.quantization.tcq import TcqLinear, TcqOptions, quantize_tcq
from vqllm.quantization.tcq_row import TcqRowLinear, TcqRowOptions, quantize_tcq_row
from vqllm.quantization.vptq import VptqOptions, quantize_vptq
from vqllm.quantization.vptq_reading import read_vptq


@dataclass(frozen=True)
class Method:
    """One way to quantize.

    Attributes:
        options: dataclass of its options.
        quantize: (weight (out, in) float32, factor, options) to the packed linear.
    """

    options: type[Any]
    quantize: Callable[[Tensor, HessianFactor, Any], QuantizedLinear]


METHODS: Mapping[str, Method] = {
    "gptq": Method(GptqOptions, quantize_gptq),
    "rtn": Method(RtnOptions, quantize_rtn),
    "tcq": Method(TcqOptions, quantize_tcq),
    "tcq_row": Method(TcqRowOptions, quantize_tcq_row),
    "vptq": Method(VptqOptions, quantize_vptq),
}


def method_of(name: str) -> Method:
    """Raises InvalidConfig: no such method."""
    if name not in METHODS:
        raise InvalidConfig("method", name, f"one of {', '.join(METHODS)}")
    return METHODS[name]


def read_linear(tensors: Arrays, entry: Mapping[str, Any]) -> QuantizedLinear:
    """The linear whose `tensors()` and `entry()` are given.

    Raises:
        InvalidConfig: the entry names an unknown format.
        KeyError, ValueError: tensors or facts are missing or do not fit each other.
    """
    if entry.get("method") not in READERS:
        raise InvalidConfig("method", entry.get("method"), f"one of {', '.join(READERS)}")
    return READERS[entry["method"]](tensors, entry)


def _read_grouped(tensors: Arrays, entry: Mapping[str, Any]) -> GroupedLinear:
    spec = GroupedSpec(int(entry["bits"]), int(entry["group_size"]))
    stored = unpack_columns(tensors["qzeros"], spec.bits)
    return GroupedLinear(
        codes=unpack_rows(tensors["qweight"], spec.bits),
        scales=tensors["scales"],
        zeros=stored + np.uint8(1) if entry["sym"] else stored,
        group_index=tensors["g_idx"],
        spec=spec,
    )


READERS: Mapping[str, Callable[[Arrays, Mapping[str, Any]], QuantizedLinear]] = {
    "gptq": _read_grouped,
    "tcq": TcqLinear.from_tensors,
    "tcq_row": TcqRowLinear.from_tensors,
    "vptq": read_vptq,
}
