"""A missing or broken native library is reported with its reason and what remains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vqkernels import (
    NativeCallError,
    NativeUnavailableError,
    ShapeError,
    ThreadPool,
    loader,
    native_status,
)


@pytest.fixture
def package_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty stand-in for the installed package folder."""
    monkeypatch.setattr(loader, "package_files", lambda: tmp_path)
    loader.load_library.cache_clear()
    yield tmp_path
    loader.load_library.cache_clear()


def write_build_info(package_dir: Path, *, native: bool, reason: str) -> None:
    fields = {"native": native, "reason": reason, "compiler": "", "tiers": []}
    (package_dir / loader.BUILD_INFO_NAME).write_text(json.dumps(fields), encoding="utf-8")


def test_build_without_compiler_is_reported_with_the_remaining_executors(package_dir: Path) -> None:
    write_build_info(package_dir, native=False, reason="no working C++ compiler was found")
    status = native_status()
    assert not status.available
    assert "no working C++ compiler was found" in status.reason
    assert status.executors == ("onnx", "torch")
    assert "not available" in str(status)
    assert "onnx, torch" in str(status)


def test_source_tree_without_install_says_how_to_install(package_dir: Path) -> None:
    assert "pip install" in native_status().reason


def test_library_that_vanished_after_the_build_is_reported(package_dir: Path) -> None:
    write_build_info(package_dir, native=True, reason="")
    assert "missing from the package" in native_status().reason


def test_file_that_is_no_library_is_reported(package_dir: Path) -> None:
    (package_dir / loader.LIBRARY_NAME).write_bytes(b"not a library")
    assert "does not load" in native_status().reason


def test_kernel_calls_without_library_raise_the_reason(package_dir: Path) -> None:
    with pytest.raises(NativeUnavailableError, match="not installed"):
        ThreadPool(1)


@pytest.mark.usefixtures("native")
def test_other_abi_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "ABI_VERSION", loader.ABI_VERSION + 1)
    loader.load_library.cache_clear()
    with pytest.raises(NativeUnavailableError, match="ABI version"):
        loader.load_library()
    loader.load_library.cache_clear()


@pytest.mark.usefixtures("native")
def test_module_prints_the_status() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "vqkernels"], capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout.startswith("native CPU kernels: available, tier ")
    assert "executors: native, onnx, torch" in printed.stdout


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("num_threads", [0, -1, 257])
def test_bad_thread_counts_are_refused(num_threads: int) -> None:
    with pytest.raises(ShapeError, match=f"num_threads is {num_threads}, must be 1..256"):
        ThreadPool(num_threads)


@pytest.mark.usefixtures("native")
def test_closed_pool_says_so_and_closes_twice() -> None:
    pool = ThreadPool(2)
    pool.close()
    pool.close()
    with pytest.raises(NativeCallError, match="closed"):
        _ = pool.handle
