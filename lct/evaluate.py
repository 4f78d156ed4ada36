"""How well generated toy scenes hold together, read from pixels against the known truth (paper § 4.1, § 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lct.data.batch import Packed
from lct.data.latents import unpatchify
from lct.data.readout import character_distance, colour_error, hue_spread, read_shot, score_reading
from lct.data.scenes import SceneSample
from lct.data.toy import ToyScenes, to_frames
from lct.model.flow import noised, shot_losses
from lct.model.mmdit import MMDiT
from lct.sample import Sampling, SceneRequest, autoregressive, joint

MODES = ("joint", "auto-regressive", "isolated")


@dataclass(frozen=True)
class Mean95:
    """A mean over scenes, half the width of its 95 % interval, and of how many scenes it is."""

    mean: float
    half: float
    n: int = 0

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean95:
        known = np.array(values, float)
        known = known[np.isfinite(known)]
        if not len(known):
            return cls(float("nan"), float("nan"))
        half = student(len(known)) * known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else float("nan")
        return cls(float(known.mean()), float(half), len(known))


def student(n: int) -> float:
    """The 97.5 % quantile of Student's t for a mean of n values, within 0.01."""
    if n < 5:
        return (12.7062, 4.3027, 3.1824)[n - 2]
    v = n - 1
    return 1.95996 + 2.37227 / v + 2.8225 / v**2 + 2.55585 / v**3 + 1.58954 / v**4


Frames = list[list[np.ndarray]]  # per scene and shot, [T, H, W, 3] in [0, 1]


def held_out(scenes: int, shots: int, preset: str = "one_character", seed: int = 7) -> list[SceneSample]:
    """Scenes whose identities training never saw."""
    toy = ToyScenes(preset, max_shots=max(2, shots))
    return [toy.evaluation_scene(index, seed, shots) for index in range(scenes)]


def true_frames(samples: Sequence[SceneSample]) -> Frames:
    return [[to_frames(shot.latents) for shot in sample.shots] for sample in samples]


def generate(
    mode: str,
    joint_model: MMDiT,
    causal_model: MMDiT,
    samples: Sequence[SceneSample],
    sampling: Sampling,
    seed: int = 1,
) -> Frames:
    """The shots of every sample, generated from its prompts; the auto-regressive mode is given the first shot.

    mode  "joint": bidirectional weights, all shots at once; "auto-regressive": context-causal weights over a KV cache;
          "isolated": bidirectional weights, each shot sees the global prompt and itself only
    """
    patch = joint_model.config.patch
    given = (0,) if mode == "auto-regressive" else ()
    requests = [SceneRequest.like(s, patch, seed * 1_000_003 + 100 * i, given) for i, s in enumerate(samples)]
    if mode == "auto-regressive":
        latents = autoregressive(causal_model, requests, sampling)
    else:
        latents = joint(joint_model, requests, sampling, "isolated" if mode == "isolated" else "bidirectional")
    return [
        [frames_of(rows, request.video, patch) for rows, request in zip(scene, requested.shots, strict=True)]
        for scene, requested in zip(latents, requests, strict=True)
    ]


def frames_of(rows: Tensor, video: tuple[int, int, int], patch: tuple[int, int, int]) -> np.ndarray:
    """Frames [T, H, W, 3] in [0, 1] of one generated shot."""
    return np.clip(to_frames(unpatchify(rows.float().cpu(), video, patch).numpy()), 0, 1)


def score(mode: str, frames: Frames, samples: Sequence[SceneSample]) -> dict[str, Mean95 | list[Mean95]]:
    """Means over scenes with 95 % intervals, of the shots after the first.

    colour        distance of a shot's character colour from what its scene fixes: its own first shot in joint mode,
                  else the truth, which a given first shot shows; `colour_by_shot` the same shot by shot. A character
                  missing on either side counts as far as a random one
    background    the same of the background's colour
    shape         share of shots whose shape is the one that the scene fixes
    visible, motion, corner, light, framing, place   share of shots, the first included unless given, that are right
    hue_spread    1 − |mean of exp(2πi·hue)| over the visible characters of the second shots; `hue_spread_truth` the
                  truth's
    """
    errors, backgrounds, shapes = [], [], []
    rights: dict[str, list[float]] = {k: [] for k in ("visible", "motion", "corner", "light", "framing", "place")}
    hues = []
    for scene, sample in zip(frames, samples, strict=True):
        readings = [read_shot(shot) for shot in scene]
        first, later = readings[0], readings[1:]
        who = sample.truth.characters[sample.truth.shots[0].who]
        if mode == "joint":
            colour, background, shape = first.character_rgb, first.background_rgb, first.shape
        else:
            colour, background, shape = who.rgb, sample.truth.background_rgb, who.shape
        errors.append([character_distance(r.character_rgb, colour) for r in later])
        backgrounds.append(np.mean([colour_error(r.background_rgb, background) for r in later]))
        shapes.append(np.mean([shape is not None and r.shape == shape for r in later]))
        hues += [r.character_rgb for r in later[:1] if r.character_rgb is not None]
        scores = [score_reading(reading, sample.truth, i) for i, reading in enumerate(readings)]
        scores = scores[1 if mode == "auto-regressive" else 0 :]
        for key, values in rights.items():
            values.append(float(np.nanmean([s[key] for s in scores])))
    return {
        "colour": Mean95.of([float(np.mean(e)) for e in errors]),
        "colour_by_shot": [Mean95.of([e[i] for e in errors]) for i in range(len(errors[0]))],
        "background": Mean95.of(backgrounds),
        "shape": Mean95.of(shapes),
        **{key: Mean95.of(values) for key, values in rights.items()},
        "hue_spread": Mean95(hue_spread(hues) if hues else 0.0, float("nan")),
        "hue_spread_truth": Mean95(
            hue_spread([s.truth.characters[s.truth.shots[0].who].rgb for s in samples]), float("nan")
        ),
    }


@torch.no_grad()
def fixed_losses(
    model: MMDiT, packed: Packed, times: Sequence[Sequence[float]], text_scale: float, seed: int = 0
) -> list[float]:
    """Per shot, the velocity error of Eq. 1 averaged over fixed draws; NaN for global prompts, noiseless at t = 0.

    times  row i gives each shot's t; noise i depends on `seed` and i alone
    """
    device = model.video_out.weight.device
    geometry = packed.layout.geometry(device, text_scale, model.config.cross)
    text = model.encoder(packed.tokens.to(device), packed.places.to(device))
    shot, is_shot, latents = geometry.streams.video_shot, packed.is_shot.to(device), packed.latents.to(device)
    total = torch.zeros(len(is_shot), device=device)
    for i, row in enumerate(times):
        t = torch.where(is_shot, torch.tensor(row, dtype=torch.float32, device=device), 0.0)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1000 * seed + i)).to(device)
        flow = noised(latents, noise, t[shot])
        total += shot_losses(model(flow.z_t, text, t, geometry), flow.target, shot, len(is_shot))
    return torch.where(is_shot, total / len(times), torch.nan).tolist()
