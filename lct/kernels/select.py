"""Who computes an operation. An explicit choice that cannot run raises with its reasons; `auto` takes the fastest
implementation that is validated for the device and dtype. Nothing falls back in silence."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from lct.kernels import reference, sdpa

try:
    from lct.kernels import triton_attention, triton_modulate, triton_norm_rope
except ImportError as error:
    why = f"Triton does not import ({error}); pip install triton"
    triton_attention = triton_modulate = triton_norm_rope = SimpleNamespace(
        reasons=lambda *tensors: [why], validated=lambda device, dtype: False
    )

# Per operation, fastest first. `reference` can do everything and stands last. Each module tells by `reasons` why it
# cannot take some tensors, and by `validated` whether it has passed its tests on a kind of device.
Implementations = dict[str, ModuleType | SimpleNamespace]
ATTENTION: Implementations = {"triton": triton_attention, "sdpa": sdpa, "reference": reference}
NORM_ROPE: Implementations = {"triton": triton_norm_rope, "reference": reference}
MODULATE: Implementations = {"triton": triton_modulate, "reference": reference}
NAMES = tuple(dict.fromkeys([*ATTENTION, *NORM_ROPE, *MODULATE]))


def choose(operation: Implementations, impl: str, *tensors: Tensor) -> str:
    """The name of the implementation to run; ValueError names what stands against an explicit choice.

    One name is given for a whole model: an operation that has no implementation of that name ("sdpa" is one of
    attention alone) takes what "auto" would.
    """
    if impl != "auto" and impl not in NAMES:
        raise ValueError(f"impl: expected 'auto' or one of {NAMES}, got {impl!r}")
    if impl not in operation:
        device, dtype = tensors[0].device, tensors[0].dtype
        return next(n for n, m in operation.items() if m.validated(device, dtype) and not m.reasons(*tensors))
    against = operation[impl].reasons(*tensors)
    if against:
        raise ValueError(
            f"impl={impl!r} cannot run: {'; '.join(against)}. Use impl='auto' or another of {tuple(operation)}"
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
