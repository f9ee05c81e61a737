"""A GPU that is the CPU: the emulated kernels behind an emulated CUDA driver."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vqkernels.cuda import CudaModule, Gpu, driver

ROOT = Path(__file__).parents[3]
IMAGE = b"emulated"
_BUILD_SECONDS = 300


def build(folder: Path) -> Path:
    """Compile the driver, with the tests of csrc/tests/test_cuda.cpp as its `main`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = folder / "libcuda_emulated.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing"]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    source = ROOT / "csrc" / "tests" / "fake_driver.cpp"
    command = [compiler, *options, *warnings, f"-I{ROOT / 'csrc' / 'cuda'}", str(source)]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True, timeout=_BUILD_SECONDS)
    return library


def install(library: Path, patch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Put the driver in the place of libcuda.so.1."""
    loaded = ctypes.CDLL(str(library))
    loaded.cuInit(0)
    launches(loaded)
    patch.setattr(driver, "_driver", lambda: loaded)
    return loaded


def open_gpu() -> Gpu:
    """The emulated GPU; its arrays lie on torch's CPU."""
    return Gpu(CudaModule(IMAGE), torch.device("cpu"), lambda: 0)


def launches(library: ctypes.CDLL) -> list[str]:
    """Names of the kernels that ran since the last call."""
    text = ctypes.create_string_buffer(1 << 16)
    library.fake_launches(text, len(text))
    return text.value.decode().split()
