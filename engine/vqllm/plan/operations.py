"""The operations that quantizing a model consists of, and how much work each is.

An operation on a shape has one or more work terms (counts of multiply-adds, of trellis steps, of
bytes); its time is modelled as a fixed cost plus a price per unit of each term. Counts follow
`vqllm.quantization`. Knows no machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, int, int]  # tokens, out_features, in_features; 0 where it does not matter
Terms = tuple[float, ...]


@dataclass(frozen=True)
class Operation:
    """One kind of work.

    Attributes:
        name: key of fits and profiles.
        unit: of the first work term.
        terms: work terms of a shape.
    """

    name: str
    unit: str
    terms: Callable[[Shape], Terms]


def _gemm(shape: Shape) -> Terms:
    tokens, rows, columns = shape
    return (float(tokens) * rows * columns,)


def _gram(shape: Shape) -> Terms:
    """float32 products, and one addition to the float64 sum per entry."""
    tokens, _, columns = shape
    return (float(tokens) * columns * columns, float(columns) ** 2)


def _factorize(shape: Shape) -> Terms:
    """Two Cholesky factors and an inverse, all float64; copies and a reordering."""
    columns = float(shape[2])
    return (columns**3, columns**2)


def _sweep(shape: Shape) -> Terms:
    """Feedback of every column into those after it, and the rounding of every weight."""
    _, rows, columns = shape
    return (float(rows) * columns * columns / 2, float(rows) * columns)


def _bytes(shape: Shape) -> Terms:
    _, rows, columns = shape
    return (2.0 * rows * columns,)


GEMM = Operation("gemm", "multiply-add", _gemm)
GRAM = Operation("gram", "multiply-add", _gram)
FACTORIZE = Operation("factorize", "n^3", _factorize)
GPTQ = Operation("gptq", "multiply-add", _sweep)
VPTQ = Operation("vptq", "multiply-add", _sweep)
TCQ = Operation("tcq", "multiply-add", _sweep)
READ = Operation("read", "byte", _bytes)
WRITE = Operation("write", "byte", _bytes)

OPERATIONS = {
    operation.name: operation for operation in (GEMM, GRAM, FACTORIZE, GPTQ, VPTQ, TCQ, READ, WRITE)
}
METHOD_OPERATIONS = ("gptq", "vptq", "tcq")
