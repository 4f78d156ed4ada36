"""Frames to latents and back, and latents to rows of patches and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Codec(Protocol):
    """What turns frames into latents and back: `PixelCodec`, or a pretrained VAE."""

    @property
    def name(self) -> str: ...

    @property
    def stride(self) -> int: ...

    @property
    def time_stride(self) -> int: ...

    def encode(self, frames: np.ndarray | Tensor) -> Tensor: ...

    def encode_images(self, frames: np.ndarray | Tensor) -> Tensor: ...

    def decode(self, latents: np.ndarray | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PixelCodec:
    """A codec without weights that stands where a video VAE will: latents are frames shrunk `stride` times.

    channels     C of the latents
    stride       pixels of a frame per latent pixel, along height and along width
    time_stride  frames per latent frame after the first: one
    """

    stride: int
    channels: ClassVar[int] = 3

    @classmethod
    def named(cls, name: str) -> PixelCodec:
        """The codec that a scene file calls `name`, such as "pixel/8"; ValueError for another kind of name."""
        kind, _, stride = name.partition("/")
        if kind != "pixel" or not stride.isdecimal():
            raise ValueError(
                f"codec: expected pixel/STRIDE, such as pixel/8, got {name!r}; a VAE's latents need its --pipeline"
            )
        return cls(int(stride))

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride: expected a positive number of pixels, got {self.stride}; use for example 8")

    @property
    def time_stride(self) -> int:
        return 1

    @property
    def name(self) -> str:
        """What a scene file calls latents of this codec."""
        return f"pixel/{self.stride}"

    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Mean over squares of `stride` pixels in [-1, 1]: uint8 [T, H, W, 3] -> float32 [T, H/stride, W/stride, 3].

        Raises ValueError for another dtype or shape and for sizes that `stride` does not divide.
        """
        pixels = torch.as_tensor(frames)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(
                f"frames: expected uint8 [T, H, W, 3], got {pixels.dtype} {list(pixels.shape)}; scale to 0..255 first"
            )
        if pixels.shape[1] % self.stride or pixels.shape[2] % self.stride:
            raise ValueError(
                f"frames: expected height and width that {self.stride} divides, got {list(pixels.shape[1:3])}; "
                "crop or resize them"
            )
        means = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), self.stride)
        return (means / 127.5 - 1).permute(0, 2, 3, 1).contiguous()

    def encode_images(self, frames: np.ndarray | Tensor) -> Tensor:
        """Encode frames as images, each on its own: uint8 [K, H, W, 3] -> float32 [K, H/stride, W/stride, 3]."""
        return self.encode(frames)

    def decode(self, latents: np.ndarray | Tensor) -> Tensor:
        """Enlarge bicubically and clamp: float [T, H, W, 3] in [-1, 1] -> uint8 [T, H·stride, W·stride, 3]."""
        small = torch.as_tensor(latents)
        if small.ndim != 4 or small.shape[-1] != self.channels:
            raise ValueError(f"latents: expected [T, H, W, {self.channels}], got {list(small.shape)}; unpatchify first")
        channels_first = small.permute(0, 3, 1, 2).float()
        enlarged = F.interpolate(channels_first, scale_factor=float(self.stride), mode="bicubic", align_corners=False)
        return ((enlarged.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def divides_in_time(codec: str | None) -> bool:
    """Whether latents that a scene file calls so may be cut between any two frames. Those of a VAE may not: their first
    frame is encoded as an image, all others as several frames each."""
    return codec is None or codec.startswith("pixel/")


def size_in_patches(size: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(T, H, W) in patches of latents whose first three sizes are `size`, in latent pixels."""
    frames, height, width = (n // p for n, p in zip(size, patch, strict=False))
    return frames, height, width


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut latents into one row per patch, in the order frame, height, width.

    latents [T, H, W, C] in latent pixels, any dtype and device; patch (pt, ph, pw) in latent pixels.
    Returns [T/pt · H/ph · W/pw, pt·ph·pw·C]; inside a row the order is frame, height, width, channel. Differentiable.
    Raises ValueError where the patch does not divide the sizes.
    """
    if latents.ndim != 4 or any(size % edge for size, edge in zip(latents.shape, patch, strict=False)):
        raise ValueError(
            f"latents: expected [T, H, W, C] with T, H, W that the patch {tuple(patch)} divides, got "
            f"{list(latents.shape)}; trim them or choose another patch"
        )
    (pt, ph, pw), (T, H, W, C) = patch, latents.shape
    grid = latents.reshape(T // pt, pt, H // ph, ph, W // pw, pw, C)
    return grid.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, pt * ph * pw * C)


def unpatchify(rows: Tensor, video: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The exact inverse of `patchify`.

    rows [T·H·W, pt·ph·pw·C]; video (T, H, W) in patches; patch (pt, ph, pw) in latent pixels.
    Returns [T·pt, H·ph, W·pw, C]. Raises ValueError where the rows do not fit the video and the patch.
    """
    (T, H, W), (pt, ph, pw) = video, patch
    if rows.ndim != 2 or rows.shape[0] != T * H * W or rows.shape[1] % (pt * ph * pw):
        raise ValueError(
            f"rows: expected [{T * H * W}, a multiple of {pt * ph * pw}] for video {tuple(video)} in patches of "
            f"{tuple(patch)}, got {list(rows.shape)}; pass the sizes in patches that patchify cut"
        )
    grid = rows.reshape(T, H, W, pt, ph, pw, -1)
    return grid.permute(0, 3, 1, 4, 2, 5, 6).reshape(T * pt, H * ph, W * pw, -1)
