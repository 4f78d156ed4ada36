"""What each weight of a model is called in diffusers' files, and how it lies there.

One table a family, read in both directions, so that what was loaded is saved as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lct.model.config import HunyuanConfig, ModelConfig, WanConfig

Change = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Key:
    """One weight of ours and those of theirs that lie in it one behind the other.

    here, there  from the joined tensor of theirs to ours, and back
    """

    ours: str
    theirs: tuple[str, ...]
    here: Change = _same
    there: Change = _same

    def read(self, tensors: list[Tensor]) -> Tensor:
        return self.here(tensors[0] if len(tensors) == 1 else torch.cat(tensors)).contiguous()

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        """Their tensors, equal parts of ours."""
        parts = self.there(weight).chunk(len(self.theirs))
        return {name: part.contiguous() for name, part in zip(self.theirs, parts, strict=True)}


def keys(config: ModelConfig) -> list[Key]:
    """Every weight of a model of this configuration. ValueError for a family that diffusers has no files of."""
    if isinstance(config, HunyuanConfig):
        return list(_hunyuan(config))
    if isinstance(config, WanConfig):
        return list(_wan(config))
    raise ValueError(f"family: expected hunyuan or wan, which diffusers has files of, got {config.family!r}")


def _layer(ours: str, *theirs: str, here: Change = _same, there: Change = _same) -> Iterator[Key]:
    """Weight and bias of a layer, or of several that are one here."""
    for part in ("weight", "bias"):
        yield Key(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), here, there)


def _pair(ours: str, theirs: str) -> Iterator[Key]:
    """The two layers that bring time, guidance or a pooled vector to the model's width."""
    yield from _layer(f"{ours}.0", f"{theirs}.linear_1")
    yield from _layer(f"{ours}.2", f"{theirs}.linear_2")


def _mlp(rise: str, fall: str, theirs: str) -> Iterator[Key]:
    yield from _layer(rise, f"{theirs}.net.0.proj")
    yield from _layer(fall, f"{theirs}.net.2")


def _swapped(x: Tensor) -> Tensor:
    """The two halves of the last modulation, which diffusers has scale first."""
    return torch.cat(x.chunk(2)[::-1])


def _entry(config: ModelConfig, theirs: str) -> Iterator[Key]:
    """A convolution over patches, whose rows here go frame, height, width, channel."""
    frames, height, width = config.patch
    channels = config.latent_channels + config.condition_channels

    def here(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 4, 1).flatten(1)

    def there(x: Tensor) -> Tensor:
        return x.unflatten(1, (frames, height, width, channels)).permute(0, 4, 1, 2, 3)

    yield Key("video_in.weight", (f"{theirs}.weight",), here, there)
    yield Key("video_in.bias", (f"{theirs}.bias",))


def _hunyuan_exit(config: ModelConfig) -> Iterator[Key]:
    """The last product, whose rows there go channel, frame, height, width."""
    frames, height, width = config.patch
    channels = config.latent_channels

    def here(x: Tensor) -> Tensor:
        return x.unflatten(0, (channels, frames, height, width)).movedim(0, 3).flatten(0, 3)

    def there(x: Tensor) -> Tensor:
        return x.unflatten(0, (frames, height, width, channels)).movedim(3, 0).flatten(0, 3)

    yield from _layer("video_out", "proj_out", here=here, there=there)


def _hunyuan(c: HunyuanConfig) -> Iterator[Key]:
    yield from _entry(c, "x_embedder.proj")
    yield from _hunyuan_exit(c)
    yield from _layer("last_modulation", "norm_out.linear", here=_swapped, there=_swapped)
    of_time = "time_embed" if c.of_kinds else "time_text_embed"
    yield from _pair("time_in", f"{of_time}.timestep_embedder")
    if c.pooled_channels:
        yield from _pair("time_pooled", f"{of_time}.text_embedder")
    if c.guidance is not None:
        yield from _pair("time_guidance", f"{of_time}.guidance_embedder")
    yield from _refiner(c)
    if c.of_kinds:
        yield Key("text_in.kinds.weight", ("cond_type_embed.weight",))
        yield from _layer("text_in.glyphs.norm", "context_embedder_2.norm")
        for i in range(3):
            yield from _layer(f"text_in.glyphs.layers.{i}", f"context_embedder_2.linear_{i + 1}")
        for ours, theirs in (("rise", "linear_1"), ("fall", "linear_2"), ("norm_in",) * 2, ("norm_out",) * 2):
            yield from _layer(f"text_in.image.{ours}", f"image_embedder.{theirs}")
    dual = c.blocks - c.single_blocks
    for i in range(dual):
        yield from _dual(f"blocks.{i}", f"transformer_blocks.{i}")
    for i in range(c.single_blocks):
        yield from _single(f"blocks.{dual + i}", f"single_transformer_blocks.{i}")


