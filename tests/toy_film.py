"""Toy scenes as films with known cuts, to test the detection of cuts, scenes and events."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from lct.data.scenes import SceneSample, ShotSample
from lct.data.toy import ShotTruth, ToyTruth, path_of, render


@dataclass(frozen=True)
class ToyFilm:
    """Scenes shown one after the other.

    frames        uint8 [N, H, W, 3]
    cuts          first frame of every shot that follows a cut, starts of later scenes included
    scene_starts  first frame of every scene, beginning with 0
    """

    frames: np.ndarray
    cuts: tuple[int, ...]
    scene_starts: tuple[int, ...]


def toy_film(scenes: Sequence[SceneSample], scale: int = 4, frames_per_shot: Sequence[int] = (12, 18, 24)) -> ToyFilm:
    """Show scenes one after the other, larger and longer, with the true cuts.

    scenes           toy scenes of one frame size
    scale            pixels of the film to one pixel of the scene
    frames_per_shot  lengths, taken in turn; the motion of a shot is spread over its frames
    Raises ValueError where there are no scenes, their sizes differ, or one is not a toy scene.
    """
    if len({scene.shots[0].latents.shape[1:] for scene in scenes}) != 1:
        raise ValueError("scenes: expected one or more scenes of one frame size")
    lengths = cycle(frames_per_shot)
    clips, cuts, scene_starts, now = [], [], [], 0
    for scene in scenes:
        truth = scene.truth
        if not isinstance(truth, ToyTruth):
            raise ValueError(f"scenes: expected toy scenes, with their truth, got one with truth {truth!r}")
        scene_starts.append(now)
        for i, (shot, event) in enumerate(zip(scene.shots, truth.shots, strict=True)):
            if now and (i == 0 or shot.cut):
                cuts.append(now)
            clips.append(_film_shot(truth, event, shot, next(lengths), scale, stops=shot.cut or len(scene.shots) == 1))
            now += len(clips[-1])
    return ToyFilm(np.concatenate(clips), tuple(cuts), tuple(scene_starts))


def _film_shot(truth: ToyTruth, event: ShotTruth, shot: ShotSample, frames: int, scale: int, stops: bool) -> np.ndarray:
    """uint8 [frames, H·scale, W·scale, 3]. A shot that `stops` ends where its toy shot does; a segment of a long
    shot goes on to where the next one starts."""
    toy_frames, height, width, _ = shot.latents.shape
    last = toy_frames - 1 if stops else toy_frames * (frames - 1) / frames
    path = path_of(event, np.linspace(0, last, frames), toy_frames, (height, width))
    pixels = render(truth, event, path, height, width, scale)
    return np.round(255 * pixels).astype(np.uint8)
