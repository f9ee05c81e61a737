"""How many processor cores this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def available_cores(limit_file: Path = CGROUP_LIMIT) -> int:
    """Cores by affinity and by the container's CPU limit, at least 1.

    A container limited to two cores on a large node sees all of the node's cores; a thread for
    each of them would spend its time waiting for the quota (cgroup v2: "quota period" or "max").
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = limit_file.read_text().split()
    except (OSError, ValueError):
        return cores or 1
    if quota == "max":
        return cores or 1
    return max(1, min(cores or 1, math.ceil(int(quota) / int(period))))
