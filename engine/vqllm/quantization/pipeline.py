"""Quantizes a whole model block by block, from memory-mapped weights to finished linears.

True sequential: inside a block the inputs of each group of linears are computed with the already
quantized linears before them, and the next block sees the quantized prefix. A second stream of
full-precision activations, when the recipe corrects towards it, runs beside the first. One block
of weights and one set of activations are in memory at a time. Knows no architecture, no method and
no file format.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vqllm.calibration import Windows
from vqllm.errors import CalibrationError, UnsupportedModel
from vqllm.packing import WORD_BITS
from vqllm.quantization.base import MethodOptions
from vqllm.quantization.blocks import Block, part_name
from vqllm.quantization.grid import GridOptions
from vqllm.quantization.layer import GroupQuantizer, LinearResult, LinearTask
from vqllm.quantization.mappers import LocalMapper, Mapper
from vqllm.quantization.memory import MemoryPlan, trim_heap
from vqllm.quantization.moments import MomentSums
from vqllm.quantization.parts import PartStore, QuantizedPart
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.walks import Group, ReplayWalk, Streams, WaitingWalk
from vqllm.quantization.workers import Workers, one_thread_each
from vqllm.sources import WeightSource


@dataclass(frozen=True)
class Surroundings:
    """What a run uses besides the model and the recipe; the result does not depend on it.

    Attributes:
        mapper: runs the linears of a group.
        workers: share out all the rest: windows, moments, factors.
        store: keeps finished linears; those that it has already are not quantized again.
        memory: what stays in memory, and how much that may be.
        spill: folder for what does not.
        release: called when a block's weights have been read; lets mapped files go.
    """

    mapper: Mapper = field(default_factory=LocalMapper)
    workers: Workers = field(default_factory=Workers)
    store: PartStore | None = None
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    spill: Path | None = None
    release: Callable[[], None] = lambda: None

    @property
    def spill_folder(self) -> Path | None:
        """Where to put weights and states, None for memory."""
        return self.spill if self.memory.is_lean else None


def quantize_model(
    source: WeightSource,
    windows: Windows,
    recipe: Recipe,
    surroundings: Surroundings | None = None,
) -> Iterator[QuantizedPart]:
    """Yield every decoder linear in execution order, quantized.

    Args:
        windows: calibration tokens (num_windows, window_length).

    Raises:
        CorruptCheckpoint: a tensor is missing, misshapen or not finite; names it.
        CalibrationError: activations overflow or a hessian cannot be factored; names the layer.
        UnsupportedModel: the recipe names an unknown linear, or a weight cannot be expressed.
        OverBudget: the memory limit was exceeded.
        DiskFull, CorruptArtefact: from the store.
    """
    check_recipe(source, windows, recipe)
    surroundings = surroundings or Surroundings()
    # A lean run has no room for several pieces of work: there torch shares out every product.
    threading = nullcontext if surroundings.memory.is_lean else one_thread_each
    parts = _quantize_blocks(source, windows, recipe, surroundings)
    while True:
        # Around each step: a suspended generator would leak the modes.
        with torch.no_grad(), threading():
            part = next(parts, None)
        if part is None:
            return
        yield part


def _quantize_blocks(
    source: WeightSource, windows: Windows, recipe: Recipe, surroundings: Surroundings
) -> Iterator[QuantizedPart]:
    spill = surroundings.spill_folder
    streams = Streams(source, windows, recipe.alpha > 0, spill)
    for layer in range(source.config.num_layers):
        block = Block.open(source, layer, windows.shape[1], spill and spill / str(layer))
        surroundings.release()
        yield from _BlockRun(layer, block, recipe, surroundings).run(streams)
        if spill is not None:
            shutil.rmtree(spill / str(layer))


def check_recipe(source: WeightSource, windows: Windows, recipe: Recipe) -> None:
    """Raise what can be known to go wrong before any work is done.

    Raises:
        UnsupportedModel: an override names a linear that the model does not have, or a linear does
            not fit the format of its method.
        CalibrationError: the damping search has no window to hold out.
    """
    unknown = sorted(set(recipe.overrides) - set(source.linear_names()))
    if unknown:
        raise UnsupportedModel(f"the recipe has options for {unknown[0]}, which the model lacks")
    for name in source.linear_names():
        _check_words(name, source.config.linear_shape(name), recipe.options_of(name))
    if len(recipe.dampings) > 1 and len(windows) < 2:
        raise CalibrationError(
            "a search for the damping holds windows out, and the calibration text has one window; "
            "use a longer text, shorter windows or a single damping"
        )


def _check_words(name: str, shape: tuple[int, int], options: MethodOptions) -> None:
    if not isinstance(options, GridOptions):
        return
    for size in shape:
        if size * options.spec.bits % WORD_BITS:
            raise UnsupportedModel(
                f"{name}: {size} codes of {options.spec.bits} bits do not fill whole 32-bit words, "
                "as the GPTQ format wants; use other bits, or the method tcq or vptq"
            )


class _BlockRun:
    """One block while it is being quantized: its linears turn quantized group by group."""

    def __init__(
        self, layer: int, block: Block, recipe: Recipe, surroundings: Surroundings
    ) -> None:
        self._layer, self._recipe, self._surroundings = layer, recipe, surroundings
        self._original = block
        self._block = block.fork() if recipe.alpha > 0 else block
        self._quantizer = GroupQuantizer(
            recipe.alpha, recipe.dampings, surroundings.mapper, surroundings.workers
        )

    def run(self, streams: Streams) -> Iterator[QuantizedPart]:
        """Quantize the block; `streams` move on to its output."""
        walk = ReplayWalk if self._surroundings.memory.is_lean else WaitingWalk
        workers = self._surroundings.workers
        for group in walk(self._block, self._original, streams, workers).groups():
            for finished in self._finish(group):
                self._block.linears[finished.name.split(".", 3)[3]] = torch.from_numpy(
                    finished.linear.dequantize()
                )
                self._surroundings.memory.check(finished.name)
                yield finished
            trim_heap()

    def _finish(self, group: Group) -> Iterator[QuantizedPart]:
        found = {part: self._load(part) for part in group.parts}
        missing = [part for part, finished in found.items() if finished is None]
        made = self._quantize(missing, group) if missing else {}
        for part in group.parts:
            yield found[part] or self._keep(part, made.pop(part))

    def _load(self, part: str) -> QuantizedPart | None:
        store = self._surroundings.store
        return None if store is None else store.load(part_name(self._layer, part))

    def _keep(self, part: str, result: LinearResult) -> QuantizedPart:
        name = part_name(self._layer, part)
        finished = QuantizedPart(name, result.linear, result.relative_error, result.damping)
        if self._surroundings.store is not None:
            self._surroundings.store.save(finished)
        return finished

    def _quantize(self, parts: list[str], group: Group) -> dict[str, LinearResult]:
        tasks = {
            part: LinearTask(
                self._original.linears[part],
                self._recipe.options_of(part_name(self._layer, part)),
            )
            for part in parts
        }
        try:
            return self._quantizer.run(tasks, self._count(group))
        except (CalibrationError, UnsupportedModel) as error:
            raise type(error)(f"{part_name(self._layer, parts[0])}: {error}") from error

    def _count(self, group: Group) -> MomentSums:
        """Moments over every batch.

        Routed experts that see fewer tokens than they have inputs are calibrated on all tokens.
        """
        workers = self._surroundings.workers
        sums = self._empty_sums(group)
        sums.add_all(group.taps(), workers)
        if sums.num_rows >= sums.num_columns or not _is_routed(group):
            return sums
        sums = self._empty_sums(group)
        sums.add_all((taps.with_every_token() for taps in group.taps()), workers)
        return sums

    def _empty_sums(self, group: Group) -> MomentSums:
        """Of all linears, also of those that a run before this one finished.

        What a sum is rounded to depends on which linears share it.
        """
        weights = {part: self._original.linears[part] for part in group.parts}
        recipe = self._recipe
        return MomentSums(weights, group.num_windows, recipe.alpha > 0, len(recipe.dampings) > 1)


def _is_routed(group: Group) -> bool:
    """All batches of a group are alike in this."""
    return next(iter(group.taps())).every_token is not None
