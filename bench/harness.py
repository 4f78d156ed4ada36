"""How every benchmark measures: correctness before timing, launches in turns, medians, and where the figures are from.

A question is a list of cases; a case is one thing to compute, with everybody who can compute it. All providers of a
case run in one process, launch by launch in turns, over random normal data; on a GPU behind a flush of its caches.
What disagrees with the truth gets no number.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from provenance import Telemetry, provenance
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lct.data.atomic import new_file
from lct.kernels.numerics import compare
from lct.model.cost import PEAKS

Run = Callable[[], object]
# Dense bf16 and fp16 matrix products by the vendor's datasheet, TFLOP/s.


@dataclass(frozen=True)
class Provider:
    """Somebody who can compute a case.

    run      one launch; what it returns is compared with the case's truth
    ours     part of this project, not a peer
    flops    of upper bounds that compute something else: timed, rated by these, never compared, never a winner
    prepare_ms, prepare_bytes   what building its mask or plan took, once
    why_not  a sentence instead of `run` where it cannot take part
    """

    name: str
    run: Run | None = None
    ours: bool = False
    flops: int | None = None
    prepare_ms: float | None = None
    prepare_bytes: int | None = None
    why_not: str | None = None

    @property
    def exact(self) -> bool:
        return self.flops is None


@dataclass(frozen=True)
class Case:
    """One thing to compute. `scale` are the numbers that growth is fitted over: rows, shots."""

    name: str
    scale: dict[str, int]
    providers: Sequence[Provider]
    flops: int = 0
    bytes: int = 0
    check: Callable[[object], str | None] = lambda result: None
    """What is wrong with a result, None where nothing is."""
    about: dict = field(default_factory=dict)
    size: Callable[[object], int] | None = None
    """Bytes of a result, where they are asked for."""
    on_host: bool = False
    """Whether it is the host's work that is asked for: timed by the wall clock on a GPU too."""


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure."""

    device: torch.device
    dtype: torch.dtype
    quick: bool
    seconds: float
    """Of one case, at most; at least three launches are timed however long they take."""

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)


# -- judging -----------------------------------------------------------------------------------------------------------


def close_to(truth, yardstick, kind: str = "forward") -> Callable[[object], str | None]:
    """A check by the acceptance rule of DESIGN § 6, over one tensor or several."""

    def check(result) -> str | None:
        got, true, allowed = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (result, truth, yardstick))
        try:
            for x, t, y in zip(got, true, allowed, strict=True):
                compare(x, t, y.to(x.dtype), kind)
        except AssertionError as error:
            return str(error)
        return None

    return check


def near(truth, budget: float) -> Callable[[object], str | None]:
    """A check by relative rms error, of the whole and, at 30 times the budget, of every row against the rows' mean: for
    what is too large to have a same-dtype reference beside it, and for whole models."""

    def check(result) -> str | None:
        got, true = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (result, truth))
        for x, t in zip(got, true, strict=True):
            error = (x.double() - t.double()).norm() / t.double().norm()
            if not error <= budget:
                return f"relative error {error:.2g}, allowed {budget:.2g}"
            if x.ndim > 1:
                rows = (x.double() - t.double()).flatten(1).norm(dim=1)
                typical = t.double().flatten(1).norm(dim=1).square().mean().sqrt()
                if not rows.max() <= 30 * budget * typical:
                    return f"row {int(rows.argmax())} is off by {rows.max() / typical:.2g} of a row's size"
        return None

    return check


# -- what is launched --------------------------------------------------------------------------------------------------


def without_graph(function: Callable, inputs: Sequence[torch.Tensor]) -> Run:
    """Forward alone."""

    def run():
        with torch.no_grad():
            return function(*inputs)

    return run


def gradients(function: Callable, inputs: Sequence[torch.Tensor], upstream) -> Run:
    """Backward alone: the graph is made at the first call and kept."""
    graph: list = []

    def run():
        if not graph:
            leaves = [x.detach().requires_grad_() for x in inputs]
            graph.extend((function(*leaves), leaves))
        outputs, leaves = graph
        return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    return run


# -- timing ------------------------------------------------------------------------------------------------------------


class Clock:
    """Milliseconds of one launch; on a GPU by events, behind a flush of its caches."""

    def __init__(self, device: torch.device):
        self.flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, run: Run, on_host: bool = False) -> float:
        if self.flush is None or on_host:
            self.settle()
            began = time.perf_counter()
            run()
            self.settle()
            return (time.perf_counter() - began) * 1e3
        self.flush.zero_()
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which Python gets ahead of the GPU
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def settle(self) -> None:
        """Wait until the device has done what it was given."""
        if self.flush is not None:
            torch.cuda.synchronize()


def interleaved(
    runs: dict[str, Run], clock: Clock, seconds: float, most: int = 30, on_host: bool = False
) -> dict[str, list[float]]:
    """Launches of all, in turns, until the time is up: between 3 and `most` each, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began = time.monotonic()
    for turn in range(most):
        if turn >= 3 and time.monotonic() - began > seconds:
            break
        for name, run in runs.items():
            times[name].append(clock(run, on_host))
    return times


