"""Zero-shot tasks from local copies of their official files.

Every task lies in a folder of its own name, in the files its authors released:

    arc_easy/ARC-Easy-Test.jsonl, arc_challenge/ARC-Challenge-Test.jsonl
        {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}
    hellaswag/hellaswag_val.jsonl
        {"activity_label", "ctx_a", "ctx_b", "endings", "label"}
    piqa/valid.jsonl with piqa/valid-labels.lst
        {"goal", "sol1", "sol2"}, and one 0 or 1 per line
    winogrande/dev.jsonl
        {"sentence" with one _, "option1", "option2", "answer"}
    lambada/lambada_test.jsonl
        {"text"}

Prompts are those of lm-evaluation-harness, so that accuracies can be compared with published ones.
Knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqllm.errors import EvaluationError

Json = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One answer: a context and what follows it, the space in front of it included."""

    context: str
    continuation: str

    @property
    def length(self) -> int:
        """Characters of the answer itself, which normalized accuracy divides by."""
        return len(self.continuation.removeprefix(" "))


@dataclass(frozen=True)
class Item:
    """One question; `answer` is the index of the right choice.

    With a single choice the item counts as right when the model would write it greedily.
    """

    choices: tuple[Choice, ...]
    answer: int = 0


def _read_arc(folder: Path, file_name: str) -> list[Item]:
    items = []
    for record in _records(folder / file_name):
        question = record["question"]
        labels = [choice["label"] for choice in question["choices"]]
        texts = [choice["text"] for choice in question["choices"]]
        prompt = f"Question: {question['stem']}\nAnswer:"
        items.append(_question(prompt, texts, labels.index(record["answerKey"])))
    return items


def _read_arc_easy(folder: Path) -> list[Item]:
    return _read_arc(folder, "ARC-Easy-Test.jsonl")


def _read_arc_challenge(folder: Path) -> list[Item]:
    return _read_arc(folder, "ARC-Challenge-Test.jsonl")


def _read_hellaswag(folder: Path) -> list[Item]:
    items = []
    for record in _records(folder / "hellaswag_val.jsonl"):
        context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
        prompt = _without_brackets(f"{record['activity_label']}: {context}")
        endings = [_without_brackets(ending) for ending in record["endings"]]
        items.append(_question(prompt, endings, int(record["label"])))
    return items


def _read_piqa(folder: Path) -> list[Item]:
    records = _records(folder / "valid.jsonl")
    labels = _lines(folder / "valid-labels.lst")
    if len(labels) != len(records):
        raise EvaluationError(
            f"{folder}: {len(records)} questions in valid.jsonl, {len(labels)} labels"
        )
    return [
        _question(f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], int(label))
        for r, label in zip(records, labels, strict=True)
    ]


def _read_winogrande(folder: Path) -> list[Item]:
    """The options stand in the context; what is scored is the rest of the sentence."""
    items = []
    for record in _records(folder / "dev.jsonl"):
        before, _, after = record["sentence"].partition("_")
        options = (record["option1"], record["option2"])
        choices = tuple(Choice(before + option, f" {after.strip()}") for option in options)
        items.append(Item(choices, int(record["answer"]) - 1))
    return items


def _read_lambada(folder: Path) -> list[Item]:
    items = []
    for record in _records(folder / "lambada_test.jsonl"):
        context, _, word = record["text"].rpartition(" ")
        items.append(Item((Choice(context, f" {word}"),)))
    return items


READERS: dict[str, Callable[[Path], list[Item]]] = {
    "arc_easy": _read_arc_easy,
    "arc_challenge": _read_arc_challenge,
    "hellaswag": _read_hellaswag,
    "piqa": _read_piqa,
    "winogrande": _read_winogrande,
    "lambada": _read_lambada,
}


def read_task(folder: Path, name: str) -> list[Item]:
    """Items of the task called `name` in `folder`/`name`.

    Raises:
        EvaluationError: no such task, or a file that is missing or not in the official layout.
    """
    if name not in READERS:
        raise EvaluationError(f"no task is called {name!r}; known: {', '.join(READERS)}")
    try:
        items = READERS[name](folder / name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(
            f"{folder / name} is not in the official layout of {name}: {error!r}"
        ) from error
    if not items:
        raise EvaluationError(f"{folder / name} holds no question")
    return items


def _question(prompt: str, answers: list[str], answer: int) -> Item:
    return Item(tuple(Choice(prompt, f" {text}") for text in answers), answer)


def _without_brackets(text: str) -> str:
    """Text without the marks that HellaSwag's WikiHow part left in it, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _records(path: Path) -> list[Json]:
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"task file {path} cannot be read: {error}") from error
    return [line for line in content.splitlines() if line.strip()]
