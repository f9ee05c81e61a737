"""The core loop over whole tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.tiny_models import CONFIGS, VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.decoder.trace import finish
from vqllm.errors import CalibrationError, CorruptCheckpoint, UnsupportedModel
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.blocks import Block
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.memory import MemoryPlan
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.pipeline import Surroundings, quantize_model
from vqllm.quantization.presets import QuantizeConfig
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.rtn import RtnOptions
from vqllm.quantization.tcq import TcqOptions
from vqllm.quantization.walks import ReplayWalk, Streams, WaitingWalk
from vqllm.sources import PlainSource, WeightSource

MakeFolder = Callable[..., Path]
Windows = np.ndarray[Any, np.dtype[np.int64]]

FAST = Recipe(GptqOptions(GroupedSpec(2, 32), clip_steps=4), dampings=(0.01,))


def source_of(folder: Path) -> PlainSource:
    return PlainSource(Checkpoint(folder))


def last_hidden(source: WeightSource, windows: Windows, parts: Iterable[QuantizedPart]) -> Tensor:
    """Output of the last block with the given linears in place of the source's."""
    linears = {part.name: torch.from_numpy(part.linear.dequantize()) for part in parts}
    hidden = source.embed(torch.from_numpy(windows))
    for layer in range(source.config.num_layers):
        block = Block.open(source, layer, windows.shape[1])
        for part in block.linears:
            block.linears[part] = linears.get(f"model.layers.{layer}.{part}", block.linears[part])
        hidden = finish(block.trace(hidden))
    return hidden


def distance(source: WeightSource, windows: Windows, parts: Iterable[QuantizedPart]) -> float:
    wanted = last_hidden(source, windows, [])
    return float((last_hidden(source, windows, parts) - wanted).square().mean())


def assert_same(first: Sequence[QuantizedPart], second: Sequence[QuantizedPart]) -> None:
    assert [part.name for part in first] == [part.name for part in second]
    for one, other in zip(first, second, strict=True):
        assert (one.relative_error, one.damping) == (other.relative_error, other.damping)
        for name, values in one.linear.tensors().items():
            assert np.array_equal(values, other.linear.tensors()[name]), (one.name, name)


class MemoryStore:
    """Keeps finished linears in memory."""

    def __init__(self, parts: Iterable[QuantizedPart] = ()) -> None:
        self.parts = {part.name: part for part in parts}
        self.saved: list[str] = []

    def load(self, name: str) -> QuantizedPart | None:
        return self.parts.get(name)

    def save(self, part: QuantizedPart) -> None:
        self.saved.append(part.name)


def test_parts_come_in_execution_order_with_small_errors(
    tiny_folder: Path, windows: Windows
) -> None:
    source = source_of(tiny_folder)
    recipe = replace(FAST, default=GptqOptions(GroupedSpec(4, 32)))
    parts = list(quantize_model(source, windows, recipe))
    assert [part.name for part in parts] == source.linear_names()
    assert all(0 < part.relative_error < 0.1 for part in parts)
    assert {part.damping for part in parts} == {0.01}


def test_feedback_beats_rounding(tiny_folder: Path, windows: Windows) -> None:
    source, spec = source_of(tiny_folder), GroupedSpec(3, 32)
    recipes = [Recipe(kind(spec), dampings=(0.01,)) for kind in (GptqOptions, RtnOptions)]
    gptq, rtn = (list(quantize_model(source, windows, recipe)) for recipe in recipes)
    assert distance(source, windows, gptq) < 0.8 * distance(source, windows, rtn)


def test_correcting_towards_full_precision_helps(tiny_folder: Path, windows: Windows) -> None:
    source = source_of(tiny_folder)
    with_step, without = (
        list(quantize_model(source, windows, replace(FAST, alpha=alpha))) for alpha in (0.5, 0.0)
    )
    assert distance(source, windows, with_step) < distance(source, windows, without)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("dampings", [(0.01,), (0.005, 0.05)])
