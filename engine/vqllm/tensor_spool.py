"""Safetensors files whose tensors are not known before they arrive.

Tensors are appended to a spool on disk; `finish` puts the header in front. Knows names, dtypes and
bytes, nothing of what a tensor means.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import DiskFull
from vqllm.tensor_store import TensorLayout, build_header

MAX_SHARD_BYTES = 4 * 2**30
_COPY_BYTES = 1 << 24
_DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class _Spooled:
    layout: TensorLayout
    offset: int


@dataclass
class _Shard:
    path: Path
    tensors: dict[str, _Spooled]
    num_bytes: int = 0


class TensorSpool:
    """Collects the tensors of one folder and writes them in files of at most `max_shard_bytes`.

    Within a file tensors lie by falling width of their elements and then by name, so every one is
    aligned, and the bytes do not depend on the order of arrival (of one file's tensors).
    """

    def __init__(self, folder: Path, max_shard_bytes: int | None = None) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes or MAX_SHARD_BYTES
        self._shards: list[_Shard] = []
        self._file: BinaryIO | None = None
        self._place: dict[str, _Shard] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._place

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self._shards)

    def put(self, name: str, values: NDArray[np.generic], dtype: str | None = None) -> None:
        """Append a tensor; `dtype` as safetensors spells it, for bfloat16 halves in uint16.

        Raises:
            ValueError: the name is taken, or the dtype has no place in the format.
            DiskFull: the disk is full or cannot be written; names the file.
        """
        if name in self._place:
            raise ValueError(f"tensor {name} was written already")
        spelled = dtype or _DTYPE_NAMES.get(values.dtype.name)
        if spelled is None:
            raise ValueError(f"{name}: safetensors files hold no {values.dtype}")
        layout = TensorLayout(spelled, tuple(values.shape))
        shard = self._shard_for(layout.num_bytes)
        shard.tensors[name] = _Spooled(layout, shard.num_bytes)
        shard.num_bytes += layout.num_bytes
        self._place[name] = shard
        self._write(shard.path, values)

    def replace(self, name: str, values: NDArray[np.generic]) -> None:
        """Overwrite a tensor by one of the same dtype and shape.

        Raises:
            ValueError: the size differs.
        """
        shard = self._place[name]
        spooled = shard.tensors[name]
        if values.nbytes != spooled.layout.num_bytes:
            raise ValueError(f"{name}: {values.nbytes} bytes do not replace {spooled.layout}")
        self._flush()
        with shard.path.open("r+b") as file:
            file.seek(spooled.offset)
            file.write(np.ascontiguousarray(values).data)

    def finish(self) -> dict[str, str]:
        """Write the final files; returns the file name of every tensor.

        Raises:
            DiskFull: the disk is full or cannot be written; names the file.
        """
        self.close()
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(self._shards):
            name = _file_name(index, len(self._shards))
            self._assemble(shard, self._folder / name)
            shard.path.unlink()
            weight_map.update(dict.fromkeys(shard.tensors, name))
        return weight_map

    def close(self) -> None:
        """Let go of the open file; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def _shard_for(self, num_bytes: int) -> _Shard:
        last = self._shards[-1] if self._shards else None
        if last is not None and last.num_bytes + num_bytes <= self._max_shard_bytes:
            return last
        if last is not None and not last.tensors:
            return last
        self.close()
        shard = _Shard(self._folder / f"spool-{len(self._shards):05d}.partial", {})
        self._shards.append(shard)
        return shard

    def _write(self, path: Path, values: NDArray[np.generic]) -> None:
        try:
            if self._file is None:
                self._file = path.open("wb")
            self._file.write(np.ascontiguousarray(values).data)
        except OSError as error:
            raise DiskFull(f"{path}: cannot be written ({error}); free some space") from error

    def _assemble(self, shard: _Shard, target: Path) -> None:
        ordered = dict(sorted(shard.tensors.items(), key=_file_order))
        header, _ = build_header({name: spooled.layout for name, spooled in ordered.items()})
        try:
            with shard.path.open("rb") as source, target.open("wb") as file:
                file.write(header)
                for spooled in ordered.values():
                    source.seek(spooled.offset)
                    _copy(source, file, spooled.layout.num_bytes)
        except OSError as error:
            raise DiskFull(f"{target}: cannot be written ({error}); free some space") from error


def _file_order(item: tuple[str, _Spooled]) -> tuple[int, str]:
    name, spooled = item
    return -spooled.layout.item_bytes, name


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        chunk = source.read(min(num_bytes, _COPY_BYTES))
        if not chunk:
            raise OSError("the spool ended early")
        target.write(chunk)
        num_bytes -= len(chunk)


def _file_name(index: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
