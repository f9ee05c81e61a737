"""Runs inside the tools venv: renders, lints and validates the chart; answers in JSON.

Usage: python chart_tool.py CHART_FOLDER. Each line of standard input is a JSON request, each line
of standard output its answer. A request holds `values`, and `versions` of Kubernetes to validate
against; an answer holds `objects`, `notes`, `lint` and `invalid`, or `error`.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

# Installed in the tools venv only, so that type checkers elsewhere need not know them.
helm: Any = importlib.import_module("helm_python")
kubernetes_validate: Any = importlib.import_module("kubernetes_validate")
yaml: Any = importlib.import_module("yaml")

RELEASE, NAMESPACE = "demo", "prod"


def render(chart_folder: str, values: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The chart's objects and its notes."""
    with helm.Chart.load(chart_folder) as chart:
        chart.validate_schema(values)
        files: dict[str, str] = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    notes = next(text for name, text in files.items() if name.endswith("NOTES.txt"))
    manifests = [text for name, text in files.items() if name.endswith(".yaml")]
    objects = [item for text in manifests for item in yaml.safe_load_all(text) if item]
    return objects, notes


def invalid(objects: list[dict[str, Any]], versions: list[str]) -> list[str]:
    """One line per object that a version of Kubernetes would refuse."""
    problems = []
    for version in versions:
        for item in objects:
            try:
                kubernetes_validate.validate(item, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                problems.append(f"{version} {item['kind']}/{item['metadata']['name']}: {error}")
    return problems


def answer(chart_folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Everything the tests ask about one set of values."""
    try:
        objects, notes = render(chart_folder, request["values"])
    except helm.HelmError as error:
        return {"error": str(error)}
    return {
        "objects": objects,
        "notes": notes,
        "lint": helm.lint(chart_folder, request["values"], strict=True),
        "invalid": invalid(objects, request["versions"]),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(sys.argv[1], json.loads(line))), flush=True)