def test_lean_runs_give_the_same_bits(
    tiny_folder: Path, tmp_path: Path, windows: Windows, alpha: float, dampings: tuple[float, ...]
) -> None:
    source = source_of(tiny_folder)
    recipe = replace(FAST, alpha=alpha, dampings=dampings)
    fast = list(quantize_model(source, windows, recipe))
    lean = Surroundings(memory=MemoryPlan(is_lean=True), spill=tmp_path / "spill")
    assert_same(fast, list(quantize_model(source, windows, recipe, lean)))
    assert not list((tmp_path / "spill").glob("[0-9]*"))


@pytest.mark.parametrize("num_finished", [0, 1, 3, 7, 9, 14])
def test_finished_linears_are_taken_as_they_are(
    tiny_folder: Path, windows: Windows, num_finished: int
) -> None:
    source = source_of(tiny_folder)
    whole = list(quantize_model(source, windows, FAST))
    store = MemoryStore(whole[:num_finished])
    again = list(quantize_model(source, windows, FAST, Surroundings(store=store)))
    assert_same(whole, again)
    assert store.saved == [part.name for part in whole[num_finished:]]


def test_the_search_picks_a_damping_per_linear(tiny_folder: Path, windows: Windows) -> None:
    source, dampings = source_of(tiny_folder), (0.005, 0.01, 0.02, 0.05)
    parts = list(quantize_model(source, windows, replace(FAST, dampings=dampings)))
    found = {part.damping for part in parts}
    assert found <= set(dampings)
    assert len(found) > 1


def test_options_can_differ_by_linear(tiny_folder: Path, windows: Windows) -> None:
    name = "model.layers.1.mlp.up_proj"
    recipe = replace(FAST, overrides={name: TcqOptions(3)})
    methods = {
        part.name: part.linear.method
        for part in quantize_model(source_of(tiny_folder), windows, recipe)
    }
    assert methods.pop(name) == "tcq"
    assert set(methods.values()) == {"gptq"}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_quantized(tmp_path: Path, family: str) -> None:
    source = source_of(write_tiny_model(tmp_path, family))
    windows = np.random.default_rng(0).integers(0, VOCAB_SIZE, (4, 24))
    parts = list(quantize_model(source, windows, Recipe(TcqOptions(4), dampings=(0.01,))))
    assert [part.name for part in parts] == source.linear_names()
    assert all(0 < part.relative_error < 0.1 for part in parts)
    wanted = float(last_hidden(source, windows, []).square().mean())
    assert distance(source, windows, parts) < 0.1 * wanted


def test_experts_that_no_token_chooses_are_calibrated_on_all(tmp_path: Path) -> None:
    family = next(name for name in CONFIGS if "n_routed_experts" in CONFIGS[name])
    source = source_of(write_tiny_model(tmp_path, family))
    one_token = np.zeros((1, 24), np.int64)  # all positions choose nearly the same experts
    block, streams = Block.open(source, 1, 24), Streams(source, one_token, False)
    starved = 0
    for group in WaitingWalk(block, block, streams).groups():
        for pair in group.taps():
            if pair.every_token is not None and not len(pair.inputs):
                starved += 1
                assert pair.with_every_token().inputs.shape[0] == 24
    assert starved
    parts = list(quantize_model(source, one_token, Recipe(TcqOptions(3), dampings=(0.01,))))
    assert all(0 < part.relative_error < 0.3 for part in parts)


@pytest.mark.parametrize("method", ["gptq", "rtn", "tcq", "vptq"])
def test_every_method_goes_through_a_rotated_model(
    tiny_folder: Path, windows: Windows, method: str
) -> None:
    source = RotatedSource(source_of(tiny_folder), QuarotOptions())
    group_size = None if method == "vptq" else 32
    options = QuantizeConfig(method=method, bits=3, group_size=group_size).options()
    recipe = Recipe(options, dampings=(0.01,))
    parts = list(quantize_model(source, windows, recipe))
    assert [part.name for part in parts] == source.linear_names()
    assert all(0 < part.relative_error < 0.2 for part in parts)


