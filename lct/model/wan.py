"""Wan as a packed multi-shot model: videos attend one another, each shot reads its own text by cross-attention.

Its positions are those of video alone (§ 3.2.2 at text scale 0). A global prompt stands before the text of every shot:
without positions and without attention among text, seeing both is the same as reading both. Weights come from and go to
diffusers' files through `lct.pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lct.kernels import KVRows, attention, gated, modulate
from lct.kernels.reference import statistics_dtype
from lct.kernels.select import Choice
from lct.layout import Geometry
from lct.model.config import ModelConfig, WanConfig
from lct.model.layers import MLP, LayerNorm, Linear, embedder, single_time_features
from lct.model.mmdit import MMDiT, attend
from lct.plan import Plan


class TextIn(nn.Module):
    """Features of UMT5 to what video reads."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.first, self.second = Linear(c.text_channels, c.width), Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x), approximate="tanh"))


class LastModulation(nn.Module):
    """Shift and scale before the last product: a learned table, and the time of the shot twice."""

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * width))

    def forward(self, time: Tensor) -> Tensor:
        return self.table + torch.cat([time, time], dim=-1)


class CrossBlock(nn.Module):
    """Self-attention over the videos of a scene, cross-attention to a shot's own text, MLP."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        inner = c.heads * c.head_dim
        self.head_dim, self.eps, self.spec = c.head_dim, c.norm_eps, c.norm_rope()
        self.table = nn.Parameter(torch.zeros(6 * c.width))
        self.qkv, self.out = Linear(c.width, 3 * inner), Linear(inner, c.width)
        self.cross_norm = LayerNorm(c.width, eps=c.norm_eps)
        self.cross_q, self.text_kv, self.cross_out = (
            Linear(c.width, inner), Linear(c.width, 2 * inner), Linear(inner, c.width)
        )  # fmt: skip
        self.q_norm, self.k_norm, self.cross_q_norm, self.cross_k_norm = (
            nn.Parameter(torch.ones(inner)) for _ in range(4)
        )
        self.mlp = MLP(c.width, c.mlp_width)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        shots: Tensor,
        geometry: Geometry,
        cache: KVRows | None,
        pool: KVRows | None,
        choice: Choice,
    ) -> Tensor:
        """x [S_video, C], text [S_text, C], shots [N, 6·C]."""
        starts = geometry.streams.video_starts
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.table + shots).chunk(6, dim=-1)
        qkv = self.qkv(modulate(x, shift, scale, starts, choice.modulate)).unflatten(-1, (-1, self.head_dim))
        norms = (self.q_norm, self.k_norm)
        none = (self.q_norm.detach(), self.k_norm.detach())  # of no rows; one tensor twice breaks fullgraph compiles
        attended = attend(qkv[:0], qkv, none, norms, self.spec, geometry, cache, pool, choice)
        x = gated(x, self.out(attended.flatten(1)), gate, starts, choice.modulate)
        x = x + self._read(x, text, cast(Plan, geometry.cross), choice)
        mlp = self.mlp(modulate(x, mlp_shift, mlp_scale, starts, choice.modulate))
        return gated(x, mlp, mlp_gate, starts, choice.modulate)

    def _read(self, x: Tensor, text: Tensor, plan: Plan, choice: Choice) -> Tensor:
        k, v = self.text_kv(text).chunk(2, dim=-1)
        q, k = self._normed(self.cross_q(self.cross_norm(x)), self.cross_q_norm), self._normed(k, self.cross_k_norm)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).contiguous() for part in (q, k, v))
        return self.cross_out(cast(Tensor, attention(q, k, v, plan, impl=choice.attention)).flatten(1))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, list(weight.shape), weight=weight.to(x.dtype), eps=self.eps)


class Wan(MMDiT):
    """Wan 2.1 or 2.2. Arguments of `forward` as in MMDiT; its geometry is one with `cross`."""

    config: WanConfig

    def __init__(self, config: WanConfig):
        super().__init__(config)
        c = config
        self.time_in = embedder(c.time_channels, c.width)
        self.time_modulation = Linear(c.width, 6 * c.width)
        self.last_modulation = LastModulation(c.width)

    def text_layers(self) -> nn.Module:
        return TextIn(self.config)

    def block_layers(self) -> Iterable[nn.Module]:
        return (CrossBlock(self.config) for _ in range(self.config.blocks))

    def condition(self, times: Tensor, text: Tensor, geometry: Geometry) -> Tensor:
        dtype = statistics_dtype(self.video_out.weight.dtype)
        return self.time_in(single_time_features(times, self.config.time_channels, dtype))

    def run_blocks(
        self,
        text: Tensor,
        video: Tensor,
        shots: Tensor,
        geometry: Geometry,
        stored: Iterable[tuple[KVRows | None, KVRows | None]],
        choice: Choice,
    ) -> Tensor:
        modulations = self.time_modulation(F.silu(shots))
        for block, kv in zip(self.blocks, stored, strict=True):
            video = block(video, text, modulations, geometry, *kv, choice)
        return video
