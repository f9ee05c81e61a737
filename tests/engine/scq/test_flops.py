"""Multiply-adds of small networks against sums worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scq.backbones import TransformerBlock
from scq.flops import count_macs, count_parameters, encoder_costs, estimated_ms, model_cost
from scq.model import ScqAutoencoder


def test_convolutions_by_hand() -> None:
    picture = torch.zeros(2, 4, 5, 6)
    assert count_macs(nn.Conv2d(4, 6, 3, padding=1), picture) == 2 * 30 * 6 * 4 * 9
    assert count_macs(nn.Conv2d(4, 6, 3, padding=1, groups=2), picture) == 2 * 30 * 6 * 2 * 9
    assert count_macs(nn.Conv2d(4, 8, 3, stride=2), picture) == 2 * (2 * 2) * 8 * 4 * 9
    assert count_macs(nn.ConvTranspose2d(4, 6, 2, stride=2), picture) == 2 * 30 * 6 * 4 * 4


def test_a_linear_network_by_hand() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    assert count_macs(network, torch.zeros(5, 8)) == 5 * (8 * 16 + 16 * 3)
    assert count_parameters(network) == 8 * 16 + 16 + 16 * 3 + 3
    assert count_parameters(None) == 0


def test_attention_by_hand() -> None:
    width, tokens = 64, 3 * 5
    projections = tokens * (3 * width * width + width * width + 2 * 4 * width * width)
    attention = 2 * tokens * tokens * width
    positions = tokens * width * 9
    macs = count_macs(TransformerBlock(width), torch.zeros(1, width, 3, 5))
    assert macs == projections + attention + positions


def test_a_model_is_the_sum_of_its_parts(tiny_model: ScqAutoencoder) -> None:
    # Encoder of the fixture: unshuffle 4, 48 -> 8, a block at 8, unshuffle 2, 32 -> 8, a block
    # at 8, 8 -> 4; on 32x16 pixels: 8x4 and 4x2 positions.
    cost = model_cost(tiny_model, 32, 16)
    block = 2 * 8 * 8 * 9
    fine, coarse = 8 * 4, 4 * 2
    assert cost.macs["encoder"] == fine * (48 * 8 * 9 + block) + coarse * (32 * 8 + block + 8 * 4)
    assert cost.macs["search"] == coarse * 32 * 4 * 4
    assert cost.macs["head"] == coarse * (4 * 8 * 9 + 8 * 8 * 9) + 8 * 3
    assert cost.sender_macs == cost.macs["encoder"] + cost.macs["search"]
    assert cost.parameters["search"] == 32 * 4
    assert sum(cost.parameters.values()) == sum(p.numel() for p in tiny_model.parameters())


def test_depthwise_backbones_take_less(tiny_model: ScqAutoencoder) -> None:
    costs = encoder_costs(tiny_model.config, 32, 32)
    assert set(costs) >= {"cnn", "mobile", "vit"}
    assert costs["mobile"][0] < costs["cnn"][0]
    assert costs["cnn"] == (
        model_cost(tiny_model, 32, 32).macs["encoder"],
        count_parameters(tiny_model.encoder),
    )


def test_the_estimate_is_two_operations_a_multiply_add() -> None:
    assert estimated_ms(10_000_000, gflops=20) == pytest.approx(1.0)
