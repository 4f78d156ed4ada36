"""Shot by shot: each new shot is denoised over the shots before it (paper § 3.3, § 3.4, Fig. 4 a.2, b).

The history is either kept as keys and values (`CachedHistory`, context-causal weights) or computed anew in every step
(`RecomputedHistory`, any visibility). Both give the same shots where both can run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lct.layout import Geometry, SceneLayout
from lct.model.cache import HistoryPool, KVCache
from lct.model.mmdit import MMDiT
from lct.sample.request import (
    START,
    Prompted,
    Sampling,
    SceneRequest,
    ShotRequest,
    as_history,
    clean_latents,
    features,
    guided,
    shot_noise,
    state,
)


class _History:
    """The shots that stand, scene by scene, and the velocity of a new one that sees them."""

    def __init__(self, model: MMDiT, scenes: int, sampling: Sampling, visibility: str, impl: str):
        self.model, self.sampling, self.visibility, self.impl = model, sampling, visibility, impl
        self.shots: list[list[Prompted]] = [[] for _ in range(scenes)]
        self.device, self.dtype = model.video_out.weight.device, sampling.compute_dtype(model)

    def _layout(self, new: Sequence[Prompted]) -> SceneLayout:
        scenes = [[p.shot for p in (*old, shot)] for old, shot in zip(self.shots, new, strict=True)]
        return SceneLayout(scenes, self.visibility)

    def _text(self, prompted: Sequence[Prompted]) -> Tensor:
        return features(self.model, prompted, self.device)

    def close(self) -> None:
        """Wait until what this holds may be let go."""

    def _remember(self, new: Sequence[Prompted]) -> None:
        for scene, shot in zip(self.shots, new, strict=True):
            scene.append(shot)


class CachedHistory(_History):
    """Keys and values of the history, written once when a shot is committed."""

    def __init__(
        self,
        model: MMDiT,
        scenes: int,
        capacity: int,
        sampling: Sampling,
        visibility: str = "context_causal",
        impl: str = "auto",
    ):
        super().__init__(model, scenes, sampling, visibility, impl)
        self.cache = KVCache(model.config, scenes, capacity, self.dtype, self.device)

    def begin(self, new: Sequence[Prompted], null: Sequence[Prompted] | None) -> None:
        """Make ready to denoise one new shot per scene; `null` are the same shots with the null prompt, to guide."""
        alternatives = [p.shot for p in null] if null else None
        self._geometry = self._tail(new, alternatives)
        branches = [p for pair in zip(new, null, strict=True) for p in pair] if null else new
        self._features, self._copies = self._text(branches), 2 if null else 1

    def velocity(self, z: Sequence[Tensor], times: Tensor) -> list[tuple[Tensor, ...]]:
        """Per scene, the velocity of its new shot, and of its null branch where there is one."""
        video = torch.cat([x for x in z for _ in range(self._copies)]).to(self.dtype)
        per_shot = times.repeat_interleave(self._copies).to(self.device)
        v = self.model(video, self._features, per_shot, self._geometry, self.cache, impl=self.impl)
        parts = v.split([len(x) for x in z for _ in range(self._copies)])
        return [parts[i : i + self._copies] for i in range(0, len(parts), self._copies)]

    def commit(self, new: Sequence[Prompted], latents: Sequence[Tensor], time: float) -> None:
        """One pass over the finished shots at `time` writes the keys and values that later shots see."""
        self._write(new, latents, time)
        self._remember(new)
        self.cache.commit()

    def _write(self, new, latents, time, pool=None) -> None:
        times = torch.full((len(new),), time, device=self.device)
        video = torch.cat(list(latents)).to(self.dtype)
        self.model(video, self._text(new), times, self._tail(new, None), self.cache, pool, self.impl)

    def _tail(self, new, alternatives) -> Geometry:
        scale = self.sampling.text_scale
        return self._layout(new).tail(self.cache.shots, self.cache.capacity, alternatives, self.device, scale)


class PooledHistory(CachedHistory):
    """The same cache, filled anew for every shot with those that it chooses from a pool of all finished ones (§ 3.4).

    Chosen shots stand one after another at compact positions, as if there had been no others. Their keys and values
    are those of the pass that finished them, in the context they saw then. `capacity` rows hold the longest context,
    `pool_capacity` rows all finished shots of a scene.
    """

    def __init__(
        self,
        model: MMDiT,
        scenes: int,
        capacity: int,
        sampling: Sampling,
        pool_capacity: int,
        impl: str = "auto",
        pool_device: str | torch.device | None = None,
    ):
        super().__init__(model, scenes, capacity, sampling, impl=impl)
        self.pool = HistoryPool(
            model.config, scenes, pool_capacity, self.dtype, pool_device or self.device, self.device
        )
        self.finished: list[list[Prompted]] = [[] for _ in range(scenes)]

    def choose(self, shots: Sequence[int]) -> None:
        """The shots at hand see these finished ones, in this order; numbers as committed, from 0."""
        self.cache.rewind(0)
        self.shots = [[scene[i] for i in shots] for scene in self.finished]
        if shots:
            layout = SceneLayout([[p.shot for p in scene] for scene in self.shots], self.visibility)
            chosen = [shots] * len(self.finished)
            self.pool.assemble_(self.cache, chosen, layout, self.sampling.text_scale, self.impl)

    def commit(self, new: Sequence[Prompted], latents: Sequence[Tensor], time: float) -> None:
        """One pass at `time`, over the chosen shots, writes the keys and values into the pool."""
        slots = self.pool.admit([p.shot.rows for p in new]).to(self.device)
        self._write(new, latents, time, self.pool.at(slots))
        for scene, shot in zip(self.finished, new, strict=True):
            scene.append(shot)

    def close(self) -> None:
        if self.pool.keys[0].device != self.device:
            torch.cuda.synchronize(self.device)  # kernels may still be reading what is about to be freed


class RecomputedHistory(_History):
    """Every step runs the whole scene; needs no cache and works with bidirectional weights too (Fig. 4 a.2)."""

    def __init__(self, model: MMDiT, scenes: int, sampling: Sampling, visibility: str, impl: str = "auto"):
        super().__init__(model, scenes, sampling, visibility, impl)
        self.latents: list[list[Tensor]] = [[] for _ in range(scenes)]
        self.times: list[float] = []

    def begin(self, new: Sequence[Prompted], null: Sequence[Prompted] | None) -> None:
        """See `CachedHistory.begin`; here a null branch is a scene of its own."""
        self._branches = [new, null] if null else [new]
        scenes = [scene for branch in self._branches for scene in self._layout(branch).scenes]
        layout = SceneLayout(scenes, self.visibility)
        self._geometry = layout.geometry(self.device, self.sampling.text_scale)
        prompted = [
            p for branch in self._branches for old, p1 in zip(self.shots, branch, strict=True) for p in (*old, p1)
        ]
        self._features = self._text(prompted)

    def velocity(self, z: Sequence[Tensor], times: Tensor) -> list[tuple[Tensor, ...]]:
        rows = [x for old, new in zip(self.latents, z, strict=True) for x in (*old, new)]
        per_shot = torch.cat([torch.tensor([*self.times, float(t)], dtype=times.dtype) for t in times])
        copies = len(self._branches)
        v = self.model(
            torch.cat(rows * copies).to(self.dtype),
            self._features,
            per_shot.repeat(copies).to(self.device),
            self._geometry,
            impl=self.impl,
        )
        parts = v.split([len(x) for x in rows] * copies)[len(self.times) :: len(self.times) + 1]
        return list(zip(*(parts[i * len(z) : (i + 1) * len(z)] for i in range(copies)), strict=True))

    def commit(self, new: Sequence[Prompted], latents: Sequence[Tensor], time: float) -> None:
        self._remember(new)
        for scene, rows in zip(self.latents, latents, strict=True):
            scene.append(rows)
        self.times.append(time)


@torch.no_grad()
def autoregressive(
    model: MMDiT,
    scenes: Sequence[SceneRequest],
    sampling: Sampling,
    visibility: str = "context_causal",
    cached: bool = True,
    impl: str = "auto",
    chosen: Sequence[Sequence[int]] | None = None,
    pool_device: str | torch.device | None = None,
) -> list[list[Tensor]]:
    """Generate scenes shot by shot: global prompt and given shots enter the history at t = 0, generated ones at t_c.

    scenes      as many shots in each; a given shot may stand anywhere, and is seen by the shots after it
    visibility  "context_causal", "isolated" or, without a cache, "bidirectional"
    cached      keep keys and values of the history; False computes it anew in every step
    chosen      per shot, numbers of the earlier shots it sees beside the global prompt, in any order; they are gathered
                from a pool of finished shots, to compact positions. None: all of them, in their order
    pool_device where that pool lies: the model's device, or "cpu"

    Returns, per scene and shot, latents as packed patches [T·H·W, patch channels]; given ones bitwise as they were.
    """
    alike = {(tuple(s.given is None for s in scene.shots), scene.global_prompt is None) for scene in scenes}
    if len(alike) != 1:
        raise ValueError(
            "scenes: expected as many shots in each, the same of them given, and a global prompt in all or none; "
            "split the batch"
        )
    new_columns = [[Prompted.of(model, scene.shots[i]) for scene in scenes] for i in range(len(scenes[0].shots))]
    prompts = [Prompted.global_prompt(model, s.global_prompt) for s in scenes if s.global_prompt is not None]
    if chosen is not None:
        _check_chosen(chosen, len(new_columns), visibility, cached)
    elif pool_device is not None:
        raise ValueError(f"pool_device: there is a pool only where shots are chosen, got {pool_device!r} and no choice")
    history = _history(model, prompts, new_columns, sampling, visibility, cached, impl, chosen, pool_device)
    like = state(model)
    if prompts:
        history.commit(prompts, [like.new_zeros(1, like.shape[1])] * len(scenes), 0.0)
    finished: list[list[Tensor]] = [[] for _ in scenes]
    for index, new in enumerate(new_columns):
        if isinstance(history, PooledHistory):
            assert chosen is not None
            shift = 1 if prompts else 0  # the global prompt is number 0 of the pool, and always seen
            history.choose([*range(shift), *(shift + i for i in chosen[index])])
        requests = [scene.shots[index] for scene in scenes]
        latents = _finish(model, history, new, requests, sampling)
        last = index == len(new_columns) - 1
        if not last and requests[0].given is not None:
            history.commit(new, latents, 0.0)
        elif not last:
            time = sampling.history_time
            history.commit(new, [as_history(x, r, time) for x, r in zip(latents, requests, strict=True)], time)
        for scene, x in zip(finished, latents, strict=True):
            scene.append(x)
    history.close()
    return finished


def _history(model, prompts, columns, sampling, visibility, cached, impl, chosen, pool_device):
    """The history that `autoregressive` asks for, with room for the longest context of any scene."""
    if not cached:
        return RecomputedHistory(model, len(columns[0]), sampling, visibility, impl)
    copies = 2 if sampling.guidance != 1 else 1  # a shot, and its version with the null prompt
    rows = [[p.shot.rows for p in scene] for scene in zip(*columns, strict=True)]
    shared = [p.shot.rows for p in prompts] or [0] * len(rows)
    seen = chosen or [range(i) for i in range(len(columns))]
    capacity = max(
        first + sum(scene[i] for i in earlier) + copies * scene[index]
        for first, scene in zip(shared, rows, strict=True)
        for index, earlier in enumerate(seen)
    )
    size = model, len(rows), max(capacity, *shared), sampling
    if chosen is None:
        return CachedHistory(*size, visibility, impl)
    pooled = max(first + sum(scene[:-1]) for first, scene in zip(shared, rows, strict=True))
    return PooledHistory(*size, max(pooled, 1), impl, pool_device)


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
    sampling: Sampling,
) -> list[Tensor]:
    """The finished latents of one shot per scene, given or denoised."""
    if requests[0].given is not None:
        return [clean_latents(request, model) for request in requests]
    null = [Prompted.of(model, r, "") for r in requests] if sampling.guidance != 1 else None
    history.begin(new, null)
    z = [shot_noise(request, START, state(model)) for request in requests]
    for now, then in sampling.times([p.shot for p in new]):
        for b, v in enumerate(history.velocity(z, now)):
            step = (then[b] - now[b]).to(z[b])
            z[b] = z[b] + step * (v[0] if len(v) == 1 else guided(v[0], v[1], sampling.guidance)).to(z[b])
    return z
