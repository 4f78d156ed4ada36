"""Keys and values of the shots generated so far, allocated once (paper § 3.3, Fig. 4b)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from lct.kernels import KVRows
from lct.model.config import ModelConfig


class Stored:
    """Per block, keys and values [scenes·capacity, A_kv, D]; scene b owns rows b·capacity onward.

    buffers  pairs of tensors; None: one a block
    """

    def __init__(
        self,
        config: ModelConfig,
        scenes: int,
        capacity: int,
        dtype: torch.dtype,
        device: str | torch.device,
        pinned: bool = False,
        buffers: int | None = None,
    ):
        if scenes < 1 or capacity < 1:
            raise ValueError(f"scenes, capacity: expected at least 1 of each, got {scenes} and {capacity}")
        shape = (scenes * capacity, config.kv_heads, config.head_dim)

        def tensors() -> list[Tensor]:
            count = config.blocks if buffers is None else buffers
            return [torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned) for _ in range(count)]

        self.keys, self.values = tensors(), tensors()
        self.scenes, self.capacity = scenes, capacity

    @property
    def rows(self) -> int:
        """Rows of each block's keys, B·capacity."""
        return self.scenes * self.capacity

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def at(self, slots: Tensor) -> Iterable[KVRows]:
        """Some rows of every block."""
        return [KVRows(keys, values, slots) for keys, values in zip(self.keys, self.values, strict=True)]


class KVCache(Stored):
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

    def fill(self, fill: Callable[[int, KVRows], None], slots: Tensor) -> None:
        """Have each block's rows `slots` written by `fill(block, rows)`, once for all blocks."""
        for block, rows in enumerate(self.at(slots)):
            fill(block, rows)

    def rewind(self, shots: int) -> None:
        """Keep the first `shots` shots of every scene. ValueError where there are fewer."""
        if not 0 <= shots <= self.shots:
            raise ValueError(f"shots: expected 0 to {self.shots} committed shots to keep, got {shots}")
        self.shots = shots


def rows_of(ranges: Iterable[range]) -> Tensor:
    """int64 numbers of rows, range by range."""
    parts = [np.arange(r.start, r.stop, dtype=np.int64) for r in ranges]
    return torch.from_numpy(np.concatenate(parts))