def ceilings(s: Setting, clock: Clock) -> dict[str, float]:
    """TFLOP/s of a matrix product and GB/s of a copy (read and written), on random data, in the same run."""
    n = 8192 if s.gpu else 1024
    a, b = (s.normal(n, n) for _ in range(2))
    source = torch.randn(2**28 if s.gpu else 2**24, device=s.device)
    target = torch.empty_like(source)
    times = interleaved({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, clock, 2.0)
    matmul, copy = (statistics.median(times[name]) for name in ("matmul", "copy"))
    found = {"matmul_tflops": 2 * n**3 / matmul / 1e9, "copy_gb_s": 2 * source.nbytes / copy / 1e6}
    name = torch.cuda.get_device_name(s.device) if s.gpu and s.dtype != torch.float32 else ""
    peak = next((peak for gpu, peak in PEAKS.items() if gpu in name), None)
    return found | ({} if peak is None else {"peak_tflops": peak})


def measure(question: str, cases: Iterable[Case], left_out: dict[str, str], s: Setting) -> dict:
    """Ask a question: the record of everything that was measured, and of who could not take part and why."""
    torch.manual_seed(0)
    clock, rows, telemetry = Clock(s.device), [], Telemetry(s.device)
    limits = ceilings(s, clock)
    for case in cases:
        rows += _measure_case(case, s, clock, limits)
        telemetry.look()
    return {
        "question": question,
        **provenance(s.device),
        "dtype": str(s.dtype).removeprefix("torch."),
        "quick": s.quick,
        **limits,
        **telemetry.summary(),
        "rows": rows,
        "left_out": left_out,
        "growth": growth(rows),
    }


def _measure_case(case: Case, s: Setting, clock: Clock, limits: dict[str, float]) -> list[dict]:
    able, found = {}, []
    for provider in case.providers:
        row = {"case": case.name, **case.scale, **case.about, "provider": provider.name, "ours": provider.ours}
        row |= {"exact": provider.exact, "match": None, "why_not": provider.why_not}
        if provider.prepare_ms is not None:
            row |= {"prepare_ms": provider.prepare_ms, "prepare_bytes": provider.prepare_bytes}
        if provider.run is not None:
            try:
                began = time.perf_counter()
                result = provider.run()
                clock.settle()
                row["first_ms"] = (time.perf_counter() - began) * 1e3  # with whatever it has to compile
                wrong = case.check(result) if provider.exact else None
                row |= {"match": wrong is None if provider.exact else None, "why_not": wrong}
                if wrong is None:
                    able[provider.name] = provider.run
                if case.size is not None:
                    row["result_bytes"] = case.size(result)
                del result
            except Exception as error:  # whatever a peer or its compiler raises is its row, not the end of the question
                first = (str(error).splitlines() or [""])[0]
                row["why_not"] = f"{type(error).__name__}: {first[:200]}"
        found.append(row)
    times = interleaved(able, clock, s.seconds, on_host=case.on_host) if able else {}
    flops = {p.name: case.flops if p.exact else p.flops for p in case.providers}
    for row in found:
        if row["provider"] in times:
            row |= _figures(times[row["provider"]], case, flops[row["provider"]], limits)
    return found


def _figures(ms: list[float], case: Case, flops: int, limits: dict[str, float]) -> dict:
    low, middle, high = (sorted(ms)[round(f * (len(ms) - 1))] for f in (0.2, 0.5, 0.8))
    figures = {"ms": middle, "ms_p20": low, "ms_p80": high, "launches": len(ms)}
    if flops:
        rate = flops / middle / 1e9
        figures |= {"tflops": rate, "of_matmul": rate / limits["matmul_tflops"]}
        if "peak_tflops" in limits:
            figures["of_peak"] = rate / limits["peak_tflops"]
    if "tokens" in case.about:
        figures["tokens_s"] = 1e3 * case.about["tokens"] / middle
    if case.bytes:
        rate = case.bytes / middle / 1e6
        figures |= {"gb_s": rate, "of_copy": rate / limits["copy_gb_s"]}
    return figures


def growth(rows: list[dict]) -> list[dict]:
    """Per case and provider, b of time ≈ a · size^b by least squares over logarithms, wherever rows or shots alone vary
    over at least three values; beside it what the count of FLOPs or bytes predicts, where there is one."""
    found = []
    for size, other in (("rows", "shots"), ("shots", "rows")):
        series: dict[tuple, list[tuple[float, float, float]]] = {}
        for r in rows:
            if size in r and "ms" in r:
                alike = tuple(sorted((k, v) for k, v in r.items() if k in (other, "dim", "heads", "kv_heads", "kind")))
                work = r.get("tflops", r.get("gb_s", 0.0)) * r["ms"]
                series.setdefault((r["case"], r["provider"], alike), []).append((r[size], r["ms"], work))
        for (case, provider, alike), points in series.items():
            if len({n for n, _, _ in points}) >= 3:
                fitted = {"case": case, "provider": provider, "against": size, **dict(alike)}
                fitted["exponent"] = _slope(points, 1)
                if all(work for _, _, work in points):
                    fitted["predicted"] = _slope(points, 2)
                found.append(fitted)
    return found


def _slope(points, value: int) -> float:
    x = [math.log(p[0]) for p in points]
    y = [math.log(p[value]) for p in points]
    middle_x, middle_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


# -- telling -----------------------------------------------------------------------------------------------------------


def winners(rows: list[dict]) -> list[dict]:
    """Per case, our fastest and the best peer."""
    found = []
    for key in dict.fromkeys(case_key(r) for r in rows):
        timed = sorted((r for r in rows if case_key(r) == key and "ms" in r and r["exact"]), key=lambda r: r["ms"])
        ours, peers = ([r for r in timed if r["ours"] is who] for who in (True, False))
        if ours:
            ratio = peers[0]["ms"] / ours[0]["ms"] if peers else None
            found.append({"case": key, "ours": ours[0], "peer": peers[0] if peers else None, "ratio": ratio})
    return found


def case_key(row: dict) -> str:
    """The name of a row's case, its sizes included."""
    sizes = [f"{row[size]:,} {size if row[size] != 1 else size[:-1]}" for size in ("rows", "shots") if size in row]
    sizes += [f"D {row['dim']}"] if "dim" in row else []
    heads, kv_heads = row.get("heads"), row.get("kv_heads", row.get("heads"))
    sizes += [f"{heads}:{kv_heads} heads"] if kv_heads != heads else []
    sizes += [row["kind"]] if "kind" in row else []
    return f"{row['case']} ({', '.join(sizes)})" if sizes else row["case"]


def sentence(record: dict) -> str:
    """Who wins and by how much, over all cases of a question."""
    compared = [w for w in winners(record["rows"]) if w["ratio"]]
    if not compared:
        return f"{record['question']}: no peer computes it here."
    won = [w for w in compared if w["ratio"] >= 1]
    middle = statistics.median(w["ratio"] for w in compared)
    text = f"{record['question']}: ahead of the best peer in {len(won)} of {len(compared)} cases, "
    text += f"median {middle:.2f} times its speed"
    for label, choose in (("at best", max), ("at worst", min)):
        w = choose(compared, key=lambda w: w["ratio"])
        text += f"; {label} {w['ratio']:.2f} times {w['peer']['provider']} in {w['case']}"
    return text + "."


def table(record: dict) -> Table:
    """A line a provider under a line a case. `Match`: its result is the truth; `speed`: over that of the best peer."""
    title = f"{record['question']} · {record['device']} · {record['dtype']}"
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rated = any("tflops" in r or "gb_s" in r for r in record["rows"])
    prepared = any("prepare_ms" in r or "result_bytes" in r for r in record["rows"])
    shown.add_column("case and provider", overflow="fold", ratio=1)
    optional = (["rate", "of ceiling"] if rated else []) + (["mask or plan"] if prepared else [])
    for name in ("Match", "ms", *optional, "speed"):
        shown.add_column(name, justify="left" if name == "Match" else "right", no_wrap=True)
    best = {w["case"]: w["peer"]["ms"] for w in winners(record["rows"]) if w["peer"]}
    last = None
    for r in record["rows"]:
        key = case_key(r)
        if key != last:
            shown.add_row(f"[bold]{key}[/]")
            last = key
        name = f"  [green]{r['provider']}[/]" if r["ours"] else f"  {r['provider']}"
        if "ms" not in r:
            match = "[red]no[/]" if r["match"] is False else "-"
            shown.add_row(f"{name} [dim]{_plain(r['why_not'])}[/]", match)
            continue
        ratio = f"{best[key] / r['ms']:.2f}" if key in best and r["exact"] else ""
        match = "yes" if r["exact"] else "bound"
        cells = (_rates(r) if rated else []) + ([_prepared(r)] if prepared else [])
        shown.add_row(name, match, milliseconds(r["ms"]), *cells, ratio)
    return shown


def _plain(why: str | None) -> str:
    return (why or "").replace("[", "(").replace("]", ")")


def milliseconds(ms: float) -> str:
    """Three digits, and never an exponent."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _prepared(r: dict) -> str:
    found = [f"{milliseconds(r['prepare_ms'])} ms"] if "prepare_ms" in r else []
    return ", ".join(found + ([f"{r['result_bytes']:,} B"] if "result_bytes" in r else []))


def _rates(r: dict) -> list[str]:
    """A rate, and what part it is of the matrix product's or the copy's."""
    if "tokens_s" in r:
        return [f"{r['tokens_s']:,.0f} tokens/s", f"{r['of_matmul']:.0%} matmul"]
    if "tflops" in r:
        rate = f"{r['tflops']:.3g} TFLOP/s" if r["tflops"] >= 1 else f"{1e3 * r['tflops']:.3g} GFLOP/s"
        return [rate, f"{r['of_matmul']:.0%} matmul"]
    if "gb_s" in r:
        return [f"{r['gb_s']:.3g} GB/s", f"{r['of_copy']:.0%} copy"]
    return ["", ""]


def tell(record: dict, console: Console) -> None:
    console.print(table(record))
    for name, why in record["left_out"].items():
        console.print(f"not here: {name}: {why}", markup=False, style="dim")
    for g in record["growth"]:
        predicted = f", {g['predicted']:.2f} predicted" if "predicted" in g else ""
        console.print(f"{g['case']}, {g['provider']}: time grows as {g['against']}^{g['exponent']:.2f}{predicted}")
    console.print(sentence(record), style="bold")


def write(record: dict, folder: Path, name: str) -> Path:
    path = folder / f"{name}.json"
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def slug(device: str) -> str:
    """A GPU's name as part of a file's."""
    return "-".join(word.lower() for word in device.split() if word != "NVIDIA")
