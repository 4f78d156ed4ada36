"""Scenes to packed tensors: what a step reads, a pure function of (seed, step, slot) (paper § 3.2.3, § 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lct.data.latents import patchify, size_in_patches
from lct.data.scenes import SceneSample, ShotSample, shot_prompt
from lct.layout import GLOBAL_VIDEO, SceneLayout, Shot

Tokenize = Callable[[str], Tensor]


class Dataset(Protocol):
    """Scenes, drawn by kind: "single", "cut" or "no_cut"."""

    def sample(self, kind: str, rng: np.random.Generator) -> SceneSample: ...


@dataclass(frozen=True)
class Packed:
    """Scenes as rows: what a model needs beside noise and times.

    layout   every shot of every scene, global prompts included
    latents  fp32 [S_video, patch channels], clean; zero for the dummy video of global prompts
    tokens   of all prompts one behind the other, ids [S_text] or features [S_text, C]; see `TextEncoder.tokenize`
    places   int64 [S_text], where in its prompt each stands
    """

    layout: SceneLayout
    latents: Tensor
    tokens: Tensor
    places: Tensor

    @property
    def is_shot(self) -> Tensor:
        """bool [N], False for global prompts, which are never sampled and have no loss."""
        return torch.tensor([shot.role == "shot" for shot in self.layout.shots])

    @property
    def has_loss(self) -> Tensor:
        """bool [N], shots with at least one row of video."""
        return self.is_shot & torch.tensor([shot.video_rows > 0 for shot in self.layout.shots])

    @property
    def losses(self) -> int:
        """How many shots have a loss."""
        return int(self.has_loss.sum())


@dataclass(frozen=True)
class Batch(Packed):
    """`Packed`, with the draws of one training step.

    normal   [N], the times come from; shifted bool [N], whether they take the shift
    noise    [S_video, patch channels]
    """

    normal: Tensor
    noise: Tensor
    shifted: Tensor


def pack(
    samples: list[SceneSample],
    tokenize: Tokenize,
    patch: tuple[int, int, int],
    visibility: str,
    one_place: bool = False,
    cross: bool = False,
) -> Packed:
    """Pack scenes without padding.

    one_place  start all shots of a scene at position 0
    cross      for a model with cross-attention: the global prompt is not a shot, it stands before each shot's own text

    ValueError where a size is no multiple of the patch.
    """
    channels = samples[0].shots[0].latents.shape[-1] * int(np.prod(patch))
    scenes, latents, prompts = [], [], []
    tokenize = lru_cache(maxsize=None)(tokenize)  # each prompt once: its rows, and their number
    for sample in samples:
        shared = None if sample.global_prompt is None else tokenize(sample.global_prompt)
        if shared is not None and not cross:
            prompts.append(shared)
            latents.append(torch.zeros(1, channels))
        for shot in sample.shots:
            tokens = tokenize(shot_prompt(shot.prompt, shot.cut))
            prompts.append(torch.cat([shared, tokens]) if shared is not None and cross else tokens)
            latents.append(patchify(torch.from_numpy(np.asarray(shot.latents)), patch))
        scenes.append(scene_shots(sample, lambda prompt: len(tokenize(prompt)), patch, cross))
    offsets = [[0.0] * len(scene) for scene in scenes] if one_place else None
    return Packed(SceneLayout(scenes, visibility, offsets), torch.cat(latents), *pack_tokens(prompts))


def scene_shots(
    sample: SceneSample, length: Callable[[str], int], patch: tuple[int, int, int], cross: bool = False
) -> list[Shot]:
    """The shots of a scene as a layout has them, from sizes alone; `length` counts the rows of a prompt."""
    shared = None if sample.global_prompt is None else length(sample.global_prompt)
    before = shared if shared is not None and cross else 0
    shots = [
        Shot(before + length(shot_prompt(s.prompt, s.cut)), size_in_patches(s.latents.shape, patch))
        for s in sample.shots
    ]
    return shots if shared is None or cross else [Shot(shared, GLOBAL_VIDEO, "global"), *shots]


def pack_tokens(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of prompts one behind the other, and places int64 [S_text], where in its prompt each stands."""
    return torch.cat(list(prompts)), torch.cat([torch.arange(len(prompt)) for prompt in prompts])


