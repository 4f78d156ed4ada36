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
    """Denoise all shots of every scene together; shots that are given condition the others at t = 0.

    Returns, per scene and shot, latents as packed patches [T·H·W, patch channels]. What the model says of given shots
    is discarded; their latents come back bitwise as they were.
    """
    like = state(model)
    dtype = sampling.compute_dtype(model)
    prompted, null, latents, made = [], [], [], []
    for scene in scenes:
        cond = [Prompted.global_prompt(model, scene.global_prompt)] if scene.global_prompt is not None else []
        uncond = list(cond)
        latents += [like.new_zeros(1, like.shape[1])] * len(cond)
        made += [False] * len(cond)
        for shot in scene.shots:
            cond.append(Prompted.of(model, shot))
            uncond.append(cond[-1] if shot.given is not None else Prompted.of(model, shot, ""))
            given = shot.given is not None
            latents.append(clean_latents(shot, model) if given else shot_noise(shot, START, like))
            made.append(not given)
        prompted.append(cond)
        null.append(uncond)
    branches = prompted + null if sampling.guidance != 1 else prompted
    layout = SceneLayout([[p.shot for p in scene] for scene in branches], visibility)
    geometry = layout.geometry(like.device, sampling.text_scale)
    text = features(model, [p for scene in branches for p in scene], like.device)

    z, is_made = torch.cat(latents), torch.tensor(made)
    shot_of_row = geometry.streams.video_shot[: len(z)].cpu()
    rows = is_made[shot_of_row].nonzero()[:, 0].to(like.device)
    copies = 2 if sampling.guidance != 1 else 1
    for now, then in sampling.times(layout.shots[: len(made)]):
        times = torch.where(is_made, now, 0.0).repeat(copies).to(like.device)
        velocity = model(z.repeat(copies, 1).to(dtype), text, times, geometry, impl=impl).to(z.dtype).chunk(copies)
        v = velocity[0] if copies == 1 else guided(velocity[0], velocity[1], sampling.guidance)
        step = (then - now)[shot_of_row].to(like)[:, None]
        z[rows] += (step * v)[rows]
    parts = iter(z.split([shot.video_rows for shot in layout.shots[: len(made)]]))
    shots = [[next(parts) for _ in scene] for scene in prompted]
    return [s if scene.global_prompt is None else s[1:] for s, scene in zip(shots, scenes, strict=True)]
