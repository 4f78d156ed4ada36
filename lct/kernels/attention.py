"""Attention over the visible rows of a plan: checks, choice of implementation, one registered op, its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lct.kernels import select
from lct.kernels.reference import statistics_dtype
from lct.layout import SceneLayout
from lct.plan import Plan

torch.library.define(
    "lct::attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor table, Tensor host_table, float scale, str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    "lct::attention_backward",
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor table, Tensor key_table, "
    "Tensor host_table, Tensor host_key_table, float scale, bool deterministic, str impl) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("lct::attention_forward", "default")
def _forward(q, k, v, table, host_table, scale, impl):
    return select.ATTENTION[impl].forward(q, k, v, table, host_table, scale)


@torch.library.impl("lct::attention_backward", "default")
def _backward(dout, dlse, q, k, v, out, lse, table, key_table, host_table, host_key_table, scale, deterministic, impl):
    tensors = dout, dlse, q, k, v, out, lse, table, key_table, host_table, host_key_table
    return select.ATTENTION[impl].backward(*tensors, scale, deterministic)


@torch.library.register_fake("lct::attention_forward")
def _forward_fake(q, k, v, table, host_table, scale, impl):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=statistics_dtype(q.dtype))


@torch.library.register_fake("lct::attention_backward")
def _backward_fake(
    dout, dlse, q, k, v, out, lse, table, key_table, host_table, host_key_table, scale, deterministic, impl
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


torch.library.register_autograd("lct::attention_backward", select.once)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, key_table, host_table, host_key_table, scale, deterministic, impl):
        out, lse = torch.ops.lct.attention_forward(q, k, v, table, host_table, scale, impl)
        ctx.save_for_backward(q, k, v, out, lse, table, key_table, host_table, host_key_table)
        ctx.options = scale, deterministic, impl
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        grads = torch.ops.lct.attention_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | SceneLayout,
    *,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over the rows each query may see: full or context-causal attention (§ 3.2.2, § 3.3).

    q              [S, A, D], rows in joint order
    k, v           [S_kv, A_kv, D], same dtype and device; A_kv divides A, query head a reads key head a // (A / A_kv)
    plan           who sees whom; a SceneLayout stands for `layout.plan(q.device)`, outside compiled regions
    scale          default D^-0.5
    deterministic  backward sums in a fixed order, bitwise repeatable (every implementation so far does so anyway)
    return_lse     also return log Σ exp(scale · q kᵀ), [A, S] in fp32 (fp64 for fp64), differentiable
    impl           "auto" or a name in `select.ATTENTION`; one that cannot run raises with its reasons

    Returns out [S, A, D] in q's dtype. Rows that see nothing get out 0 and lse −inf. Rows nobody sees are never read.
    Differentiable once, backward; asking for more raises what autograd says of it.
    Raises ValueError or TypeError where shapes, dtypes, devices and plan do not agree. Defined by
    `reference.attention_forward`.
    """
    if isinstance(plan, SceneLayout):
        plan = plan.plan(q.device)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan or a SceneLayout, got {plan!r}")
    _check(q, k, v, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    name = select.choose(select.ATTENTION, impl, q, k, v)
    tables = plan.table, plan.key_table, plan.host_table, plan.host_key_table
    out, lse = _Attention.apply(q, k, v, *tables, scale, deterministic, name)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name}: expected [rows, heads, head_dim], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}; cast all three to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if plan.table.device != q.device:
        raise ValueError(
            f"plan: expected it on {q.device}, got {plan.table.device}; build it with layout.plan({str(q.device)!r})"
        )
    if q.shape[0] != plan.q_rows:
        raise ValueError(f"q: the plan has {plan.q_rows} query rows, got {q.shape[0]}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[0] != plan.k_rows:
        raise ValueError(f"k: the plan has {plan.k_rows} key rows, got {k.shape[0]}")
    if 0 in q.shape[1:] or k.shape[2] != q.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected head_dim {q.shape[2]} and heads that divide {q.shape[1]}, got {tuple(k.shape[1:])}"
        )
