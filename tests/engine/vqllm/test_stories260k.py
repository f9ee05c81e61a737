"""A real trained model, small enough for a test: what it says is known."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from vqllm.checkpoint import Checkpoint
from vqllm.errors import UnsupportedModel
from vqllm.evaluation.evaluate import summarize
from vqllm.evaluation.perplexity import compare_windows
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.pipeline import quantize_model
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.saving import CheckpointWriter, FolderPlan
from vqllm.runtime.executors.base import Executor
from vqllm.runtime.executors.onnx import OnnxExecutor
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.sources import PlainSource

FOLDER = Path(__file__).parents[4] / "shared" / "data" / "models" / "stories260k"
BOS = 1

pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/data/models/stories260k is absent"),
]


def read_pieces(path: Path) -> list[str]:
    """Vocabulary of a llama2.c tokenizer file: per token float32 score, int32 length, bytes."""
    content, offset, pieces = path.read_bytes(), 4, []
    while offset < len(content):
        _, length = struct.unpack_from("<fi", content, offset)
        pieces.append(content[offset + 8 : offset + 8 + length].decode("utf-8", "replace"))
        offset += 8 + length
    return pieces


def sample(executor: Executor, num_tokens: int, seed: int) -> list[int]:
    """A story of the model's own, at temperature 1."""
    generator = np.random.default_rng(seed)
    cache = executor.allocate()
    token_ids, logits = [BOS], executor.prefill(cache, [BOS])
    for _ in range(num_tokens - 1):
        probabilities = np.exp(logits - logits.max(), dtype=np.float64)
        probabilities /= probabilities.sum()
        token_ids.append(int(generator.choice(len(probabilities), p=probabilities)))
        logits = executor.decode([cache], token_ids[-1:])[0]
    executor.free(cache)
    return token_ids


def tell(executor: Executor, num_tokens: int) -> str:
    """The most probable story."""
    pieces = read_pieces(FOLDER / "tok512.bin")
    cache = executor.allocate()
    story, logits = "", executor.prefill(cache, [BOS])
    for _ in range(num_tokens):
        token_id = int(logits.argmax())
        story += pieces[token_id]
        logits = executor.decode([cache], [token_id])[0]
    executor.free(cache)
    return story


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that may be written into: ONNX graphs lie beside the weights."""
    target = tmp_path / "stories260k"
    shutil.copytree(FOLDER, target, copy_function=shutil.copyfile)
    target.chmod(0o755)
    return target


def test_the_most_probable_story_begins_as_stories_do(folder: Path) -> None:
    story = tell(TorchExecutor(Checkpoint(folder), 64, 1), 12)
    assert story.startswith(" Once upon a time, there was a")


def test_its_narrow_heads_are_refused_by_onnx(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="head_dim is 8"):
        OnnxExecutor(Checkpoint(folder), 64, 1, 1)


def test_eight_bits_cost_next_to_nothing_on_the_models_own_stories(
    folder: Path, tmp_path: Path
) -> None:
    source = Checkpoint(folder)
    reference = TorchExecutor(source, 128, 1)
    stories = np.array([sample(reference, 128, seed) for seed in range(12)], dtype=np.int64)
    # 172 inner columns do not fill whole words at 4 bits.
    recipe = Recipe(GptqOptions(GroupedSpec(bits=8, group_size=64)))
    target = tmp_path / "quantized"
    with CheckpointWriter(source, target, FolderPlan("Own stories.")) as writer:
        for part in quantize_model(PlainSource(source), stories[:8], recipe):
            writer.add(part)
    score = summarize(
        compare_windows(TorchExecutor(Checkpoint(target), 128, 1), reference, stories[8:])
    )
    assert score["perplexity"] < 1.01 * score["reference_perplexity"]
    assert score["mean_kl"] < 0.01
