"""Peers that come as packages of their own, each called as its authors mean it to be, where it can be imported.

None is a dependency. An adapter is called at its first launch, so that a package whose interface has moved shows as a
row that says so; the gate before timing holds for all. In the calls q, k, v are [S, A, D], and shots are [start, end),
each seeing [0, end).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import util

import torch
from baselines import Attend, Peer, analytic_block_mask, ends_of, varlen
from torch import Tensor

from lct.layout import SceneLayout

Make = Callable[[SceneLayout, Tensor, Tensor, Tensor], Attend]


@dataclass(frozen=True)
class Package:
    """`name` in tables, the module whose import says that it is there, and whether autograd through it is exact."""

    name: str
    module: str
    make: Make
    backward: bool


def fa2(layout: SceneLayout, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as forward

    starts, zeros, ends, longest = varlen(layout, q.device)
    return lambda q, k, v: forward(
        q, k, v, starts, zeros, longest, layout.rows, 0.0, q.shape[-1] ** -0.5, False, seqused_k=ends
    )[0]


def fa3(layout: SceneLayout, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    from fa3_fwd_interface import flash_attn_varlen_func as forward

    starts, zeros, ends, longest = varlen(layout, q.device)
    return lambda q, k, v: first(
        forward(q, k, v, starts, zeros, longest, layout.rows, seqused_k=ends, causal=False),
    )


def fa4(layout: SceneLayout, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """Block-sparse, with a mask function in its own language for the blocks that shots' ends cut."""
    from cutlass import Int32, cute
    from flash_attn.cute import flash_attn_func, utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def seen(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        return n_idx < utils.scalar_to_ssa(aux_tensors[0][m_idx[0]], Int32)

    blocks = analytic_block_mask(layout, q.device)
    size = (blocks.BLOCK_SIZE[0], blocks.BLOCK_SIZE[1])
    by_query, by_key = (
        BlockSparseTensorsTorch(*(x.contiguous() for x in tensors), block_size=size)
        for tensors in (
            (blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices),
            (blocks.q_num_blocks, blocks.q_indices, blocks.full_q_num_blocks, blocks.full_q_indices),
        )
    )
    options = {"mask_mod": seen, "aux_tensors": [ends_of(layout, q.device).int()]}
    options |= {"block_sparse_tensors": by_query, "block_sparse_tensors_bwd": by_key}
    return lambda q, k, v: first(flash_attn_func(q[None], k[None], v[None], **options))[0]


def cudnn(layout: SceneLayout, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    from cudnn import create_mask_plan, flex_attn_func

    ends = ends_of(layout, q.device).int().view(1, 1, -1)
    plan = create_mask_plan(ends, q[None], k[None], v[None], build_backward=True)
    return lambda q, k, v: first(flex_attn_func(q[None], k[None], v[None], mask_plan=plan))[0]


def magi(layout: SceneLayout, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """One slice a shot; no two slices share queries, so the forward needs no atomics."""
    from magi_attention.functional import flex_flash_attn_func

    starts, zeros, ends, _ = varlen(layout, q.device)
    queries, keys = torch.stack([starts[:-1], ends], 1), torch.stack([zeros[:-1], ends], 1)
    return lambda q, k, v: first(
        flex_flash_attn_func(q, k, v, queries, keys, zeros[:-1], disable_fwd_atomic_reduction=True)
    )


def xformers(layout: SceneLayout, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    from xformers.ops import fmha

    sizes = [b - a for a, b in zip(layout.shot_starts, layout.shot_ends, strict=True)]
    bias = fmha.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
        q_seqlen=sizes, kv_seqstarts=[0] * len(sizes) + [layout.rows], kv_seqlen=list(layout.shot_ends)
    ).to(q.device)

    def run(q, k, v):
        repeated = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return fmha.memory_efficient_attention_forward(q[None], *(x[None] for x in repeated), bias)[0]

    return run


def flashinfer(layout: SceneLayout, q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """Every shot a request, whose pages, of one row each, are the prefix that it shares with the others."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    starts, _, ends, _ = varlen(layout, q.device)
    pages = torch.cat([torch.arange(end, dtype=torch.int32, device=q.device) for end in layout.shot_ends])
    of_shot = torch.nn.functional.pad(ends.cumsum(0, dtype=torch.int32), (1, 0))
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(2**27, dtype=torch.uint8, device=q.device), "NHD")
    sizes = q.shape[1], k.shape[1], q.shape[2], 1
    wrapper.plan(starts, of_shot, pages, torch.ones_like(ends), *sizes, causal=False, q_data_type=q.dtype)
    return lambda q, k, v: wrapper.run(q, (k[:, None], v[:, None]))


PACKAGES = (
    Package("FA2 package, seqused_k", "flash_attn.flash_attn_interface", fa2, backward=False),
    Package("FA3 (fa3-fwd), seqused_k", "fa3_fwd_interface", fa3, backward=False),
    Package("FA4, block-sparse", "flash_attn.cute", fa4, backward=True),
    Package("cuDNN flex attention", "cudnn", cudnn, backward=True),
    Package("MagiAttention FFA", "magi_attention", magi, backward=True),
    Package("xformers, gappy keys", "xformers", xformers, backward=False),
    Package("FlashInfer, paged prefill", "flashinfer", flashinfer, backward=False),
)


def first(result) -> Tensor:
    """The output, of what returns more than it."""
    return result[0] if isinstance(result, tuple) else result


def made_at_first_launch(make: Make, layout: SceneLayout) -> Attend:
    made: list[Attend] = []

    def run(q, k, v):
        if not made:
            made.append(make(layout, q, k, v))
        return made[0](q, k, v)

    return run


def package_peers(layout: SceneLayout, device: torch.device) -> dict[str, Peer]:
    """Those that can be imported, on a GPU."""
    able = [p for p in PACKAGES if device.type == "cuda" and importable(p.module)]
    return {p.name: Peer(made_at_first_launch(p.make, layout), p.backward) for p in able}


def left_out(device: torch.device) -> dict[str, str]:
    """Peers that cannot run here, and why."""
    if device.type != "cuda":
        names = [
            "FA2 in torch, seqused_k",
            "SDPA under cuDNN, FA2 or efficient",
            *(p.name for p in PACKAGES),
        ]
        return dict.fromkeys(names, "needs a GPU")
    return {p.name: f"{p.module} does not import" for p in PACKAGES if not importable(p.module)}


def importable(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except Exception:  # its parent package is not there, or breaks when it is imported
        return False
