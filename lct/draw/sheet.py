"""Contact sheets: what several methods made of one scene, shot by shot and frame by frame."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw

from lct.draw.ink import INK, MUTED, PAPER, font, mix, plain, shot_colour

Row = tuple[str, Sequence[np.ndarray]]

MARGIN, LABELS, GAP, SEAM = 24, 24, 28, 2  # round the sheet; after the row labels; between shots; between frames
NARROWEST = 150  # pixels of a shot's column, so that its prompt can be read above a single frame
LINES = 4  # of a prompt, before it is cut short
TITLE, LINE = 28, 19  # heights of a shot's name and of one line of its prompt


@dataclass(frozen=True)
class SheetGrid:
    """Where the frames of a contact sheet lie, in pixels.

    sizes   (width, height) of a frame, per row and shot
    lefts   of each shot's first frame
    tops    of each row's frames
    width, height   of the whole sheet
    """

    sizes: tuple[tuple[tuple[int, int], ...], ...]
    lefts: tuple[int, ...]
    tops: tuple[int, ...]
    width: int
    height: int

    @classmethod
    def of(cls, rows: Sequence[Row], lines: int = 0, frame: int = 64) -> SheetGrid:
        """The grid of a sheet with `lines` lines of prompt above the shots; `frame` as in `contact_sheet`."""
        longest = max(max(clip.shape[1:3]) for _, clips in rows for clip in clips)
        scale = max(1, round(frame / longest)) if longest <= frame else frame / longest
        sizes = tuple(
            tuple((max(1, round(c.shape[2] * scale)), max(1, round(c.shape[1] * scale))) for c in clips)
            for _, clips in rows
        )
        columns = [
            max([NARROWEST, *(len(rows[r][1][s]) * (sizes[r][s][0] + SEAM) - SEAM for r in _rows_with(rows, s))])
            for s in range(max(len(clips) for _, clips in rows))
        ]
        left = MARGIN + LABELS + round(max(font(18).getlength(plain(name)) for name, _ in rows))
        top = MARGIN + TITLE + lines * LINE + 10
        heights = [max((height for _, height in row), default=0) + GAP for row in sizes]
        lefts = tuple(accumulate((column + GAP for column in columns), initial=left))
        tops = tuple(accumulate(heights, initial=top))
        return cls(sizes, lefts[:-1], tops[:-1], lefts[-1] - GAP + MARGIN, tops[-1] - GAP + MARGIN)

    def frame(self, row: int, shot: int, index: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of one frame, half-open."""
        width, height = self.sizes[row][shot]
        left = self.lefts[shot] + index * (width + SEAM)
        return left, self.tops[row], left + width, self.tops[row] + height


def contact_sheet(
    rows: Sequence[Row],
    captions: Sequence[str] | None = None,
    given: Collection[tuple[str, int]] = (),
    frame: int = 64,
) -> Image.Image:
    """Draw one row per method and one group of frames per shot.

    rows      (name, clips); one clip per shot, uint8 [T, H, W, 3]; sizes may differ, a row may lack its last shots
    captions  a prompt per shot, wrapped above its frames
    given     (row name, shot) of the shots that a method was given rather than made; they are marked. 0 is the first
    frame     pixels of the longest side of a frame; small frames are enlarged by a whole factor, each pixel a square

    ValueError for no frames, clips of another shape or dtype, captions that do not match, and marks on absent shots.
    """
    _check(rows, captions, given)
    column = SheetGrid.of(rows, 0, frame)
    ends = (*(left - GAP for left in column.lefts[1:]), column.width - MARGIN)
    prompts = [_wrap(text, end - left) for text, left, end in zip(captions or (), column.lefts, ends, strict=False)]
    grid = SheetGrid.of(rows, max((len(prompt) for prompt in prompts), default=0), frame)
    image = Image.new("RGB", (grid.width, grid.height), PAPER)
    draw = ImageDraw.Draw(image)
    for shot, left in enumerate(grid.lefts):
        name = f"shot {shot + 1}"
        draw.text((left, MARGIN), name, mix(shot_colour(name), INK, 0.35), font(18))
        for line, text in enumerate(prompts[shot] if prompts else ()):
            draw.text((left, MARGIN + TITLE + line * LINE), text, MUTED, font(14))
    for row, (name, clips) in enumerate(rows):
        tallest = max((height for _, height in grid.sizes[row]), default=0)
        draw.text((MARGIN, grid.tops[row] + tallest / 2), plain(name), INK, font(18), "lm")
        for shot, clip in enumerate(clips):
            _paste(image, grid, row, shot, clip)
            if (name, shot) in given:
                _mark(draw, grid, row, shot, len(clip))
    return image


def _rows_with(rows: Sequence[Row], shot: int) -> list[int]:
    return [row for row, (_, clips) in enumerate(rows) if shot < len(clips)]


def _check(rows: Sequence[Row], captions: Sequence[str] | None, given: Collection[tuple[str, int]]) -> None:
    if not any(len(clips) for _, clips in rows):
        raise ValueError("rows: expected at least one row with a clip, got none")
    for name, clips in rows:
        for shot, clip in enumerate(clips):
            if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not clip.size:
                raise ValueError(
                    f"rows: {name!r}, shot {shot}: expected uint8 [T, H, W, 3], got {clip.dtype} {list(clip.shape)}"
                )
    shots = max(len(clips) for _, clips in rows)
    if captions is not None and len(captions) != shots:
        raise ValueError(f"captions: expected one for each of {shots} shots, got {len(captions)}")
    present = {(name, shot) for name, clips in rows for shot in range(len(clips))}
    for mark in given:
        if mark not in present:
            raise ValueError(f"given: expected (row name, shot) of a clip in rows, got {mark!r}")


def _wrap(text: str, width: float) -> list[str]:
    """Lines of at most `width` pixels, as many as `LINES`; what does not fit ends in dots."""
    words, lines = plain(text).split(), []
    while words and len(lines) < LINES:
        count = 1
        while count < len(words) and font(14).getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    return [_cut(line, width, bool(words) and line is lines[-1]) for line in lines]


def _cut(line: str, width: float, more: bool) -> str:
    """The line, or as much of it as fits before dots: for one word wider than its column, or with `more` to come."""
    if not more and font(14).getlength(line) <= width:
        return line
    while line and font(14).getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


def _paste(image: Image.Image, grid: SheetGrid, row: int, shot: int, clip: np.ndarray) -> None:
    for index, pixels in enumerate(clip):
        left, top, right, bottom = grid.frame(row, shot, index)
        enlarged = right - left >= clip.shape[2]
        method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        image.paste(Image.fromarray(pixels).resize((right - left, bottom - top), method), (left, top))


def _mark(draw: ImageDraw.ImageDraw, grid: SheetGrid, row: int, shot: int, frames: int) -> None:
    """A line round a given shot, and the word on it: outside the frames, so that no pixel of them is hidden."""
    left, top, _, bottom = grid.frame(row, shot, 0)
    right = grid.frame(row, shot, frames - 1)[2]
    draw.rectangle((left - 5, top - 5, right + 4, bottom + 4), outline=INK, width=2)
    middle, half = (left + right) / 2, font(12).getlength("given") / 2 + 7
    draw.rounded_rectangle((middle - half, bottom, middle + half, bottom + 17), 8, INK)
    draw.text((middle, bottom + 8.5), "given", PAPER, font(12), "mm")