def test_jobs_go_through_the_mapper(tiny_folder: Path, windows: Windows) -> None:
    class Counting:
        jobs = 0

        def map(self, function: Any, shared: Any, jobs: Sequence[Any]) -> list[Any]:
            self.jobs += len(jobs)
            return [function(shared, job) for job in jobs]

    mapper = Counting()
    list(quantize_model(source_of(tiny_folder), windows, FAST, Surroundings(mapper=mapper)))
    assert mapper.jobs == 14


def test_both_walks_tap_the_same_inputs(tiny_folder: Path, windows: Windows) -> None:
    source = source_of(tiny_folder)
    seen: list[list[tuple[tuple[str, ...], Tensor, Tensor]]] = []
    for kind in (WaitingWalk, ReplayWalk):
        block, streams = Block.open(source, 0, 32), Streams(source, windows, True)
        streams_before = streams.hidden.clone()
        walk = kind(block.fork(), block, streams)
        taps = [
            (group.parts, pair.inputs.clone(), pair.window)
            for group in walk.groups()
            for pair in group.taps()
        ]
        seen.append(taps)
        assert not torch.equal(streams.hidden, streams_before)
        assert streams.reference is not None
        assert torch.equal(streams.hidden, streams.reference)
    for one, other in zip(*seen, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])


def test_activations_that_overflow_name_the_layer(
    make_folder: MakeFolder, windows: Windows
) -> None:
    norm = torch.full((64,), 3e38)
    folder = make_folder(tensors={"model.layers.1.input_layernorm.weight": norm})
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn\.q_proj.*NaN"):
        list(quantize_model(source_of(folder), windows, FAST))


def test_weights_beyond_the_scales_of_the_format_name_the_layer(
    make_folder: MakeFolder, windows: Windows
) -> None:
    weight = torch.full((64, 160), 1e30)
    folder = make_folder(tensors={"model.layers.0.mlp.down_proj.weight": weight})
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp\.down_proj.*too large"):
        list(quantize_model(source_of(folder), windows, replace(FAST, alpha=0.0)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_tensor(
    make_folder: MakeFolder, windows: Windows, bad: float
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = make_folder(tensors={name: torch.full((64, 160), bad)})
    with pytest.raises(CorruptCheckpoint, match=rf"model\.safetensors.*{name}.*NaN or inf"):
        list(quantize_model(source_of(folder), windows, FAST))


def test_a_missing_tensor_is_named(make_folder: MakeFolder, windows: Windows) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = make_folder(tensors={name: None})
    with pytest.raises(CorruptCheckpoint, match=f"{name} is missing"):
        list(quantize_model(source_of(folder), windows, FAST))


def test_a_recipe_for_another_model_is_refused(tiny_folder: Path, windows: Windows) -> None:
    recipe = replace(FAST, overrides={"model.layers.7.mlp.up_proj": FAST.default})
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.7\.mlp\.up_proj"):
        next(quantize_model(source_of(tiny_folder), windows, recipe))


def test_sizes_that_do_not_fill_words_are_refused_before_any_work(
    make_folder: MakeFolder, windows: Windows
) -> None:
    folder = make_folder(tensors={}, intermediate_size=168)
    recipe = replace(FAST, default=GptqOptions(GroupedSpec(3, 32)))
    with pytest.raises(UnsupportedModel, match=r"mlp\.gate_proj: 168 codes of 3 bits.*tcq"):
        next(quantize_model(source_of(folder), windows, recipe))


def test_a_search_needs_two_windows(tiny_folder: Path, windows: Windows) -> None:
    recipe = replace(FAST, dampings=(0.01, 0.02))
    with pytest.raises(CalibrationError, match="one window; use a longer text"):
        next(quantize_model(source_of(tiny_folder), windows[:1], recipe))
    assert next(quantize_model(source_of(tiny_folder), windows[:1], FAST)).damping == 0.01


def test_a_limit_that_is_exceeded_names_the_linear(tiny_folder: Path, windows: Windows) -> None:
    surroundings = Surroundings(memory=MemoryPlan(limit=10**6))
    with pytest.raises(ValueError, match=r"memory peaked at .* GB at model\.layers\.0"):
        next(quantize_model(source_of(tiny_folder), windows, FAST, surroundings))
