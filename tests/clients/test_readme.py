"""The Python example of the client's README runs as it stands, but for the addresses."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from vqclient.testing import FakeGenerationService, FakeTokenizerService, serve

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"


async def test_readme_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "photo.jpg").write_bytes(b"a photograph")
    async with serve(FakeTokenizerService(), FakeGenerationService()) as address:
        code = re.sub(r"127\.0\.0\.1:\d+", address, example)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(240):
            out, _ = await process.communicate()
    assert process.returncode == 0
    assert out.decode() == "36 bytes, 0.094 bpp\none two three"
    assert (tmp_path / "photo.png").read_bytes() == b"a photograph"
