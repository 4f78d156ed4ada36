"""`lct demo`: tune a tiny model in the paper's stages, let it direct held-out scenes, measure them, show them."""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lct.data.atomic import new_file
from lct.data.batch import pack
from lct.data.readout import CHANCE
from lct.data.scenes import SceneSample, shot_prompt
from lct.data.video import video_package, write_video
from lct.draw import contact_sheet, mask_picture, positions_picture
from lct.evaluate import MODES, Frames, Mean95, generate, held_out, score, true_frames
from lct.layout import SceneLayout
from lct.model.mmdit import MMDiT
from lct.progress import counting
from lct.report import Heading, Metric, Metrics, Picture, Text, Video, write_page
from lct.sample import Sampling
from lct.train.runs import tiny_causal, tiny_lct, tiny_text_rope
from lct.train.weights import load_model
from lct.tune import complete

SHOTS = 4
SHOWN = 3  # scenes on the contact sheet
PIXEL = 8  # film pixels per toy pixel
SAMPLING = Sampling(steps=20, guidance=1.5, history_time=0.1)


@dataclass(frozen=True)
class Target:
    """What a number must reach. `most` and `least` bound its mean."""

    mode: str
    key: str
    label: str
    most: float | None = None
    least: float | None = None

    def met(self, value: float) -> bool:
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)

    def __str__(self) -> str:
        return f"≤ {self.most:g}" if self.most is not None else f"≥ {self.least:g}"


TARGETS = (
    Target("auto-regressive", "colour", "character colour, distance from the given shot's", most=0.15),
    Target("auto-regressive", "colour_worst", "the same, worst shot", most=0.20),
    Target("isolated", "colour", "the same without context", least=0.6),
    Target("joint", "colour", "character colour, distance from the scene's own first shot", most=0.15),
    Target("joint", "colour_worst", "the same, worst shot", most=0.20),
    Target("joint", "hue_spread_ratio", "spread of hues over scenes, part of the truth's", least=0.8),
    Target("auto-regressive", "motion", "motion as the prompt says", least=0.9),
    Target("joint", "motion", "motion as the prompt says", least=0.9),
    Target("joint", "light", "light, which only the global prompt names", least=0.9),
    Target("isolated", "light", "light, which only the global prompt names", least=0.9),
    Target("auto-regressive", "light", "light, which the given shot shows too", least=0.9),
)
REPORTED = ("background", "shape", "visible", "corner", "framing", "place")


def run_demo(out: Path, scenes: int, resume: bool = False, check: bool = False) -> int:
    """Train, generate, measure, draw; returns 0, or 1 with `check` where a target is missed.

    resume  go on with the stages found in `out`; otherwise they are trained anew, so that the code at hand is judged
    """
    if scenes < 2:
        raise ValueError(f"scenes: expected at least 2 to give an interval, got {scenes}")
    video_package("av")
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    bidirectional, causal, stages = _train(out, resume)
    samples = held_out(scenes, SHOTS)
    frames: dict[str, Frames] = {}
    with counting("generate", len(MODES)) as advance:
        for mode in MODES:
            frames[mode] = generate(mode, bidirectional, causal, samples, SAMPLING)
            advance(f"{mode}, {scenes} scenes of {SHOTS} shots")
    scores = {mode: _with_derived(score(mode, frames[mode], samples)) for mode in MODES}
    rows = _judge(scores)
    seconds = time.monotonic() - began
    _write(out, samples, frames, scores, rows, stages, seconds, causal)
    for row in rows:
        mark = {True: "met   ", False: "MISSED", None: "      "}[row.passed]
        print(f"{mark}  {row.name:72s}{row.value:>16s}   {row.target}")
    print(f"{seconds:.0f} s; see {out / 'index.html'}")
    return int(check and not all(row.passed for row in rows if row.passed is not None))


def _train(out: Path, resume: bool) -> tuple[MMDiT, MMDiT, dict[str, float]]:
    """The three stages, each from the weights of the one before."""
    stages: dict[str, float] = {}
    init: str | None = None
    for run in (tiny_text_rope, tiny_lct, tiny_causal):
        config = run()
        config = replace(config, init=init or config.init)
        folder = out / config.name
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        complete(config, folder)
        stages[config.name] = time.monotonic() - began
        init = str(folder)
    return load_model(out / "tiny_lct")[0], load_model(out / "tiny_causal")[0], stages


