"""Makes the package of the load generator importable: it is run from its folder, not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "loadtests"))
