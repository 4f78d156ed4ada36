"""What the GPU's attention kernels ask of their arguments alike."""

from __future__ import annotations

from torch import Tensor


def above_zero(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores from a scale above 0: the largest score is then the largest product, too."""
    if scale > 0:
        return q, scale
    return (q * 0, 1.0) if scale == 0 else (-q, -scale)


def describable(x: Tensor) -> bool:
    """Whether a descriptor of bulk copies (TMA) can say where x [S, A, D] lies: addresses of rows and heads are
    multiples of 16 bytes, and rows do not lie on one another."""
    steps = [stride * x.element_size() for stride in x.stride()[:2]]
    return x.numel() > 0 and x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)
