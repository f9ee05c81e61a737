"""Data sets in their official layouts, opened by path and fetched on request."""

from scq.datasets.base import OpenOptions
from scq.datasets.detect import DatasetInfo, SplitInfo, describe, open_dataset
from scq.datasets.lazy import LazyPictures

__all__ = [
    "DatasetInfo",
    "LazyPictures",
    "OpenOptions",
    "SplitInfo",
    "describe",
    "open_dataset",
]
