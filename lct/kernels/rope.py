"""The frequencies of 3D RoPE as the kernels read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def frequencies(axes: Sequence[int], theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every channel pair, [Σ axes / 2]: turns for a step of position, float64, and the axis it follows, int32.

    Pair m of an axis with d channels makes theta^(−2m/d) / 2π turns. Copied to a device once.
    """
    return _frequencies(tuple(axes), theta, device)


@lru_cache(maxsize=64)
def _frequencies(axes: tuple[int, ...], theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    exponents = [torch.arange(0, d, 2, dtype=torch.float64) / d for d in axes]
    turns = torch.cat([theta**-e for e in exponents]) / (2 * math.pi)
    axis = torch.cat([torch.full((len(e),), i, dtype=torch.int32) for i, e in enumerate(exponents)])
    return turns.to(device), axis.to(device)
