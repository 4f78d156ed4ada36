"""Who computes context-causal attention over shots fastest, forward and backward?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from baselines import attention_peers, left_out
from harness import Case, Provider, Setting, close_to, near
from torch import Tensor

from lct.kernels import attention, select
from lct.kernels.numerics import RMS_BUDGET
from lct.layout import SceneLayout, Shot

FULL_TRUTH = 1_024  # rows up to which every result is compared with float64


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
        plan = layout.plan(s.device)
        ours = [i for i in select.ATTENTION if i != "reference" and not select.ATTENTION[i].reasons(q, k, v)]
        attend = {f"lct {impl}": partial(attention, plan=plan, impl=impl) for impl in ours}
        peers = attention_peers(layout, s.device, flex=s.gpu or index == 1)
        scale = {"rows": layout.rows, "shots": shots}
        about = {"kind": kind, "heads": heads, "kv_heads": kv_heads, "dim": dim}
        flops = layout.flops(heads, dim)
        forward = [
            *(Provider(name, partial(without_graph, f, q, k, v), ours=True) for name, f in attend.items()),
            *(
                Provider(n, partial(without_graph, p.attend, q, k, v), False, p.exact, p.prepare_ms, p.prepare_bytes)
                for n, p in peers.items()
            ),
        ]
        yield Case("attention forward", scale, forward, flops, check=forward_check(q, k, v, layout), about=about)
        exact = {name: p for name, p in peers.items() if p.backward}
        backward = [
            *(Provider(name, gradients(f, q, k, v, dout), ours=True) for name, f in attend.items()),
            *(
                Provider(n, gradients(p.attend, q, k, v, dout), False, p.exact, p.prepare_ms, p.prepare_bytes)
                for n, p in exact.items()
            ),
        ]
        check = backward_check(q, k, v, dout, layout, peers["SDPA per shot"].attend)
        yield Case("attention backward", scale, backward, flops * 5 // 2, check=check, about=about)


def without_graph(attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return attend(q, k, v)


def gradients(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor):
    """Backward alone: the graph is made at the first call and kept."""
    graph: list = []

    def run():
        if not graph:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            graph.extend((attend(*leaves), leaves))
        out, leaves = graph
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return run


def forward_check(q: Tensor, k: Tensor, v: Tensor, layout: SceneLayout):
    """Every row against float64; of long scenes, the first, middle and last rows of every shot."""
    if layout.rows <= FULL_TRUTH:
        truth = attention(q.double(), k.double(), v.double(), layout, impl="reference")
        return close_to(truth, attention(q, k, v, layout, impl="reference"))
    spans = list(zip(layout.shot_starts, layout.shot_ends, strict=True))
    picked = sorted({row for a, b in spans if a < b for row in (a, (a + b) // 2, b - 1)})
    group = q.shape[1] // k.shape[1]
    truth = []
    for row in picked:
        end = next(b for a, b in spans if a <= row < b)
        keys, values = (x[:end].double().repeat_interleave(group, 1) for x in (k, v))
        weights = (torch.einsum("ad,tad->at", q[row].double(), keys) * q.shape[2] ** -0.5).softmax(-1)
        truth.append(torch.einsum("at,tad->ad", weights, values))
    exact = near(torch.stack(truth), RMS_BUDGET[q.dtype])
    return lambda out: exact(out[picked])


def backward_check(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, layout: SceneLayout, loop):
    """Against float64; of long scenes, against autograd through the exact loop, which is somebody else's arithmetic."""
    if layout.rows <= FULL_TRUTH:
        wide = [x.double() for x in (q, k, v)]
        truth = gradients(partial(attention, plan=layout.plan(q.device), impl="reference"), *wide, dout.double())()
        plain = gradients(partial(attention, plan=layout.plan(q.device), impl="reference"), q, k, v, dout)()
        return close_to(truth, plain, "gradient")
    return near(gradients(loop, q, k, v, dout)(), 2 * RMS_BUDGET[q.dtype])


def absent(s: Setting) -> dict[str, str]:
    """Who cannot take part here, and why."""
    without = {} if s.gpu else {"FlexAttention, backward": "PyTorch has none for the CPU"}
    flex = {} if s.gpu else {"FlexAttention, other sizes": "each takes half a minute to compile on a CPU"}
    return left_out(s.device) | without | flex
