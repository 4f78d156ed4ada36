"""Exact attention as one call of torch's SDPA per run, on the CPU, where it is the default."""

from __future__ import annotations

import torch
from torch import Tensor

from lct.plan import Run, read_table

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why this implementation cannot take these tensors; empty where it can."""
    return [] if q.device.type == "cpu" else [f"runs on the CPU only, q is on {q.device}"]


def validated(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu"


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, host_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.forward`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide)
    for run in read_table(host_table):
        if not run.sees:
            continue
        rows = slice(run.start, run.end)
        queries = _grouped(q[rows], k.shape[1])
        run_out, run_lse = _forward(queries, _visible(k, run), _visible(v, run), 0.0, False, scale=scale)
        out[rows] = _ungrouped(run_out, q.shape[1])
        lse[:, rows] = run_lse.reshape(q.shape[1], -1)
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
    """See `reference.backward`."""
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # Several runs add into one key row: sums of half-precision parts are kept in fp32.
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
    wants_lse = bool(dlse.any())
    for run in read_table(host_table):
        if not run.sees:
            continue
        rows, kv_heads = slice(run.start, run.end), k.shape[1]
        queries, keys, values = _grouped(q[rows], kv_heads), _visible(k, run), _visible(v, run)
        run_lse = lse[:, rows].reshape(1, kv_heads, -1).contiguous()
        grads = _backward(
            _grouped(dout[rows], kv_heads), queries, keys, values, _grouped(out[rows], kv_heads), run_lse, 0.0, False,
            scale=scale,
        )  # fmt: skip
        dq[rows] = _ungrouped(grads[0], q.shape[1])
        dkeys, dvalues = grads[1][0].transpose(0, 1), grads[2][0].transpose(0, 1)
        if wants_lse:
            more_dq, more_dk = _lse_gradients(dlse[:, rows], queries, keys, run_lse, scale)
            dq[rows] += _ungrouped(more_dq, q.shape[1])
            dkeys = dkeys + more_dk[0].transpose(0, 1)
        at = 0
        for start, end in run.sees:
            dk[start:end] += dkeys[at : at + end - start]
            dv[start:end] += dvalues[at : at + end - start]
            at += end - start
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """[R, A, D] -> [1, A_kv, G·R, D]: all queries of a run see the same keys, so a group of heads is just more rows."""
    grouped = rows.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    return _dense_channels(grouped.reshape(1, kv_heads, -1, rows.shape[-1]))


def _ungrouped(grouped: Tensor, heads: int) -> Tensor:
    return grouped.reshape(heads, -1, grouped.shape[-1]).transpose(0, 1)


def _visible(rows: Tensor, run: Run) -> Tensor:
    """The rows a run sees as [1, A_kv, T, D]; a view where they are one interval."""
    (start, end), *more = run.sees
    seen = torch.cat([rows[a:b] for a, b in run.sees]) if more else rows[start:end]
    return _dense_channels(seen.transpose(0, 1)[None])


def _dense_channels(x: Tensor) -> Tensor:
    """The kernel behind SDPA takes the stride of channels for 1 without looking."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _lse_gradients(dlse: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's SDPA has no gradient of lse: dS = P · dlse."""
    scores = (queries @ keys.transpose(-1, -2)).to(lse.dtype) * scale
    ds = (scores - lse[..., None]).exp() * dlse.reshape(lse.shape)[..., None] * scale
    ds = ds.to(queries.dtype)
    return ds @ keys, ds.transpose(-1, -2) @ queries
