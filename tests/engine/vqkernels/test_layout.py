"""GPTQ tensors are checked by name; the reference unpacks them as the format says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vqkernels import (
    DtypeError,
    GptqTensors,
    LayoutError,
    NonFiniteError,
    ShapeError,
    check_static_groups,
    reference,
)

QWEIGHT = np.zeros((16, 12), dtype=np.int32)
SCALES = np.ones((1, 12), dtype=np.float16)
QZEROS = np.zeros((1, 2), dtype=np.int32)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"qweight": QWEIGHT.astype(np.int64)}, DtypeError, "qweight has dtype int64"),
        ({"qweight": QWEIGHT.tolist()}, DtypeError, "qweight is a list"),
        ({"qweight": QWEIGHT[0]}, ShapeError, r"qweight has shape \(12,\)"),
        ({"qweight": QWEIGHT[:0]}, ShapeError, "not empty"),
        ({"scales": SCALES.astype(np.float64)}, DtypeError, "scales has dtype float64"),
        ({"scales": SCALES[:, :3]}, ShapeError, r"scales has shape \(1, 3\), must be \(1, 12\)"),
        ({"scales": SCALES * np.float16("nan")}, NonFiniteError, "scales holds NaN"),
        ({"qzeros": QZEROS[:, :1]}, ShapeError, r"qzeros has shape \(1, 1\), must be \(1, 2\)"),
        ({"group_size": 12}, ShapeError, "group_size is 12, must be a multiple of 8"),
        ({"group_size": -1}, ShapeError, "pass in_features"),
        ({"group_size": 64}, ShapeError, r"scales has shape \(1, 12\), must be \(2, 12\)"),
        ({"checkpoint_format": "awq"}, LayoutError, "checkpoint_format is 'awq'"),
    ],
)
def test_bad_tensors_are_named(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {"qweight": QWEIGHT, "scales": SCALES, "qzeros": QZEROS}
    with pytest.raises(error, match=message):
        GptqTensors(**(good | fields))


def test_nibbles_unpack_lowest_first() -> None:
    qweight = np.array([[0x76543210]], dtype=np.int32)
    assert reference.unpack_codes(qweight).ravel().tolist() == list(range(8))


@pytest.mark.parametrize(
    ("checkpoint_format", "zeros"), [("gptq", [8, 1, 0]), ("gptq_v2", [7, 0, 15])]
)
def test_zero_points_follow_the_checkpoint_format(checkpoint_format: Any, zeros: list[int]) -> None:
    layer = GptqTensors(
        np.zeros((1, 3), dtype=np.int32),
        np.ones((1, 3), dtype=np.float32),
        np.array([[0xF07]], dtype=np.int32),
        checkpoint_format=checkpoint_format,
    )
    assert reference.unpack_zeros(layer).ravel().tolist() == zeros


def test_dequantize_applies_code_zero_and_scale_of_the_group() -> None:
    qweight = np.array([[0x99999999 - 2**32], [0x77777777]], dtype=np.int64).astype(np.int32)
    scales = np.array([[0.5], [2.0]], dtype=np.float32)
    weight = reference.dequantize(GptqTensors(qweight, scales, group_size=8))
    assert weight.ravel().tolist() == [0.5] * 8 + [-2.0] * 8


def test_static_groups_are_accepted_and_reordered_columns_are_not() -> None:
    groups = np.arange(256) // 128
    check_static_groups(groups, 128)
    with pytest.raises(LayoutError, match=r"g_idx\[0\] is 1, expected 0: act-order"):
        check_static_groups(groups[::-1], 128)
