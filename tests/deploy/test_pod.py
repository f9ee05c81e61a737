"""The chart's numbers against the real service: a rendered pod is run here, as a kubelet would.

Its command and environment become a local process; the probes are asked with their own paths,
ports and thresholds; then the pod is deleted: SIGTERM, and the process must be gone by itself
before the grace period ends. llmd runs over the fake executor, which needs no model.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Render = Callable[..., dict[str, Any]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# What a pod of each component runs here, in place of the module that its container starts.
MODULES = {"tokenizerd": "vqserve.tokenizer", "llmd": "support.llmd"}


def rendered_pod(render: Render, component: str, folder: Path) -> dict[str, Any]:
    """A component's pod on free ports, with its smallest model; `folder` stands for a model."""
    own: dict[str, dict[str, Any]] = {
        "tokenizerd": {"settings": {"models": "sign32"}},
        "llmd": {"model": {"path": str(folder)}},
    }
    ports = {"grpc": free_port(), "http": free_port()}
    objects = render({component: {"ports": ports, **own[component]}})["objects"]
    (pod,) = (
        item["spec"]["template"]["spec"]
        for item in objects
        if item["kind"] == "Deployment" and item["metadata"]["name"].endswith(component)
    )
    spec: dict[str, Any] = pod
    return spec


@contextmanager
def running(container: dict[str, Any], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The container's command as a process, with the container's environment."""
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULES[container["name"]]],
            env={**os.environ, **environment},
            cwd=log.parent,
            stdout=sink,
            stderr=sink,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def passes(container: dict[str, Any], probe: dict[str, Any]) -> bool:
    """One attempt of an HTTP probe: 200 within its timeout."""
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    get = probe["httpGet"]
    url = f"http://127.0.0.1:{ports[get['port']]}{get['path']}"
    try:
        with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


def wait_started(container: dict[str, Any], process: subprocess.Popen[bytes], log: Path) -> None:
    """The startup probe passes within its threshold; asked ten times as often to save time."""
    probe = container["startupProbe"]
    give_up = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
    while not passes(container, probe):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < give_up, log.read_text(encoding="utf-8")
        time.sleep(probe["periodSeconds"] / 10)


@pytest.mark.parametrize("component", MODULES)
def test_rendered_pod_starts_answers_its_probes_and_stops(
    render: Render, tmp_path: Path, component: str
) -> None:
    pod = rendered_pod(render, component, tmp_path)
    (container,) = pod["containers"]
    log = tmp_path / "pod.log"
    with running(container, log) as process:
        wait_started(container, process, log)
        assert passes(container, container["readinessProbe"])
        assert passes(container, container["livenessProbe"])
        process.send_signal(signal.SIGTERM)
        pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        exit_status = process.wait(timeout=pod["terminationGracePeriodSeconds"] - pre_stop)
        assert exit_status == 0, log.read_text(encoding="utf-8")


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_fail_where_nothing_listens(render: Render, tmp_path: Path, probe: str) -> None:
    (container,) = rendered_pod(render, "tokenizerd", tmp_path)["containers"]
    assert not passes(container, container[probe])
