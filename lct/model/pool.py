"""Finished shots from which later ones choose (§ 3.4), and the context that is made of chosen ones.

Keys are kept before their rotation. A 5-second shot at 480 p is 2.6 (Wan 5B) to 21 GB (HunyuanVideo) of keys and values
in half precision, so a pool may lie in CPU memory, in 8 bits, and a context may be made block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lct.kernels import KVRows, assemble_
from lct.kernels.select import Choice
from lct.layout import SceneLayout
from lct.model.cache import KVCache, Stored, rows_of
from lct.model.config import ModelConfig

FP8, LARGEST = torch.float8_e4m3fn, 448.0
AT_ONCE = 8192  # rows that are made wide together: their fp32 values are there for a moment


class HistoryPool(Stored):
    """Per block, keys before their rotation and values of all finished shots.

    Positions belong to the reading, not to the storing: `assemble_` turns the keys of chosen shots to where they stand
    in their new context. The pool may lie in CPU memory while the model and its cache are on a GPU: kernels then read
    and write it in place, and it must outlive their launches (`torch.cuda.synchronize` before it is let go).

    dtype    of keys and values where they are written and read
    device   where it lies
    read_by  the model's device; memory is pinned where that is a GPU and the pool is not
    fp8      keep them in 8 bits, float8_e4m3fn, each row of each head with the scale of its largest value
    """

    def __init__(
        self,
        config: ModelConfig,
        scenes: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        read_by: str | torch.device = "cpu",
        fp8: bool = False,
    ):
        pinned = torch.device(device).type == "cpu" and torch.device(read_by).type == "cuda"
        super().__init__(config, scenes, capacity, FP8 if fp8 else dtype, device, pinned)
        self.spec, self.dtype, self.read_by, self.fp8 = config.norm_rope(), dtype, torch.device(read_by), fp8
        self.shots: list[list[range]] = [[] for _ in range(scenes)]
        scales = (self.rows, config.kv_heads)
        self.scales = [torch.empty(scales, device=device, pin_memory=pinned) for _ in range(2 * fp8 * config.blocks)]

    @property
    def bytes(self) -> int:
        return super().bytes + sum(x.numel() * x.element_size() for x in self.scales)

    def admit(self, rows: Sequence[int], beside: Sequence[int] | None = None) -> Tensor:
        """Room for one more shot of every scene, `rows` rows in scene b: int64 slots, for `written` to fill.

        beside  rows of other versions of the shot that the same pass computes; they go behind it and are not kept

        ValueError where a scene's capacity does not suffice, before anything changes.
        """
        if len(rows) != self.scenes:
            raise ValueError(f"rows: expected one number for each of {self.scenes} scenes, got {len(rows)}")
        if any(count < 0 for count in (*rows, *(beside or ()))):
            raise ValueError(f"rows, beside: expected numbers of at least 0, got {list(rows)} and {beside}")
        new = []
        for b, (shots, count, more) in enumerate(zip(self.shots, rows, beside or [0] * self.scenes, strict=True)):
            first = shots[-1].stop if shots else b * self.capacity
            end = first + count + more
            if end > (b + 1) * self.capacity:
                raise ValueError(f"capacity: scene {b} needs {end - b * self.capacity} pool rows, got {self.capacity}")
            new.append(range(first, end))
        for shots, room, count in zip(self.shots, new, rows, strict=True):
            shots.append(room[:count])
        return rows_of(new)

    def written(self, slots: Tensor) -> Iterable[KVRows]:
        """Per block, where a forward pass writes keys before their rotation, and values, of admitted rows.

        In 8 bits a block's rows are first written as they are, and made small when the next block asks for its own.
        """
        return self._made_small(slots) if self.fp8 else self.at(slots.to(self.read_by))

    def _made_small(self, slots: Tensor) -> Iterator[KVRows]:
        shape = (len(slots), *self.keys[0].shape[1:])
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.read_by) for _ in range(2))
        own, at = torch.arange(len(slots), device=self.read_by), slots.to(self.keys[0].device)
        for block in range(len(self.keys)):
            yield KVRows(keys, values, own)
            for wide, small, scales in zip((keys, values), *self._of_block(block), strict=True):
                scale = wide.abs().amax(-1).float().clamp(min=1e-12) / LARGEST
                quantised = (wide.float() / scale[..., None]).to(FP8)
                small.view(torch.uint8).index_copy_(0, at, quantised.view(torch.uint8).to(small.device))
                scales.index_copy_(0, at, scale.to(scales.device))

    def _of_block(self, block: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.keys[block], self.values[block]), (self.scales[2 * block], self.scales[2 * block + 1])

    def read(self, block: int, rooms: Sequence[range], slots: Tensor) -> KVRows:
        """Rows of a block as `kernels.assemble_` takes them: where they lie, or those of `rooms` made wide again.

        slots  the rows of `rooms`, on the model's device
        """
        if not self.fp8:
            return KVRows(self.keys[block], self.values[block], slots)
        wide = [self._made_wide(*part, rooms) for part in zip(*self._of_block(block), strict=True)]
        return KVRows(wide[0], wide[1], torch.arange(len(slots), device=self.read_by))

    def _made_wide(self, small: Tensor, scales: Tensor, rooms: Sequence[range]) -> Tensor:
        """Rows in the dtype they are read in, on the model's device; from pinned memory nothing waits for a copy."""
        wide = torch.empty(sum(map(len, rooms)), *small.shape[1:], dtype=self.dtype, device=self.read_by)
        cuts = (room[i : i + AT_ONCE] for room in rooms for i in range(0, len(room), AT_ONCE))
        end = 0
        for cut in cuts:
            rows, scale = (x[cut.start : cut.stop].to(self.read_by, non_blocking=True) for x in (small, scales))
            wide[end : end + len(cut)] = rows.float() * scale[..., None]
            end += len(cut)
        return wide

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
        taken = [room for scene in rooms for room in scene]
        sources = rows_of(taken).to(device)
        starts = (b * cache.capacity for b in range(cache.scenes))
        slots = rows_of(range(start, start + size) for start, size in zip(starts, sizes, strict=True)).to(device)
        positions = layout.positions(text_scale, device)

        def fill(block: int, into: KVRows) -> None:
            assemble_(self.read(block, taken, sources), into, positions, self.spec, choice)

        cache.fill(fill, slots)
        cache.shots = len(chosen[0])


