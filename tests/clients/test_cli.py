"""The command `vqclient` as a real process, against in-process fakes of the services."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc import StatusCode
from typer.testing import CliRunner

from vqclient.cli.app import app
from vqclient.testing import FakeGenerationService, FakeTokenizerService, refusal, serve

VECTORS = Path(__file__).parents[2] / "clients" / "conformance" / "vectors.json"
TIMEOUT = 240  # only so that a hang ends


def long_video(path: Path) -> None:
    """A clip of ten seconds."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'vqclient[video]'")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(300):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())


@dataclass(frozen=True)
class Finished:
    """How the process ended and what it wrote."""

    code: int
    out: str
    err: str


Start = Callable[..., Awaitable[asyncio.subprocess.Process]]
Run = Callable[..., Awaitable[Finished]]


@pytest.fixture
def tokenizer() -> FakeTokenizerService:
    return FakeTokenizerService()


@pytest.fixture
def generation() -> FakeGenerationService:
    return FakeGenerationService()


@pytest.fixture
async def start(
    tokenizer: FakeTokenizerService, generation: FakeGenerationService, tmp_path: Path
) -> AsyncIterator[Start]:
    """Starts vqclient in `tmp_path` against the fakes."""
    async with serve(tokenizer, generation) as address:
        addresses = {"VQCLIENT_TOKENIZER_ADDRESS": address, "VQCLIENT_LLM_ADDRESS": address}
        environment = os.environ | addresses | {"COLUMNS": "120", "NO_COLOR": "1"}

        async def start_vqclient(*arguments: str) -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "vqclient", *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=tmp_path,
                env=environment,
            )

        yield start_vqclient


@pytest.fixture
def run(start: Start) -> Run:
    """Runs vqclient to its end."""

    async def run_vqclient(*arguments: str, stdin: str = "") -> Finished:
        process = await start(*arguments)
        async with asyncio.timeout(TIMEOUT):
            out, err = await process.communicate(stdin.encode())
        return Finished(process.returncode or 0, out.decode(), err.decode())

    return run_vqclient


async def test_encode_then_decode_gives_the_file_back(
    run: Run, tokenizer: FakeTokenizerService, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"a photograph")
    options = ("--rate-weight", "0.5", "--tile", "4", "--entropy", "raw")
    encoded = await run("encode", "photo.jpg", "-o", "photo.scq", *options)
    (tmp_path / "photo.scq").write_bytes((tmp_path / "photo.scq").read_bytes()[:-1])
    decoded = await run("decode", "photo.scq", "-o", "back.png", "--partial")
    assert (encoded.code, decoded.code) == (0, 0)
    assert (tokenizer.encodings[0].tile_side, tokenizer.encodings[0].rate_weight) == (4, 0.5)
    assert "the codes were cut, so this is their base layer" in decoded.out
    assert "photo.scq: 36 bytes, 0.0938 bpp, 64x48, model nav" in encoded.out
    assert (tmp_path / "back.png").read_bytes() == b"a photograph"


async def test_default_outputs_never_replace_the_picture(run: Run, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"a photograph")
    await run("encode", "photo.png")
    await run("decode", "photo.scq")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "photo.decoded.png",
        "photo.png",
        "photo.scq",
    ]


async def test_recognize_reads_pictures_and_codes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "soup.jpg").write_bytes(b"soup")
    await run("encode", "soup.jpg")
    picture = await run("recognize", "soup.jpg", "--model", "nav")
    codes = await run("recognize", "soup.scq")
    assert picture.out == codes.out
    assert "bibimbap" in codes.out


async def test_models_lists_both_services(run: Run) -> None:
    listed = await run("models")
    assert listed.code == 0
    assert "256x16" in listed.out
    assert "gptq 4 bit" in listed.out


async def test_models_lists_one_service_and_names_the_other(run: Run) -> None:
    listed = await run("models", "--llm-address", "127.0.0.1:1")
    assert listed.code == 0
    assert "256x16" in listed.out
    assert "generation service at 127.0.0.1:1" in listed.err


async def test_one_question_streams_one_answer(run: Run, generation: FakeGenerationService) -> None:
    asked = await run("chat", "count to three", "--system", "be short", "--seed", "7")
    assert (asked.code, asked.out) == (0, "one two three\n")
    assert "3 prompt tokens, 3 new" in asked.err
    (request,) = generation.requests
    assert [turn.role for turn in request.chat.messages] == ["system", "user"]
    assert request.sampling.seed == 7


async def test_a_conversation_remembers_until_cleared(
    run: Run, generation: FakeGenerationService
) -> None:
    talked = await run("chat", stdin="first\n\nsecond\n/clear\nthird\n/quit\nnever\n")
    assert talked.code == 0
    turns = [[turn.role for turn in request.chat.messages] for request in generation.requests]
    assert turns == [["user"], ["user", "assistant", "user"], ["user"]]


async def test_a_failed_turn_does_not_end_the_conversation(
    run: Run, generation: FakeGenerationService
) -> None:
    generation.calls.failures.append(
        refusal(StatusCode.INVALID_ARGUMENT, "prompt too long", reason="PROMPT_TOO_LONG")
    )
    talked = await run("chat", stdin="long\nshort\n")
    assert talked.code == 0
    assert "PROMPT_TOO_LONG: prompt too long" in talked.err
    assert talked.out == "one two three\n"
    assert len(generation.requests[0].chat.messages) == 1


