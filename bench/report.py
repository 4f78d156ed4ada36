"""The README's results and plots, from the records in bench/results: `python bench/report.py` renews them.

A test fails when they are stale: nothing is quoted that was not measured. Plots need matplotlib.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from findings import page
from findings.vbench import read_json
from harness import milliseconds, sentence, winners

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"
BENCH_BEGIN, BENCH_END = "<!-- benchmarks: written by bench/report.py -->", "<!-- end of benchmarks -->"
FINDINGS_BEGIN, FINDINGS_END = "<!-- findings: written by bench/report.py -->", "<!-- end of findings -->"
DOCS = ROOT / "docs"
FINDINGS = DOCS / "findings.md"
QUESTIONS = ("attention", "norm_rope", "modulate", "plan", "training", "generation")


def record(name: str) -> dict:
    return read_json(RESULTS / f"{name}.json")


def machines() -> list[str]:
    """Those that have been asked every question, as they stand in the records' names: the CPU first."""
    asked = [{p.stem.removeprefix(f"{q}-") for p in RESULTS.glob(f"{q}-*.json")} for q in QUESTIONS]
    return sorted(set.intersection(*asked), key=lambda name: (name != "cpu", name))


def records(machine: str) -> list[dict]:
    return [record(f"{name}-{machine}") for name in QUESTIONS]


def plot_of(machine: str) -> Path:
    return DOCS / f"bench-{machine}.svg"


def cases_of(machine: str) -> Path:
    return DOCS / f"bench-{machine}.md"


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
    """The README's section: per machine, how it was measured, and who wins, a sentence a question."""
    sections = [_machine(name) for name in machines()]
    if machines() == ["cpu"]:
        sections.append("Not yet run on a GPU.")
    return "\n\n".join(sections)


def _range(found: list[dict], key: str, told: Callable[[float], str]) -> str:
    """From the least to the largest of what the records say."""
    least, most = (told(of(r[key] for r in found)) for of in (min, max))
    return least if least == most else f"{least.split()[0] if least.split()[1] == most.split()[1] else least} to {most}"


def _machine(machine: str) -> str:
    found, plot, page = records(machine), plot_of(machine), cases_of(machine)
    first = found[0]
    where = f"{first['threads']} cores of an {first['device']}" if machine == "cpu" else f"an {first['device']}"
    warm = "; small tensors stay in the processor's caches" if machine == "cpu" else ", behind a flush of its caches"
    lines = [
        f"`lct bench` on {where}, {first['dtype']}, torch {first['torch']}: there a matrix product runs at "
        f"{_range(found, 'matmul_tflops', _rate)}, a copy at {_range(found, 'copy_gb_s', '{:,.0f} GB/s'.format)}. "
        "Every number is a median of "
        f"launches in turns with the peers', after its result was found right{warm}. "
        f"[Every case]({page.relative_to(ROOT).as_posix()}).",
        "",
        *(f"- {sentence(r)}" for r in found),
        "",
        f"![Growth and roofline on {first['device']}]({plot.relative_to(ROOT).as_posix()})",
    ]
    return "\n".join(lines)


def _rate(tflops: float) -> str:
    return f"{tflops:,.0f} TFLOP/s" if tflops >= 10 else f"{1e3 * tflops:,.0f} GFLOP/s"


