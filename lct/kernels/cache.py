"""What writes keys and values where later shots read them: the KV cache, and the pool of finished shots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lct.kernels import reference, select
from lct.kernels.norm_rope import ARGUMENTS, OPTIONS, NormRope, Weights, checked, given_streams
from lct.layout import Streams

torch.library.define(
    "lct::norm_rope_append_",
    f"({ARGUMENTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    f"Tensor(c!)? k_pool, Tensor(d!)? v_pool, Tensor? pool_slots, {OPTIONS}) -> Tensor",
)
torch.library.define(
    "lct::assemble_",
    "(Tensor k_pool, Tensor v_pool, Tensor pool_slots, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    "Tensor positions, int[] axes, float theta, str impl) -> ()",
)


class KVRows(NamedTuple):
    """Some rows of a cache or a pool.

    keys, values  [rows, A_kv, D], two tensors
    slots         int64 [S], which of their rows, in the order of the joint rows at hand
    """

    keys: Tensor
    values: Tensor
    slots: Tensor


@torch.library.impl("lct::norm_rope_append_", "default")
def _append(*arguments):
    tensors, (positions, *rest) = arguments[:8], arguments[8:]
    cache, pool, (*options, impl) = tuple(rest[:3]), tuple(rest[3:6]), rest[6:]
    streams = given_streams(tensors)
    implementation = select.NORM_ROPE[impl]
    q = implementation.norm_rope_append_(streams, positions, cache, None if pool[0] is None else pool, *options)
    _written(*cache[:2], *(x for x in pool[:2] if x is not None))
    return q


def _written(*tensors: Tensor) -> None:
    """Autograd must know: a kernel that writes through a pointer leaves a tensor's version as it was."""
    torch.autograd.graph.increment_version(tensors)


@torch.library.impl("lct::assemble_", "default")
def _assemble(k_pool, v_pool, pool_slots, k_cache, v_cache, slots, positions, axes, theta, impl):
    pool, cache = (k_pool, v_pool, pool_slots), (k_cache, v_cache, slots)
    select.NORM_ROPE[impl].assemble_(pool, cache, positions, axes, theta)
    _written(k_cache, v_cache)


@torch.library.register_fake("lct::norm_rope_append_")
def _append_fake(text_qkv, video_qkv, *rest):
    heads = rest[-6]
    return video_qkv.new_empty(text_qkv.shape[0] + video_qkv.shape[0], heads, video_qkv.shape[-1])


@torch.library.register_fake("lct::assemble_")
def _assemble_fake(*arguments):
    return None


def norm_rope_append_(
    text_qkv: Tensor,
    video_qkv: Tensor,
    text_norm: Weights,
    video_norm: Weights,
    streams: Streams,
    positions: Tensor,
    spec: NormRope,
    cache: KVRows,
    pool: KVRows | None = None,
    impl: str = "auto",
) -> Tensor:
    """The same as `norm_rope_join`, with keys and values written into cache rows; returns q [S, A, D]. Inference only.

    cache  where keys, turned to their positions, and values go; changed in place, other rows keep their bytes
    pool   where keys before their rotation, and values, go too (§ 3.4: shots from which later ones may choose); on the
           same device, or in CPU memory, which for a kernel on a GPU must be pinned
    """
    tensors, options = checked(text_qkv, video_qkv, text_norm, video_norm, streams, positions, spec)
    like = video_qkv[:, spec.heads : spec.heads + reference.kv_shape(video_qkv, spec.heads)[0]]
    _check_rows("cache", cache, like, len(positions))
    if pool is not None:
        _check_rows("pool", pool, like, len(positions), anywhere=True)
        _check_apart(cache, pool)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("norm_rope_append_: inference only, its inputs require grad; call it under torch.no_grad()")
    stored = (*cache[:2], *(pool[:2] if pool else ()))
    name = select.choose(select.NORM_ROPE, impl, video_qkv, *stored)
    return torch.ops.lct.norm_rope_append_(*tensors, *cache, *(pool or (None, None, None)), *options, name)


