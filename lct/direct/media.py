"""Pictures and films of one's own as latents of a shot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lct.data.ingest import fit
from lct.data.latents import Codec
from lct.data.video import CONTAINERS, read_video

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_PICTURE = 64 << 20  # pixels


def encoded(file: Path, size: tuple[int, int, int] | None, codec: Codec, fps: float) -> np.ndarray:
    """A picture (T = 1) or a film as latents; where there is a size, its middle of that size's aspect ratio."""
    suffix = file.suffix.lower()
    if not file.is_file() or suffix not in (*PICTURES, *CONTAINERS):
        raise ValueError(f"{file}: expected a picture {PICTURES} or a film {tuple(CONTAINERS)}, found none of them")

    def covering(height: int, width: int) -> tuple[int, int]:
        if size is None:
            return fit(height, width, 480, 4 * codec.stride)
        scale = max(size[1] * codec.stride / height, size[2] * codec.stride / width)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    if suffix in PICTURES:
        with _opened(file) as picture:
            height, width = covering(picture.height, picture.width)
            frames = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))[None]
    else:
        film = read_video(file, resize=covering)
        step = max(1.0, film.fps / fps)
        count = int(np.ceil(len(film.frames) / step))
        latent = min(size[0] if size else count, 1 + (count - 1) // codec.time_stride)
        frames = film.frames[[int(i * step) for i in range(1 + (latent - 1) * codec.time_stride)]]
    if size is not None:
        height, width = size[1] * codec.stride, size[2] * codec.stride
        top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
        frames = frames[:, top : top + height, left : left + width]
    return codec.encode(np.array(frames)).numpy()


def _opened(file: Path) -> Image.Image:
    """A picture of a size that memory holds; its pixels are not read yet."""
    try:
        picture = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file}: expected at most {LARGEST_PICTURE} pixels; shrink it ({error})") from None
    if picture.width * picture.height > LARGEST_PICTURE:
        raise ValueError(f"{file}: expected at most {LARGEST_PICTURE} pixels, got {picture.size}; shrink it")
    return picture
