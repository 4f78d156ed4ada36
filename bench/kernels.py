"""How fast is each implementation of each operation, here, against the device's own copy and matrix product?

    python bench/kernels.py [--device cuda] [--rows 32768] [--out bench/results/kernels-DEVICE.json]

All providers run in one process, launch by launch in turns, over random normal data with the caches flushed; medians.
Attention is counted in FLOPs of visible pairs (backward 2.5 times forward), everything else in the bytes it has to move
once. What fails the numerics of `lct doctor --validate` gets no number. The last line is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lct.kernels import (
    KVRows,
    NormRope,
    assemble_,
    attention,
    gated,
    modulate,
    norm_rope_append_,
    norm_rope_join,
    select,
)
from lct.layout import SceneLayout, Shot
from lct.validate import failure_of

Run = Callable[[], object]


@dataclass(frozen=True)
class Options:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"
    rows: int = 32_768 if torch.cuda.is_available() else 1_024
    """About so many joint rows, in five unequal shots."""
    heads: int = 24 if torch.cuda.is_available() else 8
    dim: int = 128 if torch.cuda.is_available() else 64
    repeats: int = 15
    seconds: float = 120.0
    """No more repeats are begun after it."""
    out: Path | None = None


class Question(NamedTuple):
    """One thing to compute, who can, and what it costs: FLOPs, or bytes moved."""

    name: str
    flops: int
    bytes: int
    providers: dict[str, Run]


def scene(options: Options) -> SceneLayout:
    """Five shots of unequal size, each with a prompt; no size is a multiple of a tile."""
    share = (0.11, 0.31, 0.17, 0.25, 0.16)
    return SceneLayout([[Shot(77 + 13 * i, (1, 1, max(1, int(s * options.rows) - 90))) for i, s in enumerate(share)]])


def sdpa_per_shot(q: Tensor, k: Tensor, v: Tensor, layout: SceneLayout) -> Tensor:
    """The exact baseline of torch alone: a call per shot on its prefix."""
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q[a:b], k[:b], v[:b])))[0].transpose(0, 1)
        for a, b in zip(layout.shot_starts, layout.shot_ends, strict=True)
    ]
    return torch.cat(parts)


class Setting(NamedTuple):
    """What every question is asked about."""

    options: Options
    layout: SceneLayout
    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def able(self, operation: select.Operation, *probe: Tensor) -> list[str]:
        """Implementations that can run and pass; "sdpa" is asked under its own name, on every device."""
        names = [i for i in operation if i not in ("reference", "sdpa") and not operation[i].reasons(*probe)]
        return [i for i in names if failure_of(operation.name, i, self.device, self.dtype) is None]


def forward_and_backward(name: str, flops: int, moved: tuple[int, int], providers: dict) -> Iterator[Question]:
    """Two questions: forward without a graph, and backward alone. `providers` have a function and its leaves each."""
    runs = {provider: _two_runs(function, leaves) for provider, (function, *leaves) in providers.items()}
    for i, kind in enumerate(("forward", "backward")):
        yield Question(f"{name} {kind}", int(flops * (1, 2.5)[i]), moved[i], {p: pair[i] for p, pair in runs.items()})


def _two_runs(function: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor]) -> tuple[Run, Run]:
    inputs = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(x) for x in outputs]

    def forward():
        with torch.no_grad():
            return function(*leaves)

    return forward, lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def attention_questions(s: Setting) -> Iterator[Question]:
    heads, dim, plan = s.options.heads, s.options.dim, s.layout.plan(s.device)
    qkv = [s.normal(s.layout.rows, heads, dim) for _ in range(3)]
    able = s.able(select.ATTENTION, *qkv)
    providers = {impl: (partial(attention, plan=plan, impl=impl), *qkv) for impl in able}
    providers["sdpa per shot"] = (partial(sdpa_per_shot, layout=s.layout), *qkv)
    yield from forward_and_backward("attention", s.layout.flops(heads, dim), (0, 0), providers)


def norm_rope_questions(s: Setting) -> Iterator[Question]:
    heads, dim, rows, geometry = s.options.heads, s.options.dim, s.layout.rows, s.layout.geometry(s.device)
    streams, positions = geometry.streams, geometry.positions
    text, video = (s.normal(len(at), 3 * heads, dim) for at in (streams.text_rows, streams.video_rows))
    norm = (torch.ones(dim, device=s.device), torch.ones(dim, device=s.device))
    spec = NormRope(heads, (dim // 8, dim // 2 - dim // 8, dim // 2))
    impls = [*s.able(select.NORM_ROPE, video), "reference"]
    rest = {"text_norm": norm, "video_norm": norm, "streams": streams, "positions": positions, "spec": spec}
    tensor = rows * heads * dim * s.dtype.itemsize
    # Forward reads and writes q, k and v; backward reads their gradients, q and k, and writes their gradients.
    joined = {impl: (partial(norm_rope_join, **rest, impl=impl), text, video) for impl in impls}
    yield from forward_and_backward("norm_rope_join", 0, (6 * tensor, 8 * tensor), joined)

    slots = torch.arange(rows, device=s.device)
    cache, pool = (KVRows(s.normal(rows, heads, dim), s.normal(rows, heads, dim), slots) for _ in range(2))
    append = partial(norm_rope_append_, text, video, **rest, cache=cache, pool=pool)
    yield Question("norm_rope_append_ + pool", 0, 8 * tensor, {i: partial(append, impl=i) for i in impls})
    gather = partial(assemble_, pool, cache, positions, spec)
    yield Question("assemble_", 0, 4 * tensor, {i: partial(gather, i) for i in impls})


def modulate_questions(s: Setting) -> Iterator[Question]:
    channels, starts = s.options.heads * s.options.dim, s.layout.streams(s.device).video_starts
    x, branch = (s.normal(s.layout.video_rows, channels) for _ in range(2))
    shift, scale = s.normal(len(s.layout.shots), 6 * channels, dtype=torch.float32).chunk(6, dim=-1)[:2]
    impls = [*s.able(select.MODULATE, x), "reference"]
    tensor = x.numel() * x.element_size()
    modulated = {i: (partial(modulate, starts=starts, impl=i), x, shift, scale) for i in impls}
    yield from forward_and_backward("modulate", 0, (2 * tensor, 3 * tensor), modulated)
    added = {i: (partial(gated, starts=starts, impl=i), x, branch, scale) for i in impls}
    yield from forward_and_backward("gated", 0, (3 * tensor, 3 * tensor), added)


class Clock:
    """Milliseconds of one launch; on a GPU by events, behind a flush of its caches."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.flush = torch.empty(2**28, dtype=torch.uint8, device=device) if self.device.type == "cuda" else None

    def __call__(self, run: Run) -> float:
        if self.flush is None:
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e3
        self.flush.zero_()
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which Python gets ahead of the GPU
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def measure(providers: dict[str, Run], clock: Clock, repeats: int, until: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in providers}
    for run in providers.values():
        for _ in range(2):
            run()
    while len(next(iter(times.values()))) < repeats and (time.monotonic() < until or not next(iter(times.values()))):
        for name, run in providers.items():
            times[name].append(clock(run))
    return times


