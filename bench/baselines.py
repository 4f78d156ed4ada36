"""Everybody else who can compute context-causal attention over shots, called as their authors mean them to be called.

`attention_peers` gives, for one scene, every peer that needs nothing but torch; those that come as packages of their
own are in `packages`. In the calls q, k, v are [S, A, D], and shots are [start, end), each seeing [0, end).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lct.layout import SceneLayout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Somebody else's attention over one scene.

    attend      q, k, v [S, A, D] -> [S, A, D]
    backward    whether autograd through it is the exact gradient
    prepare_ms, prepare_bytes   what building its mask took
    pairs       of an upper bound that computes something else: its own (query, key) pairs; None: those of the layout
    """

    attend: Attend
    backward: bool = True
    prepare_ms: float | None = None
    prepare_bytes: int | None = None
    pairs: int | None = None


def attention_peers(layout: SceneLayout, device: torch.device, flex: bool = True) -> dict[str, Peer]:
    """Every peer that can compute this layout here. `flex`: compile FlexAttention too, half a minute on a CPU."""
    masked, everything = dense_mask(layout, device), layout.rows**2
    peers = {"SDPA per shot": Peer(per_shot(layout)), **masked}
    if device.type == "cuda":
        dense = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
        peers |= {f"{n}, {b}": replace(p, attend=under(dense[b], p.attend)) for n, p in masked.items() for b in dense}
        backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}
        peers |= {f"SDPA per shot, {name}": Peer(under(b, per_shot(layout))) for name, b in backends.items()}
        peers |= {
            f"dense without a mask, {name}": Peer(under(b, unmasked), pairs=everything) for name, b in backends.items()
        }
        causal = under(SDPBackend.CUDNN_ATTENTION, partial(sdpa, is_causal=True))
        peers["causal, cuDNN"] = Peer(causal, pairs=(everything + layout.rows) // 2)
        peers |= {"FA2 in torch, seqused_k": Peer(seqused(layout, device), backward=False)}
    else:
        peers["dense without a mask"] = Peer(unmasked, pairs=everything)
    if flex:
        peers["FlexAttention"] = flex_attention(layout, device)
    return peers


def heads_first(x: Tensor) -> Tensor:
    """[S, A, D] -> [1, A, S, D]."""
    return x.transpose(0, 1)[None]


def rows_first(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return rows_first(F.scaled_dot_product_attention(*map(heads_first, (q, k, v)), enable_gqa=grouped, **options))


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


def under(backend: SDPBackend, attend: Attend) -> Attend:
    def run(q, k, v):
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return run


def per_shot(layout: SceneLayout) -> Attend:
    """One exact call per shot on its prefix: the strongest baseline that needs nothing but torch."""
    runs = layout.plan().runs

    def run(q, k, v):
        parts = [sdpa(q[r.start : r.end], k[a:b], v[a:b]) for r in runs for a, b in r.sees]
        return torch.cat(parts)

    return run


def dense_mask(layout: SceneLayout, device: torch.device) -> dict[str, Peer]:
    """A boolean mask [S, S]; left out beyond 16k rows, where it alone takes a quarter of a GiB a scene."""
    if layout.rows > 16_384:
        return {}
    took, mask = timed(
        lambda: torch.arange(layout.rows, device=device)[None] < ends_of(layout, device)[:, None], device
    )
    return {"SDPA, dense mask": Peer(lambda q, k, v: sdpa(q, k, v, attn_mask=mask), True, took, mask.nbytes)}


def timed(build: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds on the wall clock until a mask is there, and the mask."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    made = build()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1e3, made


def ends_of(layout: SceneLayout, device: torch.device) -> Tensor:
    """Of every row, the end of its shot."""
    ends = torch.tensor(layout.shot_ends, device=device)
    return torch.repeat_interleave(ends, ends.diff(prepend=ends.new_zeros(1)))


def block_mask(layout: SceneLayout, device: torch.device, compiled: bool):
    """FlexAttention's mask, by its own builder."""
    from torch.nn.attention.flex_attention import create_block_mask

    ends, rows = ends_of(layout, device), layout.rows
    return create_block_mask(lambda b, h, i, j: j < ends[i], None, None, rows, rows, device=device, _compile=compiled)


def analytic_block_mask(layout: SceneLayout, device: torch.device, block: int = 128):
    """The same without looking at a single pair: per block of queries, which blocks of keys are whole and which are
    partial, from the shots' ends alone. As well as we know how to write it."""
    from torch.nn.attention.flex_attention import BlockMask

    ends, rows = ends_of(layout, device), layout.rows
    blocks = -(-rows // block)
    first = torch.arange(blocks, device=device) * block
    least, most = ends[first], ends[(first + block - 1).clamp(max=rows - 1)]  # ends never fall from row to row
    whole = (least // block).int()
    partial = ((most + block - 1) // block).int() - whole
    columns = torch.arange(blocks, device=device, dtype=torch.int32)
    indices = columns.expand(blocks, blocks)
    shifted = (columns[None] + whole[:, None]).clamp(max=blocks - 1)
    return BlockMask.from_kv_blocks(
        partial[None, None],
        shifted[None, None].contiguous(),
        whole[None, None],
        indices[None, None].contiguous(),
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, i, j: j < ends[i.clamp(max=rows - 1)],
        seq_lengths=(rows, rows),
    )


def block_mask_bytes(mask) -> int:
    """Of all its tensors."""
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    names += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    return sum(x.nbytes for name in names if (x := getattr(mask, name)) is not None)


def flex_attention(layout: SceneLayout, device: torch.device) -> Peer:
    from torch.nn.attention.flex_attention import flex_attention as flex

    builder = partial(block_mask, layout, device, compiled=device.type == "cuda")
    builder()  # the first call loads, or compiles, what the builder needs
    took, mask = timed(builder, device)
    torch._dynamo.reset()  # each size is a compilation of its own, and dynamo gives up after eight: no silent fall back
    compiled = torch.compile(flex, dynamic=False, fullgraph=True)

    def run(q, k, v):
        grouped = q.shape[1] != k.shape[1]
        return rows_first(compiled(*map(heads_first, (q, k, v)), block_mask=mask, enable_gqa=grouped))

    return Peer(run, device.type == "cuda", took, block_mask_bytes(mask))


def varlen(layout: SceneLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """cu_seqlens of queries and of keys (all prefixes start at 0), the keys' lengths, and the longest shot."""
    ends = torch.tensor(layout.shot_ends, dtype=torch.int32, device=device)
    starts = F.pad(ends, (1, 0))
    longest = max(b - a for a, b in zip(layout.shot_starts, layout.shot_ends, strict=True))
    return starts, torch.zeros_like(starts), ends, longest


def seqused(layout: SceneLayout, device: torch.device) -> Attend:
    """Overlapping prefixes in one varlen call. Its forward is right; its backward would be silently wrong."""
    starts, zeros, ends, longest = varlen(layout, device)

    def run(q, k, v):
        forward = torch.ops.aten._flash_attention_forward
        scale = q.shape[-1] ** -0.5
        return forward(q, k, v, starts, zeros, longest, layout.rows, 0.0, False, False, scale=scale, seqused_k=ends)[0]

    return run
