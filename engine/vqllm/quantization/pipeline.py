"""Quantizes a whole model block by block, from memory-mapped weights to finished linears.

True sequential: inside a block the inputs of each group of linears are computed with the already
quantized linears before them, and the next block sees the quantized prefix. A second stream of
full-precision activations, when the recipe corrects towards it, runs beside the first. One block
of weights and one set of activations are in memory at a time. Knows no architecture, no method and
no file format.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vqllm.calibration import Windows
from vqllm.errors import CalibrationError, UnsupportedModel
from vqllm.quantization.blocks import Block, part_name
from vqllm.quantization.layer import GroupQuantizer, LinearResult, LinearTask
from vqllm.quantization.mapper import LocalMapper, Mapper
from vqllm.quantization.moments import MomentSums
from vqllm.quantization.parts import PartStore, QuantizedPart
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.walks import Group, Streams, Walk
from vqllm.sources import WeightSource


def quantize_model(
    source: WeightSource,
    windows: Windows,
    recipe: Recipe,
    mapper: Mapper | None = None,
    store: PartStore | None = None,
) -> Iterator[QuantizedPart]:
    """Yield every decoder linear in execution order, quantized.

    Args:
        windows: calibration tokens (num_windows, window_length).
        mapper: runs the linears of a group; by default this process does.
        store: keeps finished linears; those that it has already are not quantized again.

    Raises:
        CorruptCheckpoint: a tensor is missing, misshapen or not finite; names it.
        CalibrationError: activations overflow or a hessian cannot be factored; names the layer.
        UnsupportedModel: the recipe names an unknown linear, or a weight cannot be expressed.
    """
    check_recipe(source, windows, recipe)
    quantizer = GroupQuantizer(recipe.alpha, recipe.dampings, mapper or LocalMapper())
    with torch.inference_mode():
        streams = Streams.start(source.embed(torch.from_numpy(windows)), recipe.alpha > 0)
        for layer in range(source.config.num_layers):
            block = Block.open(source, layer, windows.shape[1])
            run = _BlockRun(layer, block, recipe, quantizer, store)
            yield from run.run(streams)


def check_recipe(source: WeightSource, windows: Windows, recipe: Recipe) -> None:
    """Raise what can be known to go wrong before any work is done.

    Raises:
        UnsupportedModel: an override names a linear that the model does not have.
        CalibrationError: the damping search has no window to hold out.
    """
    unknown = sorted(set(recipe.overrides) - set(source.linear_names()))
    if unknown:
        raise UnsupportedModel(f"the recipe has options for {unknown[0]}, which the model lacks")
    if len(recipe.dampings) > 1 and len(windows) < 2:
        raise CalibrationError(
            "a search for the damping holds windows out, and the calibration text has one window; "
            "use a longer text, shorter windows or a single damping"
        )


class _BlockRun:
    """One block while it is being quantized: its linears turn quantized group by group."""

    def __init__(
        self,
        layer: int,
        block: Block,
        recipe: Recipe,
        quantizer: GroupQuantizer,
        store: PartStore | None,
    ) -> None:
        self._layer, self._recipe, self._quantizer = layer, recipe, quantizer
        self._block, self._original = block.fork(), block
        self._store = store

    def run(self, streams: Streams) -> Iterator[QuantizedPart]:
        """Quantize the block; `streams` move on to its output."""
        walk = Walk(self._block, self._original, streams)
        while (group := walk.next_group()) is not None:
            found = {part: self._load(part) for part in group.parts}
            missing = [part for part, finished in found.items() if finished is None]
            made = self._quantize(missing, group) if missing else {}
            for part in group.parts:
                finished = found[part] or self._keep(part, made[part])
                self._block.linears[part] = torch.from_numpy(finished.linear.dequantize())
                yield finished

    def _load(self, part: str) -> QuantizedPart | None:
        return None if self._store is None else self._store.load(part_name(self._layer, part))

    def _keep(self, part: str, result: LinearResult) -> QuantizedPart:
        name = part_name(self._layer, part)
        finished = QuantizedPart(name, result.linear, result.relative_error, result.damping)
        if self._store is not None:
            self._store.save(finished)
        return finished

    def _quantize(self, parts: list[str], group: Group) -> dict[str, LinearResult]:
        recipe = self._recipe
        weights = {part: self._original.linears[part] for part in parts}
        tasks = {
            part: LinearTask(weight, recipe.options_of(part_name(self._layer, part)))
            for part, weight in weights.items()
        }
        sums = MomentSums(weights, group.num_windows, recipe.alpha > 0, len(recipe.dampings) > 1)
        for taps in group:
            sums.add(taps)
        try:
            return self._quantizer.run(tasks, sums)
        except (CalibrationError, UnsupportedModel) as error:
            raise type(error)(f"{part_name(self._layer, parts[0])}: {error}") from error
