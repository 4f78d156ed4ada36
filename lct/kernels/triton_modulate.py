"""LayerNorm + per-shot modulation and gate + residual in Triton, forward and backward.

A program takes some rows of one shot, one after another, and holds that shot's modulation in registers meanwhile. Sums
over a shot's rows are formed tile by tile and then added up in one fixed order: nothing is atomic.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# Triton's annotations say constexpr where its language takes a plain value, and know nothing of launches or tl.range.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lct.kernels import triton_common
from lct.kernels.triton_common import launch, reachable

TILE = 32  # rows of a program that leaves sums for others to add up
FORWARD_TILE = 16  # of one that leaves none: twice as many, where rows are few


# -- what every kernel does --------------------------------------------------------------------------------------------


@triton.jit
def _tiles(starts, count, SHOTS: tl.constexpr, T: tl.constexpr):
    """Shots 0 to SHOTS − 1, and how many tiles of T rows each has; none from `count` on."""
    shots = tl.arange(0, SHOTS)
    first = tl.load(starts + shots, mask=shots < count, other=0)
    end = tl.load(starts + shots + 1, mask=shots < count, other=0)
    return shots, first, end, (end - first + T - 1) // T


@triton.jit
def _find_rows(starts, count, SHOTS: tl.constexpr, T: tl.constexpr):
    """The shot of this program's tile, and its rows [first, end), none where there is no such tile."""
    tile = tl.program_id(0)
    shots, firsts, ends, tiles = _tiles(starts, count, SHOTS, T)
    shot = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(shots < shot, tiles, 0), 0)
    first = tl.sum(tl.where(shots == shot, firsts, 0), 0) + (tile - before) * T
    end = tl.minimum(first + T, tl.sum(tl.where(shots == shot, ends, 0), 0))
    return shot, first, tl.where(shot < count, end, first)


@triton.jit
def _load(x, row, stride, C: tl.constexpr, P: tl.constexpr):
    """One row in fp32, [P]; 0 from channel C on."""
    channels = tl.arange(0, P)
    return tl.load(x + tl.cast(row, tl.int64) * stride + channels, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, row, stride, C: tl.constexpr, P: tl.constexpr):
    channels = tl.arange(0, P)
    tl.store(x + tl.cast(row, tl.int64) * stride + channels, value.to(x.dtype.element_ty), mask=channels < C)


