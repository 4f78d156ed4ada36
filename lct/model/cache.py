"""Keys and values of the shots generated so far, allocated once (paper § 3.3, Fig. 4b; § 3.4 for the pool)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lct.kernels import KVRows, assemble_
from lct.kernels.select import Choice
from lct.layout import SceneLayout
from lct.model.config import ModelConfig


class _Stored:
    """Per block, keys and values [scenes·capacity, A_kv, D]; scene b owns rows b·capacity onward."""

    def __init__(self, config: ModelConfig, scenes: int, capacity: int, dtype, device, pinned: bool = False):
        if scenes < 1 or capacity < 1:
            raise ValueError(f"scenes, capacity: expected at least 1 of each, got {scenes} and {capacity}")
        shape = (scenes * capacity, config.kv_heads, config.head_dim)

        def tensors() -> list[Tensor]:
            return [torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned) for _ in range(config.blocks)]

        self.keys, self.values = tensors(), tensors()
        self.scenes, self.capacity = scenes, capacity

    @property
    def rows(self) -> int:
        """Rows of each block's keys, B·capacity."""
        return self.scenes * self.capacity

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def at(self, slots: Tensor) -> list[KVRows]:
        """Some rows of every block."""
        return [KVRows(keys, values, slots) for keys, values in zip(self.keys, self.values, strict=True)]


class KVCache(_Stored):
    """Per block, keys (rotated) and values [B·capacity, A_kv, D]; scene b owns rows b·capacity onward.

    A forward pass writes the rows of the shot at hand but commits nothing, so the next denoising step writes the same
    rows again. The sampler alone moves `shots`, the number of committed shots of every scene: committing is setting it
    higher, rewinding is setting it lower. Rows behind the committed shots are never read before they are written.
    """

    def __init__(
        self,
        config: ModelConfig,
        scenes: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        super().__init__(config, scenes, capacity, dtype, device)
        self.shots = 0

    def commit(self, shots: int = 1) -> None:
        """The rows of the next `shots` shots, as last written, belong to the history from now on."""
        if shots < 0:
            raise ValueError(f"shots: expected 0 or more to commit, got {shots}; `rewind` goes back")
        self.shots += shots

    def rewind(self, shots: int) -> None:
        """Keep the first `shots` shots of every scene. ValueError where there are fewer."""
        if not 0 <= shots <= self.shots:
            raise ValueError(f"shots: expected 0 to {self.shots} committed shots to keep, got {shots}")
        self.shots = shots


class HistoryPool(_Stored):
    """Finished shots from which later ones choose (§ 3.4): keys before their rotation, and values, of every block.

    Positions belong to the reading, not to the storing: `assemble_` turns the keys of chosen shots to where they stand
    in their new context. The pool may lie in CPU memory while the model and its cache are on a GPU: kernels then read
    and write it in place, and it must outlive their launches (`torch.cuda.synchronize` before it is let go).

    device   where it lies
    read_by  the model's device; memory is pinned where that is a GPU and the pool is not
    """

    def __init__(
        self,
        config: ModelConfig,
        scenes: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        read_by: str | torch.device = "cpu",
    ):
        pinned = torch.device(device).type == "cpu" and torch.device(read_by).type == "cuda"
        super().__init__(config, scenes, capacity, dtype, device, pinned)
        self.spec = config.norm_rope()
        self.shots: list[list[range]] = [[] for _ in range(scenes)]

    def admit(self, rows: Sequence[int], beside: Sequence[int] | None = None) -> Tensor:
        """Room for one more shot of every scene, `rows` rows in scene b: int64 slots, for a forward pass to write to.

        beside  rows of other versions of the shot that the same pass computes; they go behind it and are not kept

        ValueError where a scene's capacity does not suffice, before anything changes.
        """
        if len(rows) != self.scenes:
            raise ValueError(f"rows: expected one number for each of {self.scenes} scenes, got {len(rows)}")
        new = []
        for b, (shots, count, more) in enumerate(zip(self.shots, rows, beside or [0] * self.scenes, strict=True)):
            first = shots[-1].stop if shots else b * self.capacity
            end = first + count + more
            if end > (b + 1) * self.capacity:
                raise ValueError(f"capacity: scene {b} needs {end - b * self.capacity} pool rows, got {self.capacity}")
            new.append(range(first, end))
        for shots, room, count in zip(self.shots, new, rows, strict=True):
            shots.append(room[:count])
        return _rows_of(new)

    def assemble_(
        self,
        cache: KVCache,
        chosen: Sequence[Sequence[int]],
        layout: SceneLayout,
        text_scale: float = 1.0,
        impl: str = "auto",
    ) -> None:
        """Make `chosen` shots of every scene, in that order, the whole committed history of a cache.

        layout  of the chosen shots alone; its positions are theirs from now on: compact, whatever lay between the
                shots when they were made
        """
        rooms = [[self.shots[b][i] for i in shots] for b, shots in enumerate(chosen)]
        sizes = [sum(map(len, scene)) for scene in rooms]
        expected = [sum(shot.rows for shot in scene) for scene in layout.scenes]
        if sizes != expected or len({len(shots) for shots in chosen}) != 1 or max(sizes) > cache.capacity:
            raise ValueError(
                f"chosen: expected as many shots of every scene, {expected} rows of them as in the layout and at most "
                f"{cache.capacity} a scene, got {list(chosen)} of {sizes} rows"
            )
        device, choice = cache.keys[0].device, Choice.of(impl).norm_rope
        sources = _rows_of(room for scene in rooms for room in scene).to(device)
        starts = (b * cache.capacity for b in range(cache.scenes))
        slots = _rows_of(range(start, start + size) for start, size in zip(starts, sizes, strict=True)).to(device)
        positions = layout.positions(text_scale, device)
        for pool, context in zip(self.at(sources), cache.at(slots), strict=True):
            assemble_(pool, context, positions, self.spec, choice)
        cache.shots = len(chosen[0])


def _rows_of(ranges: Iterable[range]) -> Tensor:
    parts = [np.arange(r.start, r.stop, dtype=np.int64) for r in ranges]
    return torch.from_numpy(np.concatenate(parts))
