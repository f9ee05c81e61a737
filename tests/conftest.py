"""Settings of the whole test run."""

from __future__ import annotations

import os
from pathlib import Path

# `python -m support.llmd` runs as a process of its own.
SUPPORT = str(Path(__file__).parent / "support")
os.environ["PYTHONPATH"] = os.pathsep.join(
    path for path in (SUPPORT, os.environ.get("PYTHONPATH", "")) if path
)
