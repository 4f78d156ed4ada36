"""Who norms, turns and joins text and video rows fastest, and who writes them to cache and pool and back?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from attention import scene
from harness import Case, Provider, Setting, close_to, gradients, near, without_graph
from torch import Tensor
from usual import norm_rope as eager

from lct.kernels import KVRows, NormRope, assemble_, norm_rope_append_, norm_rope_join, select
from lct.kernels.numerics import RMS_BUDGET
from lct.kernels.reference import rope_turns, rotate

PEERS = {
    "flash_attn.ops.triton.rotary": "flash-attn's rotary: one dimension, no norm, no streams",
    "liger_kernel": "Liger's qwen2vl_mrope: no norm, no streams",
    "flashinfer": "FlashInfer's fused_qk_rmsnorm_rope: no backward, no streams",
}


def cases(s: Setting) -> Iterator[Case]:
    heads, dim = (24, 128) if s.gpu else (8, 64)
    rows = (2048, 8192, 32_768) if s.gpu else (512, 2048) if s.quick else (512, 1024, 2048, 4096, 8192)
    for index, count in enumerate(rows):
        layout = scene(count, 5, "ragged")
        geometry = layout.geometry(s.device)
        streams = geometry.streams
        spec = NormRope(heads, (dim // 8, dim // 8 * 3, dim // 2))
        qkv = [s.normal(len(at), 3 * heads, dim) for at in (streams.text_rows, streams.video_rows)]
        norm = (s.normal(dim, dtype=torch.float32), s.normal(dim, dtype=torch.float32))
        able = [i for i in select.NORM_ROPE if not select.NORM_ROPE[i].reasons(qkv[1])]
        about, scale = {"heads": heads, "dim": dim}, {"rows": layout.rows}
        tensor = layout.rows * heads * dim * s.dtype.itemsize
        turns = rope_turns(geometry.positions, spec.axes, spec.theta, s.dtype)

        def ours(impl: str, text: Tensor, video: Tensor, *weights: Tensor, geometry=geometry, spec=spec):
            norms = weights[:2], weights[2:]
            return norm_rope_join(text, video, *norms, geometry.streams, geometry.positions, spec, impl)

        def usual(text: Tensor, video: Tensor, *weights: Tensor, geometry=geometry, spec=spec, turns=turns):
            return eager(text, video, (weights[:2], weights[2:]), geometry.streams, turns, heads, spec.eps)

        inputs = [*qkv, *norm, *norm]  # of text and video alike; each gets its own gradient
        functions = {f"lct {i}": (partial(ours, i), True) for i in able} | {"eager torch, tables ready": (usual, False)}
        if s.gpu or (index == 0 and not s.quick):
            functions["torch.compile of it"] = (torch.compile(usual, dynamic=False), False)
        upstream = [s.normal(layout.rows, heads, dim) for _ in range(3)]
        wide, exact = [x.double() for x in inputs], partial(ours, "reference")
        check = close_to(exact(*wide), exact(*inputs))
        forward = [Provider(name, without_graph(f, inputs), mine) for name, (f, mine) in functions.items()]
        yield Case("norm_rope_join forward", scale, forward, 0, 6 * tensor, check, about)
        truth = gradients(exact, wide, [u.double() for u in upstream])()
        check = both(truth, gradients(exact, inputs, upstream)(), RMS_BUDGET[s.dtype])
        backward = [Provider(name, gradients(f, inputs, upstream), mine) for name, (f, mine) in functions.items()]
        yield Case("norm_rope_join backward", scale, backward, 0, 8 * tensor, check, about)  # it need not read v
        yield from cache_cases(s, qkv, norm, geometry, spec, able, scale, about, tensor)


def both(truth, yardstick, budget: float) -> Callable[[object], str | None]:
    """QKV's gradients element by element; those of norm weights, sums over all rows in anybody's order, as one."""
    of_qkv, of_weights = close_to(truth[:2], yardstick[:2], "gradient"), near(truth[2:], budget)
    return lambda result: of_qkv(result[:2]) or of_weights(result[2:])


def cache_cases(s: Setting, qkv, norm, geometry, spec, able, scale, about, tensor) -> Iterator[Case]:
    """The last shot's rows into a cache behind the others, and the others from a pool into a cache."""
    heads, dim, rows = spec.heads, qkv[0].shape[2], scale["rows"]
    slots, positions = torch.arange(rows, device=s.device), geometry.positions
    history = [s.normal(rows, heads, dim) for _ in range(2)]
    pools = [s.normal(rows, heads, dim) for _ in range(2)]

    def append(impl: str):
        cache = KVRows(*(torch.cat([x, torch.zeros_like(x)]) for x in history), slots + rows)

        def run():
            q = norm_rope_append_(*qkv, norm, norm, geometry.streams, positions, spec, cache, impl=impl)
            return q, cache.keys, cache.values

        return run

    turns = rope_turns(positions, spec.axes, spec.theta, s.dtype)

    def joined():
        return eager(*qkv, (norm, norm), geometry.streams, turns, heads, spec.eps)

    def by_cat():
        q, k, v = joined()
        return q, torch.cat([history[0], k]), torch.cat([history[1], v])

    grown = [torch.cat([x, torch.zeros_like(x)]) for x in history]

    def by_index_copy():
        q, k, v = joined()
        return q, grown[0].index_copy_(0, slots + rows, k), grown[1].index_copy_(0, slots + rows, v)

    wide = [tuple(x.double() for x in tensors) for tensors in (qkv, norm)]
    q, k, v = norm_rope_join(*wide[0], wide[1], wide[1], geometry.streams, positions, spec, "reference")
    truth = q, torch.cat([history[0].double(), k]), torch.cat([history[1].double(), v])
    providers = [Provider(f"lct {i}", append(i), ours=True) for i in able]
    providers += [Provider("eager torch, torch.cat", by_cat), Provider("eager torch, index_copy_", by_index_copy)]
    check = near(truth, 2 * RMS_BUDGET[s.dtype])
    yield Case("append to a cache as long", scale, providers, 0, 6 * tensor, check, about)

    def assemble(impl: str):
        cache = KVRows(*(torch.zeros_like(x) for x in pools), slots)

        def run():
            assemble_(KVRows(*pools, slots.flip(0)), cache, positions, spec, impl)
            return cache.keys, cache.values

        return run

    def gather():
        return rotate(pools[0][slots.flip(0)], turns), pools[1][slots.flip(0)]

    providers = [Provider(f"lct {i}", assemble(i), ours=True) for i in able]
    providers.append(Provider("eager gather + rotate, tables ready", gather))
    keys, values = (x[slots.flip(0)].double() for x in pools)
    truth = rotate(keys, rope_turns(positions, spec.axes, spec.theta, torch.float64)), values
    yield Case("assemble_", scale, providers, 0, 4 * tensor, near(truth, 2 * RMS_BUDGET[s.dtype]), about)


def absent(s: Setting) -> dict[str, str]:
    """Who cannot take part, and why."""
    return {what: f"computes something else ({module})" for module, what in PEERS.items()}
