"""All shots of a scene at once, some of them given (paper § 3.2.3, Fig. 4 a.1, a.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lct.layout import SceneLayout
from lct.model.mmdit import MMDiT
from lct.sample.request import (
    START,
    Prompted,
    Sampling,
    SceneRequest,
    as_history,
    clean_latents,
    features,
    guided,
    shot_noise,
    state,
)


@torch.no_grad()
def joint(
    model: MMDiT,
    scenes: Sequence[SceneRequest],
    sampling: Sampling,
    visibility: str = "bidirectional",
    impl: str = "auto",
) -> list[list[Tensor]]:
    """Denoise all shots of every scene together; shots that are given condition the others, at t = 0 or times of their
    own.

    Returns, per scene and shot, latents as packed patches [T·H·W, patch channels]. What the model says of given shots
    is discarded; their latents come back bitwise as they were.
    """
    like = state(model)
    prompted, null, latents, made, times_given = [], [], [], [], []
    for scene in scenes:
        shared = scene.global_prompt
        cond = [Prompted.global_prompt(model, shared)] if shared is not None and not model.config.cross else []
        uncond = list(cond)
        latents += [like.new_zeros(1, like.shape[1])] * len(cond)
        made += [False] * len(cond)
        times_given += [0.0] * len(cond)
        for shot in scene.shots:
            cond.append(Prompted.of(model, shot, shared))
            uncond.append(cond[-1] if shot.given is not None else Prompted.of(model, shot, shared, ""))
            given = shot.given is not None
            times_given.append(sampling.time_of(shot) if given else 1.0)
            clean = clean_latents(shot, model) if given else shot_noise(shot, START, like)
            latents.append(as_history(clean, shot, times_given[-1]) if given else clean)
            made.append(not given)
        prompted.append(cond)
        null.append(uncond)
    weights = [w for w in (sampling.guidance, sampling.history_guidance) if w != 1]
    passes = [_Pass(prompted + null if sampling.guidance != 1 else prompted, visibility, model, sampling)]
    if sampling.history_guidance != 1:
        passes.append(_Pass(prompted, "isolated", model, sampling))

    z, is_made = torch.cat(latents), torch.tensor(made)
    shot_of_row = passes[0].geometry.streams.video_shot[: len(z)].cpu()
    rows = is_made[shot_of_row].nonzero()[:, 0].to(like.device)
    shots = [p.shot for scene in prompted for p in scene]
    for now, then in sampling.times(shots):
        times = torch.where(is_made, now, torch.tensor(times_given)).to(like.device)
        branches = [v for one in passes for v in one.velocities(z, times, impl)]
        step = (then - now)[shot_of_row].to(like)[:, None]
        z[rows] += (step * guided(branches, weights))[rows]
    parts = iter(z.split([shot.video_rows for shot in shots]))
    finished = [[next(parts) for _ in scene] for scene in prompted]
    return [
        [x if shot.given is None else clean_latents(shot, model) for x, shot in zip(rows, scene.shots, strict=True)]
        for rows, scene in zip((f[-len(s.shots) :] for f, s in zip(finished, scenes, strict=True)), scenes, strict=True)
    ]


class _Pass:
    """One run of the model over the scenes, or over them and their versions with the null prompt."""

    def __init__(self, scenes: list[list[Prompted]], visibility: str, model: MMDiT, sampling: Sampling):
        device = model.video_out.weight.device
        offsets = [[0.0] * len(scene) for scene in scenes] if sampling.one_place else None
        layout = SceneLayout([[p.shot for p in scene] for scene in scenes], visibility, offsets)
        self.geometry = layout.geometry(device, sampling.text_scale, model.config.cross)
        self.text = features(model, [p for scene in scenes for p in scene], device)
        self.model, self.dtype = model, sampling.compute_dtype(model)

    def velocities(self, z: Tensor, times: Tensor, impl: str) -> tuple[Tensor, ...]:
        copies = len(self.geometry.shots) // len(times)
        video = z.repeat(copies, 1).to(self.dtype)
        return self.model(video, self.text, times.repeat(copies), self.geometry, impl=impl).to(z.dtype).chunk(copies)
