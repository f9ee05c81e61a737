"""Quantized linears whose scales and codebooks take gradients while their codes stay.

Every form is brought to one: y = ((x * columns) core' + (x . biases)) * rows. Scales of whole rows
and columns then need no gradient of a matrix. Scales of groups and codebooks live in the core: its
gradient is collected over a step and pulled back to them once.

Parameters are kept as relative changes, zero at the start, so that one learning rate fits all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vqllm.errors import UnsupportedModel
from vqllm.quantization.base import Arrays, GroupedLinear, QuantizedLinear
from vqllm.quantization.tcq import TcqLinear
from vqllm.quantization.vptq_linear import VptqLinear

_TINY = 1e-12


class Tunable:
    """A tensor that starts at `start` and moves by `unit` times its change.

    Attributes:
        change: float32 leaf of the shape of `start`, zero at first.
    """

    def __init__(self, start: NDArray[Any], unit: Tensor | None = None) -> None:
        """Without `unit` the change is relative to every element's own size."""
        self._start = torch.from_numpy(np.array(start, dtype=np.float32))
        self._unit = self._start.abs().clamp_min(_TINY) if unit is None else unit
        self.change = torch.zeros_like(self._start).requires_grad_()

    @property
    def value(self) -> Tensor:
        """The tensor now; gradients reach `change`."""
        return self._start + self._unit * self.change

    def pull(self, gradient: Tensor) -> None:
        """Add a gradient of the value to the change's."""
        part = gradient.to(self.change) * self._unit
        self.change.grad = part if self.change.grad is None else self.change.grad + part

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self._start, self._unit = self._start.to(device), self._unit.to(device)
        self.change = self.change.detach().to(device).requires_grad_()

    def start_at(self, values: NDArray[Any]) -> None:
        """Begin from other values, with a change of zero."""
        self._start = torch.from_numpy(np.array(values, np.float32)).to(self._start.device)
        self.change = torch.zeros_like(self._start).requires_grad_()

    def numpy(self) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self.value.detach().cpu().numpy()
        return result


def relative(start: NDArray[Any]) -> Tunable:
    """A tunable whose elements all move by the tensor's root mean square."""
    rms = float(np.sqrt(np.square(np.asarray(start, np.float64)).mean()))
    return Tunable(start, torch.full((), max(rms, _TINY)))


class Core(ABC):
    """The matrix (out, in) that inputs are multiplied with, as a function of parameters."""

    tunables: dict[str, Tunable]

    @abstractmethod
    def build(self) -> Tensor:
        """The matrix, float32, without gradients."""

    @abstractmethod
    def pull(self, gradient: Tensor) -> None:
        """Give the matrix's gradient (out, in) to the parameters."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move codes and parameters to a device."""


class LevelsCore(Core):
    """Integer levels, times a scale per output and group of columns where `scales` are given."""

    def __init__(
        self, levels: NDArray[Any], groups: NDArray[np.int32], scales: Tunable | None
    ) -> None:
        """levels: (out, in); groups: (in,), the group of every column; scales: (groups, out)."""
        self._levels, self._groups = torch.from_numpy(levels), torch.from_numpy(groups).long()
        self.tunables = {} if scales is None else {"scales": scales}

    def build(self) -> Tensor:
        levels = self._levels.float()
        if not self.tunables:
            return levels
        return levels.mul_(self.tunables["scales"].value.detach()[self._groups].T)

    def pull(self, gradient: Tensor) -> None:
        products = (gradient.float() * self._levels).T
        scales = self.tunables["scales"]
        sums = torch.zeros_like(scales.change).index_add_(0, self._groups, products)
        scales.pull(sums)

    def to(self, device: torch.device | str) -> None:
        self._levels, self._groups = self._levels.to(device), self._groups.to(device)
        _move(self.tunables, device)


@dataclass
class _Lookup:
    """Columns of the core that read one codebook: entry `indices[row, column]` along the rows."""

    name: str
    group: int | None
    columns: slice
    indices: Tensor


class CodebookCore(Core):
    """Sums of codebook vectors that run along the outputs, columns in natural order."""

    def __init__(self, linear: VptqLinear) -> None:
        self.tunables = {
            name: relative(values)
            for name, values in linear.parameters().items()
            if name.endswith("centroids")
        }
        self._shape = linear.out_features, linear.in_features
        self._order: Tensor | None = None
        if linear.order is not None:
            self._order = torch.from_numpy(linear.order.astype(np.int64))
        self._lookups = list(_lookups(linear))

    def build(self) -> Tensor:
        rows, columns = self._shape
        tables = torch.zeros(rows, columns, device=self._lookups[0].indices.device)
        for lookup in self._lookups:
            vectors = self._book(lookup)[lookup.indices]
            tables[:, lookup.columns] += vectors.transpose(1, 2).flatten(0, 1)[:rows]
        if self._order is None:
            return tables
        result = torch.empty_like(tables)
        result[:, self._order] = tables
        return result

    def pull(self, gradient: Tensor) -> None:
        ordered = gradient.float()
        if self._order is not None:
            ordered = ordered[:, self._order]
        sums = {name: torch.zeros_like(t.change) for name, t in self.tunables.items()}
        for lookup in self._lookups:
            book = sums[lookup.name] if lookup.group is None else sums[lookup.name][lookup.group]
            length = book.shape[-1]
            part = ordered[:, lookup.columns]
            part = F.pad(part, (0, 0, 0, -len(part) % length))
            vectors = part.reshape(-1, length, part.shape[1]).transpose(1, 2).flatten(0, 1)
            # index_add_ gives the same sums and takes every row for a tensor: five times as long.
            entries = lookup.indices.flatten().long()[:, None].expand_as(vectors)
            book.scatter_add_(0, entries, vectors)
        for name, tunable in self.tunables.items():
            tunable.pull(sums[name])

    def to(self, device: torch.device | str) -> None:
        if self._order is not None:
            self._order = self._order.to(device)
        for lookup in self._lookups:
            lookup.indices = lookup.indices.to(device)
        _move(self.tunables, device)

    def _book(self, lookup: _Lookup) -> Tensor:
        book = self.tunables[lookup.name].value.detach()
        return book if lookup.group is None else book[lookup.group]


