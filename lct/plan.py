"""The plan: which key rows each run of query rows sees, as one small table and its transpose.

Every kernel reads visibility from here and from nowhere else. A run is a range of query rows that all see the same key
rows; those are a few half-open intervals, one for context-causal scenes. Query rows and key rows are numbered
independently, so that the tail of a cache, several scenes, guidance branches and cross-attention are the same call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Interval = tuple[int, int]

ROW_MULTIPLE = 16  # tables are padded to it, so that scenes of 1 to 9 shots share one compiled shape


@dataclass(frozen=True)
class Run:
    """Rows [start, end) and the intervals of rows on the other side that they see; sorted, disjoint, not empty."""

    start: int
    end: int
    sees: tuple[Interval, ...]

    @property
    def pairs(self) -> int:
        return (self.end - self.start) * sum(b - a for a, b in self.sees)


def merge_intervals(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same rows as the fewest sorted, disjoint, non-empty intervals."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[0] < i[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def merge_runs(runs: Iterable[Run], rows: int) -> tuple[Run, ...]:
    """Runs that cover [0, rows) in order: gaps become runs that see nothing, neighbours that see the same join."""
    covered: list[Run] = []

    def add(run: Run) -> None:
        if run.start == run.end:
            return
        if covered and covered[-1].sees == run.sees:
            covered[-1] = Run(covered[-1].start, run.end, run.sees)
        else:
            covered.append(run)

    at = 0
    for run in sorted(runs, key=lambda r: r.start):
        if run.start == run.end:
            continue
        if run.start < at or run.end > rows or run.end < run.start:
            raise ValueError(
                f"runs: expected disjoint ranges within {rows} rows, got [{run.start}, {run.end}) after row {at}"
            )
        add(Run(at, run.start, ()))
        add(run)
        at = run.end
    add(Run(at, rows, ()))
    return tuple(covered)


def transpose_runs(runs: Sequence[Run], key_rows: int) -> tuple[Run, ...]:
    """Per run of key rows, the query rows that see it."""
    opens: dict[int, list[Interval]] = {}
    closes: dict[int, list[Interval]] = {}
    for run in runs:
        for start, end in run.sees:
            opens.setdefault(start, []).append((run.start, run.end))
            closes.setdefault(end, []).append((run.start, run.end))
    columns, seen_by, last = [], set(), 0
    for edge in sorted({*opens, *closes}):
        columns.append(Run(last, edge, merge_intervals(seen_by)))
        seen_by.difference_update(closes.get(edge, ()))
        seen_by.update(opens.get(edge, ()))
        last = edge
    return merge_runs(columns, key_rows)


def run_table(runs: Sequence[Run]) -> np.ndarray:
    """int32 [R, 2 + 2·I]: (start, end, then I intervals); rows padded to a multiple of 16, I to a power of two.

    Rows that see most stand first: tiles are handed out in this order, so that the longest do not come last.
    """
    runs = sorted(runs, key=lambda run: -sum(b - a for a, b in run.sees))
    widest = max((len(run.sees) for run in runs), default=1)
    intervals = 1 << max(0, widest - 1).bit_length()
    height = -(-max(1, len(runs)) // ROW_MULTIPLE) * ROW_MULTIPLE
    table = np.zeros((height, 2 + 2 * intervals), np.int32)
    for row, run in zip(table, runs, strict=False):
        row[: 2 + 2 * len(run.sees)] = (run.start, run.end, *(edge for interval in run.sees for edge in interval))
    return table


def read_table(table: torch.Tensor) -> list[Run]:
    """The runs of a host table in the order of their rows, without its padding."""
    rows = sorted(row for row in table.tolist() if row[0] < row[1])
    return [
        Run(row[0], row[1], tuple((a, b) for a, b in zip(row[2::2], row[3::2], strict=True) if a < b)) for row in rows
    ]


@dataclass(frozen=True, eq=False)
class Plan:
    """Who sees whom, ready for a kernel.

    q_rows, k_rows       sizes of the two row spaces
    runs, key_runs       query runs over key intervals, and their transpose, on the host
    table, key_table     the same as int32 tensors on the device (see `run_table`)
    host_table, host_key_table   copies in CPU memory, so that reading them never waits for a device
    """

    q_rows: int
    k_rows: int
    runs: tuple[Run, ...]
    key_runs: tuple[Run, ...]
    table: torch.Tensor
    key_table: torch.Tensor
    host_table: torch.Tensor
    host_key_table: torch.Tensor

    @classmethod
    def build(cls, runs: Iterable[Run], q_rows: int, k_rows: int, device: str | torch.device = "cpu") -> Plan:
        """Plan of any disjoint runs; uncovered query rows see nothing. ValueError where a run leaves its row space."""
        import torch

        covered = merge_runs((Run(r.start, r.end, merge_intervals(r.sees)) for r in runs), q_rows)
        for run in covered:
            if run.sees and (run.sees[0][0] < 0 or run.sees[-1][1] > k_rows):
                raise ValueError(f"runs: expected key intervals within {k_rows} rows, got {run.sees}")
        key_runs = transpose_runs(covered, k_rows)
        with torch.inference_mode(False):  # they are kept, and training may follow
            host, host_key = torch.from_numpy(run_table(covered)), torch.from_numpy(run_table(key_runs))
            # Host and device tables are distinct tensors everywhere: one tensor passed twice breaks fullgraph compiles.
            table, key_table = host.to(device, copy=True), host_key.to(device, copy=True)
        return cls(q_rows, k_rows, covered, key_runs, table, key_table, host, host_key)

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        return sum(run.pairs for run in self.runs)

    def dense_mask(self) -> torch.Tensor:
        """bool [q_rows, k_rows], True where the query sees the key. For tests and pictures."""
        import torch

        mask = torch.zeros(self.q_rows, self.k_rows, dtype=torch.bool)
        for run in self.runs:
            for start, end in run.sees:
                mask[run.start : run.end, start:end] = True
        return mask
