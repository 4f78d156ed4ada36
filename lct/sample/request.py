"""What to generate, and how: requests, seeds, the steps of denoising and guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lct.data.batch import pack_tokens
from lct.data.latents import patchify, size_in_patches
from lct.data.scenes import SceneSample, shot_prompt
from lct.kernels.reference import statistics_dtype
from lct.layout import GLOBAL_VIDEO, Shot
from lct.model.config import COMPUTE_DTYPES
from lct.model.flow import shift_time, shot_shift
from lct.model.mmdit import MMDiT

KEEP = ("pass", "step")
START, HISTORY = 0, 1  # the two noises of a shot: where denoising begins, and what it is perturbed with as history

Times = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ShotRequest:
    """One shot to generate, or one that is given.

    prompt  the text the model reads, `[SHOT CUT]` included where it follows a cut
    video   (T, H, W) in patches
    seed    of this shot alone: its noise does not depend on the other shots
    given   clean latents as packed patches [T·H·W, patch channels]; None for a shot to generate
    history_time  t_c of this shot as history; None: 0 for a given shot, that of `Sampling` for a generated one
    """

    prompt: str
    video: tuple[int, int, int]
    seed: int
    given: Tensor | None = field(default=None, compare=False)
    history_time: float | None = None

    def __post_init__(self):
        shot = Shot(0, self.video)
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        if self.history_time is not None:
            _check_history_time(self.history_time)
        if self.given is not None and (self.given.ndim != 2 or len(self.given) != shot.video_rows):
            raise ValueError(
                f"given: expected [{shot.video_rows}, channels] for {self.video}, got {list(self.given.shape)}"
            )


@dataclass(frozen=True)
class SceneRequest:
    """Shots that belong together, and the global prompt, or None where there is none."""

    global_prompt: str | None
    shots: tuple[ShotRequest, ...]

    def __post_init__(self):
        if not self.shots:
            raise ValueError("shots: expected at least one, got none")

    @property
    def prompts(self) -> list[str]:
        """All that a text encoder is asked for, the null prompt as well."""
        return [self.global_prompt or "", *(shot.prompt for shot in self.shots), ""]

    @classmethod
    def like(
        cls, sample: SceneSample, patch: tuple[int, int, int], seed: int, given: Sequence[int] = ()
    ) -> SceneRequest:
        """The request for a scene like `sample`: its prompts and sizes, the shots in `given` with their media."""
        shots = []
        for index, shot in enumerate(sample.shots):
            size = size_in_patches(shot.latents.shape, patch)
            rows = patchify(torch.from_numpy(shot.latents), patch) if index in given else None
            prompt = shot_prompt(shot.prompt, shot.cut)
            shots.append(ShotRequest(prompt, size, seed + index, rows))
        return cls(sample.global_prompt, tuple(shots))


@dataclass(frozen=True)
class Sampling:
    """How to denoise.

    steps         Euler steps from t = 1 to t = 0
    guidance      w of the prompts and `history_guidance` w_h of the other shots, each 1 without guidance:
                  v + (w − 1)(v − v_null) + (w_h − 1)(v − v_alone). The null branch drops the prompts of the shots
                  being made and keeps history and global prompt; the other keeps the prompts and sees no other shot
    history_time  t_c, the noise level of generated shots as history; 0.1 to 0.5 in the paper (§ 4.2). Several numbers
                  are a schedule by age: of the shot just before, the one before that, …, the last for all older ones
    keep          which keys and values of a finished shot the cache keeps: of a "pass" of its own at t_c, or of the
                  denoising "step" nearest t_c, which spares the pass
    shift         s of the time shift, and `shift_rows`, the number of video rows it is for; 0: the same for all shots
    text_scale    λ of the positions the weights were trained with, and `one_place`, whether all shots shared them
    dtype         of the streams, keys and values, such as "bfloat16"; the weights' own by default. Latents and times
                  stay in fp32 (fp64 with fp64 weights) whatever it is
    """

    steps: int = 20
    guidance: float = 1.0
    history_guidance: float = 1.0
    history_time: float | tuple[float, ...] = 0.1
    keep: str = "pass"
    shift: float = 1.0
    shift_rows: int = 0
    text_scale: float = 1.0
    one_place: bool = False
    dtype: str | None = None

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected a number above 0, got {self.shift}")
        if self.shift_rows < 0:
            raise ValueError(f"shift_rows: expected 0 or more, got {self.shift_rows}")
        if not 0 <= self.text_scale < math.inf:
            raise ValueError(f"text_scale: expected a number of at least 0, got {self.text_scale}")
        if self.dtype is not None and self.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype: expected one of {COMPUTE_DTYPES}, got {self.dtype!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        for name in ("guidance", "history_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        if self.keep not in KEEP:
            raise ValueError(f"keep: expected one of {KEEP}, got {self.keep!r}")
        if not self.history_times:
            raise ValueError("history_time: expected a number, or one or more by age, got none")
        for time in self.history_times:
            _check_history_time(time)

    @classmethod
    def of(cls, config: Any, **options) -> Sampling:
        """For weights trained with a `TrainConfig`: its time shift and positions; `options` are the other fields."""
        shared = {name: getattr(config, name) for name in ("shift", "shift_rows", "text_scale", "one_place")}
        return cls(**shared | options)

    @property
    def history_times(self) -> tuple[float, ...]:
        """t_c by age; one number where it is the same at all ages."""
        return self.history_time if isinstance(self.history_time, tuple) else (self.history_time,)

    def time_of(self, request: ShotRequest, age: int = 0) -> float:
        """t_c of a finished shot with `age` others after it."""
        if request.history_time is not None:
            return request.history_time
        return 0.0 if request.given is not None else self.history_times[min(age, len(self.history_times) - 1)]

    def compute_dtype(self, model: MMDiT) -> torch.dtype:
        """dtype of a forward pass; ValueError where fp64 meets weights of less."""
        own = model.video_out.weight.dtype
        asked = own if self.dtype is None else getattr(torch, self.dtype)
        if statistics_dtype(asked) != statistics_dtype(own):
            raise ValueError(f"dtype: expected float64 with weights in float64 alone, got {asked} and weights in {own}")
        return asked

    def times(self, shots: Sequence[Shot]) -> Iterator[Times]:
        """(t now, t next) of each shot, step by step: one u for all of them, each mapped through its own shift."""
        shifts = torch.tensor([shot_shift(self.shift, shot.video_rows, self.shift_rows) for shot in shots])
        u = torch.linspace(1, 0, self.steps + 1)
        t = [shift_time(value, shifts) for value in u]
        return zip(t[:-1], t[1:], strict=True)


def usual_dtype(config: Any, device: str) -> Literal["bfloat16"] | None:
    """In which to sample where none is asked for, with weights trained with a `TrainConfig`: on a GPU in half
    precision, if they were trained in it. CPUs may be far slower in it. None: in that of the weights."""
    return "bfloat16" if device != "cpu" and config.compute_dtype == "bfloat16" else None


@dataclass(frozen=True)
class Prompted:
    """A shot of the layout with its tokens; `rows` of it are attended to, and cached."""

    shot: Shot
    tokens: Tensor
    rows: int

    @classmethod
    def of(cls, model: MMDiT, request: ShotRequest, shared: str | None = None, prompt: str | None = None) -> Prompted:
        """The tokens of a shot's prompt, or of `prompt` in its place. With cross-attention those of the scene's global
        prompt, `shared`, stand before them."""
        tokens = model.encoder.tokenize(request.prompt if prompt is None else prompt)
        if model.config.cross and shared is not None:
            tokens = torch.cat([model.encoder.tokenize(shared), tokens])
        shot = Shot(len(tokens), request.video)
        return cls(shot, tokens, shot.video_rows if model.config.cross else shot.rows)

    @classmethod
    def global_prompt(cls, model: MMDiT, prompt: str) -> Prompted:
        """The global prompt as a shot of its own, which it is without cross-attention."""
        tokens = model.encoder.tokenize(prompt)
        shot = Shot(len(tokens), GLOBAL_VIDEO, "global")
        return cls(shot, tokens, shot.rows)


def features(model: MMDiT, prompted: Sequence[Prompted], device: torch.device) -> Tensor:
    """Text features of shots in row order, [S_text, text_channels]."""
    tokens, places = pack_tokens([p.tokens for p in prompted])
    return model.encoder(tokens.to(device), places.to(device))


def state(model: MMDiT) -> Tensor:
    """An empty tensor on the device and in the dtype in which latents are kept between steps."""
    weight = model.video_out.weight
    return torch.empty(0, model.config.patch_channels, dtype=statistics_dtype(weight.dtype), device=weight.device)


def clean_latents(request: ShotRequest, model: MMDiT) -> Tensor:
    """The latents of a given shot, as they are where the device and dtype allow; ValueError for other channels."""
    assert request.given is not None
    if request.given.shape[1] != model.config.patch_channels:
        raise ValueError(f"given: expected {model.config.patch_channels} channels, got {request.given.shape[1]}")
    return request.given.to(state(model))


def shot_noise(request: ShotRequest, purpose: int, like: Tensor) -> Tensor:
    """Noise [T·H·W, C] of a shot, drawn from its seed and nothing else; C, dtype and device as `like`."""
    shape = (math.prod(request.video), like.shape[1])
    draw = np.random.default_rng([request.seed, purpose]).standard_normal(shape, np.float32)
    return torch.from_numpy(draw).to(like)


def as_history(clean: Tensor, request: ShotRequest, time: float) -> Tensor:
    """A finished shot perturbed to t_c, with noise drawn once from the shot's seed (§ 4.2); itself at t_c = 0."""
    return torch.lerp(clean, shot_noise(request, HISTORY, clean), time) if time else clean


def guided(velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """v + Σ (w − 1)(v − v') over the branches v' behind the first, each with its weight."""
    first, *others = velocities
    for other, weight in zip(others, weights, strict=True):
        first = first + (weight - 1) * (velocities[0] - other)
    return first


def _check_history_time(time: float) -> None:
    if not 0 <= time < 1:
        raise ValueError(f"history_time: expected 0 <= t_c < 1, got {time}")
