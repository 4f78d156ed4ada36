"""The README's results and plots, from the records in bench/results: `python bench/report.py` renews them.

A test fails when they are stale: nothing is quoted that was not measured. Plots need matplotlib.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from harness import sentence, winners

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"
BENCH_BEGIN, BENCH_END = "<!-- benchmarks: written by bench/report.py -->", "<!-- end of benchmarks -->"
PLOT, CASES = ROOT / "docs" / "bench-cpu.svg", ROOT / "docs" / "bench-cpu.md"
QUESTIONS = ("attention", "norm_rope", "modulate", "plan", "training", "generation")


def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def results() -> str:
    """The section between the markers."""
    demo, film = record("demo-cpu"), record("film-cpu")
    lines = [
        f"`make demo` on {demo['threads']} CPU cores took {demo['seconds']:.0f} s, of which "
        f"{sum(demo['stages'].values()):.0f} s were training. Over {demo['scenes']} held-out scenes of {demo['shots']} "
        "shots, mean ± 95 % interval:",
        "",
        "| measure | value | target |",
        "|---|---|---|",
        *(
            f"| {row['name']} | {row['value']} | {row['target']}{', **missed**' if row['met'] is False else ''} |"
            for row in demo["rows"]
            if row["target"]
        ),
        "",
        *_reported(demo),
        "",
        f"Colour and background are distances in RGB: two random identities are {demo['chance']} apart. Prompts "
        "name a shot's framing, corner, motion and place; colour and shape stand in none. Shape is not carried from "
        "shot to shot yet: it is right about as often without context.",
        "",
        f"Tuning on a real film of {len(film['cuts']) + 1} shots takes the loss on fixed draws to {film['ratio']:.2f} "
        f"of its start. The loss of the film's last shot is {_gain(film['before']):.2f} times better with context than "
        f"without before tuning, {_gain(film['after']):.2f} times after.",
    ]
    return "\n".join(lines)


def _reported(demo: dict) -> list[str]:
    """A table of what has no target, a column for each way of generating."""
    table: dict[str, dict[str, str]] = {}
    for row in demo["rows"]:
        if not row["target"]:
            mode, name = row["name"].split(": ")
            table.setdefault(name, {})[mode] = row["value"]
    modes = list(demo["scores"])
    return [
        f"| without target | {' | '.join(modes)} |",
        "|---|" + "---|" * len(modes),
        *(f"| {name} | {' | '.join(values[mode] for mode in modes)} |" for name, values in table.items()),
    ]


def _gain(losses: dict) -> float:
    return losses["last_isolated"] / losses["last_with_context"]


def benchmarks() -> str:
    """The README's section: how it was measured, and who wins, a sentence a question."""
    records = [record(f"{name}-cpu") for name in QUESTIONS]
    first = records[0]
    lines = [
        f"`lct bench` on {first['threads']} cores of an {first['device']}, {first['dtype']}, torch {first['torch']}: "
        f"there a matrix product runs at {1e3 * first['matmul_tflops']:.0f} GFLOP/s, a copy at "
        f"{first['copy_gb_s']:.0f} GB/s. Every number is a median of launches in turns with the peers', after its "
        "result was found right; small tensors stay in the processor's caches. On a CPU our attention is torch's own, "
        "and modulation is plain torch with a backward written out. Not yet run on a GPU. "
        f"[Every case]({CASES.relative_to(ROOT).as_posix()}).",
        "",
        *(f"- {sentence(r)}" for r in records),
        "",
        f"![Growth and roofline]({PLOT.relative_to(ROOT).as_posix()})",
    ]
    return "\n".join(lines)


