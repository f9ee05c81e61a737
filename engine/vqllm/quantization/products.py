"""Float32 matrix products on one thread, by the faster of the libraries inside of torch.

torch multiplies float32 by MKL, which leaves AVX-512 unused on processors of other makers; oneDNN,
which torch carries as well, is twice as fast there (200 against 90 GFLOPS on a core of Zen 5) and
as fast elsewhere. Knows matrices only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_onednn() -> bool:
    is_there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_there and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_HAS_ONEDNN = _has_onednn()


def multiply(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs (..., k) times weight (n, k)' in float32, without gradients: (..., n)."""
    is_single = inputs.dtype == weight.dtype == torch.float32
    if not _HAS_ONEDNN or not is_single or torch.is_grad_enabled() or not inputs.numel():
        return F.linear(inputs, weight)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return product


def multiply_rows(left: Tensor, right: Tensor) -> Tensor:
    """left' right of (n, a) and (n, b), summed over rows: (a, b)."""
    columns = left.T.contiguous()
    return multiply(columns, columns if left is right else right.T.contiguous())
