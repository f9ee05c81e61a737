"""The Dockerfiles: linted, non-root, pinned, and in step with the tree and the services."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vqserve.common.config import ServiceSettings
from vqserve.generation.config import GenerationSettings
from vqserve.tokenizer.config import TokenizerSettings

NAMES = ("tokenizer", "generation")
SETTINGS: dict[str, type[ServiceSettings]] = {
    "tokenizer": TokenizerSettings,
    "generation": GenerationSettings,
}


def instructions(root: Path, name: str) -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, with continued lines joined."""
    text = (root / f"deploy/docker/{name}.Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword.upper(), rest) for keyword, rest in pairs]


def rests(root: Path, name: str, keyword: str) -> list[str]:
    return [rest for found, rest in instructions(root, name) if found == keyword]


def environment(root: Path, name: str) -> dict[str, str]:
    words = [word for rest in rests(root, name, "ENV") for word in shlex.split(rest)]
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("name", NAMES)
def test_hadolint_has_nothing_to_say(tools_bin: Path, root: Path, name: str) -> None:
    done = subprocess.run(
        [str(tools_bin / "hadolint"), str(root / f"deploy/docker/{name}.Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_images_run_as_a_numeric_non_root_user(root: Path, name: str) -> None:
    users = rests(root, name, "USER")
    assert users
    for user in users:
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


@pytest.mark.parametrize("name", NAMES)
def test_base_images_are_pinned_by_tag(root: Path, name: str) -> None:
    arguments = dict(a.split("=", 1) for a in rests(root, name, "ARG") if "=" in a)
    stages = {rest.split()[-1] for rest in rests(root, name, "FROM")}
    for rest in rests(root, name, "FROM"):
        base = rest.split()[0]
        if base in stages:
            continue
        assert base == "${PYTHON_IMAGE}"
    assert re.search(r":\d+\.\d+\.\d+-", arguments["PYTHON_IMAGE"])


@pytest.mark.parametrize("name", NAMES)
def test_image_environment_is_what_the_service_reads(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = {k: v for k, v in environment(root, name).items() if k.startswith("VQSERVE_")}
    for key, value in own.items():
        monkeypatch.setenv(key, value)
    settings = SETTINGS[name].from_args([])
    assert settings.host == "0.0.0.0"
    assert {key.removeprefix("VQSERVE_").lower() for key in own} <= set(SETTINGS[name].model_fields)
    exposed = rests(root, name, "EXPOSE")[0].split()
    assert exposed == [str(settings.grpc_port), str(settings.http_port)]


@pytest.mark.parametrize("name", NAMES)
def test_image_starts_the_service_and_checks_its_health(root: Path, name: str) -> None:
    assert rests(root, name, "ENTRYPOINT") == [f'["python", "-m", "vqserve.{name}"]']
    (health,) = rests(root, name, "HEALTHCHECK")
    assert "/readyz" in health
    assert rests(root, name, "STOPSIGNAL") == ["SIGTERM"]


@pytest.mark.parametrize("name", NAMES)
def test_copied_paths_exist_and_enter_the_build_context(root: Path, name: str) -> None:
    ignore = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copies = [r.split() for r in rests(root, name, "COPY") if not r.startswith("--from=")]
    sources = {source for words in copies for source in words[:-1]}
    assert sources == allowed
    for source in sources:
        assert (root / source).exists(), source
