"""Settings of the whole test run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support import forkserver, isa

# `python -m support.llmd` runs as a process of its own.
SUPPORT = str(Path(__file__).parent / "support")
os.environ["PYTHONPATH"] = os.pathsep.join(
    path for path in (SUPPORT, os.environ.get("PYTHONPATH", "")) if path
)
# xdist's workers inherit the variable, and with it the server of the whole run.
RUN = None if forkserver.FOLDER_VARIABLE in os.environ else forkserver.new_run()


def pytest_configure(config: pytest.Config) -> None:
    """Force the kernels' tier where VQ_ISA names one."""
    isa.apply()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the run's fork server."""
    if RUN is not None:
        shutil.rmtree(RUN, ignore_errors=True)  # Absent when no service was started.
