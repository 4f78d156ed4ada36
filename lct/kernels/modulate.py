"""The memory-bound steps of a block around its products: LayerNorm + per-shot modulation, gate + residual (§ 3.2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lct.kernels import select
from lct.kernels.reference import statistics_dtype

EPS = 1e-6  # of the layer norm

torch.library.define(
    "lct::modulate", "(Tensor x, Tensor shift, Tensor scale, Tensor starts, float eps, str impl) -> Tensor"
)
torch.library.define(
    "lct::modulate_backward",
    "(Tensor dout, Tensor x, Tensor scale, Tensor starts, float eps, str impl) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("lct::gated", "(Tensor x, Tensor branch, Tensor gate, Tensor starts, str impl) -> Tensor")
torch.library.define(
    "lct::gated_backward",
    "(Tensor dout, Tensor branch, Tensor gate, Tensor starts, str impl) -> (Tensor, Tensor)",
)


@torch.library.impl("lct::modulate", "default")
def _modulate(x, shift, scale, starts, eps, impl):
    return select.MODULATE[impl].modulate(x, shift, scale, starts, eps)


@torch.library.impl("lct::modulate_backward", "default")
def _modulate_backward(dout, x, scale, starts, eps, impl):
    return select.MODULATE[impl].modulate_backward(dout, x, scale, starts, eps)


@torch.library.impl("lct::gated", "default")
def _gated(x, branch, gate, starts, impl):
    return select.MODULATE[impl].gated(x, branch, gate, starts)


@torch.library.impl("lct::gated_backward", "default")
def _gated_backward(dout, branch, gate, starts, impl):
    return select.MODULATE[impl].gated_backward(dout, branch, gate, starts)


@torch.library.register_fake("lct::modulate")
@torch.library.register_fake("lct::gated")
def _like_x(x, *rest):
    return x.new_empty(x.shape)


@torch.library.register_fake("lct::modulate_backward")
def _modulate_backward_fake(dout, x, scale, *rest):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.register_fake("lct::gated_backward")
def _gated_backward_fake(dout, branch, gate, starts, impl):
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


for _name in ("modulate", "gated"):
    torch.library.register_autograd(f"lct::{_name}_backward", select.once)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, starts, impl):
        ctx.save_for_backward(x, scale, starts)
        ctx.impl = impl
        return torch.ops.lct.modulate(x, shift, scale, starts, EPS, impl)

    @staticmethod
    def backward(ctx, dout):
        return *torch.ops.lct.modulate_backward(dout, *ctx.saved_tensors, EPS, ctx.impl), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, starts, impl):
        ctx.save_for_backward(branch, gate, starts)
        ctx.impl = impl
        return torch.ops.lct.gated(x, branch, gate, starts, impl)

    @staticmethod
    def backward(ctx, dout):
        return dout, *torch.ops.lct.gated_backward(dout, *ctx.saved_tensors, ctx.impl), None, None


def modulate(x: Tensor, shift: Tensor, scale: Tensor, starts: Tensor, impl: str = "auto") -> Tensor:
    """LayerNorm(x) · (1 + scale[shot]) + shift[shot], each row by its own shot's modulation.

    x             [R, C], rows of one stream, shot by shot
    shift, scale  [N, C] of every shot, fp32 (fp64 for fp64); channels contiguous
    starts        int32 [N + 1], the first row of each shot, and R: `Streams.text_starts`, `Streams.video_starts`
    impl          "auto" or a name in `select.MODULATE`; one that cannot run raises with its reasons

    Returns [R, C] in x's dtype. Differentiable in x, shift and scale; statistics (eps 1e-6) and sums in fp32; sums over
    a shot's rows have one fixed order. Raises ValueError or TypeError where shapes, dtypes or devices do not agree.
    Defined by `reference.modulate`.
    """
    _check(x, starts, shift=shift, scale=scale)
    return _Modulate.apply(x, shift, scale, starts, select.choose(select.MODULATE, impl, x))


def gated(x: Tensor, branch: Tensor, gate: Tensor, starts: Tensor, impl: str = "auto") -> Tensor:
    """x + gate[shot] · branch: what attention or MLP add to the residual stream; arguments as in `modulate`.

    x, branch  [R, C], one dtype
    gate       [N, C] of every shot

    Returns [R, C] in x's dtype. Differentiable in x, branch and gate. Defined by `reference.gated`.
    """
    _check(x, starts, gate=gate)
    if branch.shape != x.shape or branch.dtype != x.dtype or branch.device != x.device:
        raise ValueError(
            f"branch: expected {list(x.shape)} {x.dtype} on {x.device} like x, "
            f"got {list(branch.shape)} {branch.dtype} on {branch.device}"
        )
    return _Gated.apply(x, branch, gate, starts, select.choose(select.MODULATE, impl, x))


def _check(x: Tensor, starts: Tensor, **per_shot: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating-point [rows, channels], got {list(x.shape)} {x.dtype}")
    if starts.ndim != 1 or starts.dtype != torch.int32 or starts.device != x.device:
        raise ValueError(
            f"starts: expected int32 [shots + 1] on {x.device}, "
            f"got {list(starts.shape)} {starts.dtype} on {starts.device}"
        )
    # On a GPU this look would wait for the device, and in a compiled region its numbers are not there yet.
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = starts.tolist()
        if ends[:1] != [0] or ends != sorted(ends) or ends[-1] != len(x):
            raise ValueError(f"starts: expected 0, then ever later rows, last the number of rows {len(x)}, got {ends}")
    for name, value in per_shot.items():
        if value.shape != (len(starts) - 1, x.shape[1]) or value.device != x.device:
            raise ValueError(
                f"{name}: expected [{len(starts) - 1}, {x.shape[1]}] on {x.device}, "
                f"got {list(value.shape)} on {value.device}"
            )
        if value.dtype != statistics_dtype(x.dtype):
            raise TypeError(f"{name}: expected {statistics_dtype(x.dtype)} beside x in {x.dtype}, got {value.dtype}")