def ceilings(options: Options, clock: Clock) -> dict[str, float]:
    """TFLOP/s of a matrix product and GB/s of a copy in the same run, on random data."""
    dtype, n = getattr(torch, options.dtype), 8192 if options.device.startswith("cuda") else 1024
    a, b = (torch.randn(n, n, device=options.device).to(dtype) for _ in range(2))
    source = torch.randn(2**28 if n == 8192 else 2**24, device=options.device)
    target = torch.empty_like(source)
    runs = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = measure(runs, clock, 10, time.monotonic() + 20)
    matmul, copy = (statistics.median(times[name]) for name in runs)
    return {"matmul_tflops": 2 * n**3 / matmul / 1e9, "copy_gb_s": 2 * source.numel() * 4 / copy / 1e6}


def main(options: Options) -> dict:
    """Measure; what has been found is written question by question, should the time be up."""
    torch.manual_seed(0)
    clock, records = Clock(options.device), []
    about = {**provenance(options.device), "options": asdict(options) | {"out": None}}
    limits, until = ceilings(options, clock), time.monotonic() + options.seconds
    setting = Setting(options, scene(options), torch.device(options.device), getattr(torch, options.dtype))
    asked = (attention_questions, norm_rope_questions, modulate_questions)
    for question in (question for ask in asked for question in ask(setting)):
        times = measure(question.providers, clock, options.repeats, until)
        for provider, ms in times.items():
            low, middle, high = (sorted(ms)[int(f * (len(ms) - 1))] for f in (0.2, 0.5, 0.8))
            record = {"question": question.name, "provider": provider, "ms": middle, "ms_p20": low, "ms_p80": high}
            if question.flops:
                rate = question.flops / middle / 1e9
                record |= {"tflops": rate, "of_matmul": rate / limits["matmul_tflops"]}
            else:
                rate = question.bytes / middle / 1e6
                record |= {"gb_s": rate, "of_copy": rate / limits["copy_gb_s"]}
            records.append(record)
        result = {**about, **limits, "records": records}
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def print_table(result: dict) -> None:
    table = Table(
        "question",
        "provider",
        "ms",
        "p20 to p80",
        "rate",
        "of ceiling",
        title=f"{result['device']}",
        title_justify="left",
    )
    for r in result["records"]:
        rate = f"{r['tflops']:.3g} TFLOP/s" if "tflops" in r else f"{r['gb_s']:.0f} GB/s"
        share = f"{r['of_matmul']:.0%} of matmul" if "tflops" in r else f"{r['of_copy']:.0%} of copy"
        spread = f"{r['ms_p20']:.3g} to {r['ms_p80']:.3g}"
        table.add_row(r["question"], r["provider"], f"{r['ms']:.3g}", spread, rate, share)
    Console().print(table)


def sentences(records: list[dict]) -> Iterator[str]:
    """Per question, who wins and by how much."""
    for question in dict.fromkeys(r["question"] for r in records):
        best, *others = sorted((r for r in records if r["question"] == question), key=lambda r: r["ms"])
        rate = f"{best['tflops']:.3g} TFLOP/s" if "tflops" in best else f"{best['gb_s']:.3g} GB/s"
        ratios = ", ".join(f"{r['ms'] / best['ms']:.2f} times faster than {r['provider']}" for r in others)
        yield f"{question}: {best['provider']}, {rate}{', ' if ratios else ', alone'}{ratios}"


if __name__ == "__main__":
    options = tyro.cli(Options)
    result = main(options)
    print_table(result)
    print(*sentences(result["records"]), sep="\n")
    print(json.dumps(result))
