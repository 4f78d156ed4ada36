"""Keys and values of the shots generated so far, allocated once (paper § 3.3, Fig. 4b)."""

from __future__ import annotations

import torch
from torch import Tensor

from lct.model.config import ModelConfig


class KVCache:
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
        if scenes < 1 or capacity < 1:
            raise ValueError(f"scenes, capacity: expected at least 1 of each, got {scenes} and {capacity}")
        shape = (scenes * capacity, config.kv_heads, config.head_dim)
        self.keys: list[Tensor] = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.blocks)]
        self.values: list[Tensor] = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.blocks)]
        self.scenes, self.capacity, self.shots = scenes, capacity, 0

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

    @property
    def rows(self) -> int:
        """Rows of each block's keys, B·capacity."""
        return self.scenes * self.capacity

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))
