"""Floating-point operations of a model, from its products and the pairs of rows that attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lct.layout import Geometry, SceneLayout

if TYPE_CHECKING:
    import torch

PEAKS = {"H100": 989, "H200": 989, "H800": 989, "A100": 312}
"""Dense half-precision TFLOP/s of GPUs, as their makers state them, by a part of their names."""


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that a GPU can do at most in half precision; None for one that is not known, and on the CPU."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for gpu, peak in PEAKS.items() if gpu in name), None)


@dataclass(frozen=True)
class Cost:
    """products  FLOPs of all matrix products for one row of each kind: a "shot", a "text", "video" or "joint" row
    pair      FLOPs of attention, over all blocks, for one row that sees another
    cross     whether video reads text by cross-attention
    """

    products: dict[str, int]
    pair: int
    cross: bool

    def forward(self, rows: Geometry | SceneLayout) -> int:
        """Of one forward pass."""
        return sum(self.parts(rows))

    def training(self, rows: Geometry | SceneLayout) -> int:
        """Of one forward and backward pass: three times the products and 3.5 times the attention."""
        products, attended = self.parts(rows)
        return 3 * products + attended * 7 // 2

    def parts(self, rows: Geometry | SceneLayout) -> tuple[int, int]:
        """(products, attention) of a forward pass."""
        text, video = sum(s.text for s in rows.shots), sum(s.video_rows for s in rows.shots)
        counts = {"shot": len(rows.shots), "text": text, "video": video, "joint": text + video}
        return sum(flops * counts[kind] for kind, flops in self.products.items()), self.pair * self._pairs(rows)

    def _pairs(self, rows: Geometry | SceneLayout) -> int:
        if isinstance(rows, Geometry):
            return rows.plan.pairs + (rows.cross.pairs if rows.cross is not None else 0)
        if self.cross:
            return rows.videos.pairs + sum(shot.text * shot.video_rows for shot in rows.shots)
        return rows.pairs
