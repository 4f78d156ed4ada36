"""Who computes an operation. An explicit choice that cannot run raises with its reasons; `auto` takes the fastest
implementation that is validated for the device and dtype. Nothing falls back in silence."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from lct.kernels import cuda_attention, native_attention, native_norm_rope, reference, remembered, sdpa

try:
    from lct.kernels import triton_attention, triton_modulate, triton_norm_rope
except ImportError as error:
    why = f"Triton does not import ({error}); pip install triton"
    triton_attention = triton_modulate = triton_norm_rope = SimpleNamespace(reasons=lambda *tensors: [why])


class Operation(dict[str, ModuleType | SimpleNamespace]):
    """Implementations by name, fastest first. `reference` can do everything and stands last.

    Each tells by `reasons` why it cannot take some tensors, and may tell by `validated` that it has passed its tests on
    some kind of device wherever it was tried; `lct doctor --validate` adds what has passed on this machine. One may
    say in BY_NAME_ONLY why `auto` never takes it, and by FORWARD_ONLY that it computes no gradients.
    """

    def __init__(self, name: str, **implementations: ModuleType | SimpleNamespace):
        super().__init__(implementations)
        self.name = name

    def against_auto(self, impl: str, *tensors: Tensor) -> list[str]:
        """Why `auto` does not take an implementation for these tensors; empty where it may."""
        against = self[impl].reasons(*tensors)
        if why := self.by_name_only(impl):
            return [*against, f"{why}: ask for it by name"]
        if against or self._validated(impl, tensors[0]):
            return against
        kind, name = tensors[0].device.type, str(tensors[0].dtype).removeprefix("torch.")
        return [f"not validated on this {kind} in {name}: ask for it by name, or run `lct doctor --validate`"]

    def by_name_only(self, impl: str) -> str | None:
        """Why `auto` never takes an implementation, whatever it has passed; None where it may."""
        return getattr(self[impl], "BY_NAME_ONLY", None)

    def forward_only(self, impl: str) -> bool:
        """Whether an implementation computes no gradients."""
        return getattr(self[impl], "FORWARD_ONLY", False)

    def auto(self, *tensors: Tensor) -> str:
        """The fastest validated implementation for these tensors."""
        return next(i for i in self if self._validated(i, tensors[0]) and not self[i].reasons(*tensors))

    def _validated(self, impl: str, x: Tensor | SimpleNamespace) -> bool:
        """On this kind of device in this dtype: wherever it was tried, or on this machine."""
        if self.by_name_only(impl):
            return False
        everywhere = hasattr(self[impl], "validated") and self[impl].validated(x.device, x.dtype)
        return everywhere or remembered.passed(self.name, impl, x.device, x.dtype)


ATTENTION = Operation(
    "attention",
    cuda=cuda_attention,
    triton=triton_attention,
    cpu=native_attention,
    sdpa=sdpa,
    reference=reference,
)
NORM_ROPE = Operation(
    "norm_rope",
    cuda=native_norm_rope.cuda,
    triton=triton_norm_rope,
    cpu=native_norm_rope.cpu,
    reference=reference,
)
MODULATE = Operation("modulate", triton=triton_modulate, reference=reference)
OPERATIONS = (ATTENTION, NORM_ROPE, MODULATE)
NAMES = tuple(dict.fromkeys(name for operation in OPERATIONS for name in operation))


def unvalidated(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What to tell who lets `auto` choose on a GPU where plain torch is all that is validated; else None."""
    if impl != "auto" or device.type != "cuda":
        return None
    x = SimpleNamespace(device=device, dtype=dtype)
    slow = [o.name for o in OPERATIONS if not any(i != "reference" and o._validated(i, x) for i in o)]
    if not slow:
        return None
    return (
        f"{', '.join(slow)}: computed by plain torch, slowly and in much memory, because nothing faster is validated "
        f"on this GPU in {str(dtype).removeprefix('torch.')} yet; `lct doctor --validate` does that, once"
    )


def choose(operation: Operation, impl: str, *tensors: Tensor) -> str:
    """The name of the implementation to run; ValueError names what stands against an explicit choice."""
    if impl == "auto":
        return operation.auto(*tensors)
    if impl not in operation:
        raise ValueError(f"impl: {operation.name} takes 'auto' or one of {tuple(operation)}, got {impl!r}")
    against = operation[impl].reasons(*tensors)
    if against:
        raise ValueError(
            f"impl={impl!r} cannot run: {'; '.join(against)}. Use impl='auto' or another of {tuple(operation)}"
        )
    return impl


def once(ctx: object, *grads: object) -> None:
    """The backward of every backward: that of most implementations would silently be zero."""
    raise NotImplementedError("a second derivative: this operation is differentiable once")


class Choice(NamedTuple):
    """Who computes each operation of a model."""

    attention: str
    norm_rope: str
    modulate: str

    @classmethod
    def of(cls, impl: str) -> Choice:
        """One name for a whole model: an operation that has no implementation of that name ("sdpa" is one of attention
        alone), or one that computes no gradients, takes what "auto" would. ValueError where no operation has one."""
        if impl != "auto" and impl not in NAMES:
            raise ValueError(f"impl: expected 'auto' or one of {NAMES}, got {impl!r}")
        return cls(*(impl if impl in o and not o.forward_only(impl) else "auto" for o in OPERATIONS))
