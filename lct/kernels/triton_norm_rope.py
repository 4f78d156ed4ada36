"""QK-norm, 3D RoPE and the way into joint order, cache rows or the history pool, each as one Triton kernel.

A program walks the heads of a few rows of one stream or, where the norm runs over all heads of a row, holds them at
once: angles are formed for a row and not a head, QKV is read once, and what comes out lies where attention reads it.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton's annotations say constexpr where its language takes a plain value, and know nothing of launches.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lct.kernels import triton_common
from lct.kernels.rope import frequencies
from lct.kernels.triton_common import Rows, at, launch, reachable

TURN = tl.constexpr(2 * math.pi)
WARPS = 4
ROWS = 32  # of a backward program where the norm runs over a row: its sums are as wide as the row, so let them be few

Stream = tuple[Tensor, tuple[Tensor, Tensor], Tensor]  # QKV [R, A + 2·A_kv, D], (q, k) norm weights, joint rows [R]
KVRows = tuple[Tensor, Tensor, Tensor]  # keys and values [rows, A_kv, D], slots [S]


class Rope(NamedTuple):
    """Positions [S, 3], and each channel pair's frequency in turns (float64) and axis."""

    positions: Tensor
    frequencies: Tensor
    axes: Tensor


class StreamRows(NamedTuple):
    """One stream as a kernel's argument: QKV, its norm weights, the joint row of each of its rows."""

    qkv: Rows
    q_norm: Tensor
    k_norm: Tensor
    joint: Tensor


class KV(NamedTuple):
    """Where keys and values go: two tensors, and the row there of each joint row (None: the joint row itself)."""

    k: Rows
    v: Rows
    slots: Tensor | None


# -- what every kernel does --------------------------------------------------------------------------------------------


@triton.jit
def _angles(rope, rows, shown, PAIRS: tl.constexpr, P: tl.constexpr):
    """cos and sin of position · frequency for every channel pair, [B, P]; pairs from PAIRS on are not turned.

    In float64 up to the rest of the nearest quarter turn: a plain fp32 product is off by 1e-3 radians at position 1e5.
    The polynomials (of the Cephes library) are within 1e-7; sine and cosine of CUDA would keep a stack for huge angles.
    """
    pairs = tl.arange(0, P)
    turned = pairs < PAIRS
    axis = tl.load(rope.axes + pairs, mask=turned, other=0)
    frequency = tl.load(rope.frequencies + pairs, mask=turned, other=0.0)
    places = rope.positions + rows.to(tl.int64)[:, None] * 3 + axis[None, :]
    turns = tl.load(places, mask=shown[:, None] & turned[None, :], other=0.0).to(tl.float64) * frequency[None, :]
    quarters = tl.floor(turns * 4 + 0.5)
    x = ((turns - quarters * 0.25) * TURN).to(tl.float32)
    xx = x * x
    c = ((2.443315711809948e-5 * xx - 1.388731625493765e-3) * xx + 4.166664568298827e-2) * xx * xx - 0.5 * xx + 1.0
    s = ((-1.9515295891e-4 * xx + 8.3321608736e-3) * xx - 1.6666654611e-1) * xx * x + x
    quadrant = quarters.to(tl.int64) & 3
    swapped = (quadrant & 1) == 1
    along, across = tl.where(swapped, s, c), tl.where(swapped, c, s)
    return tl.where(((quadrant + 1) & 2) == 2, -along, along), tl.where((quadrant & 2) == 2, -across, across)


@triton.jit
def _rows(stream, count, block, rope, PAIRS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, H: tl.constexpr):
    """Of a tile of B rows by H heads, [B·H]: rows, which of them there are, joint rows, cos and sin of their angles (a
    lone row's once for all heads)."""
    rows = block * B + tl.arange(0, B)
    cos, sin = _angles(rope, tl.load(stream.joint + rows, mask=rows < count, other=0), rows < count, PAIRS, P)
    if B > 1 and H > 1:
        cos = tl.reshape(tl.broadcast_to(cos[:, None, :], [B, H, P]), [B * H, P])
        sin = tl.reshape(tl.broadcast_to(sin[:, None, :], [B, H, P]), [B * H, P])
    rows = block * B + tl.arange(0, B * H) // H
    shown = rows < count
    return rows, shown, tl.load(stream.joint + rows, mask=shown, other=0), cos, sin


