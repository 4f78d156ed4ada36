"""The same operations and the same model as most code writes them: what this project is compared with end to end.

Norm, RoPE and modulation in eager torch, text and video put together by `torch.cat` and indexing, attention under a
dense mask, and a KV cache that grows by `torch.cat`. Weights are those of an `MMDiT`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from baselines import sdpa
from torch import Tensor

from lct.kernels.reference import rope_turns, rotate
from lct.layout import Geometry
from lct.model.layers import time_features
from lct.model.mmdit import MMDiT


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def norm_rope(text: Tensor, video: Tensor, weights, streams, turns: Tensor, heads: int, eps: float):
    """q, k, v in joint order, from both streams' QKV: normed, concatenated, put in order, turned."""
    kv_heads = (text.shape[1] - heads) // 2
    order = torch.cat([streams.text_rows, streams.video_rows]).argsort()
    parts = [x.split((heads, kv_heads, kv_heads), dim=1) for x in (text, video)]
    q, k = (
        rotate(torch.cat([norm(p[i], w[i], eps) for p, w in zip(parts, weights, strict=True)])[order], turns)
        for i in range(2)
    )
    return q, k, torch.cat([p[2] for p in parts])[order]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, shot: Tensor) -> Tensor:
    """The norm in fp32, as most models have it; back in the dtype of x."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (normed * (1 + scale[shot]) + shift[shot]).to(x.dtype)


class UsualModel:
    """An MMDiT's forward pass in eager torch. `attend` computes attention of q, k, v; `cache`, a list of (k, v) per
    block, grows by concatenation."""

    def __init__(self, model: MMDiT):
        self.model, self.spec = model, model.config.norm_rope()

    def __call__(self, video: Tensor, text: Tensor, times: Tensor, geometry: Geometry, attend=sdpa, cache=None):
        m, s = self.model, geometry.streams
        shots = m.time_in(time_features(times, m.config.time_channels))
        turns = rope_turns(geometry.positions, self.spec.axes, self.spec.theta, video.dtype)
        x_video, x_text, grown = m.video_in(video), m.text_in(text), []
        for i, block in enumerate(m.blocks):
            x_text, x_video, kv = self.block(block, x_text, x_video, shots, s, turns, attend, cache and cache[i])
            grown.append(kv)
        shift, scale = m.last_modulation(shots).chunk(2, dim=-1)
        return m.video_out(modulate(x_video, shift, scale, s.video_shot)), grown

    def block(self, block, text, video, shots, s, turns, attend, past=None):
        text_m = block.text.modulation(shots).chunk(6 if block.text.finishes else 2, dim=-1)
        video_m = block.video.modulation(shots).chunk(6, dim=-1)
        qkv = [
            part.qkv(modulate(x, *m[:2], shot)).unflatten(-1, (-1, part.head_dim))
            for part, x, m, shot in (
                (block.text, text, text_m, s.text_shot),
                (block.video, video, video_m, s.video_shot),
            )
        ]
        weights = [(part.q_norm, part.k_norm) for part in (block.text, block.video)]
        q, k, v = norm_rope(*qkv, weights, s, turns, self.spec.heads, self.spec.eps)
        if past is not None:
            k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
        attended = attend(q, k, v).flatten(-2)
        if block.text.finishes:
            text = self.finish(block.text, text, attended[s.text_rows], text_m[2:], s.text_shot)
        return text, self.finish(block.video, video, attended[s.video_rows], video_m[2:], s.video_shot), (k, v)

    def finish(self, part, x, attended, modulation, shot):
        gate, shift, scale, mlp_gate = modulation
        x = (x + gate[shot] * part.out(attended)).to(x.dtype)
        return (x + mlp_gate[shot] * part.mlp(modulate(x, shift, scale, shot))).to(x.dtype)
