"""Scenes to packed tensors: one training step's batch, a pure function of (seed, step) (paper § 3.2.3, § 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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


@dataclass(frozen=True)
class Batch(Packed):
    """`Packed`, with the draws of one training step: normal [N] for the times, noise [S_video, patch channels]."""

    normal: Tensor
    noise: Tensor


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
    for sample in samples:
        scene, shared = [], None if sample.global_prompt is None else tokenize(sample.global_prompt)
        if shared is not None and not cross:
            scene.append(Shot(len(shared), GLOBAL_VIDEO, "global"))
            prompts.append(shared)
            latents.append(torch.zeros(1, channels))
        for shot in sample.shots:
            tokens = tokenize(shot_prompt(shot.prompt, shot.cut))
            if shared is not None and cross:
                tokens = torch.cat([shared, tokens])
            scene.append(Shot(len(tokens), size_in_patches(shot.latents.shape, patch)))
            prompts.append(tokens)
            latents.append(patchify(torch.from_numpy(shot.latents), patch))
        scenes.append(scene)
    offsets = [[0.0] * len(scene) for scene in scenes] if one_place else None
    return Packed(SceneLayout(scenes, visibility, offsets), torch.cat(latents), *pack_tokens(prompts))


def pack_tokens(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of prompts one behind the other, and places int64 [S_text], where in its prompt each stands."""
    return torch.cat(list(prompts)), torch.cat([torch.arange(len(prompt)) for prompt in prompts])


def draw_batch(
    dataset: Dataset,
    tokenize: Tokenize,
    patch: tuple[int, int, int],
    visibility: str,
    mixture: dict[str, float],
    image_probability: float,
    drop_probability: float,
    scenes: int,
    seed: int,
    step: int,
    shared_time: bool = False,
    one_place: bool = False,
    cross: bool = False,
) -> Batch:
    """The batch of one step. Every scene, substitution, dropped prompt, time and noise of slot i depends on
    (seed, step, i) alone: no loader state, any number of workers.

    mixture      shares of the kinds of scene
    shared_time  all shots of a scene have its first one's
    one_place, cross  see `pack`
    """
    kinds, shares = list(mixture), np.array(list(mixture.values()))
    rngs = [np.random.default_rng([seed, step, slot]) for slot in range(scenes)]
    samples = []
    for rng in rngs:
        sample = dataset.sample(kinds[rng.choice(len(kinds), p=shares / shares.sum())], rng)
        samples.append(_dropped(_substituted(sample, image_probability, rng), drop_probability, rng))
    packed = pack(samples, tokenize, patch, visibility, one_place, cross)
    normal, noise = [], []
    for rng, scene in zip(rngs, packed.layout.scenes, strict=True):
        draws = rng.standard_normal(len(scene), np.float32)
        normal.append(np.full_like(draws, draws[0]) if shared_time else draws)
        rows = sum(shot.video_rows for shot in scene)
        noise.append(rng.standard_normal((rows, packed.latents.shape[1]), np.float32))
    return Batch(
        packed.layout,
        packed.latents,
        packed.tokens,
        packed.places,
        torch.from_numpy(np.concatenate(normal)),
        torch.from_numpy(np.concatenate(noise)),
    )


def _substituted(sample: SceneSample, probability: float, rng: np.random.Generator) -> SceneSample:
    """Some shots replaced by one of their frames, encoded as an image (§ 3.4)."""

    def shot(s: ShotSample) -> ShotSample:
        if rng.random() >= probability or not len(s.images):
            return s
        return replace(s, latents=s.images[rng.integers(len(s.images))][None])

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
