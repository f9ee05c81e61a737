"""The files of a model that a device downloads: integer codebook, entropy tables, graphs.

Everything is read and hashed when the model is loaded, so that a download cannot fail half-way.
Knows names and hashes; knows no engine, no protobuf and no transport.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vqserve.tokenizer.errors import UnknownArtifact

CODEBOOK = "codebook.bin"
TABLES = "tables.safetensors"
MANIFEST = "manifest.json"
OCTET_STREAM = "application/octet-stream"
MEDIA_TYPES = {".json": "application/json", ".onnx": "application/onnx"}


@dataclass(frozen=True)
class Artifact:
    """One file: its name, media type, content and the SHA-256 of that in hexadecimal."""

    name: str
    media_type: str
    data: bytes = field(repr=False)
    sha256: str

    @classmethod
    def of(cls, name: str, data: bytes) -> Artifact:
        """A file with the media type that its name tells and the hash that its bytes have."""
        media_type = MEDIA_TYPES.get(Path(name).suffix, OCTET_STREAM)
        return cls(name, media_type, data, hashlib.sha256(data).hexdigest())


class Artifacts:
    """The files of one model, by name; of two with one name the later one counts."""

    def __init__(self, files: Iterable[Artifact] = ()) -> None:
        self._by_name = {file.name: file for file in files}

    def all(self) -> list[Artifact]:
        """Every file, in alphabetical order."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def get(self, name: str, field_name: str = "name") -> Artifact:
        """The file called `name`; raises UnknownArtifact, which lists those there are."""
        if name not in self._by_name:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise UnknownArtifact(
                f"no artifact {name[:100]!r}; there are: {known}", field=field_name
            )
        return self._by_name[name]
