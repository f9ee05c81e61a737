"""Hadamard matrices, the sizes they cover, and the rotations made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqllm.errors import CorruptCheckpoint, InvalidConfig, UnsupportedModel
from vqllm.outlier.hadamard import hadamard_matrix, hadamard_size, is_known_order
from vqllm.outlier.transform import ModelTransform, rotation

ORDERS = [order for order in range(1, 300) if is_known_order(order)]
# Hidden, intermediate, head and latent sizes of published models.
SIGNS_OF_2026 = "++-+---+++-+-++---+--+-----+-++-+-+--++-++-+++++---++---+++-++--"
MODEL_SIZES = {
    "SmolLM2": (576, 1536, 64),
    "Qwen2.5": (896, 4864, 1536, 8960, 2048, 11008, 3584, 18944, 5120, 13824, 27648, 8192, 29568),
    "LLaMA": (4096, 11008, 14336, 28672, 16384, 53248, 3072, 128),
    "DeepSeek": (1408, 10944, 512, 192, 1536, 12288, 2048, 7168, 18432),
}


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard_matrix(order).astype(np.int64)
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


def test_every_order_that_model_sizes_need_is_known() -> None:
    assert {1, 12, 20, 28, 36, 44, 52, 60, 76, 108, 140, 148, 156, 172} <= set(ORDERS)
    for sizes in MODEL_SIZES.values():
        for size in sizes:
            assert hadamard_size(size).blocks == 1, size


def test_an_unknown_order_is_an_error() -> None:
    with pytest.raises(ValueError, match="order 6 "):
        hadamard_matrix(6)


@pytest.mark.parametrize("size", [2, 12, 48, 96, 576, 1536, 4096, 50, 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_undoes_a_rotation(size: int, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 2, size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    turn = rotation(size, 5)
    torch.testing.assert_close(turn.invert(turn.apply(rows)), rows)
    assert turn.apply(rows).dtype == dtype


@pytest.mark.parametrize("size", [12, 64, 96, 40, 50])
def test_the_fast_transform_is_the_dense_matrix(size: int) -> None:
    turn = rotation(size, 9)
    sylvester = np.array([[1]])
    for _ in range(turn.power):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    base = np.kron(hadamard_matrix(turn.order), sylvester)
    dense = np.kron(np.eye(turn.blocks), base) / len(base) ** 0.5 * turn.signs[:, None]
    np.testing.assert_allclose(turn.matrix().numpy(), dense, atol=1e-14)


def test_signs_are_fixed_for_ever() -> None:
    signs = rotation(64, 2026).signs
    assert "".join("-" if sign < 0 else "+" for sign in signs) == SIGNS_OF_2026


def test_sizes_without_a_matrix_are_cut_into_blocks() -> None:
    size = hadamard_size(50)
    assert (size.blocks, size.order, size.power) == (25, 1, 1)


def test_odd_sizes_and_wide_seeds_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="size 7"):
        rotation(7, 0)
    with pytest.raises(InvalidConfig, match="seed"):
        rotation(8, 2**64)


def test_a_transform_survives_json() -> None:
    transform = ModelTransform(residual_seed=1, down_seed=2**64 - 1)
    assert ModelTransform.from_dict(transform.to_dict()) == transform
    assert ModelTransform.from_dict(None) == ModelTransform()
    assert not ModelTransform(head_seed=1).is_online


@pytest.mark.parametrize("content", [{"r9_seed": 1}, {"down_seed": -1}, {"head_seed": "1"}])
def test_a_broken_transform_is_named(content: dict[str, object]) -> None:
    with pytest.raises(CorruptCheckpoint, match=next(iter(content))):
        ModelTransform.from_dict(content)
