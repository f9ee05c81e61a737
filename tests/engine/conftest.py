"""The emulated GPU, built once for the kernel tests and the executor's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from support import emulated_gpu


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated CUDA driver with all kernels."""
    return emulated_gpu.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def emulated_driver(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The emulated driver in the place of the real one."""
    return emulated_gpu.install(emulated_library, monkeypatch)
