"""Settings, logs, admission, state and the admin path check, each by itself."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path

import pytest

from vqserve.common.admin import AdminLoadsDisabled, PathNotAllowed, confined_path
from vqserve.common.admission import AdmissionGate
from vqserve.common.config import ServiceSettings
from vqserve.common.cores import available_cores
from vqserve.common.errors import Draining, NotReady, ResourceExhausted, TooManyRequests
from vqserve.common.logging import (
    JsonFormatter,
    RequestRecord,
    annotate,
    begin_request,
    current_request_id,
    log_event,
    request_id_from,
)
from vqserve.common.metrics import ServerMetrics
from vqserve.common.state import ServiceState


def test_flags_win_over_the_environment_and_that_over_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VQSERVE_GRPC_PORT", "7001")
    monkeypatch.setenv("VQSERVE_HTTP_PORT", "7002")
    settings = ServiceSettings.from_args(["--http-port", "7003", "--ports-file", "p.json"])
    assert (settings.grpc_port, settings.http_port) == (7001, 7003)
    assert settings.host == "127.0.0.1"
    assert settings.ports_file == Path("p.json")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grpc-port", "99999"], "--grpc-port"),
        (["--max-request-bytes", "many"], "many"),
        (["--log-level", "loud"], "--log-level"),
        (["--drain-grace-seconds", "-1"], "--drain-grace-seconds"),
    ],
)
def test_a_bad_setting_ends_the_start_and_is_named(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        ServiceSettings.from_args(args)
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("content", "cores"),
    [("50000 100000", 1), ("100000 100000", 1), ("max 100000", None), ("what", None)],
)
def test_a_containers_cpu_limit_counts(tmp_path: Path, content: str, cores: int | None) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text(content)
    everything = available_cores(tmp_path / "missing")
    assert available_cores(limit) == (cores or everything)


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ServiceSettings.from_args(["--colour", "blue"])
    assert caught.value.code == 2
    assert "--colour" in capsys.readouterr().err


def test_settings_do_not_change() -> None:
    settings = ServiceSettings.from_args([])
    with pytest.raises(ValueError, match="frozen"):
        settings.host = "0.0.0.0"


@pytest.mark.parametrize("offered", [None, "", "a" * 129, "ümläut", "line\nbreak"])
def test_unusable_request_ids_are_replaced(offered: str | None) -> None:
    assert len(request_id_from(offered)) == 32


def test_usable_request_ids_are_kept() -> None:
    assert request_id_from("trace-1/a") == "trace-1/a"


def test_log_lines_are_one_json_object_each() -> None:
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(JsonFormatter("toy"))
    logger = logging.Logger("vqserve.test")
    logger.addHandler(handler)
    log_event(logger, logging.INFO, "two\nlines", bytes_in=3)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logger.exception("failed")
    first, second = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert first["event"] == "two\nlines"
    assert (first["service"], first["level"], first["bytes_in"]) == ("toy", "info", 3)
    assert "RuntimeError: broken" in second["traceback"]


async def test_facts_go_to_the_request_of_the_own_task() -> None:
    async def serve(name: str) -> RequestRecord:
        record = RequestRecord(name, "grpc", "/x")
        begin_request(record)
        await asyncio.sleep(0)
        annotate(model=name)
        assert current_request_id() == name
        return record

    records = await asyncio.gather(serve("a"), serve("b"))
    assert [record.facts for record in records] == [{"model": "a"}, {"model": "b"}]
    annotate(model="nobody")


def gate(limit: int, workers: int = 1) -> AdmissionGate:
    return AdmissionGate(limit, workers, ServerMetrics("toy", "0"))


def test_a_gate_admits_its_limit_and_counts_who_waits() -> None:
    doors = gate(limit=2)
    with doors.admit(), doors.admit():
        assert (doors.admitted, doors.waiting) == (2, 1)
        with pytest.raises(ResourceExhausted, match="limit is 2") as caught, doors.admit():
            pass
        assert caught.value.retry_after_seconds is not None
        assert 0 < caught.value.retry_after_seconds <= 30
    assert doors.admitted == 0


def test_a_failed_request_gives_its_place_back() -> None:
    doors = gate(limit=1)
    with pytest.raises(RuntimeError), doors.admit():
        raise RuntimeError
    with doors.admit():
        assert doors.admitted == 1


@pytest.mark.parametrize(("limit", "workers"), [(0, 1), (1, 0)])
def test_a_gate_without_room_cannot_be_built(limit: int, workers: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        gate(limit, workers)


async def test_requests_are_refused_before_serving_and_while_draining() -> None:
    state = ServiceState()
    with pytest.raises(NotReady), state.request():
        pass
    state.mark_serving()
    with state.request():
        assert state.requests_in_flight == 1
    state.mark_leaving()
    assert not state.is_ready
    with state.request():
        pass
    state.mark_draining()
    with pytest.raises(Draining), state.request():
        pass


async def test_open_requests_are_bounded() -> None:
    state = ServiceState(max_open_requests=1)
    state.mark_serving()
    with state.request():
        with pytest.raises(TooManyRequests, match="limit is 1"), state.request():
            pass
        assert state.requests_in_flight == 1
    with state.request():
        pass


async def test_waiting_for_idle_ends_with_the_last_request_or_the_time() -> None:
    state = ServiceState()
    state.mark_serving()
    with state.request():
        state.mark_draining()
        assert not await state.wait_idle(0.01)
    assert await state.wait_idle(1)


def test_admin_paths_stay_inside_the_model_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "models", tmp_path / "secret"
    root.mkdir()
    outside.write_text("x")
    (root / "good").write_text("x")
    (root / "link").symlink_to(outside)
    assert confined_path(str(root / "good"), root) == (root / "good").resolve()
    for path in ("good", str(outside), str(root / ".." / "secret"), str(root / "link")):
        with pytest.raises(PathNotAllowed):
            confined_path(path, root)
    with pytest.raises(AdminLoadsDisabled, match="--model-root"):
        confined_path(str(root / "good"), None)
