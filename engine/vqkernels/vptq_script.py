"""Runs linears of the `vptq` wheel in its own Python: `PYTHON vptq_script.py FOLDER NUM_THREADS`.

Stands alone, because the other environment has no vqkernels. FOLDER holds indices.npy (uint16
(out / v, in)), centroids.npy (float16 (k, v)) and x.npy (float32 (in,)); y.npy is written there.
Says its version, then answers every line with a number N on stdin by N products and a line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path, num_threads: int) -> None:
    """Serve products until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the wheel prints when it is imported
    torch = importlib.import_module("torch")
    torch.set_num_threads(num_threads)
    linear, x = load(torch, folder)
    with torch.inference_mode():
        np.save(folder / "y.npy", linear(x)[0].float().numpy())
        print(f"vptq {importlib.metadata.version('vptq')}, torch {torch.__version__}", file=answers)
        for line in sys.stdin:
            for _ in range(int(line)):
                linear(x)
            print("done", file=answers)


def load(torch: Any, folder: Path) -> tuple[Any, Any]:
    """The linear as a published checkpoint packs it, in halves: floats are a fifth slower."""
    vptq = importlib.import_module("vptq")
    indices, centroids = np.load(folder / "indices.npy"), np.load(folder / "centroids.npy")
    (num_centroids, length), columns = centroids.shape, indices.shape[1]
    linear = vptq.VQuantLinear(
        in_features=columns,
        out_features=indices.shape[0] * length,
        vector_lens=(-1, length),
        num_centroids=(-1, num_centroids),
        num_res_centroids=(-1, -1),
        group_num=1,
        group_size=columns,
        outlier_size=0,
        indices_as_float=False,
        is_indice_packed=True,
        dtype=torch.float16,
        enable_proxy_error=False,
    )
    words = np.ascontiguousarray(indices).view(np.int32)  # 16 bits an index
    linear.indices.data = torch.from_numpy(words[None])
    linear.centroids.weight.data = torch.from_numpy(centroids.reshape(1, -1))
    return linear.eval(), torch.from_numpy(np.load(folder / "x.npy"))[None].half()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
