"""Text positions of a model that has none: at once, or little by little? `python bench/anneal.py --out bench/results`.

A single-shot model that leaves text unrotated is tuned to the paper's positions (§ 3.2.2): abruptly, λ = 1 from the
first step, or with λ going evenly from 0, where the model is exactly what it was, to 1 over half of the steps. Same
steps, data and noise; each pair is trained from several seeds. Measured are the toy world's text accuracy and misfit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from findings.finding import World
from findings.metrics import measure
from findings.ways import Weights, requests, together
from harness import write
from provenance import provenance
from rich.console import Console
from rich.table import Table

from lct.evaluate import Mean95
from lct.train.config import TrainConfig
from lct.train.runs import micro_lct, micro_text_rope
from lct.train.weights import load_model
from lct.tune import complete

BUDGETS, SEEDS = (50, 100, 200, 400), (0, 1, 2)
SCENE_STEPS, SCENE_SEEDS = 1_000, (0, 1)


@dataclass(frozen=True)
class Options:
    runs: Path = Path("runs/findings")
    """Holds micro_pretrain, as `make findings` trains it; the runs of this study go beside it."""
    scenes: int = 64
    """Held-out scenes; four times as many single shots."""
    out: Path | None = None
    """Folder for the record."""


def stage(runs: Path, kind: str, steps: int, seed: int, annealed: bool) -> TrainConfig:
    base = micro_text_rope() if kind == "single" else micro_lct()
    way = {"text_scale_start": 0.0, "text_scale_steps": steps // 2} if annealed else {}
    name = f"anneal_{kind}_{steps}_{seed}_{'annealed' if annealed else 'abrupt'}"
    init = str(runs / "micro_pretrain")
    return replace(base, name=name, init=init, steps=steps, save_every=steps, seed=seed, ema=0.98, **way)


def trained(config: TrainConfig, runs: Path) -> Weights:
    return Weights(*load_model(complete(config, runs / config.name)))


def scores(w: Weights, kind: str, world: World):
    samples = world.singles() if kind == "single" else world.draw(4)
    m = measure(together(w, requests(w, samples)), samples)
    return {"text": m.per_scene("text"), "misfit": m.per_scene("misfit")}


def main(options: Options) -> int:
    world, rows = World(options.scenes), []
    start = Weights(*load_model(options.runs / "micro_pretrain"))
    before = scores(start, "single", world)
    rows.append({"kind": "single", "steps": 0, "text, before": vars(Mean95.of(before["text"].tolist()))})
    plans = [("single", steps, SEEDS) for steps in BUDGETS] + [("scenes", SCENE_STEPS, SCENE_SEEDS)]
    for kind, steps, seeds in plans:
        row: dict = {"kind": kind, "steps": steps, "seeds": len(seeds)}
        found = {
            way: [
                scores(trained(stage(options.runs, kind, steps, s, way == "annealed"), options.runs), kind, world)
                for s in seeds
            ]
            for way in ("abrupt", "annealed")
        }
        for name in ("text", "misfit"):
            of = {way: np.nanmean([x[name] for x in runs], axis=0) for way, runs in found.items()}
            for way, value in of.items():
                row[f"{name}, {way}"] = vars(Mean95.of(value.tolist()))
            row[f"{name}, annealed − abrupt"] = vars(Mean95.of((of["annealed"] - of["abrupt"]).tolist()))
            row[f"{name}, annealed − abrupt, by seed"] = [
                float(np.nanmean(a[name] - b[name])) for a, b in zip(found["annealed"], found["abrupt"], strict=True)
            ]
        rows.append(row)
    record = provenance() | {"scenes": options.scenes, "rows": rows}
    table = Table(title="annealed less abrupt")
    for column in (
        "from",
        "steps",
        "text, abrupt",
        "text, annealed",
        "text, annealed − abrupt",
        "misfit, annealed − abrupt",
    ):
        table.add_column(column)
    for row in rows[1:]:
        cells = (
            row[key]
            for key in ("text, abrupt", "text, annealed", "text, annealed − abrupt", "misfit, annealed − abrupt")
        )
        table.add_row(row["kind"], str(row["steps"]), *(f"{c['mean']:.4f} ± {c['half']:.4f}" for c in cells))
    Console().print(table)
    if options.out:
        write(record, options.out, "anneal-cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
