"""What the GPU's attention kernels ask of their arguments alike."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def above_zero(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores from a scale above 0 that fp32 holds: the largest score is then the largest product, too."""
    if abs(scale) < TINY:
        return q * 0, 1.0
    return (q, scale) if scale > 0 else (-q, -scale)


def describable(x: Tensor) -> bool:
    """Whether a descriptor of bulk copies (TMA) can say where x [S, A, D] lies: addresses of rows and heads are
    multiples of 16 bytes that rise."""
    steps = [stride * x.element_size() for stride in x.stride()[:2]]
    return x.numel() > 0 and x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)
