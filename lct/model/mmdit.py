"""The long-context MMDiT (paper Fig. 3a): separate text and video weights, joint attention over a whole scene."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lct.kernels import KVRows, NormRope, attention, gated, modulate, norm_rope_append_, norm_rope_join
from lct.kernels.reference import statistics_dtype
from lct.kernels.select import Choice
from lct.layout import Geometry, SceneLayout
from lct.model.cache import KVCache
from lct.model.config import ModelConfig
from lct.model.cost import Cost
from lct.model.layers import MLP, Linear, time_features
from lct.model.shared import to_heads, to_rows
from lct.model.text import TextEncoder, WordEncoder


class StreamBlock(nn.Module):
    """The weights that one stream, text or video, has in a block.

    finishes  False for the text of the last block, which is only looked at: nothing reads what would come after
    """

    def __init__(self, c: ModelConfig, finishes: bool = True):
        super().__init__()
        inner, kv_inner = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.head_dim, self.finishes = c.head_dim, finishes
        self.modulation = Linear(c.width, (6 if finishes else 2) * c.width)
        self.qkv = Linear(c.width, inner + 2 * kv_inner)
        sizes = (c.head_dim, c.head_dim) if c.norm_scope == "head" else (inner, kv_inner)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(size)) for size in sizes)
        if finishes:
            self.out = Linear(inner, c.width)
            self.mlp = MLP(c.width, c.mlp_width)

    def project(self, x: Tensor, starts: Tensor, impl: str, shift: Tensor, scale: Tensor) -> Tensor:
        """[R, C] -> [R, A + 2·A_kv, D]."""
        return self.qkv(modulate(x, shift, scale, starts, impl)).unflatten(-1, (-1, self.head_dim))

    def finish(
        self,
        x: Tensor,
        attended: Tensor,
        starts: Tensor,
        impl: str,
        gate: Tensor,
        mlp_shift: Tensor,
        mlp_scale: Tensor,
        mlp_gate: Tensor,
    ) -> Tensor:
        """The stream after attention and MLP, [R, C]."""
        x = gated(x, self.out(attended.flatten(-2)), gate, starts, impl)
        return gated(x, self.mlp(modulate(x, mlp_shift, mlp_scale, starts, impl)), mlp_gate, starts, impl)


def attend(
    text_qkv: Tensor,
    video_qkv: Tensor,
    text_norm: tuple[Tensor, Tensor],
    video_norm: tuple[Tensor, Tensor],
    spec: NormRope,
    geometry: Geometry,
    cache: KVRows | None,
    pool: KVRows | None,
    choice: Choice,
) -> Tensor:
    """What every kind of block does between its projections: norm, rotation, join, and attention over the rows at hand
    or over a cache, into which theirs are written; arguments as in `norm_rope_join`. Returns [S, A, D].

    Where processes share the rows, each attends with some heads and all rows."""
    joined = (text_qkv, video_qkv, text_norm, video_norm, geometry.streams, geometry.positions, spec)
    if geometry.shared is not None:
        own, rows = norm_rope_join(*joined, impl=choice.norm_rope), geometry.plan.q_rows
        q, k, v = (to_heads(x, geometry.shared, rows) for x in own)
        attended = cast(Tensor, attention(q, k, v, geometry.plan, impl=choice.attention))
        return to_rows(attended, geometry.shared, own[0].shape[0])
    if cache is None:
        q, k, v = norm_rope_join(*joined, impl=choice.norm_rope)
    else:
        q, k, v = norm_rope_append_(*joined, cache, pool, impl=choice.norm_rope), cache.keys, cache.values
    return cast(Tensor, attention(q, k, v, geometry.plan, impl=choice.attention))


class Block(nn.Module):
    """One long-context MMDiT block."""

    def __init__(self, c: ModelConfig, last: bool = False):
        super().__init__()
        self.text, self.video = StreamBlock(c, finishes=not last), StreamBlock(c)
        self.spec = c.norm_rope()

    def forward(
        self,
        text: Tensor,
        video: Tensor,
        shots: Tensor,
        geometry: Geometry,
        cache: KVRows | None,
        pool: KVRows | None,
        choice: Choice,
    ) -> tuple[Tensor, Tensor]:
        s = geometry.streams
        text_m = self.text.modulation(shots).chunk(6 if self.text.finishes else 2, dim=-1)
        video_m = self.video.modulation(shots).chunk(6, dim=-1)
        attended = attend(
            self.text.project(text, s.text_starts, choice.modulate, *text_m[:2]),
            self.video.project(video, s.video_starts, choice.modulate, *video_m[:2]),
            (self.text.q_norm, self.text.k_norm),
            (self.video.q_norm, self.video.k_norm),
            self.spec,
            geometry,
            cache,
            pool,
            choice,
        )
        if self.text.finishes:
            text_attended = attended.index_select(0, s.text_rows)
            text = self.text.finish(text, text_attended, s.text_starts, choice.modulate, *text_m[2:])
        video_attended = attended.index_select(0, s.video_rows)
        return text, self.video.finish(video, video_attended, s.video_starts, choice.modulate, *video_m[2:])


class MMDiT(nn.Module):
    """Velocity of every video token, given noisy latents, text and each shot's own time.

    A one-shot layout is the single-shot model: LCT adds no parameter (§ 3.2.2, § 4.2).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.text_encoder: TextEncoder | None = WordEncoder(c.vocabulary, c.text_channels) if c.vocabulary else None
        self.video_in = Linear(c.patch_channels + c.condition_channels, c.width)
        self.text_in = self.text_layers()
        self.time_in = nn.Sequential(Linear(c.time_channels, c.width), nn.SiLU(), Linear(c.width, c.width), nn.SiLU())
        self.blocks = nn.ModuleList(self.block_layers())
        self.last_modulation = Linear(c.width, 2 * c.width)
        self.video_out = Linear(c.width, c.patch_channels)
        self.reset_parameters()

    def text_layers(self) -> nn.Module:
        """What turns text features into the text stream."""
        return Linear(self.config.text_channels, self.config.width)

    def block_layers(self) -> Iterable[nn.Module]:
        """The blocks, first to last."""
        return (Block(self.config, last=i == self.config.blocks - 1) for i in range(self.config.blocks))

    def reset_parameters(self) -> None:
        """Every block starts as the identity (adaLN-Zero) and the velocity at zero."""
        zero = [self.last_modulation, self.video_out]
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, StreamBlock):
                zero.append(module.modulation)
        for linear in zero:
            nn.init.zeros_(linear.weight)

    @property
    def encoder(self) -> TextEncoder:
        """The model's text encoder; ValueError where text features come from outside."""
        if self.text_encoder is None:
            raise ValueError(
                "text_encoder: this model takes text features from outside; name the folder of its --pipeline"
            )
        return self.text_encoder

    def forward(
        self,
        video: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        times: Tensor,
        geometry: Geometry | SceneLayout,
        cache: KVCache | None = None,
        pool: Iterable[KVRows] | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """v_Θ(z_t, t, c_text) of Eq. 1, for every shot at its own t.

        video     [S_video, patch channels], noisy latents as packed patches; their dtype is the compute dtype. A model
                  with `condition_channels` takes them behind the latents; without them they are zero
        text      [S_text, text_channels], packed text features; or (tokens, places), of which the model's own encoder
                  makes them
        times     fp32 [N], t of every shot of the geometry, in [0, 1]
        geometry  of the rows given here; a SceneLayout stands for `layout.geometry(device)`
        cache     keys and values of earlier shots; the rows given here are written into it at `geometry.slots`,
                  which commits nothing: see `KVCache`
        pool      per block, where keys before their rotation, and values, go as well: see `HistoryPool`
        impl      who computes the operations; see `select.Choice`

        Returns [S_video, patch channels]. Global prompts get a velocity like any shot; callers discard it.
        """
        choice = Choice.of(impl)
        if isinstance(text, tuple):
            text = self.encoder(*text)
        if isinstance(geometry, SceneLayout):
            geometry = geometry.geometry(video.device, cross=self.config.cross)
        if not torch.compiler.is_compiling():  # sizes read here would become guards, one compilation a layout
            self._check(video, text, times, geometry, cache, pool)
        text = text.to(video.dtype)
        shots = self.condition(times, text, geometry)
        x_text, x_video = self.embed(text, video, times, geometry, choice)
        if geometry.shared is not None and geometry.cross is None:
            x_text = x_text[slice(*geometry.shared.text)]
        nowhere = [None] * len(self.blocks)
        caches = nowhere if cache is None else cache.at(cast(Tensor, geometry.slots))
        # Blocks need rows alone, and where they are recomputed torch 2.11 compiles them for each number of shots.
        geometry = replace(geometry, shots=())
        x_video = self.run_blocks(x_text, x_video, shots, geometry, zip(caches, pool or nowhere, strict=True), choice)
        shift, scale = self.last_modulation(shots).chunk(2, dim=-1)
        return self.video_out(modulate(x_video, shift, scale, geometry.streams.video_starts, choice.modulate))

    # What models that others trained do in their own way; see `hunyuan.py`.

    def condition(self, times: Tensor, text: Tensor, geometry: Geometry) -> Tensor:
        """[N, C]: what modulates the rows of each shot, in the dtype of statistics."""
        return self.time_in(
            time_features(times.to(statistics_dtype(self.video_out.weight.dtype)), self.config.time_channels)
        )

    def embed(
        self, text: Tensor, video: Tensor, times: Tensor, geometry: Geometry, choice: Choice
    ) -> tuple[Tensor, Tensor]:
        """The two streams as they enter the first block, [S_text, C] and [S_video, C]."""
        return self.text_in(text), self.video_in(video)

    def run_blocks(
        self,
        text: Tensor,
        video: Tensor,
        shots: Tensor,
        geometry: Geometry,
        stored: Iterable[tuple[KVRows | None, KVRows | None]],
        choice: Choice,
    ) -> Tensor:
        """The video stream after all blocks; `stored` has the rows of cache and pool of each."""
        for block, kv in zip(self.blocks, stored, strict=True):
            text, video = block(text, video, shots, geometry, *kv, choice)
        return video

    def _check(self, video, text, times, geometry: Geometry, cache: KVCache | None, pool: object | None) -> None:
        s, c = geometry.streams, self.config
        entering = c.patch_channels
        if c.condition_channels and video.ndim == 2 and video.shape[1] != entering:
            entering += c.condition_channels
        for name, x, expected in (
            ("video", video, (len(s.video_rows), entering)),
            ("text", text, (sum(shot.text for shot in geometry.shots), c.text_row_channels)),
            ("times", times, (len(geometry.shots),)),
        ):
            if tuple(x.shape) != expected:
                raise ValueError(f"{name}: the layout and model expect shape {expected}, got {tuple(x.shape)}")
        if (cache is None) != (geometry.slots is None):
            raise ValueError("cache: goes with a geometry made by layout.tail, and only with one")
        if pool is not None and cache is None:
            raise ValueError("pool: goes with a cache, into which the same rows are written")
        if cache is not None and (len(cache.keys), cache.rows) != (c.blocks, geometry.plan.k_rows):
            raise ValueError(
                f"cache: the geometry is for {c.blocks} blocks of {geometry.plan.k_rows} rows, "
                f"got {len(cache.keys)} of {cache.rows}; pass the cache's own capacity to layout.tail"
            )

    # -- accounting ----------------------------------------------------------------------------------------------

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def cost(self) -> Cost:
        """Floating-point operations: matrix products by kind of row, attention by visible pair."""
        c, products = self.config, {"shot": 0, "text": 0, "video": 0, "joint": 0}
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                products[self.rows_of(name)] += 2 * module.weight.numel()
        return Cost(products, c.blocks * 4 * c.heads * c.head_dim, c.cross)

    def flops(self, geometry: Geometry | SceneLayout) -> int:
        """Floating-point operations of one forward pass; see `Cost`."""
        return self.cost().forward(geometry)

    def training_flops(self, geometry: Geometry | SceneLayout) -> int:
        """The same of one forward and backward pass."""
        return self.cost().training(geometry)

    def rows_of(self, name: str) -> str:
        """What the product called `name` is computed for: each "shot", or the rows "text", "video" or "joint"."""
        if "modulation" in name or name.startswith("time_in"):
            return "shot"
        return "text" if "text" in name else "video"

    def stream_weights(self) -> frozenset[str]:
        """Names of the weights of products for rows, which cast them to the dtype of the streams; what is computed for
        shots are statistics, in fp32."""
        products = (n for n, module in self.named_modules() if isinstance(module, Linear) and self.rows_of(n) != "shot")
        names = {f"{name}.{own}" for name in products for own in ("weight", "bias")}
        return frozenset(names & {name for name, _ in self.named_parameters()})

    def kv_bytes(self, rows: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the keys and values of `rows` rows over all blocks."""
        c = self.config
        return 2 * c.blocks * rows * c.kv_heads * c.head_dim * dtype.itemsize
