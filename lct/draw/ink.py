"""Colours, names and letters that the pictures share."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import ImageFont

from lct.layout import Shot

RGB = tuple[int, int, int]

INK, MUTED, RULE, PAPER = (27, 36, 48), (104, 114, 128), (203, 209, 217), (255, 255, 255)
GLOBAL = (108, 117, 132)
# Okabe and Ito's colours, which stay apart for colour-blind readers; neighbours differ most. Shot 7 is blue again.
PALETTE = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0))


def shot_names(scene: Sequence[Shot]) -> list[str]:
    """What the pictures call the shots of one scene: "global", "shot 1", "shot 2", …"""
    first = 0 if scene[0].role == "global" else 1
    return ["global" if shot.role == "global" else f"shot {first + i}" for i, shot in enumerate(scene)]


def shot_colour(name: str) -> RGB:
    """The colour of a shot by its name in `shot_names`."""
    return GLOBAL if name == "global" else PALETTE[(int(name.split()[1]) - 1) % len(PALETTE)]


def mix(colour: RGB, other: RGB, share: float) -> RGB:
    """`colour` with `share` of `other` in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))  # type: ignore[return-value]


@lru_cache(maxsize=32)
def font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own letters, this many pixels high; the same on every machine."""
    return ImageFont.load_default(size=pixels)


def plain(text: str) -> str:
    """Text in the characters that Pillow's own font has: accents dropped, other scripts as "?"."""
    marks = {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "×": "x"}
    folded = unicodedata.normalize("NFKD", text.translate(str.maketrans(marks)))
    kept = " ".join("".join(c for c in folded if not unicodedata.combining(c)).split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in kept)
