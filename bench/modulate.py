"""Who computes layer norm + per-shot modulation, and gate + residual, fastest?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from attention import scene
from harness import Case, Provider, Setting, close_to, gradients, without_graph
from usual import modulate as eager_modulate

from lct.kernels import gated, modulate, select


def cases(s: Setting) -> Iterator[Case]:
    channels = 3072 if s.gpu else 512
    rows = (2048, 8192, 32_768) if s.gpu else (512, 2048) if s.quick else (512, 1024, 2048, 4096, 8192)
    for index, count in enumerate(rows):
        layout = scene(count, 5, "ragged")
        streams = layout.streams(s.device)
        starts, shot = streams.video_starts, streams.video_shot
        x, branch, upstream = (s.normal(layout.video_rows, channels) for _ in range(3))
        modulation = s.normal(len(layout.shots), 6 * channels, dtype=torch.float32).chunk(6, dim=-1)
        shift, scale, gate = modulation[:3]
        tensor, about = x.nbytes, {"rows": layout.video_rows}
        able = [i for i in select.MODULATE if not select.MODULATE[i].reasons(x)]

        def eager_gated(x, branch, gate, shot=shot):
            return (x + gate[shot] * branch).to(x.dtype)

        for name, function, usual, inputs, moved in (
            ("modulate", modulate, partial(eager_modulate, shot=shot), (x, shift, scale), (2, 3)),
            ("gated", gated, eager_gated, (x, branch, gate), (3, 3)),
        ):
            functions = {f"lct {i}": (partial(function, starts=starts, impl=i), True) for i in able}
            functions["eager torch"] = (usual, False)
            if s.gpu or (index == 0 and not s.quick):
                functions["torch.compile of it"] = (torch.compile(usual, dynamic=False), False)
            exact, wide = partial(function, starts=starts, impl="reference"), [t.double() for t in inputs]
            check = close_to(exact(*wide), exact(*inputs))
            providers = [Provider(n, without_graph(f, inputs), mine) for n, (f, mine) in functions.items()]
            yield Case(f"{name} forward", about, providers, 0, moved[0] * tensor, check)
            truth = gradients(exact, wide, upstream.double())()
            check = close_to(truth, gradients(exact, inputs, upstream)(), "gradient")
            providers = [Provider(n, gradients(f, inputs, upstream), mine) for n, (f, mine) in functions.items()]
            yield Case(f"{name} backward", about, providers, 0, moved[1] * tensor, check)


def absent(s: Setting) -> dict[str, str]:
    """Who cannot take part, and why: nobody asked for more than torch itself."""
    return {}
