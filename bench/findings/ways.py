"""The ways to make a scene that the findings compare: the paper's modes and stand-ins for its rivals (§ 4.1, § 4.2).

Every way gets the same prompts, sizes and seeds, so that differences between two ways are differences of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lct.data.latents import patchify, size_in_patches
from lct.data.scenes import SceneSample
from lct.data.toy import ESTABLISHING
from lct.evaluate import Frames, frames_of
from lct.model.mmdit import MMDiT
from lct.sample import Sampling, SceneRequest, ShotRequest, autoregressive, joint
from lct.train.config import TrainConfig

STEPS, GUIDANCE = 20, 1.5


@dataclass(frozen=True)
class Weights:
    """A model and the configuration that it was trained with."""

    model: MMDiT
    config: TrainConfig

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.model.config.patch

    @property
    def causal(self) -> bool:
        return self.config.visibility == "context_causal"

    def sampling(self, **options) -> Sampling:
        return Sampling.of(self.config, **{"steps": STEPS, "guidance": GUIDANCE} | options)


def requests(weights: Weights, samples: Sequence[SceneSample], given: Sequence[int] = ()) -> list[SceneRequest]:
    """Scenes like the samples, each shot with a seed of its own; shots in `given` with their media."""
    return [SceneRequest.like(s, weights.patch, 1_000_003 + 1000 * i, given) for i, s in enumerate(samples)]


def to_scenes(weights: Weights, latents: Sequence[Sequence[Tensor]], scenes: Sequence[SceneRequest]) -> Frames:
    """Frames of generated latents."""
    return [
        [frames_of(rows, shot.video, weights.patch) for rows, shot in zip(made, scene.shots, strict=True)]
        for made, scene in zip(latents, scenes, strict=True)
    ]


def together(weights: Weights, scenes: Sequence[SceneRequest], visibility="bidirectional", **options) -> Frames:
    """All shots at once (Fig. 4 a.1)."""
    latents = joint(weights.model, scenes, weights.sampling(**options), visibility)
    return to_scenes(weights, latents, scenes)


def one_by_one(weights: Weights, scenes: Sequence[SceneRequest], chosen=None, absolute=False, **options) -> Frames:
    """Shot by shot, with a cache where the weights allow one (Fig. 4 a.2, b)."""
    return to_scenes(weights, shot_by_shot(weights, scenes, chosen, absolute, **options), scenes)


def shot_by_shot(weights: Weights, scenes, chosen=None, absolute=False, **options) -> list[list[Tensor]]:
    """The latents of `one_by_one`."""
    causal = weights.causal
    visibility = "context_causal" if causal else "bidirectional"
    return autoregressive(
        weights.model, scenes, weights.sampling(**options), visibility, causal, chosen=chosen, absolute=absolute
    )


def keyframes_then_animation(
    weights: Weights, scenes: Sequence[SceneRequest], entering: Sequence[int] = (), **options
) -> Frames:
    """A keyframe of every shot, all made together (T = 1), then each shot made alone from its own keyframe.

    As the storyboard of a keyframe method would, the keyframe of a shot whose character comes in later shows the place
    without it.
    """
    boards = [replace(s, shots=tuple(still(x, i in entering) for i, x in enumerate(s.shots))) for s in scenes]
    latents = joint(weights.model, boards, weights.sampling(**options))
    alone = [
        SceneRequest(scene.global_prompt, (replace(board.shots[i], given=frames[i]), scene.shots[i]))
        for scene, board, frames in zip(scenes, boards, latents, strict=True)
        for i in range(len(scene.shots))
    ]
    made = iter(joint(weights.model, alone, weights.sampling(**options)))
    animated = [[next(made)[1] for _ in scene.shots] for scene in scenes]
    return to_scenes(weights, animated, scenes)


def still(shot: ShotRequest, nobody: bool = False) -> ShotRequest:
    """The shot as an image (T = 1), perhaps of its place alone."""
    prompt = shot.prompt
    if nobody:
        mark = prompt[: prompt.index("]") + 2] if prompt.startswith("[") else ""
        prompt = f"{mark}{ESTABLISHING} of the {prompt.rsplit(' ', 1)[1]}"
    return replace(shot, video=(1, *shot.video[1:]), prompt=prompt)


def on_identity_images(
    weights: Weights,
    scenes: Sequence[SceneRequest],
    portraits: Sequence[dict[int, ShotRequest]],
    who: Sequence[int | None],
    **options,
) -> Frames:
    """Every shot alone on a picture of its character and nothing else.

    portraits  per scene and character, a given image; `who` the character of every shot
    """
    alone = [
        SceneRequest(scene.global_prompt, (portraits[b][character], scene.shots[i]))
        for b, scene in enumerate(scenes)
        for i, character in enumerate(who)
        if character is not None
    ]
    made = iter(joint(weights.model, alone, weights.sampling(**options)))
    nobody = [
        SceneRequest(scene.global_prompt, (scene.shots[i],))
        for scene in scenes
        for i, character in enumerate(who)
        if character is None
    ]
    empty = iter(joint(weights.model, nobody, weights.sampling(**options))) if nobody else iter(())
    latents = [[next(empty)[0] if c is None else next(made)[1] for c in who] for _ in scenes]
    return to_scenes(weights, latents, scenes)


def image(latents: np.ndarray, prompt: str, patch: tuple[int, int, int], seed: int = 0) -> ShotRequest:
    """A given picture, float [H, W, C]."""
    clip = np.ascontiguousarray(latents[None], dtype=np.float32)
    return ShotRequest(prompt, size_in_patches(clip.shape, patch), seed, patchify(torch.from_numpy(clip), patch))
