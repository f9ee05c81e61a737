"""Tensors that lie in a file between uses, for runs that must not hold them in memory.

Knows arrays and files.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqllm.quantization.artefacts import disk_errors


class SpilledTensors(dict[str, Tensor]):
    """Float32 tensors by name, written to a folder when they are set and read whenever asked for.

    Behaves as a dict for reading and setting items; what comes out is a copy.
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._folder = folder
        self._shapes: dict[str, torch.Size] = {}
        self._count = 0
        self._paths: dict[str, Path] = {}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name in list(tensors):
            self[name] = tensors[name]

    def fork(self) -> SpilledTensors:
        """The same files under names of its own."""
        forked = SpilledTensors(self._folder, {})
        forked._shapes, forked._paths = dict(self._shapes), dict(self._paths)
        forked._count = self._count
        for name in self._paths:
            dict.__setitem__(forked, name, torch.empty(0))
        return forked

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._count += 1
        path = self._folder / f"{name}.{self._count}.f32"
        with disk_errors(path):
            path.write_bytes(tensor.detach().contiguous().numpy().data)
        self._paths[name], self._shapes[name] = path, tensor.shape
        dict.__setitem__(self, name, torch.empty(0))

    def __getitem__(self, name: str) -> Tensor:
        values = np.fromfile(self._paths[name], dtype=np.float32)
        return torch.from_numpy(values).view(self._shapes[name])


class SpilledTensor:
    """One float32 tensor in a file, mapped into memory.

    Attributes:
        tensor: a view of the file; writing to it writes to the file.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        """Raises DiskFull: the file cannot be made."""
        num_bytes = 4 * int(np.prod(shape))
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as file:
                _reserve(file.fileno(), num_bytes)
                self._mapping = mmap.mmap(file.fileno(), num_bytes)
        values = np.frombuffer(self._mapping, dtype=np.float32).reshape(shape)
        self.tensor: Tensor = torch.from_numpy(values)

    def release(self) -> None:
        """Let go of the pages in memory; the file keeps the values."""
        self._mapping.madvise(mmap.MADV_DONTNEED)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Take the space now: a full disk would otherwise end the process by SIGBUS on a write."""
    os.posix_fallocate(descriptor, 0, num_bytes)