def cases(machine: str) -> str:
    """All cases on a page of their own: our fastest, the best peer, and how time grows."""
    found = records(machine)
    lines = [
        f"# Every benchmark's cases on {found[0]['device']}",
        "",
        "Written by `python bench/report.py` from the records in `bench/results`. A ratio above 1 says that we are "
        "faster than the fastest peer.",
        "",
        "| case | ours | ms | the best peer | ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for w in (w for r in found for w in winners(r["rows"])):
        ours, peer = w["ours"], w["peer"]
        theirs = f"{peer['provider']} | {milliseconds(peer['ms'])} | {w['ratio']:.2f}" if peer else "none | | "
        lines.append(f"| {w['case']} | {ours['provider']} | {milliseconds(ours['ms'])} | {theirs} |")
    lines += [
        "",
        "| saying who sees whom | rows | ms | times ours | bytes | first call, ms |",
        "|---|---|---|---|---|---|",
    ]
    plans = found[QUESTIONS.index("plan")]["rows"]
    ours = {r["rows"]: r["ms"] for r in plans if r["ours"]}
    for r in plans:
        cells = f"{r['why_not']} | | | |"
        if "ms" in r:
            times = f"{milliseconds(r['ms'])} | {r['ms'] / ours[r['rows']]:.3g}"
            cells = f"{times} | {r['result_bytes']:,} | {r['first_ms']:,.0f} |"
        lines.append(f"| {r['provider']} | {r['rows']:,} | {cells}")
    lines += ["", "| time grows in | of | as a power of | measured | FLOPs or bytes predict |", "|---|---|---|---|---|"]
    for g in (g for r in found for g in r["growth"]):
        predicted = format(g["predicted"], ".2f") if "predicted" in g else ""
        lines.append(f"| {g['case']} | {g['provider']} | {g['against']} | {g['exponent']:.2f} | {predicted} |")
    left = {name: why for r in found for name, why in r["left_out"].items()}
    lines += ["", "| not measured here | why |", "|---|---|", *(f"| {name} | {why} |" for name, why in left.items())]
    return "\n".join(lines) + "\n"


def digest(machine: str) -> str:
    """Of the records that the plot shows."""
    texts = [(RESULTS / f"{name}-{machine}.json").read_bytes() for name in QUESTIONS]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def plot(machine: str) -> None:
    """Time against rows and shots, and attention under the roofline of this machine."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"svg.hashsalt": "lct", "svg.fonttype": "none", "font.size": 9})
    figure, grid = pyplot.subplots(2, 2, figsize=(10.5, 8), layout="constrained")
    axes = grid.flatten()
    attention, plan, generation = (record(f"{name}-{machine}") for name in ("attention", "plan", "generation"))
    ragged = [r for r in attention["rows"] if r["case"] == "attention forward" and r.get("kind") == "ragged"]
    _lines(axes[0], [r for r in ragged if r["kv_heads"] == r["heads"]], "rows", "Attention forward, 5 ragged shots")
    _lines(axes[1], plan["rows"], "rows", "Who sees whom: plan or mask")
    _lines(axes[2], generation["rows"], "shots", "A scene, shot by shot")
    roof = axes[3]
    peak, copy = 1e3 * attention["matmul_tflops"], attention["copy_gb_s"]
    size = 4 if attention["dtype"] == "float32" else 2
    intensities = [2.0**i for i in range(-1, 14)]
    roof.loglog(intensities, [min(peak, x * copy) for x in intensities], color="black", label="copy and matmul")
    for way in ("forward", "backward"):
        points = [r for r in attention["rows"] if r["case"] == f"attention {way}" and r["ours"] and "ms" in r]
        moved = 4 if way == "forward" else 8
        x = [1e9 * r["tflops"] * r["ms"] / (moved * size * r["rows"] * r["heads"] * r["dim"]) for r in points]
        roof.loglog(x, [1e3 * r["tflops"] for r in points], "o", label=f"attention {way}")
    roof.set(title="Roofline", xlabel="FLOP per byte", ylabel="GFLOP/s")
    for axis in axes:
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(lambda value, _: f"{value:,g}")
            side.set_minor_formatter(ticker.NullFormatter())
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=7)
    path = plot_of(machine)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = path.read_text(encoding="utf-8")
    path.write_text(drawn.replace("</svg>", f"<!-- records {digest(machine)} --></svg>"), encoding="utf-8")


def _lines(axis, rows: list[dict], size: str, title: str) -> None:
    for provider in dict.fromkeys(r["provider"] for r in rows):
        points = sorted({r[size]: r["ms"] for r in rows if r["provider"] == provider and "ms" in r}.items())
        ours = next(r["ours"] for r in rows if r["provider"] == provider)
        if points:
            axis.loglog(*zip(*points, strict=True), "o-" if ours else "s--", label=provider, lw=2 if ours else 1)
    axis.set(title=title, xlabel=size, ylabel="ms")


def renewed(readme: str) -> str:
    for begin, end, text in (
        (BEGIN, END, results),
        (FINDINGS_BEGIN, FINDINGS_END, lambda: page.summary(record("findings-cpu"))),
        (BENCH_BEGIN, BENCH_END, benchmarks),
    ):
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        if readme.count(begin) != 1 or readme.count(end) != 1 or end not in rest:
            raise ValueError(f"{README}: expected {begin} and behind it {end}, once each; put them back")
        readme = f"{before}{begin}\n{text()}\n{end}{after}"
    return readme


def main() -> None:
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
    FINDINGS.write_text(page.page(record("findings-cpu")), encoding="utf-8")
    page.draw(record("findings-cpu"), DOCS / page.FOLDER)
    for name in machines():
        cases_of(name).write_text(cases(name), encoding="utf-8")
        plot(name)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"report: error: {error}")