class Drawn(NamedTuple):
    """A scene of a step, and the generator that its times and noise come from."""

    sample: SceneSample
    rng: np.random.Generator


def draw_scene(
    dataset: Dataset,
    mixture: dict[str, float],
    image_probability: float,
    drop_probability: float,
    seed: int,
    step: int,
    slot: int,
) -> Drawn:
    """Scene `slot` of a step, with its substitutions and dropped prompts: a function of (seed, step, slot) alone.

    So there is no state of a loader, and any number of workers and processes draw the same.

    mixture  shares of the kinds of scene
    """
    rng = np.random.default_rng([seed, step, slot])
    kinds, shares = list(mixture), np.array(list(mixture.values()))
    sample = dataset.sample(kinds[rng.choice(len(kinds), p=shares / shares.sum())], rng)
    return Drawn(_dropped(_substituted(sample, image_probability, rng), drop_probability, rng), rng)


def pack_drawn(
    drawn: Sequence[Drawn],
    tokenize: Tokenize,
    patch: tuple[int, int, int],
    visibility: str,
    shared_time: bool = False,
    one_place: bool = False,
    cross: bool = False,
    unshifted: float = 0.0,
) -> Batch:
    """A batch of drawn scenes, with the draws of their times and noise, which follow on those of each scene.

    shared_time       all shots of a scene have its first one's
    unshifted         share of the shots whose times take no shift
    one_place, cross  see `pack`
    """
    packed = pack([scene.sample for scene in drawn], tokenize, patch, visibility, one_place, cross)
    normal, noise, shifted = [], [], []
    for rng, scene in zip((scene.rng for scene in drawn), packed.layout.scenes, strict=True):
        draws = rng.standard_normal(len(scene), np.float32)
        normal.append(np.full_like(draws, draws[0]) if shared_time else draws)
        rows = sum(shot.video_rows for shot in scene)
        noise.append(rng.standard_normal((rows, packed.latents.shape[1]), np.float32))
        chosen = rng.random(len(scene)) >= unshifted
        shifted.append(np.full_like(chosen, chosen[0]) if shared_time else chosen)
    return Batch(
        packed.layout,
        packed.latents,
        packed.tokens,
        packed.places,
        torch.from_numpy(np.concatenate(normal)),
        torch.from_numpy(np.concatenate(noise)),
        torch.from_numpy(np.concatenate(shifted)),
    )


def _substituted(sample: SceneSample, probability: float, rng: np.random.Generator) -> SceneSample:
    """Some shots replaced by one of their frames, encoded as an image (§ 3.4)."""

    def shot(s: ShotSample) -> ShotSample:
        if rng.random() >= probability or not len(s.images):
            return s
        chosen = int(rng.integers(len(s.images)))
        return replace(s, latents=s.images[chosen : chosen + 1])

    return replace(sample, shots=tuple(shot(s) for s in sample.shots))


def _dropped(sample: SceneSample, probability: float, rng: np.random.Generator) -> SceneSample:
    """Some prompts replaced by the null prompt, mark and all.

    In one scene of two every shot is drawn on its own, as guidance needs it shot by shot; in the other all shots share
    one draw, as guidance needs it in joint denoising. The global prompt is drawn on its own.
    """
    draws = rng.random(1 + len(sample.shots))
    if rng.random() < 0.5:
        draws[1:] = draws[1]
    keep = draws >= probability
    shots = tuple(s if k else replace(s, prompt="", cut=False) for s, k in zip(sample.shots, keep[1:], strict=True))
    scene_prompt = sample.global_prompt if keep[0] or sample.global_prompt is None else ""
    return replace(sample, global_prompt=scene_prompt, shots=shots)