class LayeredContext(KVCache):
    """A cache that holds the context of two blocks: one that runs and the next, which is made in the meantime.

    What a pass writes of its own rows does not outlive its block; the pool alone keeps shots.
    """

    def __init__(
        self,
        config: ModelConfig,
        scenes: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        Stored.__init__(self, config, scenes, capacity, dtype, device, buffers=2)
        self.shots = 0
        self._held = super().bytes
        self.keys, self.values = ([pair[i % 2] for i in range(config.blocks)] for pair in (self.keys, self.values))
        self._fill: Callable[[int, KVRows], None] | None = None
        self._slots = torch.empty(0, dtype=torch.int64)
        on_gpu = self.keys[0].device.type == "cuda"
        self._side = (
            torch.cuda.Stream(self.keys[0].device) if on_gpu else None
        )  # the next block is made beside this one

    @property
    def bytes(self) -> int:
        return self._held

    def fill(self, fill: Callable[[int, KVRows], None], slots: Tensor) -> None:
        self._fill, self._slots = fill, slots

    def rewind(self, shots: int) -> None:
        super().rewind(shots)
        if shots == 0:
            self._fill = None

    def at(self, slots: Tensor) -> Iterator[KVRows]:
        """Some rows of every block, its history made when it is asked for."""
        device = self.keys[0].device
        made = self._make(0)
        for block in range(len(self.keys)):
            if made is not None:
                torch.cuda.current_stream(device).wait_event(made)
            # the block before this one was the last to read the other buffer, and has been launched
            made = self._make(block + 1) if block + 1 < len(self.keys) else None
            yield KVRows(self.keys[block], self.values[block], slots)

    def _make(self, block: int) -> torch.cuda.Event | None:
        """Fill a block's buffer with its history, on a GPU beside what runs; returns the event of its end."""
        if self._fill is None:
            return None
        into = KVRows(self.keys[block], self.values[block], self._slots)
        side = self._side
        if side is None:
            self._fill(block, into)
            return None
        side.wait_stream(torch.cuda.current_stream(side.device))
        done = torch.cuda.Event()
        with torch.cuda.stream(side):
            self._fill(block, into)
            done.record(side)
        return done
