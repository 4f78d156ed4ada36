"""Attention over a plan's runs on Hopper GPUs, forward, by csrc/attention_sm90_fwd.h: wgmma fed by bulk tensor copies.

One launch, whose grid follows from shapes alone: a captured CUDA graph serves every plan of the same shapes. Results do
not depend on which block takes which tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lct.kernels import native
from lct.kernels.gpu_attention import above_zero, describable

BY_NAME_ONLY = "has not run on a GPU yet"  # why `auto` does not take it, wherever it passes its tests
FORWARD_ONLY = True
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
TILE = 128  # query rows of a block
# Two blocks share what they copy where a run has tiles enough: half of the pairs' last tiles are empty.
PAIRED_TILES = 8


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why this implementation cannot take these tensors; empty where it can."""
    if q.device.type != "cuda":
        return [f"needs a GPU, got a tensor on {q.device}"]
    against = native.reasons("cuda", q.device)
    if (capability := torch.cuda.get_device_capability(q.device)) != (9, 0):
        against.append(f"needs a Hopper GPU (sm_90), this one is sm_{capability[0]}{capability[1]}")
    if q.dtype not in DTYPES:
        against.append(f"takes float16 and bfloat16, got {q.dtype}")
    if q.shape[2] not in HEAD_DIMS:
        against.append(f"takes head dims 64 and 128, got {q.shape[2]}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        against.append("has no backward yet: call it under torch.no_grad()")
    return against


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, host_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.forward`. Copies tensors whose addresses or strides are no multiples of 16 bytes."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    if not k.numel() or not q.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    q, scale = above_zero(q, scale)
    given = _copyable(q), _copyable(k), _copyable(v), table, host_table
    native.library().attention_forward_on_gpu(*given, out, lse, scale, _paired(host_table))
    return out, lse


def _paired(host_table: Tensor) -> bool:
    """Whether runs are long enough for pairs of blocks; a guess about speed, which no result depends on."""
    rows = (host_table[:, 1] - host_table[:, 0]).tolist()
    return sum(rows) >= PAIRED_TILES * TILE * sum(row > 0 for row in rows)


def _copyable(x: Tensor) -> Tensor:
    """The same values where bulk copies reach them."""
    x = x.detach()
    return x if describable(x) else x.clone(memory_format=torch.contiguous_format)
