"""A distribution of scene lengths, to simulate how steps are shared out. It stands for no corpus.

One scene in five is a single shot, the others have two to nine (§ 4); a shot lasts 3.5 s in the median, log-normal with
σ = 0.6, between half a second and five, at 24 frames a second and four frames a latent frame; one in ten is an image
(§ 3.4). Frames have the area of 480 × 480 (§ 4) in one of five aspect ratios; prompts have 60 to 250 tokens.
"""

from __future__ import annotations

import numpy as np

from lct.layout import GLOBAL_VIDEO, SceneLayout, Shot
from lct.model.cost import Cost
from lct.train.balance import plan_step

ASPECTS = (16 / 9, 4 / 3, 1.0, 3 / 4, 2.39)
SIDE = 30  # patches: 480 pixels, 8 a latent pixel, 2 of those a patch
SCENES = 7  # of a process in a step


def scene(rng: np.random.Generator) -> list[Shot]:
    """One scene."""
    count = 1 if rng.random() < 0.2 else int(rng.integers(2, 10))
    aspect = float(rng.choice(ASPECTS))
    height, width = max(1, round(SIDE / aspect**0.5)), max(1, round(SIDE * aspect**0.5))
    shots = []
    for seconds in np.clip(rng.lognormal(np.log(3.5), 0.6, count), 0.5, 5.0):
        frames = 1 if rng.random() < 0.1 else 1 + int(24 * seconds) // 4
        shots.append(Shot(int(rng.integers(60, 251)), (frames, height, width)))
    return shots if count == 1 else [Shot(int(rng.integers(100, 301)), GLOBAL_VIDEO, "global"), *shots]


def imbalances(
    cost: Cost, processes: int, steps: int, pass_rows: int = 0, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Largest over mean cost of `processes` in each of so many steps of `SCENES` scenes a process: over the step, and
    where they wait for one another in every pass of `pass_rows`."""
    rng, of_step, of_passes = np.random.default_rng(seed), [], []
    pool = []
    for _ in range(4096):
        shots = scene(rng)
        if cost.cross:
            shots = [shot for shot in shots if shot.role == "shot"]
        pool.append((cost.training(SceneLayout([shots])), sum(shot.rows for shot in shots)))
    for _ in range(steps):
        costs, rows = zip(*(pool[i] for i in rng.integers(len(pool), size=SCENES * processes)), strict=True)
        share = plan_step(costs, rows, processes, pass_rows)
        of_step.append(share.imbalance(costs))
        of_passes.append(share.imbalance(costs, every_pass=True))
    return of_step, of_passes
