"""Rectified flow with one time per shot (paper § 3.1 Eq. 1, § 3.2.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Noised(NamedTuple):
    """A point on the path and the velocity there."""

    z_t: Tensor
    target: Tensor


def noised(z_0: Tensor, noise: Tensor, t: Tensor) -> Noised:
    """z_t = (1 − t) z_0 + t ε and its velocity v = ε − z_0 (Eq. 1); z_0, noise [R, C], t [R] per row, fp32."""
    t = t[:, None].to(z_0.dtype)
    return Noised(torch.lerp(z_0, noise, t), noise - z_0)


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(mean + std · normal): the paper's distribution of training times, from normal draws (§ 3.4)."""
    return torch.sigmoid(mean + std * normal)


def shift_time(u: Tensor, shift: Tensor | float) -> Tensor:
    """t = s·u / (1 + (s − 1)·u): more noise for larger s; s = 1 changes nothing (the paper names no shift)."""
    return shift * u / (1 + (shift - 1) * u)


def shot_shift(shift: float, video_rows: int, reference_rows: int = 0) -> float:
    """The shift of one shot: constant, or growing with the square root of its size where `reference_rows` is given."""
    return shift * (max(video_rows, 1) / reference_rows) ** 0.5 if reference_rows else shift


def shot_losses(velocity: Tensor, target: Tensor, shot: Tensor, shots: int, counts: Tensor | None = None) -> Tensor:
    """Per shot, the mean squared error of its video rows (Eq. 1); [shots] in fp32, 0 where a shot has no row.

    counts  rows of each shot, where some are elsewhere: then this is their part of the mean
    """
    errors = (velocity.float() - target.float()).square().mean(dim=1)
    sums = errors.new_zeros(shots).index_add(0, shot, errors)
    counts = torch.bincount(shot, minlength=shots) if counts is None else counts
    return sums / counts.clamp(min=1)
