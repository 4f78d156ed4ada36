"""Attention over a plan's runs in Triton, forward and backward: one launch a pass, whatever the scenes' shapes.

A tile of rows never crosses a run, so all of it sees the same few intervals, and only the last block of an interval is
masked. Forward and dQ walk the key intervals of a query tile, dK and dV the query intervals of a key tile (the
transposed table): every tile owns what it writes, so nothing is atomic and every sum has one fixed order.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton's annotations say constexpr where its language takes a plain value, and know nothing of launches.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lct.kernels import triton_common
from lct.kernels.gpu_attention import above_zero, describable
from lct.kernels.triton_common import Rows, launch, reachable

LOG2E = tl.constexpr(1.4426950408889634)


# -- what every kernel does --------------------------------------------------------------------------------------------


@triton.jit
def _find_tile(table, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The run that this program's tile belongs to (at least R where it has none), and the tile's first row."""
    runs = tl.arange(0, triton.next_power_of_2(R))
    starts = tl.load(table + runs * WIDTH, mask=runs < R, other=0)
    ends = tl.load(table + runs * WIDTH + 1, mask=runs < R, other=0)
    tiles = (ends - starts + BLOCK - 1) // BLOCK
    tile = tl.program_id(0)
    run = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(runs < run, tiles, 0), 0)
    return run, tl.sum(tl.where(runs == run, starts, 0), 0) + (tile - before) * BLOCK