@triton.jit
def _heads_from(head, B: tl.constexpr, H: tl.constexpr):
    """Heads of a tile of B rows by H heads, [B·H]."""
    return head + tl.arange(0, B * H) % H


@triton.jit
def _rotate(x, cos, sin, P: tl.constexpr):
    """Channel pairs (2m, 2m + 1) of x [·, 2·P] turned."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], P, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [x.shape[0], 2 * P])


@triton.jit
def _load(x, rows, heads, shown, D: tl.constexpr, P: tl.constexpr):
    """Heads of some rows in fp32, [·, 2·P]; 0 where there is none."""
    channels = tl.arange(0, 2 * P)
    mask = shown[:, None] & (channels < D)[None, :]
    return tl.load(at(x, rows, heads, channels), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, tile, rows, heads, shown, D: tl.constexpr, P: tl.constexpr):
    channels = tl.arange(0, 2 * P)
    mask = shown[:, None] & (channels < D)[None, :]
    tl.store(at(x, rows, heads, channels), tile.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def _weight(weight, heads, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BY_ROW: tl.constexpr):
    """Norm weights of some heads, [·, 2·P]; all heads share them unless the norm runs BY_ROW."""
    channels = tl.arange(0, 2 * P)
    if BY_ROW:
        mask = (heads < HEADS)[:, None] & (channels < D)[None, :]
        found = tl.load(weight + heads[:, None] * D + channels[None, :], mask=mask, other=0.0)
    else:
        found = tl.load(weight + channels, mask=channels < D, other=0.0)[None, :]
    return found.to(tl.float32)


@triton.jit
def _mean(x, HEADS: tl.constexpr, D: tl.constexpr, B: tl.constexpr, H: tl.constexpr, BY_ROW: tl.constexpr):
    """Over the channels of a row's head or, where the norm runs BY_ROW, of all its HEADS heads: [B·H, 1]."""
    mean = tl.sum(x, 1, keep_dims=True) / D
    if BY_ROW:
        mean = tl.sum(tl.reshape(mean, [B, H, 1]), 1, keep_dims=True) / HEADS
        mean = tl.reshape(tl.broadcast_to(mean, [B, H, 1]), [B * H, 1])
    return mean


# -- forward -----------------------------------------------------------------------------------------------------------


