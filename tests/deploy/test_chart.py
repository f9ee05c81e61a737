"""The Helm chart renders, lints, validates, and keeps the deployment policies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

from vqllm.cli import app
from vqserve.common.config import ServiceSettings
from vqserve.generation.config import GenerationSettings
from vqserve.tokenizer.config import TokenizerSettings

KUBERNETES_VERSIONS = ("1.30", "1.33", "1.37")
COMPONENTS = ("tokenizerd", "llmd")
SETTINGS: dict[str, type[ServiceSettings]] = {
    "tokenizerd": TokenizerSettings,
    "llmd": GenerationSettings,
}
CLAIM = {"llmd": {"model": {"source": "claim", "claim": {"name": "models", "subPath": "smollm2"}}}}
IMAGE = {"llmd": {"model": {"source": "image"}}}
BUSY = {
    "metricsAnnotations": False,
    "imagePullSecrets": [{"name": "pull"}],
    "serviceAccount": {"create": False, "name": "shared"},
    "tokenizerd": {
        "replicas": 3,
        "image": {"digest": "sha256:" + "0" * 64},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "podAnnotations": {"note": "x"},
        "drain": {"preStopSeconds": 30, "graceSeconds": 90},
    },
}

Render = Callable[..., dict[str, Any]]
Objects = list[dict[str, Any]]


def of_kind(objects: Objects, kind: str) -> Objects:
    return [item for item in objects if item["kind"] == kind]


def deployment(objects: Objects, component: str) -> dict[str, Any]:
    return next(
        item
        for item in of_kind(objects, "Deployment")
        if item["metadata"]["labels"]["app.kubernetes.io/component"] == component
    )


def pod_spec(objects: Objects, component: str) -> dict[str, Any]:
    spec: dict[str, Any] = deployment(objects, component)["spec"]["template"]["spec"]
    return spec


def containers(objects: Objects) -> Objects:
    specs = [pod_spec(objects, component) for component in COMPONENTS]
    return [c for spec in specs for c in spec["containers"] + spec.get("initContainers", [])]


def service_container(objects: Objects, component: str) -> dict[str, Any]:
    (container,) = pod_spec(objects, component)["containers"]
    found: dict[str, Any] = container
    return found


def env_of(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


@pytest.mark.parametrize(
    "values", [{}, CLAIM, IMAGE, BUSY], ids=["default", "claim", "image", "busy"]
)
def test_chart_lints_and_validates(render: Render, values: dict[str, Any]) -> None:
    answer = render(values, KUBERNETES_VERSIONS)
    assert answer.get("error") is None
    assert answer["lint"]["errors"] == []
    assert [m for m in answer["lint"]["messages"] if m["severity"] > 1] == []
    assert answer["invalid"] == []
    assert len(of_kind(answer["objects"], "Deployment")) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer": {}}, "additional properties 'tokenizer' not allowed"),
        ({"tokenizerd": {"replicas": "x"}}, "/tokenizerd/replicas"),
        ({"tokenizerd": {"image": {"tag": "latest"}}}, "/tokenizerd/image/tag"),
        ({"llmd": {"settings": {"http_port": 1}}}, "invalid propertyName 'http_port'"),
        ({"llmd": {"ports": {"http": 80}}}, "/llmd/ports/http"),
        ({"llmd": {"resources": {"limits": {"memory": None}}}}, "/llmd/resources/limits"),
        ({"llmd": {"model": {"source": "claim"}}}, "set llmd.model.claim.name"),
        ({"securityIds": {"user": 0}}, "/securityIds/user"),
    ],
)
def test_bad_values_are_refused_by_name(
    render: Render, values: dict[str, Any], message: str
) -> None:
    assert message in render(values).get("error", "")


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("values", [{}, BUSY], ids=["default", "busy"])
def test_environment_is_what_the_service_reads(
    render: Render, monkeypatch: pytest.MonkeyPatch, component: str, values: dict[str, Any]
) -> None:
    container = service_container(render(values)["objects"], component)
    environment = env_of(container)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = SETTINGS[component].from_args([])
    known = {f"VQSERVE_{name.upper()}" for name in SETTINGS[component].model_fields}
    assert set(environment) <= known
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.grpc_port, "http": settings.http_port}
    assert settings.host == "0.0.0.0"
    assert settings.max_concurrent_requests == 64


@pytest.mark.parametrize("component", COMPONENTS)
def test_command_starts_a_module_that_exists(objects: Objects, component: str) -> None:
    command = service_container(objects, component)["command"]
    module = {"tokenizerd": "vqserve.tokenizer", "llmd": "vqserve.generation"}[component]
    assert command == ["python", "-m", module]
    assert SETTINGS[component].__module__.startswith(module)


@pytest.mark.parametrize("component", COMPONENTS)
def test_probes_ask_ports_and_paths_that_exist(objects: Objects, component: str) -> None:
    container = service_container(objects, component)
    port_names = {port["name"] for port in container["ports"]}
    probes = {name: container[name]["httpGet"] for name in container if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/startupz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }
    assert {probe["port"] for probe in probes.values()} <= port_names


def test_startup_probe_allows_the_declared_time(render: Render) -> None:
    objects = render({"llmd": {"startupSeconds": 601}})["objects"]
    probe = service_container(objects, "llmd")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 601


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("values", [{}, BUSY], ids=["default", "busy"])
def test_grace_period_outlasts_the_drain(
    render: Render, component: str, values: dict[str, Any]
) -> None:
    objects = render(values)["objects"]
    container = service_container(objects, component)
    pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(env_of(container)["VQSERVE_DRAIN_GRACE_SECONDS"])
    assert pod_spec(objects, component)["terminationGracePeriodSeconds"] > pre_stop + drain


def test_every_container_has_limits_and_a_pinned_image(objects: Objects) -> None:
    for container in containers(objects):
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
        tag = container["image"].rpartition(":")[2]
        assert tag not in ("", "latest", container["image"])


def test_digest_wins_over_the_tag(render: Render) -> None:
    image = service_container(render(BUSY)["objects"], "tokenizerd")["image"]
    assert image == "vqstack/tokenizerd@sha256:" + "0" * 64


def test_pods_run_without_privileges_or_credentials(objects: Objects) -> None:
    for component in COMPONENTS:
        spec = pod_spec(objects, component)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
    for container in containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert all(not a["automountServiceAccountToken"] for a in of_kind(objects, "ServiceAccount"))


def test_everything_that_is_written_to_is_a_volume(objects: Objects) -> None:
    for container in containers(objects):
        mounts = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert mounts >= {"/tmp", "/cache"}


@pytest.mark.parametrize("values", [{}, CLAIM, IMAGE], ids=["default", "claim", "image"])
def test_mounts_name_volumes_that_exist(render: Render, values: dict[str, Any]) -> None:
    objects = render(values)["objects"]
    for component in COMPONENTS:
        spec = pod_spec(objects, component)
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounted = {m["name"] for c in containers(objects) for m in c["volumeMounts"]}
        own = spec["containers"] + spec.get("initContainers", [])
        assert {m["name"] for c in own for m in c["volumeMounts"]} == volumes
        assert volumes <= mounted


def test_services_and_budgets_select_the_pods(objects: Objects) -> None:
    for component in COMPONENTS:
        template = deployment(objects, component)["spec"]["template"]
        labels = template["metadata"]["labels"]
        ports = {p["name"] for p in service_container(objects, component)["ports"]}
        services = [
            s
            for s in of_kind(objects, "Service")
            if s["spec"]["selector"]["app.kubernetes.io/component"] == component
        ]
        assert [s["spec"].get("clusterIP") for s in services] == [None, "None"]
        for service in services:
            assert service["spec"]["selector"].items() <= labels.items()
            assert {p["targetPort"] for p in service["spec"]["ports"]} == ports
    budgets = of_kind(objects, "PodDisruptionBudget")
    assert len(budgets) == 2


def test_prepared_model_is_the_one_that_is_served(objects: Objects) -> None:
    (prepare,) = pod_spec(objects, "llmd")["initContainers"]
    assert "vqllm quantize" in prepare["args"][0]
    assert prepare["args"][1] == env_of(service_container(objects, "llmd"))["VQSERVE_MODEL"]


def test_model_is_prepared_with_options_that_vqllm_has(objects: Objects) -> None:
    (prepare,) = pod_spec(objects, "llmd")["initContainers"]
    used = set(re.findall(r"--[a-z-]+", prepare["args"][0]))
    quantize = get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    assert used
    assert used <= {option for param in quantize.params for option in param.opts}


def test_large_numbers_stay_integers(render: Render) -> None:
    values = {"tokenizerd": {"settings": {"max_image_pixels": 123456789}}}
    environment = env_of(service_container(render(values)["objects"], "tokenizerd"))
    assert environment["VQSERVE_MAX_IMAGE_PIXELS"] == "123456789"


def test_notes_name_both_services(render: Render) -> None:
    notes = render()["notes"]
    assert "svc/demo-vqstack-tokenizerd 8080" in notes
    assert "svc/demo-vqstack-llmd 8081" in notes