def _lookups(linear: VptqLinear) -> list[_Lookup]:
    def as_index(indices: NDArray[np.uint16]) -> Tensor:
        return torch.from_numpy(indices.astype(np.int32))

    found, start = [], linear.spec.num_outliers
    if linear.outlier_indices is not None:
        indices = as_index(linear.outlier_indices)
        found.append(_Lookup("outlier_centroids", None, slice(0, start), indices))
    size = linear.indices.shape[2]
    for group in range(linear.spec.num_groups):
        columns = slice(start + group * size, start + (group + 1) * size)
        found.append(_Lookup("centroids", group, columns, as_index(linear.indices[group])))
        if linear.res_indices is not None:
            indices = as_index(linear.res_indices[group])
            found.append(_Lookup("res_centroids", group, columns, indices))
    return found


class TunableLinear:
    """A quantized linear with gradients for its parameters.

    Between `begin` and `finish` the parameters of the core must not change.
    """

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        """`dtype` is that of the products with the core.

        Raises:
            UnsupportedModel: tuning does not know this kind of linear.
        """
        self.linear, self._dtype = linear, dtype
        self._rows: Tunable | None = None
        self._outer: dict[str, Tunable] = {}
        self._core = self._take_apart(linear)
        self._matrix = torch.empty(0)
        self.begin()

    def _take_apart(self, linear: QuantizedLinear) -> Core:
        if isinstance(linear, TcqLinear):
            levels = np.ascontiguousarray(linear.levels().T)
            if linear.column_scales is not None:
                self._outer["column_scales"] = Tunable(linear.column_scales)
            return self._levels_core(levels, linear.group_index, linear.scales)
        if isinstance(linear, GroupedLinear):
            levels = (linear.codes.astype(np.int16) - linear.zeros[linear.group_index]).T
            return self._levels_core(
                np.ascontiguousarray(levels), linear.group_index, linear.scales
            )
        if isinstance(linear, VptqLinear):
            if linear.column_scales is not None and linear.column_biases is not None:
                self._outer["column_scales"] = Tunable(linear.column_scales)
                spread = float(np.abs(linear.dequantize()).mean())
                unit = torch.full((), spread)
                self._outer["column_biases"] = Tunable(linear.column_biases, unit)
            return CodebookCore(linear)
        raise UnsupportedModel(f"tuning cannot change a linear of method {linear.method!r}")

    def _levels_core(
        self,
        levels: NDArray[Any],
        groups: NDArray[np.int32],
        scales: NDArray[np.float16],
    ) -> Core:
        if len(scales) == 1:
            self._rows = Tunable(scales[0])
            return LevelsCore(levels, groups, None)
        return LevelsCore(levels, groups, Tunable(scales))

    @property
    def tunables(self) -> list[Tunable]:
        """Everything that takes gradients."""
        rows = [] if self._rows is None else [self._rows]
        return [*rows, *self._outer.values(), *self._core.tunables.values()]

    @property
    def matrices(self) -> list[Tensor]:
        """The core, if gradients are taken by it."""
        return [self._matrix] if self._matrix.requires_grad else []

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self._core.to(device)
        _move(self._outer, device)
        if self._rows is not None:
            self._rows.to(device)
        self.begin()

    def begin(self) -> None:
        """Build the core from the parameters as they are now."""
        is_there = self._matrix.numel() and self._matrix.device == self._device
        if is_there and not self._core.tunables:
            return
        matrix = self._core.build().to(self._dtype)
        self._matrix = matrix.requires_grad_(bool(self._core.tunables))

    @property
    def _device(self) -> torch.device:
        return self.tunables[0].change.device

    def project(self, inputs: Tensor) -> Tensor:
        """Inputs (..., in) float32 to outputs (..., out) float32, without a bias."""
        scaled = inputs
        if "column_scales" in self._outer:
            scaled = inputs * self._outer["column_scales"].value
        outputs = F.linear(scaled.to(self._dtype), self._matrix)
        if self._rows is not None:  # in the short dtype the outputs are kept for going back
            return outputs * self._rows.value
        if "column_biases" not in self._outer:
            return outputs.to(inputs.dtype)
        biases = self._outer["column_biases"].value
        return outputs.to(inputs.dtype) + (inputs * biases).sum(-1, keepdim=True)

    def finish(self) -> None:
        """Pull the core's gradient back to its parameters, and forget it."""
        if self._matrix.grad is not None:
            self._core.pull(self._matrix.grad)
            self._matrix.grad = None

    def tuned(self) -> QuantizedLinear:
        """The linear with the parameters as they are now, in the stored precision."""
        parameters: Arrays = {name: t.numpy() for name, t in self._outer.items()}
        parameters |= {name: t.numpy() for name, t in self._core.tunables.items()}
        if self._rows is not None:
            parameters["scales"] = self._rows.numpy()[None]
        return self.linear.with_parameters(parameters)


def _move(tunables: dict[str, Tunable], device: torch.device | str) -> None:
    for tunable in tunables.values():
        tunable.to(device)
