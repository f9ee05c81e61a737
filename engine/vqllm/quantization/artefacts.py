"""Keeps every finished linear of a run in a work folder, so that a killed run can go on.

A linear is two files: the tensors (safetensors), and a JSON record with their hash that is renamed
into place last. A record without a match is damage and is never repaired silently; tensors without
a record are an unfinished write and are made again. Knows no model and no method.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from vqllm.errors import CorruptArtefact, DiskFull, InvalidConfig, ResumeMismatch
from vqllm.quantization.methods import read_linear
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.recipe import Recipe

_KEY_FILE, _RECIPE_FILE = "run.json", "recipe.json"
_START_OVER = "start over with --no-resume"
_REMEDY = f"remove both files of this linear to quantize it again, or {_START_OVER}"


class WorkFolder:
    """Finished linears of one run, next to the folder that the run will write."""

    def __init__(self, target: Path, key: Mapping[str, Any], resume: bool = True) -> None:
        """Open or create `<target>.partial`.

        Args:
            key: what the finished linears depend on: recipe, source, calibration; fit for JSON.
            resume: go on with what is there; else it is removed.

        Raises:
            ResumeMismatch: the folder belongs to a run with another key.
            CorruptArtefact: its run.json is damaged.
            DiskFull: it cannot be created.
        """
        self.path = target.with_name(f"{target.name}.partial")
        if not resume:
            shutil.rmtree(self.path, ignore_errors=True)
        record = self.path / _KEY_FILE
        if record.is_file():
            self._compare(record, key)
            return
        with disk_errors(record):
            self.path.mkdir(parents=True, exist_ok=True)
            _write_json(record, key)

    def recipe(self, make: Callable[[], Recipe]) -> Recipe:
        """The recipe the run was started with, or a new one that is kept from now on.

        Raises:
            CorruptArtefact: recipe.json is damaged.
        """
        path = self.path / _RECIPE_FILE
        if path.is_file():
            try:
                return Recipe.from_dict(_read_json(path))
            except (InvalidConfig, AttributeError, TypeError, ValueError) as error:
                raise CorruptArtefact(f"{path} is damaged ({error}); {_START_OVER}") from error
        recipe = make()
        with disk_errors(path):
            _write_json(path, recipe.to_dict())
        return recipe

    def save(self, part: QuantizedPart) -> None:
        """Keep a finished linear.

        Raises:
            DiskFull: names the file; linears kept before stay.
        """
        tensors = {name: np.ascontiguousarray(a) for name, a in part.linear.tensors().items()}
        path = self._path(part.name, "safetensors")
        with disk_errors(path):
            _write(path, safetensors.numpy.save(tensors))
            record = {
                "sha256": _sha256(path),
                "entry": part.linear.entry(),
                "relative_error": part.relative_error,
                "damping": part.damping,
            }
            _write_json(self._path(part.name, "json"), record)

    def load(self, name: str) -> QuantizedPart | None:
        """The linear as it was saved, or None when it was not finished.

        Raises:
            CorruptArtefact: a file is damaged; names it and the remedy.
        """
        path, record = self._path(name, "safetensors"), self._path(name, "json")
        if not record.is_file():
            return None
        fields = _read_json(record)
        if not path.is_file() or _sha256(path) != fields.get("sha256"):
            raise CorruptArtefact(f"{path} does not match the hash in {record.name}; {_REMEDY}")
        try:
            linear = read_linear(safetensors.numpy.load_file(path), fields["entry"])
            loss, damping = float(fields["relative_error"]), float(fields["damping"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtefact(f"{record} is damaged ({error!r}); {_REMEDY}") from error
        return QuantizedPart(name, linear, loss, damping)

    def parts(self, names: Iterable[str]) -> Iterator[QuantizedPart]:
        """The finished linears of these names, one at a time.

        Raises:
            CorruptArtefact: one is missing or damaged.
        """
        for name in names:
            part = self.load(name)
            if part is None:
                raise CorruptArtefact(f"{self._path(name, 'json')} is missing; {_REMEDY}")
            yield part

    def remove(self) -> None:
        """Delete the folder: the run is complete."""
        shutil.rmtree(self.path)

    def _path(self, name: str, suffix: str) -> Path:
        return self.path / f"{name}.{suffix}"

    def _compare(self, record: Path, key: Mapping[str, Any]) -> None:
        found, wanted = _read_json(record), json.loads(json.dumps(key))
        changed = [f for f in sorted(found.keys() | wanted.keys()) if found.get(f) != wanted.get(f)]
        if changed:
            raise ResumeMismatch(
                f"{self.path} was started with another {', '.join(changed)}; use the same "
                "settings to go on, or --no-resume to start over"
            )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's error about a full disk into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"no room to write {path} ({error.strerror}); finished layers are kept, free some "
            "space and run the same command again"
        ) from error


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is whole."""
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, json.dumps(content, indent=1, sort_keys=True).encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtefact(f"{path} is not readable JSON ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise CorruptArtefact(f"{path} holds no JSON object; {_REMEDY}")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
