"""KL divergence between teacher and student over the vocabulary, a few tokens at a time.

Logits of a whole batch over a large vocabulary would be most of the memory of a step; here the
gradient by the hidden states is computed chunk by chunk and logits are forgotten at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqllm.output_head import OutputHead

# So few that a chunk's logits fit memory that was freed before: larger buffers take fresh pages.
CHUNK_TOKENS = 64


def divergence(head: OutputHead, teacher: Tensor, student: Tensor, norm: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student) in nats; a scalar with gradients.

    Args:
        teacher: (n, d), what the teacher's output projection reads.
        student: (n, d), the student's last hidden states.
        norm: (d,), weight of the student's final norm.
    """
    normed = head.normed(student, norm)
    result: Tensor = _Divergence.apply(normed, teacher, head)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    """KL by what the student's output projection reads; its gradient is made on the way."""

    @staticmethod
    def forward(ctx: object, normed: Tensor, teacher: Tensor, head: OutputHead) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=normed.device)
        gradient = torch.empty_like(normed)
        for start in range(0, len(normed), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            wanted, found = head.project(teacher[rows]), head.project(normed[rows])
            p = wanted.softmax(-1)
            difference = wanted.log_softmax(-1).sub_(found.log_softmax(-1))
            total += difference.mul_(p).sum(dtype=torch.float64)
            slope = found.softmax(-1).sub_(p).to(head.table.dtype)
            gradient[rows] = (slope @ head.table).to(gradient.dtype)
        ctx.save_for_backward(gradient)  # type: ignore[attr-defined]
        return total.float()

    @staticmethod
    def backward(ctx: object, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * outer[0], None, None
