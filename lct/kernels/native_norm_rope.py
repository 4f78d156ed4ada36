"""QK-norm, 3D RoPE and the way into joint order, cache rows or the history pool, by csrc/norm_rope.h.

One body, two implementations: `cpu` runs it lane by lane on the CPU, `cuda` on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from lct.kernels import native
from lct.kernels.rope import frequencies

Stream = tuple[Tensor, tuple[Tensor, Tensor], Tensor]  # QKV [R, A + 2·A_kv, D], (q, k) norm weights, joint rows [R]
KVRows = tuple[Tensor, Tensor, Tensor]  # keys and values [rows, A_kv, D], slots [S]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = 0  # as many as suit the device; the tests ask for more, to split heads over blocks


def reasons(part: str, qkv: Tensor, *stored: Tensor) -> list[str]:
    """Why the "cpu" or "cuda" part cannot take QKV like this, or reach a cache or pool; empty where it can."""
    if qkv.device.type != part:
        needs = "a GPU" if part == "cuda" else "tensors on the CPU"
        return [f"needs {needs}, got a tensor on {qkv.device}"]
    against = native.reasons(part, qkv.device)
    if qkv.dtype not in DTYPES:
        against.append(f"takes float16, bfloat16 and float32, got {qkv.dtype}")
    if qkv.shape[2] % 8 or not 8 <= qkv.shape[2] <= 256:
        against.append(f"takes head dims that are multiples of 8 up to 256, got {qkv.shape[2]}")
    if any(x.stride(-1) != 1 for x in stored):
        against.append("a cache's or pool's channels must be contiguous")
    if part == "cuda" and not all(_aligned(x) for x in stored):
        against.append("a cache's or pool's address and strides must be multiples of 16 bytes")
    if part == "cuda" and any(x.device.type == "cpu" and not x.is_pinned() for x in stored):
        against.append("a pool in CPU memory must be pinned, for a kernel on a GPU to reach it")
    return against


def tested(device: torch.device, dtype: torch.dtype) -> bool:
    """The `cpu` part on x86 has passed every test."""
    return device.type == "cpu" and native.X86


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
    return _write(streams, positions, (k, v, None), None, heads, axes, theta, eps, scope), k, v


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
    return _write(streams, positions, _rows(cache), pool and _rows(pool), heads, axes, theta, eps, scope)


def _write(streams, positions, context, pool, heads, axes, theta, eps, scope) -> Tensor:
    qkv = streams[1][0]
    q = qkv.new_empty(len(positions), heads, qkv.shape[2])
    native.library().norm_rope_join(
        *_given(streams, positions, axes, theta),
        q,
        *context,
        *(pool or (None, None, None)),
        eps,
        scope == "row",
        *_split(),
    )
    return q


def assemble_(pool: KVRows, cache: KVRows, positions: Tensor, axes: Sequence[int], theta: float) -> None:
    """See `reference.assemble_`."""
    native.library().norm_rope_assemble(*_rows(pool), *_rows(cache), *_rope(positions, axes, theta), *_split())


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
    library, by_row, split = native.library(), scope == "row", _split()
    given = _given(streams, positions, axes, theta)
    qkv, weights = [stream[0] for stream in streams], [w for _, pair, _ in streams for w in pair]
    blocks = [library.norm_rope_partial_rows(*given[:2], heads, by_row, split[0], i) for i in (0, 0, 1, 1)]
    d_qkv = [x.new_empty(x.shape) for x in qkv]
    parts = [w.new_empty(n, len(w), dtype=torch.float32) for n, w in zip(blocks, weights, strict=True)]
    upstream = [_readable(x) for x in (dq, dk, dv)]
    library.norm_rope_backward(*upstream, *given, *d_qkv, *parts, eps, by_row, *split)
    return *d_qkv, *(part.sum(0).to(w.dtype) for part, w in zip(parts, weights, strict=True))


def _given(streams: Sequence[Stream], positions: Tensor, axes: Sequence[int], theta: float) -> list[Tensor]:
    """QKV, norm weights and joint rows of both streams, positions and frequencies, in the library's order."""
    qkv, pairs, rows = zip(*streams, strict=True)
    weights = [_readable(w.float()) for pair in pairs for w in pair]
    return [*map(_readable, qkv), *weights, *(x.contiguous() for x in rows), *_rope(positions, axes, theta)]


def _rope(positions: Tensor, axes: Sequence[int], theta: float) -> tuple[Tensor, Tensor, Tensor]:
    return positions.contiguous(), *frequencies(axes, theta, positions.device)


def _rows(rows: KVRows) -> tuple[Tensor, Tensor, Tensor]:
    return rows[0], rows[1], rows[2].contiguous()


def _split() -> tuple[int, int]:
    """Blocks and threads."""
    return BLOCKS, torch.get_num_threads()


def _readable(x: Tensor) -> Tensor:
    """The same values where a kernel can read them, eight channels at a time; a copy only where it could not."""
    x = x.detach()
    anywhere = x.device.type == "cpu" or (_aligned(x) and x.data_ptr() % 16 == 0)
    if x.stride(-1) == 1 and anywhere and (x.ndim > 1 or x.is_contiguous()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _aligned(x: Tensor) -> bool:
    """Whether every row and head begins at a multiple of 16 bytes of its storage."""
    return all(n * x.element_size() % 16 == 0 for n in (*x.stride()[:-1], x.storage_offset()))


def _implementation(part: str) -> SimpleNamespace:
    functions = (norm_rope_join, norm_rope_join_backward, norm_rope_append_, assemble_)
    named = {function.__name__: function for function in functions}
    return SimpleNamespace(__name__=__name__, reasons=partial(reasons, part), **named)


cpu, cuda = _implementation("cpu"), _implementation("cuda")
cpu.validated = tested