@triton.jit
def _join_heads(
    out, out_rows, raw, raw_rows, qkv, here, weight, first, eps,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, B: tl.constexpr, H: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Norm and turn HEADS heads of QKV from `first` on into `out`; `raw` also gets them unturned."""
    rows, shown, _, cos, sin = here
    for head in range(0, HEADS, H):
        heads = _heads_from(head, B, H)
        there = shown & (heads < HEADS)
        x = _load(qkv, rows, first + heads, there, D, P)
        inverse = tl.rsqrt(_mean(x * x, HEADS, D, B, H, BY_ROW) + eps)
        normed = x * inverse * _weight(weight, heads, HEADS, D, P, BY_ROW)
        if raw is not None:
            _store(raw, normed, raw_rows, heads, there, D, P)
        _store(out, _rotate(normed, cos, sin, P), out_rows, heads, there, D, P)


@triton.jit
def _join_rows(
    stream, count, block, rope, q, context, pool, eps,
    A: tl.constexpr, A_KV: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    H: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    here = _rows(stream, count, block, rope, PAIRS, P, B, H)
    rows, shown, joint, _, _ = here
    _join_heads(q, joint, None, joint, stream.qkv, here, stream.q_norm, 0, eps, A, D, P, B, H, BY_ROW)
    slot, pool_slot, raw = joint, joint, None
    if context.slots is not None:
        slot = tl.load(context.slots + joint, mask=shown, other=0)
    if pool is not None:
        pool_slot = tl.load(pool.slots + joint, mask=shown, other=0)
        raw = pool.k
    _join_heads(context.k, slot, raw, pool_slot, stream.qkv, here, stream.k_norm, A, eps, A_KV, D, P, B, H, BY_ROW)
    for head in range(0, A_KV, H):
        heads = _heads_from(head, B, H)
        there = shown & (heads < A_KV)
        values = _load(stream.qkv, rows, A + A_KV + heads, there, D, P)
        _store(context.v, values, slot, heads, there, D, P)
        if pool is not None:
            _store(pool.v, values, pool_slot, heads, there, D, P)


@triton.jit(do_not_specialize=["texts", "videos"])
def join_kernel(
    text, video, texts, videos, rope, q, context, pool, eps,
    A: tl.constexpr, A_KV: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    H: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """B rows of one stream: q into joint order, k and v into the context, k unturned and v into the pool if any."""
    block, text_blocks = tl.program_id(0), tl.cdiv(texts, B)
    if block < text_blocks:
        _join_rows(text, texts, block, rope, q, context, pool, eps, A, A_KV, D, PAIRS, P, B, H, BY_ROW)
    else:
        _join_rows(video, videos, block - text_blocks, rope, q, context, pool, eps, A, A_KV, D, PAIRS, P, B, H, BY_ROW)


@triton.jit(do_not_specialize=["count"])
def assemble_kernel(
    pool, rope, context, count,
    A_KV: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """B rows of a context: keys of the pool turned to their new positions, and values."""
    rows = tl.program_id(0) * B + tl.arange(0, B)
    shown = rows < count
    source = tl.load(pool.slots + rows, mask=shown, other=0)
    slot = tl.load(context.slots + rows, mask=shown, other=0)
    cos, sin = _angles(rope, rows, shown, PAIRS, P)
    for head in range(A_KV):
        keys = _load(pool.k, source, head, shown, D, P)
        _store(context.k, _rotate(keys, cos, sin, P), slot, head, shown, D, P)
        _store(context.v, _load(pool.v, source, head, shown, D, P), slot, head, shown, D, P)


# -- backward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_heads(
    total, d_qkv, qkv, here, weight, upstream, first, eps,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, B: tl.constexpr, H: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """With y = x·r·w, r = 1/rms, x̂ = x·r, g = dy·w: dx = r (g − x̂ · mean(g·x̂)); returns `total` + dy·x̂."""
    rows, shown, joint, cos, sin = here
    for head in range(0, HEADS, H):
        heads = _heads_from(head, B, H)
        there = shown & (heads < HEADS)
        x = _load(qkv, rows, first + heads, there, D, P)
        dy = _rotate(_load(upstream, joint, heads, there, D, P), cos, -sin, P)
        inverse = tl.rsqrt(_mean(x * x, HEADS, D, B, H, BY_ROW) + eps)
        normed = x * inverse
        g = dy * _weight(weight, heads, HEADS, D, P, BY_ROW)
        dx = inverse * (g - normed * _mean(g * normed, HEADS, D, B, H, BY_ROW))
        _store(d_qkv, dx, rows, first + heads, there, D, P)
        total += tl.where(there[:, None], dy * normed, 0.0)  # where there is no row and eps is 0, 1 / rms is not finite
    return total


@triton.jit
def _backward_values(
    d_qkv, here, upstream, first, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    H: tl.constexpr,
):  # fmt: skip
    rows, shown, joint, _, _ = here
    for head in range(0, HEADS, H):
        heads = _heads_from(head, B, H)
        there = shown & (heads < HEADS)
        _store(d_qkv, _load(upstream, joint, heads, there, D, P), rows, first + heads, there, D, P)


@triton.jit
def _store_sums(
    sums, part, total, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, B: tl.constexpr, H: tl.constexpr
):
    """What `total` of a tile comes to over its rows, for the weights of HEADS heads, as one row of `sums`."""
    heads, channels = tl.arange(0, H), tl.arange(0, 2 * P)
    if B > 1:
        total = tl.sum(tl.reshape(total, [B, H, 2 * P]), 0)
    places = sums + (part.to(tl.int64) * HEADS + heads)[:, None] * D + channels[None, :]
    tl.store(places, total, mask=(heads < HEADS)[:, None] & (channels < D)[None, :])


@triton.jit
def _backward_rows(
    d_qkv, d_q_norm, d_k_norm, stream, count, part, rope, dq, dk, dv, eps,
    A: tl.constexpr, A_KV: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    H: tl.constexpr, BY_ROW: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    qkv, none = stream.qkv, tl.zeros([B * H, 2 * P], tl.float32)
    if BY_ROW:  # registers hold sums as wide as a row's q or k, not both: the rows are walked once for each
        first, end = part * (T // B), tl.cdiv(tl.minimum(part * T + T, count), B)
        total = none
        for block in range(first, end):
            here = _rows(stream, count, block, rope, PAIRS, P, B, H)
            total = _backward_heads(total, d_qkv, qkv, here, stream.q_norm, dq, 0, eps, A, D, P, B, H, BY_ROW)
        _store_sums(d_q_norm, part, total, A, D, P, B, H)
        total = none
        for block in range(first, end):
            here = _rows(stream, count, block, rope, PAIRS, P, B, H)
            total = _backward_heads(total, d_qkv, qkv, here, stream.k_norm, dk, A, eps, A_KV, D, P, B, H, BY_ROW)
            _backward_values(d_qkv, here, dv, A + A_KV, A_KV, D, P, B, H)
        _store_sums(d_k_norm, part, total, A_KV, D, P, B, H)
    else:
        here = _rows(stream, count, part, rope, PAIRS, P, B, H)
        total = _backward_heads(none, d_qkv, qkv, here, stream.q_norm, dq, 0, eps, A, D, P, B, H, BY_ROW)
        _store_sums(d_q_norm, part, total, 1, D, P, B, H)
        total = _backward_heads(none, d_qkv, qkv, here, stream.k_norm, dk, A, eps, A_KV, D, P, B, H, BY_ROW)
        _store_sums(d_k_norm, part, total, 1, D, P, B, H)
        _backward_values(d_qkv, here, dv, A + A_KV, A_KV, D, P, B, H)


@triton.jit(do_not_specialize=["texts", "videos"])
def backward_kernel(
    d_text, d_text_q_norm, d_text_k_norm, d_video, d_video_q_norm, d_video_k_norm, text, video, texts, videos, rope,
    dq, dk, dv, eps,
    A: tl.constexpr, A_KV: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    H: tl.constexpr, BY_ROW: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of T rows of one stream's QKV, and these rows' part of its norm weights': one row of d_*_norm."""
    part, text_parts = tl.program_id(0), tl.cdiv(texts, T)
    if part < text_parts:
        _backward_rows(
            d_text, d_text_q_norm, d_text_k_norm, text, texts, part, rope, dq, dk, dv, eps,
            A, A_KV, D, PAIRS, P, B, H, BY_ROW, T,
        )  # fmt: skip
    else:
        _backward_rows(
            d_video, d_video_q_norm, d_video_k_norm, video, videos, part - text_parts, rope, dq, dk, dv, eps,
            A, A_KV, D, PAIRS, P, B, H, BY_ROW, T,
        )  # fmt: skip


# -- host --------------------------------------------------------------------------------------------------------------


def reasons(qkv: Tensor, *stored: Tensor) -> list[str]:
    """Why this implementation cannot take QKV like this, or cannot reach a pool; empty where it can."""
    against = triton_common.reasons(qkv)
    if qkv.device.type == "cuda" and any(x.device.type == "cpu" and not x.is_pinned() for x in stored):
        against.append("a pool in CPU memory must be pinned, for a kernel on a GPU to reach it")
    if any(x.stride(-1) != 1 for x in stored):
        against.append("a cache's or pool's channels must be contiguous")
    if qkv.shape[2] % 2 or not 2 <= qkv.shape[2] <= 256:
        against.append(f"takes even head dims up to 256, got {qkv.shape[2]}")
    return against


def norm_rope_join(
    streams: Sequence[Stream],
    positions: Tensor,
    heads: int,
    axes: Sequence[int],
    theta: float,
    eps: float,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.norm_rope_join`."""
    qkv = streams[1][0]
    kv_heads = (qkv.shape[1] - heads) // 2
    k, v = (qkv.new_empty(len(positions), kv_heads, qkv.shape[2]) for _ in range(2))
    q = _write(streams, positions, KV(Rows.of(k), Rows.of(v), None), None, heads, axes, theta, eps, scope)
    return q, k, v


def norm_rope_append_(
    streams: Sequence[Stream],
    positions: Tensor,
    cache: KVRows,
    pool: KVRows | None,
    heads: int,
    axes: Sequence[int],
    theta: float,
    eps: float,
    scope: str,
) -> Tensor:
    """See `reference.norm_rope_append_`."""
    return _write(streams, positions, _kv(cache), pool and _kv(pool), heads, axes, theta, eps, scope)


def _write(streams, positions, context: KV, pool: KV | None, heads, axes, theta, eps, scope) -> Tensor:
    text, video = (_stream(stream) for stream in streams)
    q = text.qkv.data.new_empty(len(positions), heads, text.qkv.data.shape[2])
    rope, sizes = _rope(positions, axes, theta), _heads(text.qkv.data, heads, axes, scope)
    counts = [len(qkv) for qkv, _, _ in streams]
    programs = sum(triton.cdiv(count, sizes["B"]) for count in counts)
    if programs:
        launch(join_kernel, q.device, (programs,), text, video, *counts, rope, Rows.of(q), context, pool, eps, **sizes)
    return q


def assemble_(pool: KVRows, cache: KVRows, positions: Tensor, axes: Sequence[int], theta: float) -> None:
    """See `reference.assemble_`."""
    keys = cache[0]
    sizes = _tile(keys.shape[2], axes)
    if len(positions):
        launch(
            assemble_kernel, keys.device, (triton.cdiv(len(positions), sizes["B"]),),
            _kv(pool), _rope(positions, axes, theta), _kv(cache), len(positions),
            A_KV=keys.shape[1], **sizes, num_warps=WARPS,
        )  # fmt: skip


def _kv(rows: KVRows) -> KV:
    return KV(Rows.of(rows[0]), Rows.of(rows[1]), rows[2])


def norm_rope_join_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    streams: Sequence[Stream],
    positions: Tensor,
    heads: int,
    axes: Sequence[int],
    theta: float,
    eps: float,
    scope: str,
) -> tuple[Tensor, ...]:
    """See `reference.norm_rope_join_backward`. Norm weights' gradients add up block by block in one fixed order."""
    upstream = [Rows.of(reachable(x)) for x in (dq, dk, dv)]
    given = [_stream(stream) for stream in streams]
    sizes = _heads(given[0].qkv.data, heads, axes, scope)
    counts = [len(qkv) for qkv, _, _ in streams]
    rows = ROWS if scope == "row" else sizes["B"]  # of a program
    programs = [triton.cdiv(count, rows) for count in counts]
    d_qkv = [s.qkv.data.new_empty(s.qkv.data.shape) for s in given]
    parts = [
        [w.new_empty(n, len(w), dtype=torch.float32) for w in (s.q_norm, s.k_norm)]
        for n, s in zip(programs, given, strict=True)
    ]
    if sum(programs):
        rope = _rope(positions, axes, theta)
        launch(
            backward_kernel, dq.device, (sum(programs),),
            Rows.of(d_qkv[0]), *parts[0], Rows.of(d_qkv[1]), *parts[1], *given, *counts, rope, *upstream, eps,
            **sizes, T=rows,
        )  # fmt: skip
    weights = [w for _, pair, _ in streams for w in pair]
    return *d_qkv, *(part.sum(0).to(w.dtype) for part, w in zip(sum(parts, []), weights, strict=True))


def _stream(stream: Stream) -> StreamRows:
    qkv, (q_norm, k_norm), rows = stream
    return StreamRows(Rows.of(reachable(qkv)), q_norm.contiguous(), k_norm.contiguous(), rows)


def _rope(positions: Tensor, axes: Sequence[int], theta: float) -> Rope:
    return Rope(positions.contiguous(), *frequencies(axes, theta, positions.device))


def _heads(qkv: Tensor, heads: int, axes: Sequence[int], scope: str) -> dict:
    """A tile is B rows by H heads: one, or all of a row where the norm runs over them."""
    kv_heads = (qkv.shape[1] - heads) // 2
    sizes = {"A": heads, "A_KV": kv_heads, "BY_ROW": scope == "row", "H": 1, **_tile(qkv.shape[2], axes)}
    if scope == "head":
        return {**sizes, "num_warps": WARPS}
    held = triton.next_power_of_2(max(heads, kv_heads))
    channels = 2 * held * sizes["P"]
    rows, warps = min(ROWS, max(1, 512 // channels)), min(16, max(WARPS, channels // 512))
    return {**sizes, "B": rows, "H": held, "num_warps": warps}


def _tile(dim: int, axes: Sequence[int]) -> dict:
    """P pairs of channels, a power of two, by B rows: about 1,024 elements."""
    pairs = triton.next_power_of_2(dim) // 2
    return {"D": dim, "PAIRS": sum(axes) // 2, "P": pairs, "B": max(4, 512 // pairs)}
