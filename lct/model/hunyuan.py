"""HunyuanVideo and HunyuanVideo-1.5 as packed multi-shot models: the blocks of `mmdit.py`, their own ways in.

Both are MMDiTs whose positions leave text unrotated, which is this project's layout at text scale 0 (§ 3.2.2). They add
a refiner of text features; 1.0 adds a pooled vector of each prompt and single-stream blocks, 1.5 features of glyphs and
of an image. Weights come from and go to diffusers' files through `lct.pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lct.kernels import KVRows, attention, gated, modulate
from lct.kernels.reference import statistics_dtype
from lct.kernels.select import Choice
from lct.layout import Geometry, SceneLayout, Shot, Streams
from lct.model.config import HunyuanConfig, ModelConfig
from lct.model.layers import LayerNorm, Linear, embedder, single_time_features
from lct.model.mmdit import Block, MMDiT, attend

LANGUAGE, GLYPHS, IMAGE = range(3)  # kinds of text rows in 1.5, in the numbering of its weights
GLYPH_WIDTH = 2048  # of the projection of glyph features


class RefinerBlock(nn.Module):
    """Self-attention and MLP over the text of one shot, gated by its time."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        inner = c.heads * c.head_dim
        self.heads = c.heads
        self.norm_1, self.norm_2 = (LayerNorm(c.width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = Linear(c.width, 3 * inner), Linear(inner, c.width)
        self.rise, self.fall = Linear(c.width, 4 * c.width), Linear(4 * c.width, c.width)
        self.modulation = Linear(c.width, 2 * c.width)

    def forward(self, x: Tensor, conditions: Tensor, starts: Tensor, plan, choice: Choice) -> Tensor:
        gate, mlp_gate = self.modulation(conditions).chunk(2, dim=-1)
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.contiguous() for part in qkv.unbind(1))
        attended = cast(Tensor, attention(q, k, v, plan, impl=choice.attention))
        x = gated(x, self.out(attended.flatten(1)), gate, starts, choice.modulate)
        mlp = self.fall(F.silu(self.rise(self.norm_2(x))))
        return gated(x, mlp, mlp_gate, starts, choice.modulate)


class Refiner(nn.Module):
    """Features of a language model to the text stream, shot by shot."""

    def __init__(self, c: HunyuanConfig):
        super().__init__()
        self.time_in, self.pooled_in = embedder(c.time_channels, c.width), embedder(c.text_channels, c.width)
        self.entry = Linear(c.text_channels, c.width)
        self.blocks = nn.ModuleList(RefinerBlock(c) for _ in range(c.refiner_blocks))

    def forward(self, text: Tensor, counts: tuple[int, ...], time: Tensor, choice: Choice) -> Tensor:
        """text [R, text_channels] in shot order, counts of each shot, time features [N, time_channels] -> [R, C]."""
        layout = SceneLayout([[Shot(count, (0, 0, 0)) for count in counts]], "isolated")
        streams, plan = layout.streams(text.device), layout.plan(text.device)
        sums = torch.stack([part.to(time.dtype).sum(0) for part in text.split(counts)])  # in one order, on GPUs too
        sizes = torch.tensor(counts, device=text.device).clamp(min=1)
        conditions = F.silu(self.time_in(time) + self.pooled_in(sums / sizes[:, None]))
        x = self.entry(text)
        for block in self.blocks:
            x = block(x, conditions, streams.text_starts, plan, choice)
        return x


class GlyphIn(nn.Module):
    """Features of words that are to be shown, to the text stream (1.5)."""

    def __init__(self, c: HunyuanConfig):
        super().__init__()
        self.norm = LayerNorm(c.glyph_channels)
        widths = (c.glyph_channels, GLYPH_WIDTH, GLYPH_WIDTH, c.width)
        self.layers = nn.ModuleList(map(Linear, widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return third(F.gelu(second(F.gelu(first(self.norm(x))))))


class ImageIn(nn.Module):
    """Features of a first frame, to the text stream (1.5)."""

    def __init__(self, c: HunyuanConfig):
        super().__init__()
        self.norm_in, self.norm_out = LayerNorm(c.image_channels), LayerNorm(c.width)
        self.rise, self.fall = Linear(c.image_channels, c.image_channels), Linear(c.image_channels, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.fall(F.gelu(self.rise(self.norm_in(x)))))


class TextIn(nn.Module):
    """All that becomes text rows."""

    def __init__(self, c: HunyuanConfig):
        super().__init__()
        self.refiner = Refiner(c)
        if c.of_kinds:
            self.glyphs, self.image, self.kinds = GlyphIn(c), ImageIn(c), nn.Embedding(3, c.width)


class SingleBlock(nn.Module):
    """One set of weights for both streams, attention and MLP side by side."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        inner, kv_inner = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.head_dim, self.spec = c.head_dim, c.norm_rope()
        self.modulation = Linear(c.width, 3 * c.width)
        self.qkv = Linear(c.width, inner + 2 * kv_inner)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(c.head_dim)) for _ in range(2))
        self.rise = Linear(c.width, c.mlp_width)
        self.out = Linear(inner + c.mlp_width, c.width)

    def forward(
        self, x: Tensor, shots: Tensor, geometry: Geometry, cache: KVRows | None, pool: KVRows | None, choice: Choice
    ) -> Tensor:
        """x [S, C], rows in joint order; `geometry` has them all in the video stream."""
        s = geometry.streams
        shift, scale, gate = self.modulation(shots).chunk(3, dim=-1)
        h = modulate(x, shift, scale, s.video_starts, choice.modulate)
        qkv = self.qkv(h).unflatten(-1, (-1, self.head_dim))
        norms = (self.q_norm, self.k_norm)
        none = (self.q_norm.detach(), self.k_norm.detach())  # of no rows; one tensor twice breaks fullgraph compiles
        attended = attend(qkv[:0], qkv, none, norms, self.spec, geometry, cache, pool, choice)
        both = torch.cat([attended.flatten(1), F.gelu(self.rise(h), approximate="tanh")], dim=-1)
        return gated(x, self.out(both), gate, s.video_starts, choice.modulate)


class Hunyuan(MMDiT):
    """HunyuanVideo, 1.0 or 1.5. Arguments of `forward` as in MMDiT; text rows as in `HunyuanConfig`."""

    config: HunyuanConfig
    text_in: TextIn

    def __init__(self, config: HunyuanConfig):
        super().__init__(config)
        c = config
        if c.pooled_channels:
            self.time_pooled = embedder(c.pooled_channels, c.width)
        if c.guidance is not None:
            self.time_guidance = embedder(c.time_channels, c.width)

    def text_layers(self) -> nn.Module:
        return TextIn(self.config)

    def block_layers(self) -> Iterable[nn.Module]:
        c = self.config
        yield from (Block(c) for _ in range(c.blocks - c.single_blocks))
        yield from (SingleBlock(c) for _ in range(c.single_blocks))

    def rows_of(self, name: str) -> str:
        if name.startswith("time_") or ".time_in" in name or ".pooled_in" in name:
            return "shot"
        parts = name.split(".")
        single = parts[0] == "blocks" and int(parts[1]) >= self.config.blocks - self.config.single_blocks
        return "joint" if single and "modulation" not in name else super().rows_of(name)

    def _time(self, times: Tensor) -> Tensor:
        return single_time_features(times, self.config.time_channels, statistics_dtype(self.video_out.weight.dtype))

    def condition(self, times: Tensor, text: Tensor, geometry: Geometry) -> Tensor:
        c, features = self.config, self._time(times)
        shots = self.time_in[:3](features)
        if c.guidance is not None:
            told = torch.full((1,), c.guidance, device=times.device)
            shots = shots + self.time_guidance(self._time(told))
        if c.pooled_channels:
            padded = F.pad(text[:, c.text_channels :], (0, 0, 0, 1))  # a shot without text has a pooled vector of zeros
            counts = np.array([shot.text for shot in geometry.shots])  # of all, though this process may compute some
            rows = np.where(counts > 0, counts.cumsum() - counts, len(text))
            first = torch.from_numpy(rows).to(text.device)
            shots = shots + self.time_pooled(padded[first].to(features.dtype))
        return F.silu(shots)

    def embed(
        self, text: Tensor, video: Tensor, times: Tensor, geometry: Geometry, choice: Choice
    ) -> tuple[Tensor, Tensor]:
        c, layers = self.config, self.text_in
        missing = c.patch_channels + c.condition_channels - video.shape[1]
        x_video = self.video_in(F.pad(video, (0, missing)) if missing else video)
        counts, time = [shot.text for shot in geometry.shots], self._time(times)
        if not c.of_kinds:
            return layers.refiner(text[:, : c.text_channels], tuple(counts), time, choice), x_video
        kinds = text[:, 0].round().long().cpu().numpy()  # waits for the device, once a pass
        shot = np.repeat(np.arange(len(counts)), counts)
        where = [torch.from_numpy(np.flatnonzero(kinds == kind)).to(text.device) for kind in range(3)]
        of_language = tuple(np.bincount(shot[kinds == LANGUAGE], minlength=len(counts)).tolist())

        def rows(kind: int, channels: int) -> Tensor:
            return text.index_select(0, where[kind])[:, 1 : 1 + channels]

        x_text = text.new_zeros(len(text), c.width)
        for kind, made in (
            (LANGUAGE, layers.refiner(rows(LANGUAGE, c.text_channels), of_language, time, choice)),
            (GLYPHS, layers.glyphs(rows(GLYPHS, c.glyph_channels))),
            (IMAGE, layers.image(rows(IMAGE, c.image_channels))),
        ):
            x_text = x_text.index_copy(0, where[kind], made + layers.kinds.weight[kind].to(made.dtype))
        return x_text, x_video

    def run_blocks(
        self,
        text: Tensor,
        video: Tensor,
        shots: Tensor,
        geometry: Geometry,
        stored: Iterable[tuple[KVRows | None, KVRows | None]],
        choice: Choice,
    ) -> Tensor:
        stored, dual = iter(stored), len(self.blocks) - self.config.single_blocks
        # where no block follows, `stored` is asked to its end: only then has it taken what the last block wrote
        for block, kv in zip(islice(self.blocks, dual), stored, strict=dual == len(self.blocks)):
            text, video = block(text, video, shots, geometry, *kv, choice)
        if dual == len(self.blocks):
            return video
        s = geometry.streams
        order = torch.cat([s.text_rows, s.video_rows]).argsort()
        x = torch.cat([text, video]).index_select(0, order)
        joint = replace(geometry, streams=_joint_stream(s, order))
        for block, kv in zip(islice(self.blocks, dual, None), stored, strict=True):
            x = block(x, shots, joint, *kv, choice)
        return x.index_select(0, s.video_rows)


def _joint_stream(s: Streams, order: Tensor) -> Streams:
    """All rows in the video stream, in joint order, which `order` picks from text and video one behind the other."""
    none = s.text_rows[:0]
    return Streams(
        text_rows=none,
        video_rows=torch.arange(len(order), device=order.device),
        text_shot=none,
        video_shot=torch.cat([s.text_shot, s.video_shot])[order],
        text_starts=torch.zeros_like(s.text_starts),
        video_starts=s.text_starts + s.video_starts,
    )
