"""The CUDA executor: the reference's forward pass with packed weights in our GPU kernels.

Norms, attention and the output head stay in torch. A linear whose format has no kernel runs in half
precision, dequantized, and `providers` counts both kinds. The KV cache is in half precision and is
reserved at the start, so that memory that does not suffice shows before any request. Knows nothing
of requests or text.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor

from vqkernels.cuda import (
    CodebookArrays,
    CodebookWeights,
    CudaUnavailableError,
    CudaWeights,
    GptqArrays,
    GptqWeights,
    Gpu,
    TrellisArrays,
    TrellisWeights,
    open_gpu,
)
from vqkernels.errors import LayoutError, NativeUnavailableError
from vqllm.checkpoint import Checkpoint
from vqllm.decoder.weights import BlockWeights, block_around
from vqllm.errors import ExecutorUnavailable
from vqllm.quantization.base import GroupedLinear, QuantizedLinear
from vqllm.quantization.tcq import TcqLinear
from vqllm.quantization.vptq_linear import VptqLinear
from vqllm.runtime.executors.torch import TorchExecutor

_log = logging.getLogger(__name__)


@dataclass
class CudaBlock(BlockWeights):
    """A block whose packed linears are in `matrices`; `linears` holds the others."""

    matrices: dict[str, CudaWeights] = field(default_factory=dict, kw_only=True)

    def project(self, part: str, inputs: Tensor) -> Tensor:
        matrix = self.matrices.get(part)
        if matrix is None:
            return super().project(part, inputs)
        rows = inputs.reshape(-1, inputs.shape[-1]).half()
        outputs = matrix.linear(rows).to(inputs.dtype)
        outputs = outputs.view(*inputs.shape[:-1], matrix.out_features)
        bias = self.biases.get(part)
        return outputs if bias is None else outputs + bias


class CudaExecutor(TorchExecutor):
    """Runs any checkpoint on one NVIDIA GPU.

    A step's sequences share one forward pass, so the last bits of their logits may depend on how
    many they are.
    """

    name = "cuda"
    batches_decode = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        max_num_sequences: int = 8,
        num_threads: int = 0,
    ) -> None:
        """
        Raises:
            ExecutorUnavailable: no GPU, no driver, or the kernels cannot be compiled; says which.
            CorruptCheckpoint: a tensor is missing, misshapen or not finite.
            OverBudget: the KV cache does not fit beside the weights.
        """
        self._gpu = _open_gpu()
        self._formats: Counter[str] = Counter()
        sizes = (context_length, max_num_sequences, num_threads)
        device = str(self._gpu.device)
        super().__init__(checkpoint, *sizes, device=device, dtype=torch.float16)
        facts = {**self._formats, "kv_cache_bytes": self._slots.num_bytes}
        _log.info("linears and KV cache on the GPU", extra={"facts": facts})

    @property
    def providers(self) -> tuple[str, ...]:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self._formats.items()))
        return (f"cuda {self._gpu.module.name}", counts, *super().providers)

    def _load_block(self, checkpoint: Checkpoint, layer: int) -> BlockWeights:
        matrices: dict[str, CudaWeights] = {}
        dense: dict[str, Tensor] = {}
        for part in checkpoint.config.linear_shapes(layer):
            linear = checkpoint.linear(f"model.layers.{layer}.{part}")
            if not isinstance(linear, QuantizedLinear):
                dense[part] = torch.from_numpy(linear)
                self._formats["unquantized"] += 1
                continue
            try:
                matrices[part] = upload(self._gpu, linear)
                self._formats[linear.method] += 1
            except LayoutError as error:
                _log.warning("no kernel for %s: %s; it runs dequantized", part, error)
                dense[part] = torch.from_numpy(linear.dequantize())
                self._formats[f"{linear.method} dequantized"] += 1
        block = block_around(checkpoint, layer, dense)
        fields = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
        return CudaBlock(**fields, matrices=matrices)


def upload(gpu: Gpu, linear: QuantizedLinear) -> CudaWeights:
    """A packed linear on a GPU.

    Raises:
        LayoutError: its format or its sizes have no kernel.
    """
    match linear:
        case GroupedLinear():
            return GptqWeights(gpu, _gptq_arrays(linear))
        case TcqLinear():
            return TrellisWeights(gpu, _trellis_arrays(linear))
        case VptqLinear():
            return CodebookWeights(gpu, _codebook_arrays(linear))
    raise LayoutError(f"no CUDA kernel for the method {linear.method!r}")


def _gptq_arrays(linear: GroupedLinear) -> GptqArrays:
    if not linear.has_contiguous_groups:
        raise LayoutError("act-order without static groups")
    return GptqArrays(
        words=linear.tensors()["qweight"],
        scales=linear.scales,
        zeros=None if linear.is_symmetric else linear.zeros,
        bits=linear.spec.bits,
        group_size=linear.spec.group_size if linear.spec.group_size > 0 else linear.in_features,
    )


def _trellis_arrays(linear: TcqLinear) -> TrellisArrays:
    codebook = linear.codebook
    return TrellisArrays(
        codes=linear.codes,
        table=codebook.table,
        scales=linear.scales,
        bits=codebook.bits,
        multiplier=codebook.multiplier,
        trellis_bits=codebook.trellis_bits,
        group_size=linear.group_size,
        column_scales=linear.column_scales,
    )


def _codebook_arrays(linear: VptqLinear) -> CodebookArrays:
    if linear.spec.num_groups != 1 or linear.spec.num_outliers:
        raise LayoutError("several column groups, or outlier columns")
    if linear.out_features % linear.centroids.shape[2]:
        raise LayoutError(f"{linear.out_features} outputs cut the last vector")
    stages = [(linear.indices[0], linear.centroids[0])]
    if linear.res_indices is not None and linear.res_centroids is not None:
        stages.append((linear.res_indices[0], linear.res_centroids[0]))
    most = max(len(entries) for _, entries in stages)
    return CodebookArrays(
        indices=np.stack([indices.astype(np.int64) for indices, _ in stages]),
        # No index names what a smaller codebook is filled up with.
        entries=np.stack(
            [np.pad(entries, ((0, most - len(entries)), (0, 0))) for _, entries in stages]
        ),
        input_scale=linear.column_scales,
        input_bias=linear.column_biases,
        permutation=None if linear.order is None else linear.order.astype(np.int64),
    )


def _open_gpu() -> Gpu:
    if not torch.cuda.is_available():
        raise ExecutorUnavailable(
            "executor 'cuda' needs an NVIDIA GPU and torch with CUDA; torch sees none"
        )
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        cache = user_cache_path("vqstack", appauthor=False) / "cuda"
        return open_gpu(cache, device)
    except (CudaUnavailableError, NativeUnavailableError) as error:
        raise ExecutorUnavailable(f"executor 'cuda': {error}") from error