def cases() -> str:
    """All cases on a page of their own: our fastest, the best peer, and how time grows."""
    records = [record(f"{name}-cpu") for name in QUESTIONS]
    lines = [
        "# Every benchmark's cases",
        "",
        "Written by `python bench/report.py` from the records in `bench/results`. A ratio above 1 says that we are "
        "faster than the fastest peer.",
        "",
        "| case | ours | ms | the best peer | ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for w in (w for r in records for w in winners(r["rows"])):
        ours, peer = w["ours"], w["peer"]
        theirs = f"{peer['provider']} | {_ms(peer)} | {w['ratio']:.2f}" if peer else "none | | "
        lines.append(f"| {w['case']} | {ours['provider']} | {_ms(ours)} | {theirs} |")
    lines += [
        "",
        "| saying who sees whom | rows | ms | times ours | bytes | first call, ms |",
        "|---|---|---|---|---|---|",
    ]
    plans = records[QUESTIONS.index("plan")]["rows"]
    ours = {r["rows"]: r["ms"] for r in plans if r["ours"]}
    for r in plans:
        found = f"{r['why_not']} | | | |"
        if "ms" in r:
            found = f"{_ms(r)} | {r['ms'] / ours[r['rows']]:.3g} | {r['result_bytes']:,} | {r['first_ms']:,.0f} |"
        lines.append(f"| {r['provider']} | {r['rows']:,} | {found}")
    lines += ["", "| time grows in | of | as a power of | measured | FLOPs or bytes predict |", "|---|---|---|---|---|"]
    for g in (g for r in records for g in r["growth"]):
        predicted = format(g["predicted"], ".2f") if "predicted" in g else ""
        lines.append(f"| {g['case']} | {g['provider']} | {g['against']} | {g['exponent']:.2f} | {predicted} |")
    left = {name: why for r in records for name, why in r["left_out"].items()}
    lines += ["", "| not measured here | why |", "|---|---|", *(f"| {name} | {why} |" for name, why in left.items())]
    return "\n".join(lines) + "\n"


def _ms(row: dict) -> str:
    """Three digits, and never an exponent."""
    return f"{row['ms']:,.0f}" if row["ms"] >= 1000 else f"{row['ms']:.3g}"


def digest() -> str:
    """Of the records that the plot shows."""
    texts = [(RESULTS / f"{name}-cpu.json").read_bytes() for name in QUESTIONS]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def plot() -> None:
    """Time against rows and shots, and attention under the roofline of this machine."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"svg.hashsalt": "lct", "svg.fonttype": "none", "font.size": 9})
    figure, grid = pyplot.subplots(2, 2, figsize=(10.5, 8), layout="constrained")
    axes = grid.flatten()
    attention, plan, generation = (record(f"{name}-cpu") for name in ("attention", "plan", "generation"))
    ragged = [r for r in attention["rows"] if r["case"] == "attention forward" and r.get("kind") == "ragged"]
    _lines(axes[0], [r for r in ragged if r["kv_heads"] == r["heads"]], "rows", "Attention forward, 5 ragged shots")
    _lines(axes[1], plan["rows"], "rows", "Who sees whom: plan or mask")
    _lines(axes[2], generation["rows"], "shots", "A scene, shot by shot")
    roof = axes[3]
    peak, copy = 1e3 * attention["matmul_tflops"], attention["copy_gb_s"]
    intensities = [2.0**i for i in range(-1, 14)]
    roof.loglog(intensities, [min(peak, x * copy) for x in intensities], color="black", label="copy and matmul")
    for way in ("forward", "backward"):
        points = [r for r in attention["rows"] if r["case"] == f"attention {way}" and r["ours"] and "ms" in r]
        moved = 4 if way == "forward" else 8
        x = [1e9 * r["tflops"] * r["ms"] / (moved * 4 * r["rows"] * r["heads"] * r["dim"]) for r in points]
        roof.loglog(x, [1e3 * r["tflops"] for r in points], "o", label=f"attention {way}")
    roof.set(title="Roofline", xlabel="FLOP per byte", ylabel="GFLOP/s")
    for axis in axes:
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(lambda value, _: f"{value:,g}")
            side.set_minor_formatter(ticker.NullFormatter())
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=7)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = PLOT.read_text(encoding="utf-8")
    PLOT.write_text(drawn.replace("</svg>", f"<!-- records {digest()} --></svg>"), encoding="utf-8")


def _lines(axis, rows: list[dict], size: str, title: str) -> None:
    for provider in dict.fromkeys(r["provider"] for r in rows):
        points = sorted({r[size]: r["ms"] for r in rows if r["provider"] == provider and "ms" in r}.items())
        ours = next(r["ours"] for r in rows if r["provider"] == provider)
        if points:
            axis.loglog(*zip(*points, strict=True), "o-" if ours else "s--", label=provider, lw=2 if ours else 1)
    axis.set(title=title, xlabel=size, ylabel="ms")


def renewed(readme: str) -> str:
    for begin, end, text in ((BEGIN, END, results), (BENCH_BEGIN, BENCH_END, benchmarks)):
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{text()}\n{end}{after}"
    return readme


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
    CASES.write_text(cases(), encoding="utf-8")
    plot()
