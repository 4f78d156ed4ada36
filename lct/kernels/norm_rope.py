"""QK-norm, 3D RoPE and the way into joint order: what stands between QKV projection and attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lct.kernels import reference, select
from lct.layout import Streams

Weights = tuple[Tensor, Tensor]  # (q, k) norm weights of one stream


@dataclass(frozen=True)
class NormRope:
    """What differs from model to model.

    heads     A query heads; the rest of a QKV row are A_kv key heads and A_kv value heads
    axes      channels rotated by (t, y, x); even, their sum at most D, channels beyond it pass through
    theta     RoPE base; pair m of an axis with d channels turns by position · theta^(−2m/d)
    eps       of the RMS norm
    scope     "head": RMS over D, weights [D]; "row": RMS over all heads of a row (Wan), weights [A·D], [A_kv·D]
    """

    heads: int
    axes: tuple[int, int, int]
    theta: float = 10_000.0
    eps: float = 1e-6
    scope: str = "head"

    def __post_init__(self):
        if self.scope not in ("head", "row"):
            raise ValueError(f"scope: expected 'head' or 'row', got {self.scope!r}")
        if len(self.axes) != 3 or any(d < 0 or d % 2 for d in self.axes):
            raise ValueError(f"axes: expected three even channel counts (t, y, x), got {self.axes}")


ARGUMENTS = (
    "Tensor text_qkv, Tensor video_qkv, Tensor text_q_norm, Tensor text_k_norm, Tensor video_q_norm, "
    "Tensor video_k_norm, Tensor text_rows, Tensor video_rows, Tensor positions"
)
OPTIONS = "int heads, int[] axes, float theta, float eps, str scope, str impl"

torch.library.define("lct::norm_rope_join", f"({ARGUMENTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "lct::norm_rope_join_backward",
    f"(Tensor dq, Tensor dk, Tensor dv, {ARGUMENTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _join(*arguments):
    tensors, (positions, *options, impl) = arguments[:8], arguments[8:]
    return select.NORM_ROPE[impl].norm_rope_join(given_streams(tensors), positions, *options)


def _join_backward(dq, dk, dv, *arguments):
    tensors, (positions, *options, impl) = arguments[:8], arguments[8:]
    return select.NORM_ROPE[impl].norm_rope_join_backward(dq, dk, dv, given_streams(tensors), positions, *options)


def given_streams(tensors) -> tuple[reference.Stream, reference.Stream]:
    """The two streams of an operation's first eight arguments."""
    text_qkv, video_qkv, text_q_norm, text_k_norm, video_q_norm, video_k_norm, text_rows, video_rows = tensors
    return (text_qkv, (text_q_norm, text_k_norm), text_rows), (video_qkv, (video_q_norm, video_k_norm), video_rows)


torch.library.impl("lct::norm_rope_join", "default", _join)
torch.library.impl("lct::norm_rope_join_backward", "default", _join_backward)


@torch.library.register_fake("lct::norm_rope_join")
def _join_fake(text_qkv, video_qkv, tqn, tkn, vqn, vkn, text_rows, video_rows, positions, heads, *options):
    rows, (kv_heads, dim) = text_qkv.shape[0] + video_qkv.shape[0], reference.kv_shape(video_qkv, heads)
    k, v = (video_qkv.new_empty(rows, kv_heads, dim) for _ in range(2))
    return video_qkv.new_empty(rows, heads, dim), k, v


@torch.library.register_fake("lct::norm_rope_join_backward")
def _join_backward_fake(dq, dk, dv, text_qkv, video_qkv, tqn, tkn, vqn, vkn, *rest):
    return tuple(x.new_empty(x.shape) for x in (text_qkv, video_qkv, tqn, tkn, vqn, vkn))


torch.library.register_autograd("lct::norm_rope_join_backward", select.once)


class _NormRopeJoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text_qkv, video_qkv, tqn, tkn, vqn, vkn, text_rows, video_rows, positions, *options):
        tensors = (text_qkv, video_qkv, tqn, tkn, vqn, vkn, text_rows, video_rows, positions)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return torch.ops.lct.norm_rope_join(*tensors, *options)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        grads = torch.ops.lct.norm_rope_join_backward(dq, dk, dv, *ctx.saved_tensors, *ctx.options)
        return *grads, *[None] * 9


