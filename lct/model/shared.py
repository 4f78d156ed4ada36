"""Rows of a pass shared out over processes: each computes a part of them, and in attention all rows of some heads.

Around attention rows and heads change places (all-to-all), so that the layout, its plan and the kernels stay as they
are. Process i of c holds the i-th of c equal parts of the joint rows, the last ones perhaps fewer.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from lct.layout import Geometry, SharedRows
from lct.plan import Plan, Run


def share_rows(geometry: Geometry, index: int, count: int, group: str) -> Geometry:
    """The geometry of the rows that process `index` of `count` computes; `group` is the name of the process group."""
    rows = geometry.plan.q_rows
    size = -(-rows // count)
    first, end = min(rows, index * size), min(rows, (index + 1) * size)
    text, video = _stream_rows(geometry, first, end)
    s = geometry.streams
    streams = replace(
        s,
        text_rows=s.text_rows[slice(*text)] - first,
        video_rows=s.video_rows[slice(*video)] - first,
        text_shot=s.text_shot[slice(*text)],
        video_shot=s.video_shot[slice(*video)],
        text_starts=s.text_starts.clamp(*text) - text[0],
        video_starts=s.video_starts.clamp(*video) - video[0],
    )
    shared = SharedRows(group, count, size, text, video)
    cross = None if geometry.cross is None else _within(geometry.cross, first, end)
    return replace(geometry, streams=streams, positions=geometry.positions[first:end], cross=cross, shared=shared)


def _stream_rows(geometry: Geometry, first: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows of the text and of the video stream that lie in joint rows [first, end); they stand in joint order."""
    if geometry.cross is not None:  # joint rows are video alone
        return (0, 0), (first, end)
    counts = np.array([(shot.text, shot.video_rows) for shot in geometry.shots]).reshape(-1, 2)
    ends = np.array([0, *accumulate(counts.sum(1))])

    def before(row: int, kind: int) -> int:
        within = np.clip(row - ends[:-1] - (counts[:, 0] if kind else 0), 0, counts[:, kind])
        return int(within.sum())

    text, video = ((before(first, kind), before(end, kind)) for kind in (0, 1))
    return text, video


def _within(plan: Plan, first: int, end: int) -> Plan:
    """The plan of query rows [first, end) alone."""
    runs = [Run(max(r.start, first) - first, min(r.end, end) - first, r.sees) for r in plan.runs]
    kept = [run for run in runs if run.start < run.end]
    return Plan.build(kept, end - first, plan.k_rows, plan.table.device)


def to_heads(x: Tensor, shared: SharedRows, rows: int) -> Tensor:
    """[own rows, A, D] of every process -> [rows, A / count, D], all rows of this process's heads. Differentiable."""
    padded = F.pad(x, (0, 0, 0, 0, 0, shared.size - x.shape[0]))
    parts = padded.unflatten(1, (shared.count, -1)).transpose(0, 1).contiguous()
    return _exchanged(parts, shared).flatten(0, 1)[:rows].contiguous()


def to_rows(x: Tensor, shared: SharedRows, own: int) -> Tensor:
    """The inverse: [rows, A / count, D] -> [own rows, A, D]. Differentiable."""
    padded = F.pad(x, (0, 0, 0, 0, 0, shared.size * shared.count - x.shape[0]))
    parts = _exchanged(padded.unflatten(0, (shared.count, -1)), shared)
    return parts.transpose(0, 1).flatten(1, 2)[:own].contiguous()


def _exchanged(parts: Tensor, shared: SharedRows) -> Tensor:
    """[count, size, …]: part j goes to process j, and part j of what returns came from it."""
    flat = parts.reshape(shared.count, -1)
    return all_to_all_single_autograd(flat, None, None, cast(Any, shared.group)).view(parts.shape)
