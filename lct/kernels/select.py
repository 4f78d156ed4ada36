"""Who computes an operation. An explicit choice that cannot run raises with its reasons; `auto` takes the fastest
implementation that is validated for the device and dtype. Nothing falls back in silence."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lct.kernels import reference, sdpa

# Fastest first. `reference` can do everything and stands last. Each module tells by `reasons` why it cannot take some
# tensors, and by `validated` whether it has passed its tests on a kind of device.
ATTENTION: dict[str, ModuleType] = {"sdpa": sdpa, "reference": reference}


def choose(impl: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The name of the implementation to run; ValueError names what stands against an explicit choice."""
    if impl == "auto":
        return next(n for n, m in ATTENTION.items() if m.validated(q.device, q.dtype) and not m.reasons(q, k, v))
    if impl not in ATTENTION:
        raise ValueError(f"impl: expected 'auto' or one of {tuple(ATTENTION)}, got {impl!r}")
    against = ATTENTION[impl].reasons(q, k, v)
    if against:
        raise ValueError(
            f"impl={impl!r} cannot run: {'; '.join(against)}. Use impl='auto' or another of {tuple(ATTENTION)}"
        )
    return impl


def against_auto(device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
    """Per implementation, why `auto` does not take it for this device and dtype; empty where it may."""
    probe = torch.zeros(1, 1, 64, dtype=dtype, device=device)
    report = {}
    for name, module in ATTENTION.items():
        report[name] = module.reasons(probe, probe, probe)
        if not report[name] and not module.validated(device, dtype):
            report[name] = [f"not validated on {device.type} in {dtype}; ask for it by name"]
    return report
