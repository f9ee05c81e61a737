"""Where a command's numbers go. Knows no command."""

from __future__ import annotations

import os
from pathlib import Path

from vqllm.errors import InvalidConfig

STANDARD_OUTPUT = "-"


def check_target(option: str, target: str | Path | None) -> None:
    """Refuse a file that cannot be written, before hours go into what it shall hold.

    Args:
        option: name of the option, for the message.
        target: a file, STANDARD_OUTPUT, or None.

    Raises:
        InvalidConfig: it is a folder, its folder does not exist, or it may not be written.
    """
    if target is None or str(target) == STANDARD_OUTPUT:
        return
    path = Path(target)
    place = path if path.exists() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
        raise InvalidConfig(option, str(target), "a file in a folder that can be written")
