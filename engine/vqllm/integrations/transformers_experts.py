"""Routed experts that transformers 5 keeps as one tensor per projection, not as linear layers.

`experts.gate_up_proj` is (experts, 2 * inner, hidden), gates first; `experts.down_proj` is
(experts, hidden, inner). Nothing can be hooked before the latter, so a rotation of its inputs is
multiplied into the dequantized weights, which turns them back.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.checkpoint import Checkpoint
from vqllm.outlier.transform import rotation

_EXPERT = re.compile(r"^(?P<place>.*\.experts)\.\d+\.(?P<part>gate_proj|up_proj|down_proj)$")
_FUSED = ("gate_up_proj", "down_proj")


class FusedExperts:
    """The fused experts of one model, as the checkpoint's linears come by."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def takes(self, model: Any, name: str) -> bool:
        """Whether the linear `name` of the checkpoint is a slice of fused experts in `model`."""
        match = _EXPERT.match(name)
        if match is None:
            return False
        place = match["place"]
        module = model.get_submodule(place)
        if not all(isinstance(getattr(module, part, None), nn.Parameter) for part in _FUSED):
            return False
        self._places[place] = module.down_proj.shape[0]
        return True

    @property
    def parameter_names(self) -> list[str]:
        """Parameters that are filled in here and not loaded by transformers."""
        return [f"{place}.{part}" for place in self._places for part in _FUSED]

    def fill(self, model: Any, checkpoint: Checkpoint, like: Tensor) -> None:
        """Set the parameters from the packed linears, on the device and in the dtype of `like`."""
        for place, count in self._places.items():
            experts = [_weights(checkpoint, f"{place}.{index}") for index in range(count)]
            module = model.get_submodule(place)
            for part, weights in zip(_FUSED, zip(*experts, strict=True), strict=True):
                stacked = torch.stack(weights).to(like.device, like.dtype)
                setattr(module, part, nn.Parameter(stacked, requires_grad=False))


def _weights(checkpoint: Checkpoint, expert: str) -> tuple[Tensor, Tensor]:
    """(gate_up, down) of one expert, float32."""
    gate, up, down = (
        torch.from_numpy(checkpoint.dense_linear(f"{expert}.{part}"))
        for part in ("gate_proj", "up_proj", "down_proj")
    )
    seed = checkpoint.transform.down_seed
    if seed is not None:
        down = rotation(down.shape[1], seed).invert(down)
    return torch.cat([gate, up]), down