def _with_derived(scores: dict) -> dict:
    by_shot = scores["colour_by_shot"]
    worst = max(by_shot, key=lambda interval: interval.mean)
    ratio = scores["hue_spread"].mean / scores["hue_spread_truth"].mean
    return scores | {"colour_worst": worst, "hue_spread_ratio": Mean95(ratio, float("nan"))}


def _judge(scores: dict[str, dict]) -> list[Metric]:
    rows = []
    for target in TARGETS:
        value = scores[target.mode][target.key]
        rows.append(Metric(f"{target.mode}: {target.label}", _shown(value), str(target), target.met(value.mean)))
    for mode in MODES:
        rows += [Metric(f"{mode}: {key}", _shown(scores[mode][key]), "", None) for key in REPORTED]
    return rows


def _shown(value: Mean95) -> str:
    return f"{value.mean:.3f}" if np.isnan(value.half) else f"{value.mean:.3f} ± {value.half:.3f}"


def demo_layout(sample: SceneSample, model: MMDiT) -> SceneLayout:
    """The layout of the scene that the pictures show."""
    return pack([sample], model.encoder.tokenize, model.config.patch, "context_causal").layout


def _write(
    out: Path, samples, frames: dict[str, Frames], scores, rows: list[Metric], stages, seconds: float, causal: MMDiT
) -> None:
    layout = demo_layout(samples[0], causal)
    pictures = {"mask.png": mask_picture(layout), "positions.png": positions_picture(layout)}
    truth = true_frames(samples)
    for i in range(min(SHOWN, len(samples))):
        shown = [("truth", truth[i]), *((mode, frames[mode][i]) for mode in MODES)]
        captions = [shot_prompt(shot.prompt, shot.cut) for shot in samples[i].shots]
        sheet = [(name, [_bytes(shot) for shot in shots]) for name, shots in shown]
        pictures[f"contact-sheet-{i + 1}.png"] = contact_sheet(sheet, captions, given={("auto-regressive", 0)})
    for name, picture in pictures.items():
        with new_file(out / name) as temporary:
            picture.save(temporary)
    write_video(out / "auto-regressive.mp4", _film(frames["auto-regressive"][:SHOWN]), fps=3)
    record = {
        "scenes": len(samples),
        "shots": SHOTS,
        "seconds": seconds,
        "stages": stages,
        "sampling": vars(SAMPLING),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "scores": {mode: _plain(values) for mode, values in scores.items()},
        "chance": CHANCE,
        "rows": [{"name": r.name, "value": r.value, "target": r.target, "met": r.passed} for r in rows],
    }
    with new_file(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False))
    shown_scenes = [
        section
        for i in range(min(SHOWN, len(samples)))
        for section in (
            Heading(f"Scene {i + 1}"),
            Text(samples[i].global_prompt or ""),
            Picture(f"contact-sheet-{i + 1}.png", f"Scene {i + 1}, frames of its shots side by side"),
        )
    ]
    sections = [
        Text(
            f"A model of {causal.parameter_count() / 1e6:.2f} M parameters, pre-trained on single shots, was tuned "
            f"here on scenes of several shots in {sum(stages.values()):.0f} s. What a character looks like stands in "
            "no prompt: a shot can only know it from the other shots."
        ),
        *shown_scenes,
        Heading("Directed shot by shot"),
        Video("auto-regressive.mp4", "The first shot of each scene is given, the others come over a KV cache"),
        Heading(f"Measured on {len(samples)} held-out scenes, mean ± 95 % interval"),
        Metrics(tuple(rows)),
        Heading("Who sees whom"),
        Picture("mask.png", "Context-causal attention over interleaved text and video"),
        Heading("Where each token sits"),
        Picture("positions.png", "Interleaved 3D RoPE positions"),
    ]
    write_page(out, "Long Context Tuning, small", sections)


def _plain(scores: dict) -> dict:
    def plain(mean: Mean95) -> dict:
        return {"mean": mean.mean, "half": None if np.isnan(mean.half) else mean.half}

    return {k: [plain(x) for x in v] if isinstance(v, list) else plain(v) for k, v in scores.items()}


def _bytes(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().astype(np.uint8)


def _film(scenes: Frames) -> np.ndarray:
    frames = np.concatenate([_bytes(shot) for scene in scenes for shot in scene])
    return frames.repeat(PIXEL, axis=1).repeat(PIXEL, axis=2)
