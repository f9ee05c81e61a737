"""Zero-shot tasks: official files, prompts, accuracies, and bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vqllm.cli import main
from vqllm.errors import EvaluationError
from vqllm.evaluation.tasks import READERS, Choice, Item, read_task
from vqllm.evaluation.zeroshot import TaskScores, encode_choice, score_task

MakeFolder = Callable[..., Path]

ARC: dict[str, Any] = {
    "id": "1",
    "question": {
        "stem": "What melts ice?",
        "choices": [{"text": "heat", "label": "1"}, {"text": "a cold wind", "label": "2"}],
    },
    "answerKey": "2",
}
HELLASWAG: dict[str, Any] = {
    "ind": 4,
    "activity_label": "Baking",
    "ctx_a": "A man bakes.",
    "ctx_b": "he [step] opens",
    "endings": ["the oven.", "a [x] door."],
    "label": 0,
}
PIQA = {"goal": "open a jar", "sol1": "twist the lid", "sol2": "sing"}
WINOGRANDE = {
    "qID": "q",
    "sentence": "Ann thanked Bea because _ had helped.",
    "option1": "Ann",
    "option2": "Bea",
    "answer": "2",
}
FILES: dict[str, dict[str, list[Any]]] = {
    "arc_easy": {"ARC-Easy-Test.jsonl": [ARC]},
    "arc_challenge": {"ARC-Challenge-Test.jsonl": [ARC]},
    "hellaswag": {"hellaswag_val.jsonl": [HELLASWAG]},
    "piqa": {"valid.jsonl": [PIQA], "valid-labels.lst": [0]},
    "winogrande": {"dev.jsonl": [WINOGRANDE]},
    "lambada": {"lambada_test.jsonl": [{"text": "He sat on the chair"}]},
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Every task with one item."""
    for name, files in FILES.items():
        (tmp_path / "tasks" / name).mkdir(parents=True)
        for file_name, records in files.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / "tasks" / name / file_name).write_text(lines)
    return tmp_path / "tasks"


class ByteEncoder:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class LikesLetters:
    """Logits that grow with how much the scorer likes a byte, whatever came before."""

    def __init__(self, **liked: float) -> None:
        self.logits = np.zeros(256, dtype=np.float32)
        for letter, liking in liked.items():
            self.logits[ord(letter)] = liking

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return np.tile(self.logits, (len(token_ids), 1))


def test_prompts_are_those_of_the_harness(tasks: Path) -> None:
    (arc,) = read_task(tasks, "arc_easy")
    assert arc.choices[1] == Choice("Question: What melts ice?\nAnswer:", " a cold wind")
    assert arc.answer == 1
    (swag,) = read_task(tasks, "hellaswag")
    assert swag.choices[1] == Choice("Baking: A man bakes. He opens", " a door.")
    (piqa,) = read_task(tasks, "piqa")
    assert piqa.choices[0] == Choice("Question: open a jar\nAnswer:", " twist the lid")
    (wino,) = read_task(tasks, "winogrande")
    assert wino.choices[1] == Choice("Ann thanked Bea because Bea", " had helped.")
    assert wino.answer == 1
    (lambada,) = read_task(tasks, "lambada")
    assert lambada == Item((Choice("He sat on the", " chair"),))
    assert read_task(tasks, "arc_challenge") == [arc]


def test_longer_answers_win_only_by_character() -> None:
    item = Item((Choice("Q:", " a"), Choice("Q:", " aaaaaa")), 1)
    scores = score_task(LikesLetters(a=4.0), ByteEncoder(), [item], 100)
    assert not scores.correct[0]
    assert scores.correct_normalized[0]
    facts = scores.to_dict(TaskScores(np.array([True]), np.array([True]), True))
    assert facts["acc"] == 0
    assert facts["acc_norm"] == 1
    assert facts["flips"] == 1


def test_log_likelihoods_are_sums_over_the_answer() -> None:
    scorer = LikesLetters(b=1.0)
    right = Item((Choice("x", " b"), Choice("x", " c")), 0)
    assert score_task(scorer, ByteEncoder(), [right], 100).correct[0]
    wrong = Item((Choice("x", " b"), Choice("x", " c")), 1)
    assert not score_task(scorer, ByteEncoder(), [wrong], 100).correct[0]


def test_single_choices_must_be_greedy() -> None:
    item = Item((Choice("on the", " aa"),))
    assert not score_task(LikesLetters(a=4.0), ByteEncoder(), [item], 100).correct[0]
    items = [Item((Choice("on the", "aa"),)), item]
    scores = score_task(LikesLetters(a=4.0), ByteEncoder(), items, 100)
    assert scores.correct.tolist() == [True, False]
    assert "acc_norm" not in scores.to_dict()
    assert scores.to_dict()["acc_stderr"] == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_spaces_belong_to_the_answer() -> None:
    whole, count = encode_choice(ByteEncoder(), Choice("word ", "next"))
    assert bytes(whole[-count:]) == b" next"
    with pytest.raises(EvaluationError, match="no tokens"):
        encode_choice(ByteEncoder(), Choice("word", ""))


def test_long_contexts_lose_their_start() -> None:
    item = Item((Choice("x" * 50, " b"), Choice("y" * 50, " c")), 0)

    class Limited(LikesLetters):
        def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
            assert len(token_ids) <= 16
            return super().score(token_ids)

    assert score_task(Limited(b=1.0), ByteEncoder(), [item], 16).correct[0]


@pytest.mark.parametrize("name", READERS)
def test_bad_files_are_named(tasks: Path, name: str) -> None:
    path = tasks / name / next(iter(FILES[name]))
    path.write_text('{"strange": 1}\n')
    with pytest.raises(EvaluationError, match=f"{name} is not in the official layout"):
        read_task(tasks, name)
    path.write_text("")
    with pytest.raises(EvaluationError, match=r"no question|1 labels"):
        read_task(tasks, name)
    path.unlink()
    with pytest.raises(EvaluationError, match=path.name):
        read_task(tasks, name)


def test_unknown_tasks_are_refused(tasks: Path) -> None:
    with pytest.raises(EvaluationError, match="known: arc_easy"):
        read_task(tasks, "chess")


def test_the_command_answers_tasks(
    make_folder: MakeFolder,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words to score " * 20)
    model, reference = make_folder("model", 1), make_folder("reference", 2)
    words = ["vqllm", "evaluate", model, "--reference", reference, "--text", text]
    words += ["--window-length", "32", "--windows", "1", "--json", "-"]
    words += ["--tasks", ",".join(FILES), "--tasks-dir", tasks, "--task-limit", "1"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as done:
        main()
    captured = capsys.readouterr()
    assert not done.value.code, captured.err
    results = json.loads(captured.out)["tasks"]
    assert set(results) == set(FILES)
    assert {result["items"] for result in results.values()} == {1}
    assert "acc_norm" in results["piqa"]
    assert "reference_acc" in results["lambada"]
