"""Finished linears on disk: kept, read back, damaged, and a disk that is full."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vqllm.checkpoint import Checkpoint
from vqllm.errors import CorruptArtefact, DiskFull, ResumeMismatch
from vqllm.quantization.artefacts import WorkFolder
from vqllm.quantization.hessian import factorize
from vqllm.quantization.job import QuantizeJob
from vqllm.quantization.methods import method_of
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.presets import METHOD_NAMES, QuantizeConfig
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.tcq import TcqOptions

KEY: dict[str, Any] = {"config": {"alpha": 0.5, "dampings": (0.01,)}, "source": "abc"}
ERROR = 0.1 + 1e-16  # its shortest decimal has 17 digits
NAME = "model.layers.0.mlp.up_proj"


def test_settings_that_were_not_made_do_not_decide_whether_a_run_goes_on(
    tiny_folder: Path, windows: NDArray[np.int64]
) -> None:
    def key(**wish: Any) -> Any:
        job = QuantizeJob(Checkpoint(tiny_folder), QuantizeConfig(bits=4, **wish), windows, "text")
        return job.key["config"]

    assert None not in key().values()
    assert key(tune_steps=3) == key()
    assert key(symmetric=False) != key()


def part_of(method: str, bits: int = 2) -> QuantizedPart:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    options = QuantizeConfig(method=method, bits=bits, group_size=32 if method != "vptq" else None)
    factor = factorize(torch.eye(64, dtype=torch.float64), 0.01)
    linear = method_of(method).quantize(weight, factor, options.options())
    return QuantizedPart(NAME, linear, ERROR, 0.02)


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder(tmp_path / "out", KEY)
    folder.save(part_of("gptq"))
    return folder


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_method_comes_back_as_it_was(tmp_path: Path, method: str, bits: int) -> None:
    folder, part = WorkFolder(tmp_path / "out", KEY), part_of(method, bits)
    folder.save(part)
    again = WorkFolder(tmp_path / "out", KEY).load(NAME)
    assert again is not None
    assert (again.name, again.relative_error, again.damping) == (NAME, ERROR, 0.02)
    assert again.linear.entry() == part.linear.entry()
    assert np.array_equal(again.linear.dequantize(), part.linear.dequantize())
    for name, values in part.linear.tensors().items():
        assert np.array_equal(again.linear.tensors()[name], values)
        assert again.linear.tensors()[name].dtype == values.dtype


def test_what_was_never_saved_is_not_there(work: WorkFolder) -> None:
    assert work.load("model.layers.9.mlp.up_proj") is None
    with pytest.raises(CorruptArtefact, match=r"layers\.9\.mlp\.up_proj\.json is missing"):
        list(work.parts([NAME, "model.layers.9.mlp.up_proj"]))


def test_tensors_without_a_record_are_an_unfinished_write(work: WorkFolder) -> None:
    (work.path / f"{NAME}.json").unlink()
    assert work.load(NAME) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_tensors_are_named_with_the_remedy(work: WorkFolder, damage: str) -> None:
    path = work.path / f"{NAME}.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-5])
    else:
        content[-5] ^= 1
        path.write_bytes(content)
    with pytest.raises(CorruptArtefact, match=r"up_proj.*--no-resume"):
        work.load(NAME)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"sha256": 1, "entry": {}, "relative_error": 0, "damping": 0}']
)
def test_a_damaged_record_is_named(work: WorkFolder, text: str) -> None:
    (work.path / f"{NAME}.json").write_text(text)
    with pytest.raises(CorruptArtefact, match=r"up_proj\.(json|safetensors).*--no-resume"):
        work.load(NAME)


def test_a_record_whose_entry_lies_is_named(work: WorkFolder) -> None:
    path = work.path / f"{NAME}.json"
    record = json.loads(path.read_text())
    record["entry"] = {"method": "magic"}
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptArtefact, match=r"up_proj\.json.*magic"):
        work.load(NAME)


def test_other_settings_do_not_go_on(work: WorkFolder, tmp_path: Path) -> None:
    with pytest.raises(ResumeMismatch, match=r"another source; .*--no-resume"):
        WorkFolder(tmp_path / "out", {**KEY, "source": "xyz"})
    fresh = WorkFolder(tmp_path / "out", {**KEY, "source": "xyz"}, resume=False)
    assert fresh.load(NAME) is None


def test_a_damaged_key_is_named(work: WorkFolder, tmp_path: Path) -> None:
    (work.path / "run.json").write_text("nonsense")
    with pytest.raises(CorruptArtefact, match=r"run\.json"):
        WorkFolder(tmp_path / "out", KEY)


def test_the_recipe_is_made_once(work: WorkFolder, tmp_path: Path) -> None:
    first = work.recipe(lambda: Recipe(TcqOptions(2), seed=1))
    again = WorkFolder(tmp_path / "out", KEY).recipe(lambda: Recipe(TcqOptions(3)))
    assert again == first
    (work.path / "recipe.json").write_text('{"default": 3}')
    with pytest.raises(CorruptArtefact, match=r"recipe\.json is damaged"):
        work.recipe(lambda: first)


def test_a_full_disk_names_the_file_and_keeps_the_rest(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    other = QuantizedPart("model.layers.1.x", part_of("gptq").linear, 0.0)
    with pytest.raises(DiskFull, match=r"model\.layers\.1\.x.*finished layers are kept"):
        work.save(other)
    monkeypatch.undo()
    assert work.load(NAME) is not None
    assert work.load("model.layers.1.x") is None
    assert not list(work.path.glob("*.part"))


def test_a_disk_that_is_really_full(work: WorkFolder) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    (work.path / "other.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"other\.safetensors \(No space left"):
        work.save(QuantizedPart("other", part_of("gptq").linear, 0.0))
    assert work.load("other") is None


def test_other_errors_of_the_system_stay_what_they_are(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, content: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(OSError, match="Input/output"):
        work.save(part_of("gptq"))


def test_a_finished_run_leaves_nothing(work: WorkFolder) -> None:
    work.remove()
    assert not work.path.exists()
