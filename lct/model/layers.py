"""The parts of a block. Each shot is modulated by its own time: per-shot rows are looked up by token (§ 3.2.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Master weights keep their dtype; the product runs in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, shot: Tensor) -> Tensor:
    """LayerNorm(x) · (1 + scale[shot]) + shift[shot]; x [R, C], shift and scale [N, C], shot [R] -> [R, C] as x."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (normed * (1 + F.embedding(shot, scale)) + F.embedding(shot, shift)).to(x.dtype)


def gated(x: Tensor, branch: Tensor, gate: Tensor, shot: Tensor) -> Tensor:
    """x + gate[shot] · branch; [R, C]."""
    return (x + F.embedding(shot, gate) * branch).to(x.dtype)


def time_features(times: Tensor, channels: int) -> Tensor:
    """Sinusoidal features of t in [0, 1], [N] -> [N, channels]; t = 0.5 is the paper's "timestep 500"."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device, dtype=times.dtype) / half)
    angles = 1000 * times[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.rise = Linear(width, hidden)
        self.fall = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(F.gelu(self.rise(x), approximate="tanh"))
