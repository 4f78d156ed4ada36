"""What a scene is as data: prompts and latents, shot by shot (paper § 3.2.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHOT_CUT = "[SHOT CUT]"


def shot_prompt(prompt: str, cut: bool) -> str:
    """The text a model reads for one shot: `[SHOT CUT]` stands before it when it follows a cut (§ 3.2.1, § 4.3)."""
    return f"{SHOT_CUT} {prompt}".strip() if cut else prompt


def single_prompt(shared: str | None, prompt: str) -> str:
    """The text that a model reads which knows single shots alone: what scenes share stands before it, without marks."""
    return ". ".join(part for part in (shared, prompt) if part)


@dataclass(frozen=True)
class ShotSample:
    """One shot of a scene.

    latents  float32 [T, H, W, C], in latent pixels (a patch is cut from them later); `Stored` stands for those on disk
    prompt   what happens in this shot, without the `[SHOT CUT]` mark
    cut      True where the shot belongs to an authentic multi-shot scene; False for a segment of one long shot and
             for a single shot
    images   float32 [K, H, W, C], frames of the shot encoded as single images (image substitution, § 3.4); K may be 0
    """

    latents: np.ndarray
    prompt: str
    cut: bool
    images: np.ndarray


@dataclass(frozen=True)
class SceneSample:
    """Shots that belong together. `global_prompt` is None for a single shot, which has no second tier of prompts."""

    global_prompt: str | None
    shots: tuple[ShotSample, ...]
    truth: Any = field(default=None, compare=False)
