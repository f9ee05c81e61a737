"""What every layout gives: how to recognise it, its splits, and one split's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scq.data import ImageSet
from scq.errors import ScqError


@dataclass(frozen=True)
class OpenOptions:
    """roi: cut pictures to their annotated region of interest, where the set has one.

    cache_bytes: decoded pictures kept in memory, for sets that are read lazily.
    """

    roi: bool = False
    cache_bytes: int = 512 << 20


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk.

    find: the folder of the layout at or below a path's own folder, or None. splits: those it
    holds. open_split: the pictures of one of them.
    """

    name: str
    matches: Callable[[Path], bool]
    splits: Callable[[Path], tuple[str, ...]]
    open_split: Callable[[Path, str, OpenOptions], ImageSet]


def check_split(root: Path, split: str, available: Sequence[str]) -> None:
    """Raise ScqError unless `split` is one of those available."""
    if split not in available:
        raise ScqError(
            f"{root}: has no split {split!r}; available: {', '.join(available) or 'none'}"
        )


def read_lines(path: Path, remedy: str) -> list[str]:
    """Non-empty lines of a small text file. Raises ScqError naming the remedy."""
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise ScqError(f"{path}: no such file; {remedy}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ScqError(f"{path}: cannot be read: {error}; {remedy}") from error


def missing_pictures(missing: Sequence[str], total: int, remedy: str) -> ScqError:
    """The error for a list that names pictures which are not there."""
    return ScqError(
        f"{missing[0]}: no such picture, nor {len(missing) - 1} more of the {total} listed; "
        f"{remedy}"
    )
