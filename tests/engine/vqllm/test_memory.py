"""Memory limits, estimates, and tensors that lie on disk."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vqllm.decoder.config import DecoderConfig
from vqllm.errors import DiskFull, InvalidConfig, OverBudget
from vqllm.quantization import memory
from vqllm.quantization.memory import MemoryPlan, parse_bytes, peak_bytes, plan_memory, reset_peak
from vqllm.quantization.presets import QuantizeConfig
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.spill import SpilledTensor, SpilledTensors
from vqllm.quantization.tcq import TcqOptions

RECIPE = Recipe(TcqOptions(2))
LLAMA_70B = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    context_length=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("3GB", 3 * 10**9), ("20 GiB", 20 * 2**30), ("800M", 8 * 10**8), ("1.5G", 15 * 10**8)],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0GB", "3 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfig, match="such as 3GB"):
        parse_bytes(text)


def test_the_peak_grows_with_what_is_used_and_starts_anew() -> None:
    held = np.ones(20_000_000)
    before = peak_bytes()
    assert before >= held.nbytes
    del held
    reset_peak()
    assert peak_bytes() <= before


def test_a_plan_is_as_fast_as_the_limit_allows() -> None:
    config, shape = LLAMA_70B, (16, 2048)
    fast = plan_memory(config, shape, RECIPE, None)
    assert not fast.is_lean
    assert not plan_memory(config, shape, RECIPE, fast.expected_bytes + 10**9).is_lean
    lean = plan_memory(config, shape, RECIPE, fast.expected_bytes - 10**9)
    assert lean.is_lean
    assert lean.expected_bytes < fast.expected_bytes


def test_one_block_of_70b_shapes_fits_in_20_gigabytes() -> None:
    recipe = replace(RECIPE, dampings=(0.01,))
    plan = plan_memory(LLAMA_70B, (64, 2048), recipe, 20 * 10**9)
    assert plan.is_lean
    assert plan.expected_bytes <= 20 * 10**9


def test_an_impossible_limit_names_what_is_needed_and_what_helps() -> None:
    wanted = r"needs about \d+\.\d\d GB and --max-memory is 3\.00 GB; .*a single --damping"
    with pytest.raises(OverBudget, match=wanted):
        plan_memory(LLAMA_70B, (64, 2048), RECIPE, 3 * 10**9)


def test_the_limit_is_checked_against_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda: 5 * 10**9)
    MemoryPlan(limit=6 * 10**9).check("x")
    MemoryPlan().check("x")
    with pytest.raises(OverBudget, match=r"peaked at 5\.00 GB at x, over the limit of 4\.00 GB"):
        MemoryPlan(limit=4 * 10**9).check("x")


def test_spilled_tensors_come_back_and_can_be_replaced(tmp_path: Path) -> None:
    first, second = torch.randn(3, 4), torch.randn(5)
    tensors = SpilledTensors(tmp_path, {"a": first, "b": second})
    forked = tensors.fork()
    forked["a"] = second
    assert torch.equal(tensors["a"], first)
    assert torch.equal(forked["a"], second)
    assert torch.equal(forked["b"], second)
    assert list(forked) == ["a", "b"]
    with pytest.raises(KeyError):
        tensors["c"]


def test_a_spilled_tensor_keeps_what_is_written_when_pages_go(tmp_path: Path) -> None:
    spilled = SpilledTensor(tmp_path / "x.f32", (3, 1000))
    spilled.tensor[1] = torch.arange(1000.0)
    spilled.release()
    assert torch.equal(spilled.tensor[1], torch.arange(1000.0))
    assert not spilled.tensor[0].any()


def test_no_room_to_spill_is_said_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match=r"x\.f32"):
        SpilledTensor(tmp_path / "x.f32", (3,))


def test_a_disk_that_fills_up_while_weights_are_spilled(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    (tmp_path / "b.2.f32").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"no room to write .*b\.2\.f32 \(No space left"):
        SpilledTensors(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(3)})


def test_the_search_for_a_damping_costs_memory() -> None:
    searching = QuantizeConfig(method="tcq", bits=2)
    single = replace(searching, dampings=(0.01,))
    plans = [
        plan_memory(LLAMA_70B, (64, 2048), Recipe(c.options(), dampings=c.dampings), None)
        for c in (searching, single)
    ]
    assert plans[0].expected_bytes > plans[1].expected_bytes