def assemble_(pool: KVRows, cache: KVRows, positions: Tensor, spec: NormRope, impl: str = "auto") -> None:
    """Rows of the pool into rows of the cache: keys turned to `positions`, values as they are (§ 3.4). Inference only.

    pool       keys before their rotation, and values, and which of their rows to read, [S]; on the cache's device, or
               in CPU memory, which for a kernel on a GPU must be pinned
    cache      where they go, [S] rows; changed in place, other rows keep their bytes
    positions  float32 [S, 3], (t, y, x) at which the keys are read from now on
    spec       of the model; its axes and theta count

    Raises ValueError or TypeError where shapes, dtypes or devices do not agree. Defined by `reference.assemble_`.
    """
    _check_rows("cache", cache, cache.keys, len(cache.slots))
    _check_rows("pool", pool, cache.keys, len(cache.slots), anywhere=True)
    _check_apart(cache, pool)
    if tuple(positions.shape) != (len(cache.slots), 3) or positions.dtype != torch.float32:
        raise ValueError(
            f"positions: expected float32 [{len(cache.slots)}, 3], got {positions.dtype} {list(positions.shape)}"
        )
    if positions.device != cache.keys.device:
        raise ValueError(f"positions: expected them on {cache.keys.device}, got {positions.device}")
    if sum(spec.axes) > cache.keys.shape[2]:
        raise ValueError(f"axes: expected a sum of at most head_dim {cache.keys.shape[2]}, got {spec.axes}")
    name = select.choose(select.NORM_ROPE, impl, cache.keys, cache.values, *pool[:2])
    torch.ops.lct.assemble_(*pool, *cache, positions, list(spec.axes), spec.theta, name)


def _check_rows(name: str, rows: KVRows, like: Tensor, count: int, anywhere: bool = False) -> None:
    """`anywhere`: the tensors may also lie in CPU memory."""
    for part, x in (("keys", rows.keys), ("values", rows.values)):
        if x.ndim != 3 or x.shape[1:] != like.shape[1:]:
            raise ValueError(f"{name} {part}: expected [rows, {like.shape[1]}, {like.shape[2]}], got {tuple(x.shape)}")
        if x.dtype != like.dtype:
            raise TypeError(f"{name} {part}: expected the dtype of what is stored, {like.dtype}, got {x.dtype}")
        if x.device != like.device and not (anywhere and x.device.type == "cpu"):
            raise ValueError(f"{name} {part}: expected {like.device}, got {x.device}")
    if len(rows.keys) != len(rows.values) or _overlap(rows.keys, rows.values):
        raise ValueError(
            f"{name} values: expected another tensor of {len(rows.keys)} rows, got {len(rows.values)} rows"
        )
    slots = rows.slots
    if slots.shape != (count,) or slots.dtype != torch.int64:
        raise ValueError(f"{name} slots: expected int64 [{count}], got {slots.dtype} {list(slots.shape)}")
    if slots.device != like.device:
        raise ValueError(f"{name} slots: expected them on {like.device}, got {slots.device}")
    # On a GPU this look would wait for the device; `SceneLayout.tail` and `HistoryPool` check capacities on the host.
    if slots.device.type == "cpu" and count and not 0 <= slots.min() <= slots.max() < len(rows.keys):
        raise ValueError(
            f"{name} slots: expected rows of a {name} of {len(rows.keys)}, got {slots.min()} to {slots.max()}"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory; of compiled ones only whether they are one."""
    if a is b or torch.compiler.is_compiling() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return a is b
    steps = [sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) for x in (a, b)]
    ends = [x.data_ptr() + x.element_size() * (1 + step) for x, step in zip((a, b), steps, strict=True)]
    return a.numel() > 0 and b.numel() > 0 and a.data_ptr() < ends[1] and b.data_ptr() < ends[0]


def _check_apart(cache: KVRows, pool: KVRows) -> None:
    if any(_overlap(a, b) for a in (cache.keys, cache.values) for b in (pool.keys, pool.values)):
        raise ValueError("pool: expected tensors of its own, got one of the cache's")
