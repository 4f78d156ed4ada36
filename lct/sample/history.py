"""The shots that stand, and the velocity of a new one over them (paper § 3.3, § 3.4, Fig. 4 a.2, b).

`CachedHistory` keeps keys and values, `PooledHistory` gathers those of chosen shots from a pool, `RecomputedHistory`
runs the whole scene in every step. All three give the same shots where all can run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lct.layout import Geometry, SceneLayout
from lct.model.cache import KVCache
from lct.model.config import Memory
from lct.model.mmdit import MMDiT
from lct.model.pool import HistoryPool, LayeredContext
from lct.sample.request import Prompted, Sampling, ShotRequest, as_history, features

Velocities = list[tuple[Tensor, ...]]  # per scene, of its new shot and of the branches that guide it


@dataclass(frozen=True)
class Guides:
    """Other versions of the shots at hand, one per scene: with the null prompt, and without the other shots."""

    null: Sequence[Prompted] | None = None
    alone: Sequence[Prompted] | None = None

    @property
    def branches(self) -> list[Sequence[Prompted]]:
        return [branch for branch in (self.null, self.alone) if branch is not None]


class _History:
    """What the three have in common: the shots that stand, scene by scene."""

    def __init__(self, model: MMDiT, scenes: int, sampling: Sampling, visibility: str, impl: str):
        self.model, self.sampling, self.visibility, self.impl = model, sampling, visibility, impl
        self.shots: list[list[Prompted]] = [[] for _ in range(scenes)]
        self.device, self.dtype = model.video_out.weight.device, sampling.compute_dtype(model)

    def _layout(self, new: Sequence[Prompted]) -> SceneLayout:
        scenes = [[p.shot for p in (*old, shot)] for old, shot in zip(self.shots, new, strict=True)]
        offsets = [[0.0] * len(scene) for scene in scenes] if self.sampling.one_place else None
        return SceneLayout(scenes, self.visibility, offsets)

    def _placed(self, layout: SceneLayout) -> tuple[float, ...]:
        """Where the shots of a layout start along the space diagonal."""
        return layout.videos.origins() if self.model.config.cross else layout.origins(self.sampling.text_scale)

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
        cache: type[KVCache] = KVCache,
    ):
        super().__init__(model, scenes, sampling, visibility, impl)
        self.cache = cache(model.config, scenes, capacity, self.dtype, self.device)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def begin(self, new: Sequence[Prompted], guides: Guides) -> None:
        """Make ready to denoise one new shot per scene."""
        self._geometry = self._tail(new, guides)
        self._columns = [new, *guides.branches]
        self._features = self._text([p for scene in zip(*self._columns, strict=True) for p in scene])

    def velocity(self, z: Sequence[Tensor], times: Tensor, keep: bool = False) -> Velocities:
        """Of the new shots at `times` [scenes]; `keep` their keys and values of this step, for `commit`."""
        copies = len(self._columns)
        video = torch.cat([x for x in z for _ in range(copies)]).to(self.dtype)
        per_shot = times.repeat_interleave(copies).to(self.device)
        pool = self._kept_pool() if keep else None
        v = self.model(video, self._features, per_shot, self._geometry, self.cache, pool, self.impl)
        if keep:
            self._keep()
        parts = v.split([len(x) for x in z for _ in range(copies)])
        return [parts[i : i + copies] for i in range(0, len(parts), copies)]

    def commit(
        self, new: Sequence[Prompted], requests: Sequence[ShotRequest] | None, latents: Sequence[Tensor]
    ) -> None:
        """Finished shots become history: by one pass over them at t_c, or with what `velocity` kept."""
        if self._kept:
            slots = self._own_slots()
            for kept, *stored in zip(self._kept, self.cache.keys, self.cache.values, strict=True):
                for rows, into in zip(kept, stored, strict=True):
                    into.index_copy_(0, slots, rows)
            self._kept = []
        else:
            self._write(new, requests, latents)
        self._remember(new)
        self.cache.commit()

    def _kept_pool(self):
        """Where keys before their rotation go in the step that is kept."""
        return None

    def _keep(self) -> None:
        slots = self._own_slots()
        stored = zip(self.cache.keys, self.cache.values, strict=True)
        self._kept = [(keys.index_select(0, slots), values.index_select(0, slots)) for keys, values in stored]

    def _own_slots(self) -> Tensor:
        """Cache rows of the new shots, without those of their guides."""
        assert self._geometry.slots is not None
        parts = self._geometry.slots.split([p.rows for scene in zip(*self._columns, strict=True) for p in scene])
        return torch.cat(parts[:: len(self._columns)])

    def _write(self, new, requests, latents, pool=None) -> None:
        times = [0.0 if requests is None else self.sampling.time_of(request) for request in requests or latents]
        if requests is not None:
            latents = [as_history(x, r, t) for x, r, t in zip(latents, requests, times, strict=True)]
        video = torch.cat(list(latents)).to(self.dtype)
        geometry = self._tail(new, Guides())
        self.model(video, self._text(new), torch.tensor(times).to(self.device), geometry, self.cache, pool, self.impl)

    def _tail(self, new: Sequence[Prompted], guides: Guides) -> Geometry:
        null, alone = ([p.shot for p in branch] if branch else None for branch in (guides.null, guides.alone))
        size = self.cache.shots, self.cache.capacity
        return self._layout(new).tail(
            *size, null, self.device, self.sampling.text_scale, alone, self.model.config.cross
        )


class PooledHistory(CachedHistory):
    """The same cache, filled anew for every shot with those that it chooses from a pool of all finished ones (§ 3.4).

    Chosen shots stand one after another at compact positions, as if there had been no others. Their keys and values
    are those of the pass that finished them, in the context they saw then. `capacity` rows hold the longest context,
    `pool_capacity` rows all finished shots of a scene.

    absolute  leave chosen shots at the positions of the whole scene instead, to see what is lost by it
    """

    def __init__(
        self,
        model: MMDiT,
        scenes: int,
        capacity: int,
        sampling: Sampling,
        pool_capacity: int,
        impl: str = "auto",
        memory: Memory | None = None,
        absolute: bool = False,
    ):
        memory = memory or Memory()
        cache = LayeredContext if memory.layered else KVCache
        super().__init__(model, scenes, capacity, sampling, impl=impl, cache=cache)
        device = memory.device or self.device
        self.pool = HistoryPool(model.config, scenes, pool_capacity, self.dtype, device, self.device, memory.fp8)
        self.finished: list[list[Prompted]] = [[] for _ in range(scenes)]
        self.chosen, self.absolute, self._admitted = (), absolute, False

    def choose(self, shots: Sequence[int]) -> None:
        """The shots at hand see these finished ones, in this order; numbers as committed, from 0."""
        self.cache.rewind(0)
        self.chosen = tuple(shots)
        self.shots = [[scene[i] for i in shots] for scene in self.finished]
        if shots:
            chosen = [shots] * len(self.finished)
            layout = SceneLayout([[p.shot for p in scene] for scene in self.shots], offsets=self._offsets())
            layout = layout.videos if self.model.config.cross else layout
            self.pool.assemble_(self.cache, chosen, layout, self.sampling.text_scale, self.impl)

    def _offsets(self, new: Sequence[Prompted] | None = None) -> list[list[float]] | None:
        """Where chosen shots, and the new ones behind them, stand."""
        if self.sampling.one_place:
            return [[0.0] * (len(scene) + (new is not None)) for scene in self.shots]
        if not self.absolute:
            return None
        where = []
        for b, finished in enumerate(self.finished):
            everything = [p.shot for p in (*finished, *((new[b],) if new else ()))]
            origins = self._placed(SceneLayout([everything]))
            where.append([origins[i] for i in self.chosen] + ([origins[-1]] if new else []))
        return where

    def _layout(self, new: Sequence[Prompted]) -> SceneLayout:
        return SceneLayout(super()._layout(new).scenes, self.visibility, self._offsets(new))

    def commit(
        self, new: Sequence[Prompted], requests: Sequence[ShotRequest] | None, latents: Sequence[Tensor]
    ) -> None:
        """One pass, over the chosen shots, writes the keys and values into the pool, unless a step's are there."""
        if not self._admitted:
            slots = self.pool.admit([p.rows for p in new])
            self._write(new, requests, latents, self.pool.written(slots))
        self._admitted = False
        for scene, shot in zip(self.finished, new, strict=True):
            scene.append(shot)

    def _kept_pool(self):
        new, *others = ([p.rows for p in column] for column in self._columns)
        slots = self.pool.admit(new, [sum(rows) for rows in zip(*others, strict=True)] if others else None)
        return self.pool.written(slots)

    def _keep(self) -> None:
        self._admitted = True

    def close(self) -> None:
        if self.pool.keys[0].device != self.device:
            torch.cuda.synchronize(self.device)  # kernels may still be reading what is about to be freed


