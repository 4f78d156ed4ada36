"""The layers of a block that are torch's own, and the features of a shot's time (§ 3.2.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Master weights keep their dtype; the product runs in the dtype of the input.

    down, up  [r, in] and [out, r] of a low-rank change up · down of the weight, where `add_lora` made one
    """

    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, channels: int, out: int, bias: bool = True):
        super().__init__(channels, out, bias)
        self.register_parameter("down", None)
        self.register_parameter("up", None)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.down is None or self.up is None:
            return out
        return torch.addmm(out, F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype).t())  # x [R, in]


class LayerNorm(nn.LayerNorm):
    """Master weights keep their dtype, as in `Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        shape = list(self.normalized_shape)
        return F.layer_norm(x, shape, weight=self.weight.to(x.dtype), bias=self.bias.to(x.dtype), eps=self.eps)


def time_features(times: Tensor, channels: int) -> Tensor:
    """Sinusoidal features of t in [0, 1], [N] -> [N, channels]; t = 0.5 is the paper's "timestep 500"."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device, dtype=times.dtype) / half)
    angles = 1000 * times[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embedder(channels: int, width: int) -> nn.Sequential:
    """Two layers that bring time, guidance or a pooled vector to a model's width."""
    return nn.Sequential(Linear(channels, width), nn.SiLU(), Linear(width, width))


def single_time_features(times: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """`time_features` computed in fp32, whatever they are multiplied in, as models that others trained know them."""
    return time_features(times.float(), channels).to(dtype)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.rise = Linear(width, hidden)
        self.fall = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(F.gelu(self.rise(x), approximate="tanh"))