@triton.jit
def _interval(table, run, i, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Interval i of a run: its first row, the row where whole blocks end, and its end."""
    lo = tl.load(table + run * WIDTH + 2 + 2 * i)
    hi = tl.load(table + run * WIDTH + 3 + 2 * i)
    return lo, lo + (hi - lo) // BLOCK * BLOCK, hi


@triton.jit
def _tile(x, first, head, rows, channels):
    """Addresses of a tile: its corner's offset in int64, those within it in 32 bits (see `reachable`)."""
    corner = x.data + tl.cast(first, tl.int64) * x.row + tl.cast(head, tl.int64) * x.head
    return corner + rows[:, None] * x.row + channels[None, :]


@triton.jit
def _load(x, box, first, head, end, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK rows of one head, [BLOCK, padded D], through TMA where `box` is a descriptor. Channels from D on are 0;
    MASKED: rows from `end` on are 0 too, whatever they hold."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    rows, channels = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    if box is not None:
        tile = tl.reshape(box.load([head, first, 0]), [BLOCK, PADDED])
        if MASKED:
            tile = tl.where((rows < end - first)[:, None], tile, 0.0)
    elif MASKED:
        shown = (rows < end - first)[:, None] & (channels < D)[None, :]
        tile = tl.load(_tile(x, first, head, rows, channels), mask=shown, other=0.0)
    elif PADDED > D:
        tile = tl.load(_tile(x, first, head, rows, channels), mask=(channels < D)[None, :], other=0.0)
    else:
        tile = tl.load(_tile(x, first, head, rows, channels))
    return tile


@triton.jit
def _store(x, tile, first, head, end, BLOCK: tl.constexpr, D: tl.constexpr):
    rows, channels = tl.arange(0, BLOCK), tl.arange(0, triton.next_power_of_2(D))
    shown = (rows < end - first)[:, None] & (channels < D)[None, :]
    tl.store(_tile(x, first, head, rows, channels), tile.to(x.data.dtype.element_ty), mask=shown)


@triton.jit
def _statistic(x, rows, head, q_rows, end):
    """Rows of lse or δ, [A, S]."""
    return tl.load(x + tl.cast(head, tl.int64) * q_rows + rows, mask=rows < end, other=0.0)


# -- forward -----------------------------------------------------------------------------------------------------------


@triton.jit
def _slope(peak, scale):
    """Of weights 2^(slope · score − slope · peak). One operation makes a weight of a score, with an exact product where
    the other is rounded: weights under one peak share a factor within 2^(±2⁻²⁴ · slope · peak), which cancels but must
    not overflow. Past 2²⁴, where scores that are rounded sums are known to no closer, a power of two rounds nothing."""
    slope = scale * LOG2E
    below = (slope.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(peak) * slope < 2**24, slope, below)


@triton.jit
def _forward_block(
    out, peak, total, queries, k, v, k_box, v_box, first, end, head, scale,
    N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: online softmax, statistics in fp32; `peak` is of products before their scale."""
    keys = _load(k, k_box, first, head, end, N, D, MASKED)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if MASKED:
        scores = tl.where((first + tl.arange(0, N) < end)[None, :], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    slope = _slope(higher, scale)
    base = higher * slope
    p = tl.exp2(scores * slope[:, None] - base[:, None])
    shrink = tl.exp2((peak - higher) * slope)  # 1 where the peak stays, step by step
    values = _load(v, v_box, first, head, end, N, D, MASKED)
    out = tl.dot(p.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
    return out, higher, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["q_rows"])
def forward_kernel(
    q, k, v, k_box, v_box, out, lse, table, scale, q_rows,
    R: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out and lse of M query rows of one head."""
    run, first = _find_tile(table, R, WIDTH, M)
    if run < R:
        head = tl.program_id(1)
        end = tl.load(table + run * WIDTH + 1)
        queries = _load(q, None, first, head, end, M, D, True)
        acc = tl.zeros([M, triton.next_power_of_2(D)], tl.float32)
        peak, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
        for i in range((WIDTH - 2) // 2):
            lo, whole, hi = _interval(table, run, i, WIDTH, N)
            for row in range(lo, whole, N):
                acc, peak, total = _forward_block(
                    acc, peak, total, queries, k, v, k_box, v_box, row, hi, head // GROUP, scale, N, D, False
                )
            if whole < hi:
                acc, peak, total = _forward_block(
                    acc, peak, total, queries, k, v, k_box, v_box, whole, hi, head // GROUP, scale, N, D, True
                )
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # rows that see nothing: out 0, lse −inf
        _store(out, acc, first, head, end, M, D)
        rows = first + tl.arange(0, M)
        row_lse = peak * scale + tl.log(total)
        tl.store(lse + tl.cast(head, tl.int64) * q_rows + rows, row_lse, mask=rows < end)


# -- backward ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["q_rows"])
def delta_kernel(dout, out, dlse, delta, q_rows, D: tl.constexpr, M: tl.constexpr):
    """δ = Σ_d dout · out − dlse, [A, S]."""
    first, head = tl.program_id(0) * M, tl.program_id(1)
    products = _load(dout, None, first, head, q_rows, M, D, True).to(tl.float32)
    products *= _load(out, None, first, head, q_rows, M, D, True).to(tl.float32)
    rows = first + tl.arange(0, M)
    value = tl.sum(products, 1) - _statistic(dlse, rows, head, q_rows, q_rows)
    tl.store(delta + tl.cast(head, tl.int64) * q_rows + rows, value, mask=rows < q_rows)


@triton.jit
def _probabilities(scores, lse, scale):
    """exp(scale · scores − lse); the difference is taken before the change of base, which would round large values."""
    return tl.exp2((scores * scale - lse) * LOG2E)


@triton.jit
def _dq_block(
    dq, queries, upstream, lse, delta, k, v, k_box, v_box, first, end, head, scale,
    N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    keys = _load(k, k_box, first, head, end, N, D, MASKED)
    p = _probabilities(tl.dot(queries, tl.trans(keys), input_precision="ieee"), lse[:, None], scale)
    if MASKED:
        p = tl.where((first + tl.arange(0, N) < end)[None, :], p, 0.0)
    values = _load(v, v_box, first, head, end, N, D, MASKED)
    ds = p * (tl.dot(upstream, tl.trans(values), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["q_rows"])
def dq_kernel(
    q, k, v, k_box, v_box, dout, lse, delta, dq, table, scale, q_rows,
    R: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dQ of M query rows of one head."""
    run, first = _find_tile(table, R, WIDTH, M)
    if run < R:
        head = tl.program_id(1)
        end = tl.load(table + run * WIDTH + 1)
        queries = _load(q, None, first, head, end, M, D, True)
        upstream = _load(dout, None, first, head, end, M, D, True)
        rows = first + tl.arange(0, M)
        row_lse = _statistic(lse, rows, head, q_rows, end)
        row_delta = _statistic(delta, rows, head, q_rows, end)
        acc = tl.zeros([M, triton.next_power_of_2(D)], tl.float32)
        for i in range((WIDTH - 2) // 2):
            lo, whole, hi = _interval(table, run, i, WIDTH, N)
            for row in range(lo, whole, N):
                acc = _dq_block(
                    acc, queries, upstream, row_lse, row_delta, k, v, k_box, v_box, row, hi, head // GROUP,
                    scale, N, D, False,
                )  # fmt: skip
            if whole < hi:
                acc = _dq_block(
                    acc, queries, upstream, row_lse, row_delta, k, v, k_box, v_box, whole, hi, head // GROUP,
                    scale, N, D, True,
                )  # fmt: skip
        _store(dq, acc * scale, first, head, end, M, D)


@triton.jit
def _dkv_block(
    dk, dv, keys, values, q, dout, q_box, dout_box, lse, delta, first, end, head, scale, q_rows,
    M: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    queries = _load(q, q_box, first, head, end, M, D, MASKED)
    rows = first + tl.arange(0, M)
    row_lse = _statistic(lse, rows, head, q_rows, end)[None, :]
    p = _probabilities(tl.dot(keys, tl.trans(queries), input_precision="ieee"), row_lse, scale)
    if MASKED:
        p = tl.where((rows < end)[None, :], p, 0.0)
    upstream = _load(dout, dout_box, first, head, end, M, D, MASKED)
    dv = tl.dot(p.to(upstream.dtype), upstream, dv, input_precision="ieee")
    dp = tl.dot(values, tl.trans(upstream), input_precision="ieee")
    ds = p * (dp - _statistic(delta, rows, head, q_rows, end)[None, :])
    return tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["q_rows"])
def dkv_kernel(
    q, k, v, q_box, dout_box, dout, lse, delta, dk, dv, key_table, scale, q_rows,
    R: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dK and dV of N key rows of one key head, summed over the query heads of its group in their order."""
    run, first = _find_tile(key_table, R, WIDTH, N)
    if run < R:
        kv_head = tl.program_id(1)
        end = tl.load(key_table + run * WIDTH + 1)
        keys = _load(k, None, first, kv_head, end, N, D, True)
        values = _load(v, None, first, kv_head, end, N, D, True)
        acc_k = tl.zeros([N, triton.next_power_of_2(D)], tl.float32)
        acc_v = tl.zeros([N, triton.next_power_of_2(D)], tl.float32)
        for i in range((WIDTH - 2) // 2 * GROUP):
            head = kv_head * GROUP + i % GROUP
            lo, whole, hi = _interval(key_table, run, i // GROUP, WIDTH, M)
            for row in range(lo, whole, M):
                acc_k, acc_v = _dkv_block(
                    acc_k, acc_v, keys, values, q, dout, q_box, dout_box, lse, delta, row, hi, head, scale,
                    q_rows, M, D, False,
                )  # fmt: skip
            if whole < hi:
                acc_k, acc_v = _dkv_block(
                    acc_k, acc_v, keys, values, q, dout, q_box, dout_box, lse, delta, whole, hi, head, scale,
                    q_rows, M, D, True,
                )  # fmt: skip
        _store(dk, acc_k * scale, first, kv_head, end, N, D)
        _store(dv, acc_v, first, kv_head, end, N, D)


# -- host --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile (M query rows, N key rows), warps and pipeline stages of one launch."""

    m: int
    n: int
    warps: int
    stages: int


def tiles(kernel: str, dim: int, itemsize: int, hopper: bool) -> Tiles:
    """The sizes of "forward", "dq" or "dkv": fixed by head dim, element size and GPU generation alone, so that results
    do not depend on what was tuned where."""
    if itemsize == 4:  # exact fp32 products run on plain FMAs, every operand in a register
        return Tiles(32, 32, 1, 1) if triton_common.INTERPRETED else Tiles(16, 16, 8, 1)
    # Blocks are as long as registers allow with hardly a spill on Triton 3.6 and 3.9. Before Hopper, operands wait in
    # registers; head dims that are no multiple of 32 need masks for their channels too.
    wide, padded, odd = dim > 64, dim & (dim - 1) != 0, dim % 32 != 0
    warps = 8 if wide or odd else 4  # before Hopper
    if kernel == "forward":
        if hopper:
            return Tiles(128, 128, 8, 3)
        return Tiles(128, 16 if wide and odd else 64, warps, 2 if odd else 3)
    if kernel == "dq":
        if hopper:
            return Tiles(128, 32, 8, 2) if wide and padded else Tiles(128, 64, 8, 3)
        return Tiles(128, 16 if wide and odd else 32, warps, 2)
    if hopper:  # products of fewer queries would wait for their keys from shared memory
        return Tiles(64, 64 if odd and wide else 128, 8, 2)
    return Tiles(16 if wide else 32, 128, 8, 2)


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why this implementation cannot take these tensors; empty where it can."""
    against = triton_common.reasons(q)
    if q.shape[2] % 8 or not 16 <= q.shape[2] <= 128:
        against.append(f"takes head dims 16, 24, …, 128, got {q.shape[2]}")
    return against


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, host_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.forward`."""
    q, scale = above_zero(q, scale)
    q, k, v = (reachable(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    size = _sizes("forward", q)
    _launch(
        forward_kernel, size, q, size.m, table, host_table,
        Rows.of(q), Rows.of(k), Rows.of(v), *_boxes(k, v, size.n), Rows.of(out), lse, table, scale,
        q.shape[0], GROUP=q.shape[1] // k.shape[1],
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    key_table: Tensor,
    host_table: Tensor,
    host_key_table: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.backward`. One fixed order of summation, deterministic whether asked or not."""
    q, k, v, dout, out = (reachable(x) for x in (q, k, v, dout, out))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if q.shape[0]:
        launch(
            delta_kernel, q.device, (triton.cdiv(q.shape[0], 64), q.shape[1]),
            Rows.of(dout), Rows.of(out), dlse.contiguous(), delta, q.shape[0], D=q.shape[2], M=64,
        )  # fmt: skip
    given = Rows.of(q), Rows.of(k), Rows.of(v)
    rest = Rows.of(dout), lse, delta
    group = q.shape[1] // k.shape[1]
    size = _sizes("dq", q)
    _launch(
        dq_kernel, size, q, size.m, table, host_table,
        *given, *_boxes(k, v, size.n), *rest, Rows.of(dq), table, scale, q.shape[0], GROUP=group,
    )  # fmt: skip
    size = _sizes("dkv", q)
    _launch(
        dkv_kernel, size, k, size.n, key_table, host_key_table,
        *given, *_boxes(q, dout, size.m), *rest, Rows.of(dk), Rows.of(dv), key_table, scale, q.shape[0], GROUP=group,
    )  # fmt: skip
    return dq, dk, dv


def _launch(kernel, size: Tiles, owner: Tensor, block: int, table: Tensor, host: Tensor, *arguments, **constants):
    """A program for every tile of `block` rows of `owner`, head by head. Tiles never cross a run, so there is at most
    one partial tile more for each row of the table: the grid follows from shapes alone."""
    rows, heads, dim = owner.shape
    if not rows:
        return
    runs, width = table.shape
    # A GPU is done with programs that find no tile at once, but interpreted each takes milliseconds.
    partial = int((host[:, 0] < host[:, 1]).sum()) if triton_common.INTERPRETED else runs
    launch(
        kernel, owner.device, (triton.cdiv(rows, block) + partial, heads),
        *arguments, **constants, R=runs, WIDTH=width, D=dim, M=size.m, N=size.n,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip


def _sizes(kernel: str, q: Tensor) -> Tiles:
    return tiles(kernel, q.shape[2], q.element_size(), _hopper(q.device))


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _boxes(a: Tensor, b: Tensor, block: int) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """On Hopper, descriptors of both tensors as [A, S, D] whose boxes are `block` rows of one head, where they can be
    described."""
    if not _hopper(a.device) or not (describable(a) and describable(b)):
        return None, None
    return _box(a, block), _box(b, block)


def _box(x: Tensor, block: int) -> TensorDescriptor:
    shape, strides = [x.shape[1], x.shape[0], x.shape[2]], [x.stride(1), x.stride(0), 1]
    return TensorDescriptor(x, shape, strides, [1, block, triton.next_power_of_2(x.shape[2])])
