"""The native executor: the reference's forward pass over packed 4-bit weights in our C library.

Every decoder linear is one native call on the weights as packed; norms, attention and the output
head stay in torch. Knows nothing of requests, sampling or text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels import GptqTensors, Q4Matrix, ThreadPool, native_status, pack_gptq, q4_gemv
from vqllm.checkpoint import Checkpoint
from vqllm.errors import ExecutorUnavailable, UnsupportedModel
from vqllm.llama import BlockWeights
from vqllm.packing import pack_columns, pack_rows
from vqllm.quantization.base import GroupedLinear
from vqllm.runtime.executors.support import refuse_beyond
from vqllm.runtime.executors.torch import TorchExecutor

BITS = 4


@dataclass
class NativeBlock(BlockWeights):
    """A block whose linears are packed matrices; `linears` stays empty."""

    matrices: dict[str, Q4Matrix]
    pool: ThreadPool | None

    def project(self, part: str, inputs: Tensor) -> Tensor:
        """One native call for all tokens; each row's result is independent of the others."""
        rows = inputs.reshape(-1, inputs.shape[-1]).numpy()
        outputs = torch.from_numpy(q4_gemv(self.matrices[part], rows, pool=self.pool))
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


class NativeExecutor(TorchExecutor):
    """Runs 4-bit GPTQ checkpoints on the native library's best instruction-set tier."""

    name = "native"

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        max_num_sequences: int = 8,
        num_threads: int = 0,
    ) -> None:
        """`num_threads` splits each product's outputs; 0 and 1 use the calling thread.

        Raises:
            ExecutorUnavailable: there is no native library; the message says why.
            UnsupportedModel: a linear is not 4-bit with contiguous groups, naming it.
            CorruptCheckpoint: a tensor is missing, misshapen or not finite.
        """
        status = native_status()
        if not status.available:
            raise ExecutorUnavailable(
                f"executor 'native' has no native library: {status.reason}; "
                f"use one of {', '.join(status.executors)}"
            )
        refuse_beyond(checkpoint, self.name)
        self._isa = status.isa
        self._pool = ThreadPool(num_threads) if num_threads > 1 else None
        super().__init__(checkpoint, context_length, max_num_sequences, num_threads)

    @property
    def providers(self) -> tuple[str, ...]:
        return (f"vqkernels {self._isa}", *super().providers)

    def _load_block(self, checkpoint: Checkpoint, layer: int) -> BlockWeights:
        prefix = f"model.layers.{layer}"
        matrices = {
            part: _pack(f"{prefix}.{part}", checkpoint.linear(f"{prefix}.{part}"))
            for part in checkpoint.config.linear_shapes()
        }
        return NativeBlock(
            input_norm=_norm(checkpoint, f"{prefix}.input_layernorm"),
            post_attention_norm=_norm(checkpoint, f"{prefix}.post_attention_layernorm"),
            linears={},
            matrices=matrices,
            pool=self._pool,
        )


def _norm(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.from_numpy(checkpoint.norm(f"{name}.weight"))


def _pack(name: str, linear: object) -> Q4Matrix:
    if not isinstance(linear, GroupedLinear) or linear.spec.bits != BITS:
        raise UnsupportedModel(
            f"{name} is not a {BITS}-bit GPTQ layer; quantize with --bits {BITS}, "
            "or use the executor onnx or torch"
        )
    if not linear.has_contiguous_groups:
        raise UnsupportedModel(
            f"{name} has act-order without static groups; requantize it, or use the executor torch"
        )
    tensors = GptqTensors(
        qweight=pack_rows(linear.codes, BITS),
        scales=linear.scales,
        qzeros=pack_columns(linear.zeros, BITS),
        group_size=linear.spec.group_size,
        checkpoint_format="gptq_v2",
    )
    return pack_gptq(tensors)
