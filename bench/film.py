"""What tuning on a real film does: loss on fixed draws before and after, with context and without, and a further shot.

    python bench/film.py FILM [--steps 300] [--work build/film-run] [--out bench/results/film-cpu.json]

The film is ingested, the `film` run is trained on its scenes, and the loss is taken on fixed (shot, t, ε) triples.
For the last shot of the longest scene, the shots before it are given clean, as conditions (Fig. 4 a.2).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from provenance import provenance

from lct.data.batch import pack
from lct.data.ingest import ingest
from lct.data.scenefile import ShotEntry, load_sample, read_scene, write_scene
from lct.data.scenes import SceneSample
from lct.evaluate import fixed_losses
from lct.model.mmdit import MMDiT
from lct.progress import training
from lct.sample import Sampling
from lct.sample.files import sample_scene
from lct.train.runs import film as film_run
from lct.train.trainer import Trainer

TIMES = tuple(np.linspace(0.1, 0.9, 9).round(2).tolist())


@dataclass(frozen=True)
class Options:
    film: tyro.conf.Positional[Path]
    steps: int = 300
    side: int = 128
    """The target area is side×side pixels."""
    work: Path = Path("build/film-run")
    """New folder for scenes, checkpoints and the further shot."""
    out: Path | None = None


def losses(model: MMDiT, sample: SceneSample, text_scale: float) -> dict[str, float]:
    """Means over fixed draws: all shots noisy, and the last shot after clean ones, with context and isolated."""
    causal, isolated = (
        pack([sample], model.encoder.tokenize, model.config.patch, visibility)
        for visibility in ("context_causal", "isolated")
    )
    clean_history = [0.0] * (len(causal.layout.shots) - 1)
    last = [
        fixed_losses(model, packed, [[*clean_history, t] for t in TIMES], text_scale)[-1]
        for packed in (causal, isolated)
    ]
    return {
        "all": float(
            np.nanmean(fixed_losses(model, causal, [[t] * len(causal.layout.shots) for t in TIMES], text_scale))
        ),
        "last_with_context": last[0],
        "last_isolated": last[1],
    }


def losses_at_start(model: MMDiT, sample: SceneSample) -> dict[str, float]:
    """The pre-trained weights know no text RoPE: the fair start is the better of both geometries."""
    return min((losses(model, sample, scale) for scale in (0.0, 1.0)), key=lambda loss: loss["all"])


def further_shot(scene_folder: Path, model: MMDiT, work: Path) -> Path:
    """Direct one more shot after the scene's own."""
    scene, sample = read_scene(scene_folder), load_sample(scene_folder)
    new = ShotEntry("", cut=True, size=(4, *sample.shots[0].latents.shape[1:3]), seed=1)
    latents = {f"{entry.media}.video": shot.latents for entry, shot in zip(scene.shots, sample.shots, strict=True)}
    write_scene(work / "further", replace(scene, shots=(*scene.shots, new)), latents)
    return sample_scene(model, work / "further", work / "further-shot", Sampling(), "context_causal")


def main(options: Options) -> dict:
    report = ingest(options.film, options.work / "scenes", side=options.side, patch=4, fps=6.0, max_frames=8)
    print(report)
    folders = sorted((options.work / "scenes").iterdir())
    longest = max(folders, key=lambda folder: len(read_scene(folder).shots))
    sample = load_sample(longest)
    config = film_run()
    config = replace(config, steps=options.steps, data=replace(config.data, source=str(options.work / "scenes")))
    trainer = Trainer(config, options.work / "run")
    before = losses_at_start(trainer.model.eval(), sample)
    trainer.model.train()
    with training("film", config.steps) as progress:
        trainer.run(progress)
    model = trainer.averaged()
    after = losses(model, sample, config.text_scale)
    shot = further_shot(longest, model, options.work)
    record = {
        "question": "tuning on a real film",
        "cuts": list(report.cuts),
        "steps": options.steps,
        "before": before,
        "after": after,
        "ratio": after["all"] / before["all"],
        **provenance(),
    }
    print(
        f"loss on fixed draws {before['all']:.3f} before, {after['all']:.3f} after ({record['ratio']:.2f}x); last shot "
        f"{after['last_with_context']:.3f} with context, {after['last_isolated']:.3f} isolated; further shot in {shot}"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
