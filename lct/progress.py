"""Progress that a person can read: a bar with ETA on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 15.0  # seconds between lines where there is no terminal

Report = Callable[..., None]


@contextmanager
def training(name: str, steps: int, done: int = 0, quiet: bool = False) -> Iterator[Report]:
    """Gives a function to call with each `StepRecord`; shows step, smoothed loss, rate and time left, or nothing."""
    if quiet:
        yield lambda record: None
        return
    loss, began = None, time.monotonic()
    with counting(name, steps, done) as advance:

        def report(record) -> None:
            nonlocal loss
            if record.loss is not None:
                loss = record.loss if loss is None else 0.95 * loss + 0.05 * record.loss
            rate = (record.step - done) / max(1e-9, time.monotonic() - began)
            shown = "–" if loss is None else f"{loss:.4f}"
            left_out = f"  {record.skipped} left out" if record.skipped else ""
            advance(f"loss {shown}  {rate:.1f} steps/s{left_out}")

        yield report


@contextmanager
def counting(name: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Gives a function that counts one more of `total` and shows a note beside it."""
    console = Console(file=sys.stdout)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:16s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=total, completed=done, note="")
            yield lambda note: progress.update(task, advance=1, note=note)
        return
    began = last = time.monotonic()
    count = done

    def line(note: str) -> None:
        nonlocal count, last
        count, now = count + 1, time.monotonic()
        if now - last > LINE_EVERY or count == total:
            last, spent = now, now - began
            left = spent / (count - done) * (total - count)
            print(f"{name:16s}{count:>6d}/{total}  {spent:4.0f} s, {left:4.0f} s left  {note}", flush=True)

    yield line
