"""Times of training for a model with a time shift: which reach history? `python bench/shifted.py --out bench/results`.

Open models are trained and sampled with times moved towards noise (shift 5), so shots as clean as history are hardly
met in training (§ 3.2.3, § 4.2). The demo's model is tuned with that shift in three ways, same steps, data and noise:
all shots shifted, half of them, and half with times that spread wider; and sampled with it. Measured are the errors of
identity and motion of scenes, joint and shot by shot.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from harness import write
from provenance import provenance
from rich.console import Console
from rich.table import Table

from lct.demo import SAMPLING, SHOTS
from lct.evaluate import generate, held_out, score
from lct.train.config import TrainConfig
from lct.train.runs import tiny_causal, tiny_lct, tiny_text_rope
from lct.train.weights import load_model
from lct.tune import complete

SHIFT = 5.0
WAYS: dict[str, dict[str, Any]] = {
    "all shifted": {"time_std": 1.0},
    "half shifted": {"time_std": 1.0, "unshifted": 0.5},
    "half shifted, wider": {"time_std": 1.6, "unshifted": 0.5},
}
ASKED = ("colour", "background", "motion")


@dataclass(frozen=True)
class Options:
    runs: Path = Path("runs/shifted")
    """Of this study; those found there go on, finished ones are taken as they are."""
    scenes: int = 64
    """Held-out scenes."""
    out: Path | None = None
    """Folder for the record."""


def main(options: Options) -> int:
    samples, rows = held_out(options.scenes, SHOTS), []

    def trained(config: TrainConfig) -> str:
        return str(complete(replace(config, save_every=config.steps), options.runs / config.name))

    start = trained(tiny_text_rope())
    for way, times in WAYS.items():
        name = way.replace(", ", "_").replace(" ", "_")
        lct = replace(tiny_lct(), name=f"lct_{name}", init=start, shift=SHIFT, **times)
        both = trained(lct)
        causal = replace(tiny_causal(), name=f"causal_{name}", init=both, shift=SHIFT, **times)
        models = [load_model(folder)[0] for folder in (both, trained(causal))]
        for mode in ("auto-regressive", "joint"):
            found = score(mode, generate(mode, *models, samples, replace(SAMPLING, shift=SHIFT)), samples)
            rows.append({"way": way, "mode": mode} | {what: vars(found[what]) for what in ASKED})
    table = Table("times", "mode", *ASKED, title=f"Tuned and sampled with a time shift of {SHIFT:g}")
    for row in rows:
        table.add_row(row["way"], row["mode"], *(f"{row[x]['mean']:.3f} ± {row[x]['half']:.3f}" for x in ASKED))
    Console().print(table)
    if options.out is not None:
        write(provenance() | {"shift": SHIFT, "scenes": options.scenes, "rows": rows}, options.out, "shifted-cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
