"""Shot by shot: each new shot is denoised over the shots before it (paper § 3.3, § 3.4, Fig. 4 a.2, b)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lct.model.config import Memory
from lct.model.mmdit import MMDiT
from lct.sample.history import CachedHistory, Guides, PooledHistory, RecomputedHistory
from lct.sample.request import (
    START,
    Prompted,
    Sampling,
    SceneRequest,
    ShotRequest,
    clean_latents,
    guided,
    shot_noise,
    state,
)


@torch.no_grad()
def autoregressive(
    model: MMDiT,
    scenes: Sequence[SceneRequest],
    sampling: Sampling,
    visibility: str = "context_causal",
    cached: bool = True,
    impl: str = "auto",
    chosen: Sequence[Sequence[int]] | None = None,
    memory: Memory | None = None,
    absolute: bool = False,
) -> list[list[Tensor]]:
    """Generate scenes shot by shot: global prompt and given shots enter the history at t = 0, generated ones at t_c.

    scenes      as many shots in each; a given shot may stand anywhere, and is seen by the shots after it
    visibility  "context_causal", "isolated" or, without a cache, "bidirectional"
    cached      keep keys and values of the history; False computes it anew in every step
    chosen      per shot, numbers of the earlier shots it sees beside the global prompt, in any order; they are gathered
                from a pool of finished shots, to compact positions. None: all of them, in their order
    memory      of that pool, where finished shots should take another place or less of it; see `Memory`
    absolute    chosen shots keep the positions of the whole scene, to see what is lost by it

    Returns, per scene and shot, latents as packed patches [T·H·W, patch channels]; given ones bitwise as they were.
    """
    alike = {(tuple(s.given is None for s in scene.shots), scene.global_prompt is None) for scene in scenes}
    if len(alike) != 1:
        raise ValueError(
            "scenes: expected as many shots in each, the same of them given, and a global prompt in all or none; "
            "split the batch"
        )
    shared = [scene.global_prompt for scene in scenes]
    new_columns = [
        [Prompted.of(model, scene.shots[i], scene.global_prompt) for scene in scenes]
        for i in range(len(scenes[0].shots))
    ]
    prompts = [Prompted.global_prompt(model, p) for p in shared if p is not None and not model.config.cross]
    if cached and len(sampling.history_times) > 1:
        raise ValueError("history_time: a schedule by age needs cached=False, or times of each shot's own")
    if chosen is None and memory is not None:
        chosen = [range(index) for index in range(len(new_columns))]
    if chosen is not None:
        _check_chosen(chosen, len(new_columns), visibility, cached)
    elif absolute:
        raise ValueError("absolute: goes with chosen shots, got no choice")
    history = _history(model, prompts, new_columns, sampling, visibility, cached, impl, chosen, memory, absolute)
    like = state(model)
    if prompts:
        history.commit(prompts, None, [like.new_zeros(1, like.shape[1])] * len(scenes))
    finished: list[list[Tensor]] = [[] for _ in scenes]
    for index, new in enumerate(new_columns):
        seen = range(index) if chosen is None else chosen[index]
        if isinstance(history, PooledHistory):
            shift = 1 if prompts else 0  # the global prompt is number 0 of the pool, and always seen
            history.choose([*range(shift), *(shift + i for i in seen)])
        requests = [scene.shots[index] for scene in scenes]
        last = index == len(new_columns) - 1
        latents = _finish(model, history, new, requests, shared, sampling, guide_history=len(seen) > 0, keep=not last)
        if not last:
            history.commit(new, requests, latents)
        for scene, x in zip(finished, latents, strict=True):
            scene.append(x)
    history.close()
    return finished


def _history(model, prompts, columns, sampling, visibility, cached, impl, chosen, memory, absolute):
    """The history that `autoregressive` asks for, with room for the longest context of any scene."""
    if not cached:
        return RecomputedHistory(model, len(columns[0]), sampling, visibility, impl)
    copies = 1 + (sampling.guidance != 1) + (sampling.history_guidance != 1)  # a shot, and the versions that guide it
    rows = [[p.rows for p in scene] for scene in zip(*columns, strict=True)]
    shared = [p.rows for p in prompts] or [0] * len(rows)
    seen = chosen or [range(i) for i in range(len(columns))]
    capacity = max(
        first + sum(scene[i] for i in earlier) + copies * scene[index]
        for first, scene in zip(shared, rows, strict=True)
        for index, earlier in enumerate(seen)
    )
    size = model, len(rows), max(capacity, *shared), sampling
    if chosen is None:
        return CachedHistory(*size, visibility, impl)
    # where a step's keys are kept, the pool takes those of the guiding versions too, behind the newest shot
    beside = (copies - 1) * max(max(scene) for scene in rows) if sampling.keep == "step" else 0
    pooled = max(first + sum(scene[:-1]) for first, scene in zip(shared, rows, strict=True)) + beside
    return PooledHistory(*size, max(pooled, 1), impl, memory, absolute)


def _check_chosen(chosen: Sequence[Sequence[int]], shots: int, visibility: str, cached: bool) -> None:
    if visibility != "context_causal" or not cached:
        raise ValueError(
            f"chosen: a choice of history needs a cache and context_causal, got cached={cached}, {visibility!r}"
        )
    if len(chosen) != shots:
        raise ValueError(f"chosen: expected a list of earlier shots for each of {shots} shots, got {len(chosen)}")
    for index, earlier in enumerate(chosen):
        if len(set(earlier)) != len(earlier) or not set(earlier) <= set(range(index)):
            raise ValueError(f"chosen: shot {index} may see each of the shots before it once, got {list(earlier)}")


def _finish(
    model: MMDiT,
    history: CachedHistory | RecomputedHistory,
    new: Sequence[Prompted],
    requests: Sequence[ShotRequest],
    shared: Sequence[str | None],
    sampling: Sampling,
    guide_history: bool,
    keep: bool,
) -> list[Tensor]:
    """The finished latents of one shot per scene, given or denoised; `keep` the keys of a step where that is asked."""
    if requests[0].given is not None:
        return [clean_latents(request, model) for request in requests]
    pairs = zip(requests, shared, strict=True)
    null = [Prompted.of(model, r, scene, "") for r, scene in pairs] if sampling.guidance != 1 else None
    alone = new if sampling.history_guidance != 1 and guide_history else None
    weights = [w for w, branch in ((sampling.guidance, null), (sampling.history_guidance, alone)) if branch is not None]
    history.begin(new, Guides(null, alone))
    z = [shot_noise(request, START, state(model)) for request in requests]
    steps = list(sampling.times([p.shot for p in new]))
    nearest = _nearest(steps, [sampling.time_of(request) for request in requests]) if keep else None
    for step, (now, then) in enumerate(steps):
        kept = sampling.keep == "step" and step == nearest
        for b, v in enumerate(history.velocity(z, now, kept)):
            z[b] = z[b] + (then[b] - now[b]).to(z[b]) * guided(v, weights).to(z[b])
    return z


def _nearest(steps: Sequence[tuple[Tensor, Tensor]], times: Sequence[float]) -> int:
    """The step at whose start the shots are nearest to `times`."""
    far = [float((now - torch.tensor(times)).abs().sum()) for now, _ in steps]
    return far.index(min(far))
