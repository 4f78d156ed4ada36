"""What a model is: one frozen dataclass without defaults, and presets as functions that return a complete one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lct.kernels import NormRope

COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """An MMDiT. LCT adds nothing to it: a one-shot layout is the single-shot model (§ 3.2.2)."""

    blocks: int
    width: int
    """C, of both streams."""
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    latent_channels: int
    patch: tuple[int, int, int]
    """(frames, height, width) of latent pixels in one video token."""
    text_channels: int
    vocabulary: int
    """Word buckets of the small trainable text encoder; 0 where text features come from outside."""
    rope_axes: tuple[int, int, int]
    """Channels of a head rotated by (t, y, x)."""
    rope_theta: float
    norm_eps: float
    norm_scope: str
    """QK RMS norm over each "head", or over the whole "row" as in Wan."""
    time_channels: int
    """Sinusoidal features of a shot's time."""

    def __post_init__(self):
        sizes = (self.blocks, self.width, self.heads, self.kv_heads, self.head_dim, self.mlp_width, *self.patch)
        if min(*sizes, self.latent_channels, self.text_channels, self.time_channels) < 1:
            raise ValueError(f"model: expected every size to be at least 1, got {self}")
        if self.time_channels % 2 or self.vocabulary == 1 or self.vocabulary < 0:
            raise ValueError(
                "time_channels, vocabulary: expected an even number and 0 or at least 2 words, "
                f"got {self.time_channels} and {self.vocabulary}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}")
        if sum(self.rope_axes) > self.head_dim:
            raise ValueError(f"rope_axes: expected a sum of at most head_dim {self.head_dim}, got {self.rope_axes}")

    @property
    def patch_channels(self) -> int:
        """Channels of one video token before the first projection."""
        frames, height, width = self.patch
        return frames * height * width * self.latent_channels

    def norm_rope(self) -> NormRope:
        """What `norm_rope_join` needs to know of the model."""
        from lct.kernels import NormRope

        return NormRope(self.heads, self.rope_axes, self.rope_theta, self.norm_eps, self.norm_scope)


def tiny() -> ModelConfig:
    """A model that learns toy scenes on two CPU cores within minutes."""
    return ModelConfig(
        blocks=4,
        width=128,
        heads=4,
        kv_heads=4,
        head_dim=32,
        mlp_width=256,
        latent_channels=3,
        patch=(1, 4, 4),
        text_channels=48,
        vocabulary=512,
        rope_axes=(8, 12, 12),
        rope_theta=10_000.0,
        norm_eps=1e-6,
        norm_scope="head",
        time_channels=64,
    )


def micro() -> ModelConfig:
    """A model of a million parameters, small enough to be trained a dozen times in an evening on two CPU cores."""
    return replace(tiny(), width=96, heads=3, kv_heads=3, mlp_width=192)


def lct_3b() -> ModelConfig:
    """The size of the paper's model, 3 B parameters (§ 4); its inner sizes are not published."""
    return ModelConfig(
        blocks=20,
        width=2048,
        heads=16,
        kv_heads=16,
        head_dim=128,
        mlp_width=8192,
        latent_channels=16,
        patch=(1, 2, 2),
        text_channels=4096,
        vocabulary=0,
        rope_axes=(16, 56, 56),
        rope_theta=10_000.0,
        norm_eps=1e-6,
        norm_scope="head",
        time_channels=256,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "micro": micro, "lct_3b": lct_3b}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`; ValueError lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {tuple(PRESETS)}, got {name!r}")
    return PRESETS[name]()
