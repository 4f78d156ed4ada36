"""Who computes context-causal attention over shots fastest, forward and backward?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from baselines import Attend, Peer, attention_peers, timed
from harness import Case, Provider, Run, Setting, close_to, gradients, near, without_graph
from packages import left_out, package_peers
from torch import Tensor

from lct.kernels import attention, select
from lct.kernels.numerics import RMS_BUDGET
from lct.layout import SceneLayout, Shot, _plan
from lct.plan import Plan

FULL_TRUTH = 1_024  # rows up to which the error of a same-dtype reference is the yardstick, element by element
EXACT_ROWS = 20_000  # rows up to which the truth is float64


def scene(rows: int, shots: int, kind: str) -> SceneLayout:
    """Equal shots, or unequal ones whose prompts have 77 to 512 tokens and whose sizes end inside tiles."""
    if kind == "equal":
        return SceneLayout([[Shot(0, (1, 1, rows // shots))] * shots])
    weights = [1 + (7 * i) % 5 / 3 for i in range(shots)]
    sizes = [int(rows * w / sum(weights)) for w in weights]
    texts = [min(77 + 48 * i, 512, size // 3) for i, size in enumerate(sizes)]
    return SceneLayout([[Shot(text, (1, 1, size - text)) for text, size in zip(texts, sizes, strict=True)]])


def sizes(s: Setting) -> list[tuple[int, int, str, int, int, int]]:
    """(rows, shots, kind, heads, kv_heads, dim)."""
    if s.gpu:
        heads = 24
        grown = [
            (rows, 5, "ragged", heads, heads, 128) for rows in (2048, 8192, 32_768, *([] if s.quick else [131_072]))
        ]
        shots = [(32_768, n, "ragged", heads, heads, 128) for n in (1, 3, 9)]
        others = [
            (32_768, 5, "ragged", heads, heads, 64),
            (32_768, 5, "ragged", 32, 4, 128),
            (32_768, 5, "equal", 24, 24, 128),
        ]
        return grown + ([shots[-1]] if s.quick else shots + others)
    quick = [(160, 5, "equal", 8, 8, 64), (2304, 9, "equal", 8, 8, 64), (1500, 5, "ragged", 8, 2, 64)]
    grown = [(rows, 5, "ragged", 8, 8, 64) for rows in (512, 1024, 2048, 4096, 8192)]
    shots = [(2304, n, "equal", 8, 8, 64) for n in (1, 3, 5)]
    return quick if s.quick else [*quick, *shots, *grown, (4608, 9, "equal", 8, 8, 128), (18_432, 9, "equal", 8, 8, 64)]


def cases(s: Setting) -> Iterator[Case]:
    for index, (rows, shots, kind, heads, kv_heads, dim) in enumerate(sizes(s)):
        layout = scene(rows, shots, kind)
        q = s.normal(layout.rows, heads, dim)
        k, v = (s.normal(layout.rows, kv_heads, dim) for _ in range(2))
        dout = s.normal(layout.rows, heads, dim)
        took, plan = timed(partial(fresh_plan, layout, s.device), s.device)
        table = plan.table.nbytes + plan.key_table.nbytes
        ours = [i for i in select.ATTENTION if i != "reference" and not select.ATTENTION[i].reasons(q, k, v)]
        attend = {
            f"lct {impl}": Peer(
                partial(attention, plan=plan, impl=impl), not select.ATTENTION.forward_only(impl), took, table
            )
            for impl in ours
        }
        peers = attention_peers(layout, s.device, flex=s.gpu or index == 1) | package_peers(layout, s.device)
        scale = {"rows": layout.rows, "shots": shots}
        about = {"kind": kind, "heads": heads, "kv_heads": kv_heads, "dim": dim}
        flops = layout.flops(heads, dim)
        of_forward, of_backward = checks(q, k, v, dout, layout, peers["SDPA per shot"].attend)
        forward = providers(attend, peers, 4 * heads * dim, partial(without_graph, inputs=(q, k, v)))
        yield Case("attention forward", scale, forward, flops, check=of_forward, about=about)
        trained, peers_trained = ({name: p for name, p in side.items() if p.backward} for side in (attend, peers))
        backward = providers(
            trained, peers_trained, 10 * heads * dim, partial(gradients, inputs=(q, k, v), upstream=dout)
        )
        yield Case("attention backward", scale, backward, flops * 5 // 2, check=of_backward, about=about)


def providers(
    ours: dict[str, Peer], peers: dict[str, Peer], pair_flops: int, launch: Callable[[Attend], Run]
) -> list[Provider]:
    """Everybody who takes part, with what `launch` makes of their attention; `pair_flops`: of a (query, key) pair."""
    return [
        Provider(name, launch(p.attend), own, p.pairs and p.pairs * pair_flops, p.prepare_ms, p.prepare_bytes)
        for own, side in ((True, ours), (False, peers))
        for name, p in side.items()
    ]


def fresh_plan(layout: SceneLayout, device: torch.device) -> Plan:
    """The plan of a layout that has never been seen."""
    _plan.cache_clear()
    return SceneLayout(layout.scenes).plan(device)


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, layout: SceneLayout) -> tuple[Tensor, list[Tensor]]:
    """out and (dq, dk, dv) in float64, some queries at a time: at most 256 MiB of scores."""
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    wide_q, wide_dout = q.double(), dout.double()
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (wide_q, wide_q, keys, values))
    for start, end in zip(layout.shot_starts, layout.shot_ends, strict=True):
        step = max(1, 2**25 // (end * q.shape[1])) if end else 1
        for first in range(start, end, step):
            rows = slice(first, min(first + step, end))
            p = (torch.einsum("sad,tad->ast", wide_q[rows], keys[:end]) * scale).softmax(-1)
            out[rows] = torch.einsum("ast,tad->sad", p, values[:end])
            dv[:end] += torch.einsum("ast,sad->tad", p, wide_dout[rows])
            dp = torch.einsum("sad,tad->ast", wide_dout[rows], values[:end])
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[rows] = torch.einsum("ast,tad->sad", ds, keys[:end])
            dk[:end] += torch.einsum("ast,sad->tad", ds, wide_q[rows])
    return out, [dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))]


def checks(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, layout: SceneLayout, loop):
    """(of forward, of backward): everything against float64, up to EXACT_ROWS; beyond it against the exact loop, which
    is somebody else's arithmetic in the same dtype."""
    budget = RMS_BUDGET[q.dtype]
    if layout.rows > EXACT_ROWS:
        return near(without_graph(loop, (q, k, v))(), 2 * budget), near(gradients(loop, (q, k, v), dout)(), 2 * budget)
    out, truth = exact(q, k, v, dout, layout)
    if layout.rows > FULL_TRUTH:
        return near(out, budget), near(truth, budget)
    reference = partial(attention, plan=layout.plan(q.device), impl="reference")
    plain = gradients(reference, (q, k, v), dout)()
    return close_to(out, without_graph(reference, (q, k, v))()), close_to(truth, plain, "gradient")


def absent(s: Setting) -> dict[str, str]:
    """Who cannot take part here, and why."""
    without = {} if s.gpu else {"FlexAttention, backward": "PyTorch has none for the CPU"}
    flex = {} if s.gpu else {"FlexAttention, other sizes": "each takes half a minute to compile on a CPU"}
    return left_out(s.device) | without | flex
