"""README's examples run as they stand."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = Path(__file__).parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture
def photograph() -> bytes:
    """A small JPEG with edges and gradients, which stands for the reader's photo.jpg."""
    rows, columns = np.mgrid[0:150, 0:200]
    pixels = np.stack([rows + columns // 2, 255 - rows, 40 * ((columns // 25) % 2)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((pixels % 256).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def test_first_example_is_about_ten_lines_and_gives_a_picture_back(
    tmp_path: Path, photograph: bytes
) -> None:
    example = python_blocks()[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    (tmp_path / "photo.jpg").write_bytes(photograph)
    finished = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 1
    with Image.open(pictures[0]) as picture:
        assert picture.size == (200, 150)
    assert re.search(r"\d+ bytes", finished.stdout)


def test_the_layer_example_prints_its_certificate() -> None:
    (example,) = (block for block in python_blocks() if "SCQLayer" in block)
    finished = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    residual = re.search(r"KKT residual (\S+)", finished.stdout)
    assert residual is not None
    assert float(residual[1]) < 1e-8
