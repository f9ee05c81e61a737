"""Several processes on one training run: who samples what, and averages between them.

Every process holds the whole model and takes its share of each batch; gradients are averaged
before every update, so all models stay equal. Starting the processes is torchrun's business.
Knows tensors and process groups, nothing of models or losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from scq.errors import ScqError


@dataclass(frozen=True)
class Team:
    """This process's place among `size` equals; rank 0 writes files and reports."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def slots(self, batch_size: int) -> range:
        """This process's part of the batch. Raises ScqError for uneven parts."""
        if batch_size % self.size:
            raise ScqError(f"batch_size {batch_size} is not a multiple of {self.size} processes")
        part = batch_size // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the team, in one exchange."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        joint = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(joint)
        joint /= self.size
        parts = torch.split(joint, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over the team."""
        if self.size > 1:
            distributed.all_reduce(tensor)

    def follow(self, tensor: Tensor) -> None:
        """Replace the tensor by that of rank 0."""
        if self.size > 1:
            distributed.broadcast(tensor, 0)


def current_team() -> Team:
    """The process group that is initialised, or a team of one."""
    if distributed.is_available() and distributed.is_initialized():
        return Team(distributed.get_rank(), distributed.get_world_size())
    return Team()


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the group that torchrun set up, if it did; yields the device this process is to use.

    `device` is auto, cpu or cuda as for `choose_device`.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield device
        return
    chosen = choose_device(device)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        local = distributed.get_node_local_rank(fallback_rank=distributed.get_rank())
        yield f"cuda:{local}" if chosen.type == "cuda" else "cpu"
    finally:
        distributed.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """auto (CUDA where there is one), cpu, cuda or cuda:N. Raises ScqError for what is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda" and not name.startswith("cuda:"):
        raise ScqError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ScqError(f"device {name!r} was asked for, but torch sees no CUDA device; use cpu")
    return torch.device(name)
