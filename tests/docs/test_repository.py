"""The repository itself: nothing tracked that must not be published."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Written with character classes so that this file does not match itself.
FORBIDDEN_TEXT = re.compile(
    r"p[y]pi[.]org|p[y]thonhosted|registry[.]n[p]mjs|d[e]b[.]debian[.]org|/r[o]ot/|/h[o]me/[a-z]",
)
FORBIDDEN_FILES = re.compile(r"(^|/)uv[.]lock$|[.](pkl|pickle|pt|pth|ckpt)$")
MAX_WEIGHT_BYTES = 12 * 2**20


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str | None:
    content = path.read_bytes()
    return None if b"\0" in content[:8192] else content.decode("utf-8")


def test_no_tracked_text_names_a_package_registry_or_a_private_path() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked_files()
        if (text := text_of(path)) is not None and (match := FORBIDDEN_TEXT.search(text))
    ]
    assert offenders == []


def test_no_lock_file_or_pickle_is_tracked() -> None:
    names = [str(path.relative_to(ROOT)) for path in tracked_files()]
    assert [name for name in names if FORBIDDEN_FILES.search(name)] == []


def test_shipped_weights_stay_within_their_budget_and_have_cards() -> None:
    weights = [path for path in tracked_files() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= MAX_WEIGHT_BYTES
    shipped = [path for path in weights if "zoo" in path.parts]
    assert [path.name for path in shipped if not path.with_suffix(".md").is_file()] == []


@pytest.mark.parametrize("guide", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_named_in_a_guide_exists(guide: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", (ROOT / guide).read_text()))
    assert named - targets == set()
    assert named, f"{guide} names no make target"


def test_every_link_to_a_file_in_the_guides_leads_somewhere() -> None:
    broken = []
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in link and not (document.parent / link).exists():
                broken.append(f"{document.name}: {link}")
    assert broken == []
