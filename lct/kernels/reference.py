"""The specification: every operation in plain torch, any dtype, CPU or GPU. Other implementations are judged by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lct.plan import Run, read_table


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics, norms and reductions run in fp32, or wider where the input is."""
    return torch.promote_types(dtype, torch.float32)


def reasons(*tensors: Tensor) -> list[str]:
    """It can take everything."""
    return []


def validated(device: torch.device, dtype: torch.dtype) -> bool:
    """It is what the others are judged by, on any device."""
    return True


# -- attention ---------------------------------------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, host_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention_forward` over a plan's table; every implementation has this function and `backward`."""
    with torch.autocast(q.device.type, enabled=False):
        return attention_forward(q, k, v, read_table(host_table), scale)


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
    """`attention_backward` over a plan's tables. Runs add up in one fixed order: deterministic whether asked or not."""
    with torch.autocast(q.device.type, enabled=False):
        return attention_backward(dout, dlse, q, k, v, out, lse, read_table(host_table), scale)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float) -> tuple[Tensor, Tensor]:
    """out = softmax(scale · q kᵀ) v over each run's visible keys, and lse = log Σ exp(scale · q kᵀ).

    q [S, A, D]; k, v [S_kv, A_kv, D], query head a reads key head a // (A / A_kv) -> out [S, A, D], lse [A, S].
    Rows that see nothing: out 0, lse −inf. Differentiable.
    """
    wide = statistics_dtype(q.dtype)
    outs = [q.new_zeros(0, *q.shape[1:])]
    lses = [q.new_zeros(q.shape[1], 0, dtype=wide)]
    for run in runs:
        rows = q[run.start : run.end]
        if not run.sees:
            outs.append(torch.zeros_like(rows))
            lses.append(q.new_full((q.shape[1], len(rows)), -torch.inf, dtype=wide))
            continue
        keys, values = _visible(k, run, q.shape[1]), _visible(v, run, q.shape[1])
        scores = _scores(rows, keys, scale, wide)
        lse = torch.logsumexp(scores, dim=-1)
        # Not exp(scores − lse), which sums to T instead of 1 where log T is below the rounding of lse.
        probabilities = scores.softmax(-1)
        outs.append(torch.einsum("ast,tad->sad", probabilities.to(q.dtype), values))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: Sequence[Run],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attention_forward`, with P = softmax(scale · q kᵀ) and δ = Σ_d dout · out − dlse:

    dv = Pᵀ dout, dS = P ∘ (dout vᵀ − δ), dq = scale · dS k, dk = scale · dSᵀ q.
    """
    wide = statistics_dtype(q.dtype)
    delta = torch.einsum("sad,sad->as", dout.to(wide), out.to(wide)) - dlse
    group = q.shape[1] // k.shape[1]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
    for run in runs:
        if not run.sees:
            continue
        rows = slice(run.start, run.end)
        keys, values = _visible(k, run, q.shape[1]), _visible(v, run, q.shape[1])
        scores = _scores(q[rows], keys, scale, wide)
        probabilities = scores.softmax(-1)
        dp = torch.einsum("sad,tad->ast", dout[rows], values).to(wide)
        ds = (probabilities * (dp - delta[:, rows, None]) * scale).to(q.dtype)
        dq[rows] = torch.einsum("ast,tad->sad", ds, keys)
        dkeys = torch.einsum("ast,sad->tad", ds, q[rows]).unflatten(1, (-1, group)).sum(2, dtype=wide)
        dvalues = torch.einsum("ast,sad->tad", probabilities.to(q.dtype), dout[rows]).unflatten(1, (-1, group))
        _add_visible(dk, run, dkeys)
        _add_visible(dv, run, dvalues.sum(2, dtype=wide))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """scale · q kᵀ. A power of two in the scale goes first, which rounds nothing: fp16 ends at 65,504."""
    first = min(1.0, 2.0 ** math.frexp(scale)[1]) if scale else 1.0
    return torch.einsum("sad,tad->ast", q * first, k).to(wide) * (scale / first)


def _visible(rows: Tensor, run: Run, heads: int) -> Tensor:
    """The rows a run sees, [T, A, D], each key head repeated for its group of query heads."""
    seen = torch.cat([rows[start:end] for start, end in run.sees])
    return seen.repeat_interleave(heads // rows.shape[1], dim=1)


def _add_visible(total: Tensor, run: Run, part: Tensor) -> None:
    at = 0
    for start, end in run.sees:
        total[start:end] += part[at : at + end - start]
        at += end - start


# -- norm + RoPE -------------------------------------------------------------------------------------------------------


def rope_turns(positions: Tensor, axes: Sequence[int], theta: float, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers exp(i · pos · theta^(−2m/d)), [S, Σ axes / 2]; an axis with d channels has d/2 pairs m.

    Angles are formed in float64 and then rounded: at position 1e5 a plain fp32 product is off by 1e-3 radians.
    """
    exponents = [torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / d for d in axes]
    wide = positions.to(torch.float64)
    angles = torch.cat([wide[:, axis, None] * theta**-e for axis, e in enumerate(exponents)], dim=1)
    turns = torch.polar(torch.ones_like(angles), angles)
    return turns.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [S, A, D] with the channel pairs (2m, 2m+1) turned by turns [S, P]; channels beyond 2P pass through."""
    rotated, rest = x[..., : 2 * turns.shape[1]], x[..., 2 * turns.shape[1] :]
    pairs = torch.view_as_complex(rotated.to(turns.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def rms_norm(x: Tensor, weight: Tensor, eps: float, scope: str) -> Tensor:
    """x / sqrt(mean x² + eps) · weight, over D per head (weight [D]) or over all heads of a row (weight [A·D])."""
    wide = x.to(statistics_dtype(x.dtype))
    return (wide * inverse_rms(wide, eps, scope) * norm_weight(weight, x, scope)).to(x.dtype)


def inverse_rms(wide: Tensor, eps: float, scope: str) -> Tensor:
    dims = (-1,) if scope == "head" else (-2, -1)
    return torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)


def norm_weight(weight: Tensor, x: Tensor, scope: str) -> Tensor:
    return weight if scope == "head" else weight.view(x.shape[-2:])


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, scope: str) -> tuple[Tensor, Tensor]:
    """With y = x·r·w, r = 1/rms: dx = r (g − x̂ · mean(g·x̂)), g = dy·w, x̂ = x·r; dw = Σ dy·x̂."""
    wide = x.to(statistics_dtype(x.dtype))
    inverse = inverse_rms(wide, eps, scope)
    normed, dy = wide * inverse, dy.to(wide.dtype)
    g = dy * norm_weight(weight, x, scope)
    dims = (-1,) if scope == "head" else (-2, -1)
    dx = inverse * (g - normed * (g * normed).mean(dims, keepdim=True))
    d_weight = (dy * normed).sum((0, 1) if scope == "head" else 0)
    return dx.to(x.dtype), d_weight.reshape(weight.shape).to(weight.dtype)


Stream = tuple[Tensor, tuple[Tensor, Tensor], Tensor]  # QKV [R, A + 2·A_kv, D], (q, k) norm weights, joint rows [R]
KVRows = tuple[Tensor, Tensor, Tensor]  # keys and values [rows, A_kv, D], slots [S]


def kv_shape(qkv: Tensor, heads: int) -> tuple[int, int]:
    """(A_kv, D) of a QKV tensor [R, A + 2·A_kv, D]."""
    return (qkv.shape[1] - heads) // 2, qkv.shape[2]


def norm_rope_join(
    streams: Sequence[Stream],
    positions: Tensor,
    heads: int,
    axes: Sequence[int],
    theta: float,
    eps: float,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k = rotate(rms_norm(·)) and v of every stream, in joint order; [S, A, D] and twice [S, A_kv, D]."""
    qkv = streams[0][0]
    kv_heads, dim = kv_shape(qkv, heads)
    q = qkv.new_empty(len(positions), heads, dim)
    k, v = (qkv.new_empty(len(positions), kv_heads, dim) for _ in range(2))
    turns = rope_turns(positions, axes, theta, q.dtype)
    for qkv, weights, rows in streams:
        parts = qkv.split((heads, kv_heads, kv_heads), dim=1)
        for out, x, weight in zip((q, k), parts, weights, strict=False):
            out[rows] = rotate(rms_norm(x, weight, eps, scope), turns[rows])
        v[rows] = parts[2]
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
    """q of `norm_rope_join`; its k and v go into rows of the cache, k before its rotation and v into the pool's."""
    q, *kv = norm_rope_join(streams, positions, heads, axes, theta, eps, scope)
    _write(cache, *kv)
    if pool is not None:
        _write(pool, *norm_rope_join(streams, positions, heads, (0, 0, 0), theta, eps, scope)[1:])
    return q


def assemble_(pool: KVRows, cache: KVRows, positions: Tensor, axes: Sequence[int], theta: float) -> None:
    """cache[slots] = rotate(keys of the pool), values of the pool."""
    keys, values, rows = pool
    k, v = (x[rows.to(x.device)].to(cache[0].device) for x in (keys, values))
    _write(cache, rotate(k, rope_turns(positions, axes, theta, k.dtype)), v)


def _write(to: KVRows, k: Tensor, v: Tensor) -> None:
    keys, values, slots = to
    for out, x in ((keys, k), (values, v)):
        out[slots.to(out.device)] = x.to(out.device)


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
    """Gradients of every stream's QKV, then of every stream's q and k norm weights: the rotation is turned back."""
    turns = rope_turns(positions, axes, theta, dq.dtype).conj().resolve_conj()
    d_qkv, d_weights = [], []
    for qkv, weights, rows in streams:
        kv_heads, _ = kv_shape(qkv, heads)
        d_stream = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        parts, d_parts = (x.split((heads, kv_heads, kv_heads), dim=1) for x in (qkv, d_stream))
        for x, d_x, weight, gradient in zip(parts, d_parts, weights, (dq, dk), strict=False):
            d_input, d_weight = rms_norm_backward(rotate(gradient[rows], turns[rows]), x, weight, eps, scope)
            d_x.copy_(d_input)
            d_weights.append(d_weight)
        d_parts[2].copy_(dv[rows])
        d_qkv.append(d_stream)
    return *d_qkv, *d_weights


# -- modulation --------------------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor, starts: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) · (1 + scale[shot]) + shift[shot]; x [R, C], shift and scale [N, C], starts [N + 1] -> [R, C]."""
    shot = shot_of_rows(starts, len(x))
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (normed * (1 + F.embedding(shot, scale)) + F.embedding(shot, shift)).to(x.dtype).contiguous()


def modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor, starts: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With x̂ = (x − mean) r and g = dout · (1 + scale): dx = r (g − mean g − x̂ · mean(g x̂)), and sums over each shot's
    rows, dshift = Σ dout, dscale = Σ dout · x̂."""
    shot, width = shot_of_rows(starts, len(x)), x.shape[-1:]
    wide, dout = x.to(scale.dtype), dout.to(scale.dtype)
    normed, mean, inverse = torch.native_layer_norm(wide, width, None, None, eps)
    g = (dout * (1 + F.embedding(shot, scale))).contiguous()
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        g, wide, width, mean, inverse, None, None, [True, False, False]
    )
    return dx.to(x.dtype).contiguous(), _sum_by_shot(dout, shot, scale), _sum_by_shot(dout * normed, shot, scale)


def gated(x: Tensor, branch: Tensor, gate: Tensor, starts: Tensor) -> Tensor:
    """x + gate[shot] · branch; x and branch [R, C], gate [N, C], starts [N + 1] -> [R, C]."""
    return (x + F.embedding(shot_of_rows(starts, len(x)), gate) * branch).to(x.dtype).contiguous()


def gated_backward(dout: Tensor, branch: Tensor, gate: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """dbranch = gate[shot] · dout, and dgate = Σ dout · branch over each shot's rows."""
    shot, dout = shot_of_rows(starts, len(branch)), dout.to(gate.dtype)
    d_branch = (dout * F.embedding(shot, gate)).to(branch.dtype).contiguous()
    return d_branch, _sum_by_shot(dout * branch, shot, gate)


def shot_of_rows(starts: Tensor, rows: int) -> Tensor:
    """The shot of every row, [R]."""
    return torch.repeat_interleave(starts.diff(), output_size=rows)


def _sum_by_shot(x: Tensor, shot: Tensor, like: Tensor) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(x.contiguous(), shot, len(like), -1, False)
