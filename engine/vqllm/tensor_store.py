"""Memory-mapped reading and piecewise writing of safetensors files.

Own code for the safetensors layout (8-byte header length, JSON header, raw data), for two reasons:
the library's numpy binding refuses bfloat16, and it writes a file only from tensors that are all
in memory. Knows names, dtypes and bytes, nothing of what a tensor means.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import CorruptCheckpoint, UnknownModel

_MAX_HEADER_BYTES = 100 * 2**20
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # raw halves; `float32` widens them
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
    "F8_E4M3": "|u1",  # raw bits
}


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file


class TensorStore:
    """The tensors of one folder, from `model.safetensors` or from an index of shards.

    Raises:
        UnknownModel: the folder holds no safetensors.
        CorruptCheckpoint: a file is missing, truncated or has a broken header.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self._entries: dict[str, _Entry] = {}
        for path in self.files:
            self._entries.update(_read_header(path))
        self._mappings = {path: _mapped(path) for path in self.files}
        self._maps = {path: np.frombuffer(m, np.uint8) for path, m in self._mappings.items()}

    def release(self) -> None:
        """Let go of the pages that were read; arrays from `raw` stay valid."""
        for mapping in self._mappings.values():
            mapping.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def num_bytes(self, name: str) -> int:
        entry = self._entry(name)
        return int(np.prod(entry.shape, dtype=np.int64)) * np.dtype(_DTYPES[entry.dtype]).itemsize

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor, or the folder where there is none."""
        entry = self._entries.get(name)
        return self.folder if entry is None else entry.path

    def dtype(self, name: str) -> str:
        """Dtype as the file spells it, for example `F16`."""
        return self._entry(name).dtype

    def raw(self, name: str) -> NDArray[Any]:
        """A read-only view of the file; bfloat16 comes as uint16 halves.

        Raises:
            CorruptCheckpoint: no such tensor; names folder and tensor.
        """
        entry = self._entry(name)
        num_bytes = self.num_bytes(name)
        data = self._maps[entry.path][entry.offset : entry.offset + num_bytes]
        return data.view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def float32(self, name: str) -> NDArray[np.float32]:
        """A float32 copy of a floating-point tensor.

        Raises:
            CorruptCheckpoint: no such tensor, not floating point, or it holds NaN or infinity.
        """
        entry, raw = self._entry(name), self.raw(name)
        if entry.dtype == "BF16":
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        elif entry.dtype in ("F16", "F32", "F64"):
            values = np.array(raw, dtype=np.float32)
        else:
            raise CorruptCheckpoint(f"{entry.path}: {name} is {entry.dtype}, not floating point")
        if not np.isfinite(values).all():
            raise CorruptCheckpoint(f"{entry.path}: {name} holds NaN or infinite values")
        return values

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CorruptCheckpoint(f"{self.folder}: tensor {name} is missing")
        return entry


@dataclass(frozen=True)
class TensorLayout:
    """Dtype (as safetensors spells it) and shape of a tensor that is still to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.item_bytes

    @property
    def item_bytes(self) -> int:
        return np.dtype(_DTYPES[self.dtype]).itemsize


class TensorFileWriter:
    """One safetensors file whose tensors arrive one by one, in any order.

    The header is written first, so the layout must be known; no tensor is kept in memory.
    """

    def __init__(self, path: Path, layout: dict[str, TensorLayout]) -> None:
        self._layout = layout
        self._missing = set(layout)
        header, self._offsets = build_header(layout)
        self._file = path.open("wb")
        self._file.write(header)

    def put(self, name: str, values: NDArray[Any]) -> None:
        """Write one tensor; bfloat16 is passed as uint16 halves, as `TensorStore.raw` gives it.

        Raises:
            ValueError: dtype or shape differ from the layout.
        """
        layout = self._layout[name]
        if values.dtype != np.dtype(_DTYPES[layout.dtype]) or values.shape != layout.shape:
            raise ValueError(f"{name} is {values.dtype} {values.shape}, announced was {layout}")
        self._file.seek(self._offsets[name])
        self._file.write(np.ascontiguousarray(values).data)
        self._missing.discard(name)

    def close(self) -> None:
        """Let go of the file, complete or not; may be called twice."""
        self._file.close()

    def finish(self) -> None:
        """Close the complete file.

        Raises:
            ValueError: a tensor of the layout was never written.
        """
        self.close()
        if self._missing:
            raise ValueError(f"never written: {', '.join(sorted(self._missing))}")


def build_header(layout: dict[str, TensorLayout]) -> tuple[bytes, dict[str, int]]:
    """The file's header, padded to 8 bytes, and where each tensor starts in the file."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, tensor in layout.items():
        starts[name], start, end = end, end, end + tensor.num_bytes
        fields[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(fields, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    header = len(content).to_bytes(8, "little") + content
    return header, {name: len(header) + start for name, start in starts.items()}


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise UnknownModel(f"{folder} holds neither {single.name} nor {index.name}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CorruptCheckpoint(f"{index}: no readable weight_map ({error})") from error
    paths = tuple(folder / Path(name).name for name in names)
    for path in paths:
        if not path.is_file():
            raise CorruptCheckpoint(f"{index} names {path.name}, which is missing")
    return paths


def _read_header(path: Path) -> dict[str, _Entry]:
    num_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        num_header_bytes = int.from_bytes(file.read(8), "little")
        if num_header_bytes > min(num_file_bytes - 8, _MAX_HEADER_BYTES):
            raise CorruptCheckpoint(f"{path}: truncated, or not a safetensors file")
        try:
            header = json.loads(file.read(num_header_bytes))
            entries = {
                name: _entry_of(path, fields, 8 + num_header_bytes)
                for name, fields in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"{path}: broken safetensors header ({error})") from error
    for name, (entry, end) in entries.items():
        if end > num_file_bytes:
            raise CorruptCheckpoint(f"{path}: truncated inside tensor {name}")
        if entry.dtype not in _DTYPES:
            raise CorruptCheckpoint(f"{path}: {name} has the unknown dtype {entry.dtype}")
    return {name: entry for name, (entry, _) in entries.items()}


def _entry_of(path: Path, fields: dict[str, Any], data_start: int) -> tuple[_Entry, int]:
    """The entry, and where its data end in the file."""
    start, end = fields["data_offsets"]
    shape = tuple(int(size) for size in fields["shape"])
    dtype = str(fields["dtype"])
    if dtype in _DTYPES:
        expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(_DTYPES[dtype]).itemsize
        if end - start != expected:
            raise ValueError(f"{shape} {dtype} needs {expected} bytes, found {end - start}")
    return _Entry(path, dtype, shape, data_start + start), data_start + end