class RecomputedHistory(_History):
    """Every step runs the whole scene; needs no cache and works with bidirectional weights too (Fig. 4 a.2)."""

    def __init__(self, model: MMDiT, scenes: int, sampling: Sampling, visibility: str, impl: str = "auto"):
        super().__init__(model, scenes, sampling, visibility, impl)
        self.finished: list[tuple[Sequence[ShotRequest] | None, Sequence[Tensor]]] = []

    def begin(self, new: Sequence[Prompted], guides: Guides) -> None:
        """See `CachedHistory.begin`; here a guiding branch is a scene of its own, at the same positions."""
        everything = range(len(self.finished))
        shared = [i for i in everything if self.finished[i][0] is None]  # the global prompt
        named = ((new, everything), (guides.null, everything), (guides.alone, shared))
        self._branches = [(column, past) for column, past in named if column is not None]
        prompted, offsets = [], []
        for column, past in self._branches:
            origins = iter(self._placed(self._layout(column)))
            for scene, p in zip(self.shots, column, strict=True):
                at = [next(origins) for _ in (*scene, p)]
                prompted.append([*(scene[i] for i in past), p])
                offsets.append([*(at[i] for i in past), at[-1]])
        layout = SceneLayout([[p.shot for p in scene] for scene in prompted], self.visibility, offsets)
        self._geometry = layout.geometry(self.device, self.sampling.text_scale, self.model.config.cross)
        self._features = self._text([p for scene in prompted for p in scene])
        self._past = [self._as_history(i) for i in everything]

    def _as_history(self, index: int) -> list[tuple[float, Tensor]]:
        """Per scene, time and latents of a finished shot at the age that it has now."""
        requests, latents = self.finished[index]
        if requests is None:
            return [(0.0, x) for x in latents]
        times = [self.sampling.time_of(request, len(self.finished) - 1 - index) for request in requests]
        return [(t, as_history(x, r, t)) for x, r, t in zip(latents, requests, times, strict=True)]

    def velocity(self, z: Sequence[Tensor], times: Tensor, keep: bool = False) -> Velocities:
        """See `CachedHistory.velocity`; there is nothing to keep."""
        new = [(float(t), x) for t, x in zip(times, z, strict=True)]
        scenes = [[*(self._past[i][b] for i in past), new[b]] for _, past in self._branches for b in range(len(z))]
        shots = [shot for scene in scenes for shot in scene]
        per_shot = torch.tensor([t for t, _ in shots], dtype=times.dtype).to(self.device)
        video = torch.cat([x for _, x in shots]).to(self.dtype)
        v = self.model(video, self._features, per_shot, self._geometry, impl=self.impl)
        parts = iter(v.split([len(x) for _, x in shots]))
        last = [[next(parts) for _ in scene][-1] for scene in scenes]
        return [tuple(last[b :: len(z)]) for b in range(len(z))]

    def commit(
        self, new: Sequence[Prompted], requests: Sequence[ShotRequest] | None, latents: Sequence[Tensor]
    ) -> None:
        self._remember(new)
        self.finished.append((requests, latents))
