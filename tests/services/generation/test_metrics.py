"""The llm_* families: names, units, values after known work, and Prometheus's own linter."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
import urllib.request
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.llmd import LlmServer

DURATIONS = (
    "llm_time_to_first_token_seconds",
    "llm_inter_token_latency_seconds",
    "llm_time_per_output_token_seconds",
    "llm_e2e_request_latency_seconds",
    "llm_step_duration_seconds",
)


def exposition(server: LlmServer) -> str:
    with urllib.request.urlopen(f"{server.http_url}/metrics", timeout=10) as response:
        return str(response.read().decode())


async def test_known_work_gives_known_values(fast: LlmServer, http: httpx.AsyncClient) -> None:
    names = (
        "llm_prompt_tokens_total",
        "llm_generation_tokens_total",
        "llm_time_to_first_token_seconds_count",
        "llm_inter_token_latency_seconds_count",
        "llm_time_per_output_token_seconds_count",
        "llm_e2e_request_latency_seconds_count",
        "llm_request_prompt_tokens_sum",
        "llm_request_generation_tokens_sum",
    )
    before = {name: fast.metric(name, model="fast") for name in names}
    for _ in range(3):
        body = {"prompt": "four", "max_tokens": 11, "temperature": 0}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    gained = [fast.metric(name, model="fast") - before[name] for name in names]
    assert gained == [12, 33, 3, 30, 3, 3, 12, 33]
    assert fast.metric("llm_requests_total", model="fast", finish_reason="length") >= 3
    assert fast.metric("llm_requests_running") == fast.metric("llm_requests_waiting") == 0


async def test_the_engine_shows_its_pages_and_speed(
    fast: LlmServer, http: httpx.AsyncClient
) -> None:
    body = {"prompt": "four", "max_tokens": 40, "temperature": 0}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert fast.metric("llm_kv_pages", model="fast") > 0
    assert fast.metric("llm_kv_pages_used", model="fast") == 0
    for name in ("prefix_hit_tokens", "preemptions", "drafted_tokens", "accepted_tokens"):
        assert fast.metric(f"llm_{name}_total", model="fast") >= 0
    deadline = time.monotonic() + 5
    while fast.metric("llm_generation_tokens_per_second", model="fast") == 0:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("prompt_too_long", {"prompt": "x" * 300}),
        ("prompt_too_long", {"prompt": "x" * 10**6}),
        ("invalid_sampling", {"prompt": "x", "temperature": 9.0}),
        ("invalid_sampling", {"prompt": "x", "logit_bias": {"100000": 1}}),
        ("empty_prompt", {"prompt": ""}),
    ],
)
async def test_refusals_are_counted_by_reason(
    fast: LlmServer, http: httpx.AsyncClient, reason: str, fields: dict[str, Any]
) -> None:
    before = fast.metric("llm_requests_rejected_total", reason=reason)
    assert (await http.post("/v1/completions", json=fields)).status_code == 400
    after = fast.metric("llm_requests_rejected_total", reason=reason)
    assert after == before + 1


def test_every_family_has_help_and_durations_name_their_unit(fast: LlmServer) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exposition(fast))}
    ours = {name: family for name, family in families.items() if name.startswith("llm_")}
    assert len(ours) >= 15
    assert all(family.documentation.endswith(".") for family in ours.values())
    for name in DURATIONS:
        assert "seconds" in ours[name].documentation


def test_all_series_exist_before_the_first_request(fast: LlmServer) -> None:
    for reason in ("stop", "length", "abort", "error"):
        assert f'finish_reason="{reason}",model="fast"' in exposition(fast)
    labels = {"quant": "gptq", "bits": "4", "group_size": "128", "avg_bits": "4.16"}
    assert fast.metric("llm_model_info", executor="fake", **labels) == 1


def test_promtool_finds_nothing(fast: LlmServer) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    check = subprocess.run(
        ["promtool", "check", "metrics"],
        input=exposition(fast), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