@triton.jit
def _normed(x, eps, C: tl.constexpr, P: tl.constexpr):
    """(x − mean) / deviation of one row, and 1 / deviation."""
    centred = tl.where(tl.arange(0, P) < C, x - tl.sum(x, 0) / C, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    return centred * inverse, inverse


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def modulate_kernel(
    x, shift, scale, out, starts, count, x_row, shift_row, scale_row, eps,
    C: tl.constexpr, P: tl.constexpr, SHOTS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    shot, first, end = _find_rows(starts, count, SHOTS, T)
    if first < end:
        factor, offset = 1 + _load(scale, shot, scale_row, C, P), _load(shift, shot, shift_row, C, P)
        for row in tl.range(first, end, num_stages=STAGES):
            normed, _ = _normed(_load(x, row, x_row, C, P), eps, C, P)
            _store(out, normed * factor + offset, row, C, C, P)


@triton.jit(do_not_specialize=["count"])
def modulate_backward_kernel(
    dout, x, scale, dx, shift_parts, scale_parts, starts, count, dout_row, x_row, scale_row, eps,
    C: tl.constexpr, P: tl.constexpr, SHOTS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a tile's rows, and the tile's part of dshift and dscale."""
    shot, first, end = _find_rows(starts, count, SHOTS, T)
    if first < end:
        factor = 1 + _load(scale, shot, scale_row, C, P)
        d_shift, d_scale = tl.zeros([P], tl.float32), tl.zeros([P], tl.float32)
        for row in tl.range(first, end, num_stages=STAGES):
            normed, inverse = _normed(_load(x, row, x_row, C, P), eps, C, P)
            upstream = _load(dout, row, dout_row, C, P)
            g = upstream * factor
            mean, along = tl.sum(g, 0) / C, tl.sum(g * normed, 0) / C
            _store(dx, inverse * (g - mean - normed * along), row, C, C, P)
            d_shift += upstream
            d_scale += upstream * normed
        _store(shift_parts, d_shift, tl.program_id(0), C, C, P)
        _store(scale_parts, d_scale, tl.program_id(0), C, C, P)


@triton.jit(do_not_specialize=["count"])
def gated_kernel(
    x, branch, gate, out, starts, count, x_row, branch_row, gate_row,
    C: tl.constexpr, P: tl.constexpr, SHOTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    shot, first, end = _find_rows(starts, count, SHOTS, T)
    if first < end:
        factor = _load(gate, shot, gate_row, C, P)
        for row in range(first, end):
            value = _load(x, row, x_row, C, P) + factor * _load(branch, row, branch_row, C, P)
            _store(out, value, row, C, C, P)


@triton.jit(do_not_specialize=["count"])
def gated_backward_kernel(
    dout, branch, gate, d_branch, parts, starts, count, dout_row, branch_row, gate_row,
    C: tl.constexpr, P: tl.constexpr, SHOTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The branch's gradient in a tile's rows, and the tile's part of the gate's."""
    shot, first, end = _find_rows(starts, count, SHOTS, T)
    if first < end:
        factor, total = _load(gate, shot, gate_row, C, P), tl.zeros([P], tl.float32)
        for row in range(first, end):
            upstream = _load(dout, row, dout_row, C, P)
            _store(d_branch, factor * upstream, row, C, C, P)
            total += upstream * _load(branch, row, branch_row, C, P)
        _store(parts, total, tl.program_id(0), C, C, P)


@triton.jit(do_not_specialize=["count"])
def add_up_kernel(
    parts, out, starts, count, C: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, SHOTS: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Sums of a shot's tiles, for BLOCK channels: MANY tiles apart from each other, then these MANY sums."""
    shot, channels = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shots, _, _, tiles = _tiles(starts, count, SHOTS, T)
    first = tl.sum(tl.where(shots < shot, tiles, 0), 0)
    end = first + tl.sum(tl.where(shots == shot, tiles, 0), 0)
    total = tl.zeros([MANY, BLOCK], tl.float32)
    for tile in range(first, end, MANY):
        these = tile + tl.arange(0, MANY)
        places = parts + these.to(tl.int64)[:, None] * C + channels[None, :]
        total += tl.load(places, mask=(these < end)[:, None] & (channels < C)[None, :], other=0.0)
    tl.store(out + tl.cast(shot, tl.int64) * C + channels, tl.sum(total, 0), mask=channels < C)


# -- host --------------------------------------------------------------------------------------------------------------


def reasons(x: Tensor) -> list[str]:
    """Why this implementation cannot take rows like these; empty where it can."""
    against = triton_common.reasons(x)
    if x.shape[1] > 16_384:
        against.append(f"takes up to 16384 channels, got {x.shape[1]}")
    return against


def modulate(x: Tensor, shift: Tensor, scale: Tensor, starts: Tensor, eps: float) -> Tensor:
    """See `reference.modulate`."""
    out = x.new_empty(x.shape)
    _launch(modulate_kernel, (x, shift, scale), (out,), starts, eps, T=FORWARD_TILE, STAGES=_stages(x))
    return out


def modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor, starts: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.modulate_backward`."""
    dx, shift_parts, scale_parts = x.new_empty(x.shape), _parts(x, starts), _parts(x, starts)
    written = dx, shift_parts, scale_parts
    _launch(modulate_backward_kernel, (dout, x, scale), written, starts, eps, T=TILE, STAGES=_stages(x))
    return dx, _add_up(shift_parts, starts, scale), _add_up(scale_parts, starts, scale)


def gated(x: Tensor, branch: Tensor, gate: Tensor, starts: Tensor) -> Tensor:
    """See `reference.gated`."""
    out = x.new_empty(x.shape)
    _launch(gated_kernel, (x, branch, gate), (out,), starts, T=FORWARD_TILE)
    return out


def gated_backward(dout: Tensor, branch: Tensor, gate: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.gated_backward`."""
    d_branch, parts = branch.new_empty(branch.shape), _parts(branch, starts)
    _launch(gated_backward_kernel, (dout, branch, gate), (d_branch, parts), starts, T=TILE)
    return d_branch, _add_up(parts, starts, gate)


def _launch(
    kernel, given: tuple[Tensor, ...], written: tuple[Tensor, ...], starts: Tensor, *rest: float, **sizes: int
) -> None:
    """A program for every tile of rows. Tiles never cross a shot, so there is at most one partial tile more for each:
    the grid follows from shapes alone."""
    given = tuple(reachable(x) for x in given)
    rows, channels = given[0].shape
    padded = triton.next_power_of_2(channels)
    if rows:
        launch(
            kernel, starts.device, (_tiles_at_most(rows, starts, sizes["T"]),),
            *given, *written, starts, len(starts) - 1, *(x.stride(0) for x in given), *rest,
            C=channels, P=padded, SHOTS=_padded_shots(starts), **sizes, num_warps=min(16, max(4, padded // 512)),
        )  # fmt: skip


def _stages(x: Tensor) -> int:
    """Stages of a loop in which all warps wait for each other at every row: the next two rows of two tensors are under
    way meanwhile, in shared memory, where 64 KiB hold them."""
    return 3 if 4 * triton.next_power_of_2(x.shape[1]) * x.element_size() <= 2**16 else 1


def _tiles_at_most(rows: int, starts: Tensor, tile: int) -> int:
    return triton.cdiv(rows, tile) + len(starts) - 1


def _parts(x: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(_tiles_at_most(len(x), starts, TILE), x.shape[1], dtype=torch.float32)


def _add_up(parts: Tensor, starts: Tensor, like: Tensor) -> Tensor:
    shots, channels = like.shape
    out = like.new_empty(like.shape)
    many, block = 64, 32  # narrow blocks: one long shot alone has to fill a GPU
    launch(
        add_up_kernel, out.device, (shots, triton.cdiv(channels, block)),
        parts, out, starts, shots, C=channels, MANY=many, BLOCK=block, SHOTS=_padded_shots(starts), T=TILE,
    )  # fmt: skip
    return out


def _padded_shots(starts: Tensor) -> int:
    """A power of two from 16 on: scenes of 1 to 9 shots share one compilation."""
    return max(16, triton.next_power_of_2(len(starts) - 1))
