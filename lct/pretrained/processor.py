"""Context-causal attention inside a diffusers pipeline: its transformer's processors, replaced by ones with a plan.

A video of the pipeline is read as shots, one behind the other in time. Positions, weights and everything else stay the
pipeline's own; what a row sees is this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from lct.kernels import attention
from lct.layout import VISIBILITIES
from lct.plan import Interval, Plan, Run


@dataclass(frozen=True)
class Shots:
    """How a pipeline's video falls into shots.

    frames      latent frames of each, in order
    visibility  "context_causal": a shot sees the shots before it; "isolated", "bidirectional": as in SceneLayout
    texts       per shot, the rows of packed text that are its own, as (first, end), for Wan, whose text is read by
                cross-attention; rows before the first of them are the global prompt. None: every shot reads all text

    Where text attends jointly (HunyuanVideo), it belongs to the first shot, and every shot sees it: so it carries
    nothing back from later shots, and one shot alone is the pipeline as it was.
    """

    frames: tuple[int, ...]
    visibility: str = "context_causal"
    texts: tuple[Interval, ...] | None = None

    def __post_init__(self):
        if not self.frames or min(self.frames) < 1:
            raise ValueError(f"frames: expected one latent frame or more in each shot, got {self.frames}")
        if self.visibility not in VISIBILITIES:
            raise ValueError(f"visibility: expected one of {VISIBILITIES}, got {self.visibility!r}")
        if self.texts is not None and len(self.texts) != len(self.frames):
            raise ValueError(f"texts: expected rows for each of {len(self.frames)} shots, got {len(self.texts)}")

    def videos(self, rows: int) -> list[Interval]:
        """Rows of each shot's video, of `rows` altogether; ValueError where they do not divide into frames."""
        total = sum(self.frames)
        if rows % total:
            raise ValueError(
                f"frames: expected shots of {rows} rows together, got {total} latent frames; do they add up?"
            )
        ends = [0]
        for count in self.frames:
            ends.append(ends[-1] + count * (rows // total))
        return list(zip(ends, ends[1:], strict=False))

    def seen(self, index: int) -> range:
        """The shots that a shot sees."""
        if self.visibility == "isolated":
            return range(index, index + 1)
        return range(index + 1) if self.visibility == "context_causal" else range(len(self.frames))


def use_shots(transformer: Any, shots: Shots, impl: str = "auto") -> Callable[[], None]:
    """Give every attention layer of a HunyuanVideo, HunyuanVideo-1.5 or Wan transformer the sight of `shots`.

    transformer  a module of diffusers, such as `pipeline.transformer`; changed in place

    Returns a function that puts the old processors back. TypeError for another module.
    """
    kind = type(transformer).__name__
    if kind == "WanTransformer3DModel":
        layers = [(b.attn1, _Wan(shots, impl)) for b in transformer.blocks]
        layers += [(b.attn2, _WanText(shots, impl)) for b in transformer.blocks] if shots.texts is not None else []
    elif kind in ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"):
        if shots.texts is not None:
            raise ValueError(f"texts: expected None for {kind}, whose text attends jointly, got {shots.texts}")
        blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
        texts = _Texts()
        layers = [(block.attn, _Hunyuan(shots, impl, texts)) for block in blocks]
    else:
        raise TypeError(f"transformer: expected one of HunyuanVideo, HunyuanVideo-1.5 or Wan, got {kind}")
    before = [(layer, layer.processor) for layer, _ in layers]
    for layer, processor in layers:
        layer.set_processor(processor)

    def restore() -> None:
        for layer, processor in before:
            layer.set_processor(processor)

    return restore


@lru_cache(maxsize=64)
def _plan(shots: Shots, rows: int, texts: tuple[int, ...], keys: int, device: str) -> Plan:
    """Of packed videos: each `rows` rows of video and `keys − rows` of text, of which as many count as `texts` says."""
    runs = []
    for b, text in enumerate(texts):
        start = b * keys
        videos = [(start + a, start + z) for a, z in shots.videos(rows)]
        words = (start + rows, start + rows + text)
        for i, video in enumerate(videos):
            runs.append(Run(*video, (*(videos[j] for j in shots.seen(i)), words)))
        runs.append(Run(*words, (*(videos[j] for j in shots.seen(0)), words)))
    return Plan.build(runs, len(texts) * keys, len(texts) * keys, device)


@lru_cache(maxsize=64)
def _text_plan(shots: Shots, rows: int, words: int, batch: int, device: str) -> Plan:
    """Of packed videos that read text: their own, and what stands before the first shot's."""
    assert shots.texts is not None
    shared, runs = (0, shots.texts[0][0]), []
    for b in range(batch):
        for video, text in zip(shots.videos(rows), shots.texts, strict=True):
            sees = tuple((b * words + a, b * words + z) for a, z in (shared, text))
            runs.append(Run(b * rows + video[0], b * rows + video[1], sees))
    return Plan.build(runs, batch * rows, batch * words, device)


class _Texts:
    """How many rows of each text count, asked of the device once a mask: all layers of a pass are given the same."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._version, self._counts = (0, 0, 0), ()

    def counts(self, mask: Tensor | None, words: int, batch: int) -> tuple[int, ...]:
        """Rows that count of each text of `words` rows; they stand first. A new mask waits for the device."""
        if mask is None:
            return (words,) * batch
        version = (0 if mask.is_inference() else mask._version, words, batch)
        if mask is not self._mask or version != self._version:
            of_text = mask.reshape(batch, -1)[:, -words:] if words else mask.new_zeros(batch, 0)
            self._mask, self._version = mask, version
            self._counts = tuple(of_text.bool().sum(1).tolist())
        return self._counts


@dataclass
class _Processor:
    shots: Shots
    impl: str
    texts: _Texts = field(default_factory=_Texts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """[B, rows, A, D] each, packed for one call; returns [B, rows, A·D]."""
        rows = [x.flatten(0, 1).contiguous() for x in (q, k, v)]
        return cast(Tensor, attention(rows[0], rows[1], rows[2], plan, impl=self.impl)).view(*q.shape[:2], -1)


class _Wan(_Processor):
    """Self-attention of video."""

    def __call__(
        self,
        attn,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
        **_,
    ):
        x = hidden_states
        q, k = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x))
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, attn.to_v(x)))
        q, k = (_turned(part, rotary_emb) for part in (q, k))
        plan = _plan(self.shots, x.shape[1], (0,) * len(x), x.shape[1], str(x.device))
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v, plan)))


class _WanText(_Processor):
    """Cross-attention to text."""

    def __call__(
        self,
        attn,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
        **_,
    ):
        x, text = hidden_states, encoder_hidden_states
        if attn.add_k_proj is not None:
            raise ValueError("texts: expected a transformer for video from text, got one that reads an image beside it")
        q, k = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text))
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, attn.to_v(text)))
        plan = _text_plan(self.shots, x.shape[1], text.shape[1], len(x), str(x.device))
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v, plan)))


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Wan's rotation: neighbouring channels are a pair."""
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


class _Hunyuan(_Processor):
    """Joint attention of video and text, two streams or one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        **_,
    ):
        from diffusers.models.embeddings import apply_rotary_emb

        video, text = hidden_states, encoder_hidden_states
        rows, words, heads = video.shape[1], text.shape[1], attn.heads

        def projected(x: Tensor, layers: Sequence[Any], norms: Sequence[Any]) -> list[Tensor]:
            parts = [layer(x).unflatten(2, (heads, -1)) for layer in layers]
            return [parts[i] if norm is None else norm(parts[i]) for i, norm in enumerate((*norms, None))]

        own = projected(video, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        turned = [cast(Tensor, apply_rotary_emb(part, image_rotary_emb, sequence_dim=1)) for part in own[:2]]
        own = [*turned, own[2]]
        if attn.add_q_proj is None:
            other = projected(text, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        else:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            other = projected(text, added, (attn.norm_added_q, attn.norm_added_k))
        q, k, v = (torch.cat(pair, 1) for pair in zip(own, other, strict=True))
        counts = self.texts.counts(attention_mask, words, len(video))
        out = self.attend(q, k, v, _plan(self.shots, rows, counts, rows + words, str(video.device)))
        video_out, text_out = out[:, :rows], out[:, rows:]
        if getattr(attn, "to_out", None) is not None:
            video_out = attn.to_out[1](attn.to_out[0](video_out))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return video_out, text_out
