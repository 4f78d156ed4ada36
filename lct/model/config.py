"""What a model is: one frozen dataclass without defaults, and presets as functions that return a complete one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from lct.kernels import NormRope

ComputeDtype = Literal["float32", "bfloat16", "float16", "float64"]
COMPUTE_DTYPES: tuple[str, ...] = get_args(ComputeDtype)


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
    family: str = "mmdit"
    """"mmdit" of this project, or a model that others trained: "hunyuan", "wan"."""

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
    def cross(self) -> bool:
        """Whether video reads text by cross-attention, and rows are video alone; see `Geometry.cross`."""
        return False

    @property
    def condition_channels(self) -> int:
        """Channels behind the latents at the entry of the model, zero where nothing is said about them."""
        return 0

    @property
    def text_row_channels(self) -> int:
        """Channels of a row of text features as the model takes them."""
        return self.text_channels

    @property
    def patch_channels(self) -> int:
        """Channels of one video token before the first projection."""
        frames, height, width = self.patch
        return frames * height * width * self.latent_channels

    def norm_rope(self) -> NormRope:
        """What `norm_rope_join` needs to know of the model."""
        from lct.kernels import NormRope

        return NormRope(self.heads, self.rope_axes, self.rope_theta, self.norm_eps, self.norm_scope)


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig(ModelConfig):
    """`text_channels` are those of the language model; `blocks` counts both kinds."""

    family: str = "hunyuan"
    single_blocks: int
    """How many blocks at the end have one set of weights for both streams: 40 in 1.0, none in 1.5."""
    refiner_blocks: int
    pooled_channels: int
    """Of the vector that CLIP makes of a prompt, in 1.0; 0 in 1.5."""
    guidance: float | None
    """The guidance that distilled weights are told, in 1.0; None where they take none."""
    glyph_channels: int
    """Of ByT5's features of words to be shown, in 1.5; 0 in 1.0."""
    image_channels: int
    """Of features of a first frame, in 1.5; 0 in 1.0."""
    frame_channels: int
    """Channels behind the latents in 1.5: those of a first frame, and its mask; zero here, as for video from text."""
    others: str = "{}"
    """What else diffusers' config.json says, as JSON; written back as it was."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.single_blocks <= self.blocks or self.refiner_blocks < 0:
            raise ValueError(
                f"single_blocks, refiner_blocks: expected 0 to {self.blocks} and at least 0, "
                f"got {self.single_blocks} and {self.refiner_blocks}"
            )
        if self.frame_channels and self.patch != (1, 1, 1):
            raise ValueError(f"frame_channels: expected a patch of one latent pixel beside them, got {self.patch}")
        if self.vocabulary or self.norm_scope != "head":
            raise ValueError("vocabulary, norm_scope: expected 0 and 'head', text features come from outside")

    @property
    def condition_channels(self) -> int:
        return self.frame_channels

    @property
    def of_kinds(self) -> bool:
        """Whether text rows are of several kinds, as in 1.5."""
        return self.glyph_channels > 0

    @property
    def text_row_channels(self) -> int:
        """1.0: the language model's features, then the pooled vector, the same in all rows of a shot. 1.5: the kind of
        the row, then its features, zeros behind them."""
        if self.of_kinds:
            return 1 + max(self.text_channels, self.glyph_channels, self.image_channels)
        return self.text_channels + self.pooled_channels


@dataclass(frozen=True, kw_only=True)
class WanConfig(ModelConfig):
    """Wan 2.1 and 2.2 for video from text."""

    family: str = "wan"
    others: str = "{}"
    """What else diffusers' config.json says, as JSON; written back as it was."""

    def __post_init__(self):
        super().__post_init__()
        if self.vocabulary or self.norm_scope != "row" or self.heads != self.kv_heads:
            raise ValueError("vocabulary, norm_scope, kv_heads: expected 0, 'row' and as many as heads")

    @property
    def cross(self) -> bool:
        return True


@dataclass(frozen=True)
class Memory:
    """Where and how finished shots are kept, and how a context is made of chosen ones."""

    device: str | None = None
    """Where the pool lies, such as "cpu" beside a model on a GPU; None: with the model."""
    fp8: bool = False
    """Keys and values in 8 bits with a scale for each row and head: half of what bf16 takes."""
    layered: bool = False
    """Make the context of a block when it runs, in every step, in one of two buffers, and not once for all blocks."""


FAMILIES: dict[str, type[ModelConfig]] = {"mmdit": ModelConfig, "hunyuan": HunyuanConfig, "wan": WanConfig}


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


def hunyuan() -> HunyuanConfig:
    """HunyuanVideo, 12.8 B parameters."""
    return HunyuanConfig(
        blocks=60,
        single_blocks=40,
        refiner_blocks=2,
        width=3072,
        heads=24,
        kv_heads=24,
        head_dim=128,
        mlp_width=12288,
        latent_channels=16,
        frame_channels=0,
        patch=(1, 2, 2),
        text_channels=4096,
        pooled_channels=768,
        glyph_channels=0,
        image_channels=0,
        guidance=6.0,
        vocabulary=0,
        rope_axes=(16, 56, 56),
        rope_theta=256.0,
        norm_eps=1e-6,
        norm_scope="head",
        time_channels=256,
    )


def hunyuan15() -> HunyuanConfig:
    """HunyuanVideo-1.5, 8.3 B parameters."""
    return replace(
        hunyuan(),
        blocks=54,
        single_blocks=0,
        width=2048,
        heads=16,
        kv_heads=16,
        mlp_width=8192,
        latent_channels=32,
        frame_channels=33,
        patch=(1, 1, 1),
        text_channels=3584,
        pooled_channels=0,
        glyph_channels=1472,
        image_channels=1152,
        guidance=None,
    )


def wan_1_3b() -> WanConfig:
    """Wan 2.1, 1.4 B parameters."""
    return WanConfig(
        blocks=30,
        width=1536,
        heads=12,
        kv_heads=12,
        head_dim=128,
        mlp_width=8960,
        latent_channels=16,
        patch=(1, 2, 2),
        text_channels=4096,
        vocabulary=0,
        rope_axes=(44, 42, 42),
        rope_theta=10_000.0,
        norm_eps=1e-6,
        norm_scope="row",
        time_channels=256,
    )


def wan_5b() -> WanConfig:
    """Wan 2.2 TI2V, 5.0 B parameters."""
    return replace(wan_1_3b(), width=3072, heads=24, kv_heads=24, mlp_width=14336, latent_channels=48)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    preset.__name__: preset for preset in (tiny, micro, lct_3b, hunyuan, hunyuan15, wan_1_3b, wan_5b)
}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`; ValueError lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {tuple(PRESETS)}, got {name!r}")
    return PRESETS[name]()