def norm_rope_join(
    text_qkv: Tensor,
    video_qkv: Tensor,
    text_norm: Weights,
    video_norm: Weights,
    streams: Streams,
    positions: Tensor,
    spec: NormRope,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k = RoPE(RMSNorm(·)), v unchanged; the two streams in, joint order out (§ 3.2.2, Fig. 3).

    text_qkv, video_qkv    [S_text, A + 2·A_kv, D], [S_video, A + 2·A_kv, D]: query, key, value heads of each row
    text_norm, video_norm  (q, k) weights of each stream, fp32; [D] each, or [A·D] and [A_kv·D] with scope "row"
    streams                joint row of every stream row
    positions              float32 [S, 3], (t, y, x) of every joint row; text at (0, 0, 0) is left unrotated
    spec                   heads, axes, theta, eps, scope
    impl                   "auto" or a name in `select.NORM_ROPE`; one that cannot run raises with its reasons

    Returns q [S, A, D], k and v [S, A_kv, D], new tensors. Differentiable in QKV and norm weights; deterministic.
    Norm statistics and rotation run in fp32 (fp64 for fp64). Raises ValueError or TypeError where shapes disagree.
    Defined by `reference.norm_rope_join`.
    """
    tensors, options = checked(text_qkv, video_qkv, text_norm, video_norm, streams, positions, spec)
    return _NormRopeJoin.apply(*tensors, *options, select.choose(select.NORM_ROPE, impl, video_qkv))


def checked(text_qkv, video_qkv, text_norm, video_norm, streams, positions, spec):
    """The tensors and options of a registered op; ValueError or TypeError where they do not agree."""
    for name, qkv, at in (("text_qkv", text_qkv, streams.text_rows), ("video_qkv", video_qkv, streams.video_rows)):
        if (
            qkv.ndim != 3
            or qkv.shape[1] <= spec.heads
            or (qkv.shape[1] - spec.heads) % 2
            or spec.heads % reference.kv_shape(qkv, spec.heads)[0]
        ):
            raise ValueError(f"{name}: expected [rows, {spec.heads} + 2·kv_heads, head_dim], got {tuple(qkv.shape)}")
        if qkv.shape[0] != len(at):
            raise ValueError(f"{name}: the layout has {len(at)} rows in this stream, got {qkv.shape[0]}")
    if text_qkv.shape[1:] != video_qkv.shape[1:] or text_qkv.dtype != video_qkv.dtype:
        raise ValueError(
            f"text_qkv: expected heads, head_dim, dtype of video_qkv, {tuple(video_qkv.shape[1:])} {video_qkv.dtype}, "
            f"got {tuple(text_qkv.shape[1:])} {text_qkv.dtype}"
        )
    kv_heads, dim = reference.kv_shape(video_qkv, spec.heads)
    if sum(spec.axes) > dim:
        raise ValueError(f"axes: expected a sum of at most head_dim {dim}, got {spec.axes}")
    sizes = (dim, dim) if spec.scope == "head" else (spec.heads * dim, kv_heads * dim)
    for stream, weights in (("text_norm", text_norm), ("video_norm", video_norm)):
        for name, weight, size in zip(("q", "k"), weights, sizes, strict=True):
            if tuple(weight.shape) != (size,):
                raise ValueError(
                    f"{stream} {name}: expected [{size}] for scope {spec.scope!r}, got {list(weight.shape)}"
                )
    rows = text_qkv.shape[0] + video_qkv.shape[0]
    if tuple(positions.shape) != (rows, 3) or positions.dtype != torch.float32:
        raise ValueError(f"positions: expected float32 [{rows}, 3], got {positions.dtype} {list(positions.shape)}")
    tensors = (text_qkv, video_qkv, *text_norm, *video_norm, streams.text_rows, streams.video_rows, positions)
    names = ("text_qkv", "video_qkv", *2 * ("text_norm",), *2 * ("video_norm",), "text_rows", "video_rows", "positions")
    for name, x in zip(names, tensors, strict=True):
        if x.device != video_qkv.device:
            raise ValueError(f"{name}: expected the device of video_qkv, {video_qkv.device}, got {x.device}")
    if not video_qkv.is_floating_point():
        raise TypeError(f"video_qkv: expected a floating-point tensor, got {video_qkv.dtype}")
    return tensors, (spec.heads, list(spec.axes), spec.theta, spec.eps, spec.scope)
