"""Who computes an operation. An explicit choice that cannot run raises with its reasons; `auto` takes the fastest
implementation that is validated for the device and dtype. Nothing falls back in silence."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

# Fastest first. `reference` can do everything and stands last.
ATTENTION = {"sdpa": "lct.kernels.sdpa", "reference": "lct.kernels.reference"}


def implementation(name: str):
    """The module of an attention implementation."""
    return import_module(ATTENTION[name])


def reasons(name: str, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why an implementation cannot take these tensors; empty where it can."""
    return [] if name == "reference" else implementation(name).reasons(q, k, v)


def validated(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the implementation has passed its tests on this kind of device."""
    return name == "reference" or implementation(name).validated(device, dtype)


def choose(impl: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The name of the implementation to run; ValueError names what stands against an explicit choice."""
    if impl == "auto":
        return next(n for n in ATTENTION if validated(n, q.device, q.dtype) and not reasons(n, q, k, v))
    if impl not in ATTENTION:
        raise ValueError(f"impl: expected 'auto' or one of {tuple(ATTENTION)}, got {impl!r}")
    against = reasons(impl, q, k, v)
    if against:
        raise ValueError(
            f"impl={impl!r} cannot run: {'; '.join(against)}. Use impl='auto' or another of {tuple(ATTENTION)}"
        )
    return impl
