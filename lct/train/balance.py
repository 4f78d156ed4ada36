"""Scenes of a step shared out over processes and passes, so that all have about as much to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SWAPS, PARTNERS = 400, 8  # most exchanges after the greedy start, and parts tried in each
EVEN = 1.002  # largest over mean that is good enough


def share_out(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` lists whose largest sum is small; the same on every process.

    Longest first to the part that has least, then the part that has most gives or exchanges what evens it out best.
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(parts), key=lambda p: (sums[p], p))
        lists[least].append(index)
        sums[least] += costs[index]
    mean = sum(sums) / parts
    for _ in range(SWAPS):
        most = max(range(parts), key=lambda p: (sums[p], -p))
        if sums[most] <= EVEN * mean:
            break
        best: tuple[float, int, int, int | None] | None = None
        for other in sorted(range(parts), key=lambda p: (sums[p], p))[:PARTNERS]:
            gap = sums[most] - sums[other]
            for i in lists[most]:
                for j in (None, *lists[other]):
                    moved = costs[i] - (0.0 if j is None else costs[j])
                    left = abs(gap - 2 * moved)
                    if 0 < moved < gap and (best is None or left < best[0]):
                        best = (left, other, i, j)
        if best is None:
            break
        _, other, i, j = best
        for part, goes, comes in ((most, i, j), (other, j, i)):
            if goes is not None:
                lists[part].remove(goes)
                sums[part] -= costs[goes]
            if comes is not None:
                lists[part].append(comes)
                sums[part] += costs[comes]
    return [sorted(part) for part in lists]


class Share(NamedTuple):
    """What each process does in a step: `passes[p][m]` are the scenes of process p in its pass m, perhaps none; all
    processes have as many passes, because they gather weights together."""

    passes: list[list[list[int]]]

    def imbalance(self, costs: Sequence[float], every_pass: bool = False) -> float:
        """Largest over mean cost of the processes; `every_pass` where they wait for one another in every pass."""
        sums = [[sum(costs[i] for i in one) for one in part] for part in self.passes]
        mean = sum(map(sum, sums)) / len(sums)
        slowest = sum(map(max, zip(*sums, strict=True))) if every_pass else max(map(sum, sums))
        return slowest / mean if mean else 1.0


def plan_step(costs: Sequence[float], rows: Sequence[int], parts: int, most_rows: int = 0) -> Share:
    """Share scenes out over `parts` processes, and each one's over passes of at most `most_rows` rows.

    costs, rows  of every scene; one with more than `most_rows` has a pass of its own
    most_rows    0: all scenes of a process in one pass

    Passes are in order of cost, so that those that run at the same time are alike.
    """
    lists = share_out(costs, parts)
    fits = [_fitted(part, rows, most_rows) for part in lists]
    count = max(len(one) for one in fits)
    passes = []
    for part, fitted in zip(lists, fits, strict=True):
        even = [[part[i] for i in one] for one in share_out([costs[i] for i in part], count)]
        if most_rows and any(len(one) > 1 and sum(rows[i] for i in one) > most_rows for one in even):
            even = fitted + [[] for _ in range(count - len(fitted))]
        passes.append(sorted(even, key=lambda one: -sum(costs[i] for i in one)))
    return Share(passes)


def _fitted(part: Sequence[int], rows: Sequence[int], most: int) -> list[list[int]]:
    """Scenes in as few passes as first fit, largest first, finds; one pass where there is no limit."""
    if not most:
        return [list(part)]
    passes: list[list[int]] = []
    for index in sorted(part, key=lambda i: (-rows[i], i)):
        for one in passes:
            if sum(rows[i] for i in one) + rows[index] <= most:
                one.append(index)
                break
        else:
            passes.append([index])
    return [sorted(one) for one in passes] or [[]]
