"""The native library, shared by the kernel tests."""

from __future__ import annotations

import shutil

import pytest

from vqkernels import native_status


@pytest.fixture(scope="session")
def native() -> None:
    """Skip where nothing could be built; fail where a compiler is there but the library is not."""
    status = native_status()
    if status.available:
        return
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.fail(f"a C++ compiler is installed, but: {status.reason}")
    pytest.skip(status.reason)