async def test_stream_reports_rate_latency_and_drops(run: Run, tmp_path: Path) -> None:
    long_video(tmp_path / "clip.mp4")
    options = ("--no-paced", "--max-frames", "6", "--size", "32x32", "--keyframe-interval", "5")
    shown = await run("stream", "clip.mp4", *options)
    assert shown.code == 0, shown.err
    assert "frames answered │ 6 in" in shown.out
    assert "key frames      │ 2 of 36 bytes each" in shown.out
    assert "delta frames    │ 4 of 26 bytes each" in shown.out
    assert "0 before sending, 0 by age" in shown.out


async def test_stream_whose_every_frame_fails_exits_2(
    run: Run, tokenizer: FakeTokenizerService, tmp_path: Path
) -> None:
    long_video(tmp_path / "clip.mp4")
    tokenizer.bad_seqs = {0, 1}
    shown = await run("stream", "clip.mp4", "--no-paced", "--max-frames", "2")
    assert shown.code == 2
    assert "every frame failed; the last: CORRUPT_CODES: told to fail" in shown.err


async def test_fetch_writes_the_files_that_a_device_needs(run: Run, tmp_path: Path) -> None:
    fetched = await run("fetch", "nav", "-o", "phone/nav")
    assert fetched.code == 0, fetched.err
    assert (tmp_path / "phone" / "nav" / "encoder.onnx").stat().st_size == 1_000_000
    assert "codebook.bin: 8,192 bytes" in fetched.out


def inspected(path: Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", str(path)], terminal_width=100)
    return result.exit_code, result.stdout, result.stderr


def test_inspect_needs_no_server(tmp_path: Path) -> None:
    vectors = json.loads(VECTORS.read_text())["vectors"]
    delta = next(v for v in vectors if not v.get("refused") and v["header"]["reference"])
    path = tmp_path / "delta.scq"
    path.write_bytes(bytes.fromhex(delta["codes"]))
    code, out, _ = inspected(path)
    assert code == 0
    assert "delta, rans" in out
    assert "holds" in out
    assert f"fingerprint {delta['header']['reference']:08x}" in out


def test_inspect_says_why_bytes_are_no_codes(tmp_path: Path) -> None:
    path = tmp_path / "old.scq"
    path.write_bytes(b"SQ\x01" + bytes(20))
    code, _, err = inspected(path)
    assert (code, "version 1 of SCQ1 is no longer read" in err) == (2, True)


async def interrupt(process: asyncio.subprocess.Process, is_running: Callable[[], bool]) -> None:
    """Ctrl-C once the service has seen the process's call."""
    async with asyncio.timeout(TIMEOUT):
        while not is_running():
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    process.send_signal(signal.SIGINT)


async def test_ctrl_c_ends_a_stream_with_its_summary(
    tokenizer: FakeTokenizerService, start: Start, tmp_path: Path
) -> None:
    long_video(tmp_path / "clip.mp4")
    process = await start("stream", "clip.mp4")
    await interrupt(process, lambda: tokenizer.num_answered > 3)
    out, err = await process.communicate()
    assert process.returncode == 130
    assert "frames answered" in out.decode()
    assert err == b""


async def test_ctrl_c_frees_the_servers_sequence(
    generation: FakeGenerationService, start: Start
) -> None:
    generation.words, generation.calls.delay = ("word ",) * 10_000, 0.01
    process = await start("chat", "go on", "--max-tokens", "10000")
    await interrupt(process, lambda: bool(generation.requests))
    _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
    async with asyncio.timeout(TIMEOUT):
        while not generation.calls.num_cancelled:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "nope.jpg"], "cannot read nope.jpg: No such file or directory"),
        (["encode", "empty.jpg"], "empty.jpg is empty; give a file with content"),
        (["encode", "x.jpg", "--model", "zzz"], "UNKNOWN_MODEL: unknown model 'zzz'"),
        (["encode", "x.jpg", "-o", "no/folder.scq"], "cannot write no/folder.scq"),
        (["encode", "x.jpg", "--tokenizer-address", "nonsense"], "'nonsense' is not HOST:PORT"),
        (["decode", "x.jpg"], "CORRUPT_CODES: checksum mismatch (field codes)"),
        (["decode", "x.jpg", "-o", "x.gif"], "cannot write x.gif: name it .png, .jpg or .webp"),
        (["stream", "x.jpg"], "x.jpg"),
        (["stream", "nope.mp4"], "cannot open video nope.mp4"),
        (["stream", "x.mp4", "--size", "big"], "write WIDTHxHEIGHT"),
        (["stream", "x.mp4", "--operation", "decode"], "a video holds pictures, not codes"),
        (["chat", " "], "the question is empty"),
        (["--timeout", "0", "chat", "hi"], "give a positive number of seconds"),
        (["--tls-ca", "nope.pem", "chat", "hi"], "cannot read nope.pem"),
    ],
)
async def test_mistakes_are_one_line_and_exit_2(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    if arguments[0] == "stream":
        pytest.importorskip("av", reason="needs PyAV: pip install 'vqclient[video]'")
    (tmp_path / "x.jpg").write_bytes(b"no codes")
    (tmp_path / "empty.jpg").touch()
    finished = await run(*arguments)
    assert finished.code == 2
    assert message in finished.err
    assert finished.err.startswith("vqclient: ")
    assert finished.err.count("\n") == 1
    assert finished.out == ""


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["encode", "x.jpg", "--tokenizer-address", "127.0.0.1:1"], "vqserve.tokenizer"),
        (["chat", "hi", "--llm-address", "127.0.0.1:1"], "vqserve.generation"),
    ],
)
async def test_unreachable_service_names_address_and_remedy(
    run: Run, tmp_path: Path, arguments: list[str], remedy: str
) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    finished = await run(*arguments)
    assert finished.code == 2
    assert "service at 127.0.0.1:1" in finished.err
    assert f"start it with `python -m {remedy}" in finished.err
    assert finished.err.count("\n") == 1