def _refiner(c: HunyuanConfig) -> Iterator[Key]:
    ours, theirs = "text_in.refiner", "context_embedder"
    yield from _layer(f"{ours}.entry", f"{theirs}.proj_in")
    yield from _pair(f"{ours}.time_in", f"{theirs}.time_text_embed.timestep_embedder")
    yield from _pair(f"{ours}.pooled_in", f"{theirs}.time_text_embed.text_embedder")
    for i in range(c.refiner_blocks):
        a, b = f"{ours}.blocks.{i}", f"{theirs}.token_refiner.refiner_blocks.{i}"
        yield from _layer(f"{a}.norm_1", f"{b}.norm1")
        yield from _layer(f"{a}.norm_2", f"{b}.norm2")
        yield from _layer(f"{a}.qkv", *(f"{b}.attn.to_{x}" for x in "qkv"))
        yield from _layer(f"{a}.out", f"{b}.attn.to_out.0")
        yield from _mlp(f"{a}.rise", f"{a}.fall", f"{b}.ff")
        yield from _layer(f"{a}.modulation", f"{b}.norm_out.linear")


def _dual(ours: str, theirs: str) -> Iterator[Key]:
    attn = f"{theirs}.attn"
    yield from _layer(f"{ours}.video.qkv", *(f"{attn}.to_{x}" for x in "qkv"))
    yield from _layer(f"{ours}.text.qkv", *(f"{attn}.add_{x}_proj" for x in "qkv"))
    yield from _layer(f"{ours}.video.out", f"{attn}.to_out.0")
    yield from _layer(f"{ours}.text.out", f"{attn}.to_add_out")
    for stream, modulation, norm, mlp in (
        ("video", "norm1", "norm", "ff"),
        ("text", "norm1_context", "norm_added", "ff_context"),
    ):
        yield from _layer(f"{ours}.{stream}.modulation", f"{theirs}.{modulation}.linear")
        yield from _mlp(f"{ours}.{stream}.mlp.rise", f"{ours}.{stream}.mlp.fall", f"{theirs}.{mlp}")
        yield from (Key(f"{ours}.{stream}.{x}_norm", (f"{attn}.{norm}_{x}.weight",)) for x in "qk")


def _single(ours: str, theirs: str) -> Iterator[Key]:
    yield from _layer(f"{ours}.modulation", f"{theirs}.norm.linear")
    yield from _layer(f"{ours}.qkv", *(f"{theirs}.attn.to_{x}" for x in "qkv"))
    yield from (Key(f"{ours}.{x}_norm", (f"{theirs}.attn.norm_{x}.weight",)) for x in "qk")
    yield from _layer(f"{ours}.rise", f"{theirs}.proj_mlp")
    yield from _layer(f"{ours}.out", f"{theirs}.proj_out")


def _wan(c: WanConfig) -> Iterator[Key]:
    def table(ours: str, theirs: str, count: int) -> Key:
        return Key(ours, (theirs,), lambda x: x.flatten(), lambda x: x.view(1, count, c.width))

    yield from _entry(c, "patch_embedding")
    yield from _layer("video_out", "proj_out")
    yield table("last_modulation.table", "scale_shift_table", 2)
    yield from _pair("time_in", "condition_embedder.time_embedder")
    yield from _layer("time_modulation", "condition_embedder.time_proj")
    yield from _layer("text_in.first", "condition_embedder.text_embedder.linear_1")
    yield from _layer("text_in.second", "condition_embedder.text_embedder.linear_2")
    for i in range(c.blocks):
        a, b = f"blocks.{i}", f"blocks.{i}"
        yield table(f"{a}.table", f"{b}.scale_shift_table", 6)
        yield from _layer(f"{a}.qkv", *(f"{b}.attn1.to_{x}" for x in "qkv"))
        yield from _layer(f"{a}.out", f"{b}.attn1.to_out.0")
        yield from _layer(f"{a}.cross_norm", f"{b}.norm2")
        yield from _layer(f"{a}.cross_q", f"{b}.attn2.to_q")
        yield from _layer(f"{a}.text_kv", f"{b}.attn2.to_k", f"{b}.attn2.to_v")
        yield from _layer(f"{a}.cross_out", f"{b}.attn2.to_out.0")
        for x in "qk":
            yield Key(f"{a}.{x}_norm", (f"{b}.attn1.norm_{x}.weight",))
            yield Key(f"{a}.cross_{x}_norm", (f"{b}.attn2.norm_{x}.weight",))
        yield from _mlp(f"{a}.mlp.rise", f"{a}.mlp.fall", f"{b}.ffn")
