"""Long shots that can stand for scenes: divided where what happens changes, into segments without cut (§ 3.2.1).

The measure compares what moves, whereto, and the colours shown in a window before a frame with those in a window after
it. Camera cuts are for `find_cuts`: a shot is looked at on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from lct.data.video import video_package

Span = tuple[int, int]

SIDE = 96  # pixels of the longer side at which motion is looked for
DIRECTIONS = 8
# Pixels a frame: slower motion is noise of the flow; and the mean motion at which a picture counts as half still.
SLOWEST, STILL = 0.1, 0.05
# On toy films with noise of 8 of 255 the weakest event reaches 0.29, and what is none stays below 0.15.
EVENT = 0.25
SHORTEST, LONG, SPARSEST = 1.0, 3.0, 10.0
HUES, SATURATIONS, VALUES = 16, 4, 4


def change(frames: np.ndarray, fps: float, window: float = SHORTEST) -> np.ndarray:
    """How much what happens after each frame differs from what happened before it; float32 [N] in [0, 1].

    frames  uint8 [N, H, W, 3] in RGB, one shot
    fps     of the frames
    window  seconds before and after that are compared; at the ends as many as there are

    It is 1 − (1 − m)(1 − c), smoothed. m is the distance ½ Σ |before − after| of two histograms of the directions of
    optical flow, weighted by its length, with a bin for standing still; c that of two histograms of colour. Of both
    what differs inside the windows is taken off, so that noise and what drifts evenly are no change. Deterministic.
    Raises ValueError for frames of another dtype or shape and for fps or window out of range.
    """
    _check(frames, fps=fps, window=window)
    if len(frames) < 2:
        return np.zeros(len(frames), np.float32)
    width = max(round(window * fps), 2)
    shades = np.stack([colours([frame]).ravel() for frame in frames])
    # a frame shows its colours, but motion lies between two: only so do both windows meet at the frame
    moved, coloured = _contrast(_motion(frames), width, 0.5, STILL), _contrast(shades, width, 1.0)[:-1]
    measure = 1 - (1 - moved) * (1 - coloured)
    measure[0] = measure[-1] = 0
    return np.convolve(np.pad(measure, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid").astype(np.float32)


def find_events(frames: np.ndarray, fps: float, shortest: float = SHORTEST, least: float = EVENT) -> list[int]:
    """First frame of every segment of a shot but the first.

    An event is a peak of `change` over windows of `shortest` seconds that reaches `least`, the highest first; no
    segment lasts less than `shortest`. Arguments and errors otherwise as of `change`.
    """
    return peaks(change(frames, fps, shortest), max(round(shortest * fps), 1), least)


def peaks(measure: np.ndarray, apart: int, least: float = EVENT) -> list[int]:
    """Places of the highest values from `least` up, at least `apart` from each other and from both ends, in order."""
    found: list[int] = []
    for i in np.argsort(-measure, kind="stable").tolist():
        if measure[i] < least:
            break
        top = measure[i] >= measure[max(i - 1, 0) : i + 2].max()
        if top and apart <= i <= len(measure) - apart and all(abs(i - other) >= apart for other in found):
            found.append(i)
    return sorted(found)


def select_long(
    frames: np.ndarray, fps: float, shots: Iterable[Span], shortest: float = SHORTEST, long: float = LONG
) -> list[list[Span]]:
    """Segments, as (first frame, end), of every shot that is long and in which much changes.

    frames  uint8 [N, H, W, 3] in RGB, the film
    shots   (first frame, end) of its shots
    long    seconds that a shot must last

    Much changes where there is an event, and one in every 10 seconds on average.
    """
    _check(frames, fps=fps, shortest=shortest, long=long)
    chosen = []
    for start, end in shots:
        if end - start < long * fps:
            continue
        events = find_events(frames[start:end], fps, shortest)
        if len(events) >= (end - start) / fps / SPARSEST:
            chosen.append(list(pairwise([start, *(start + event for event in events), end])))
    return chosen


def colours(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Joint histogram of hue, saturation and value of frames [H, W, 3], float32 [16, 4, 4] that sums to 1.

    A pixel is shared between neighbouring bins, and grey spreads over all hues: neither a small change of light nor the
    noise of a grey pixel's hue moves it far.
    """
    cv2 = video_package("cv2")
    small = [cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA) for frame in frames]
    pixels = np.concatenate(small).astype(np.float32) / 255
    hue, saturation, value = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV).reshape(-1, 3).T
    colourful = np.minimum(8 * saturation * value, 1)[:, None]
    turns = (hue[:, None] / 360 * HUES - 0.5 - np.arange(HUES) + HUES / 2) % HUES - HUES / 2
    hues = colourful * np.maximum(1 - np.abs(turns), 0) + (1 - colourful) / HUES
    joint = np.einsum("ph,ps,pv->hsv", hues, _shares(saturation, SATURATIONS), _shares(value, VALUES), optimize=True)
    return joint / joint.sum()


def _shares(values: np.ndarray, bins: int) -> np.ndarray:
    """How much each of P values in [0, 1] belongs to each bin, linear in between; float32 [P, bins]."""
    place = np.clip(values * bins - 0.5, 0, bins - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(bins)), 0)


def _motion(frames: np.ndarray) -> np.ndarray:
    """Mean length of the flow from each frame to the next in each direction, float64 [N - 1, DIRECTIONS]."""
    cv2 = video_package("cv2")
    height, width = frames.shape[1:3]
    scale = min(1.0, SIDE / max(height, width))
    size = max(round(width * scale), 16), max(round(height * scale), 16)

    def small() -> Iterator[np.ndarray]:
        return (cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames)

    axis, motion, last = _telling_axis(small()), [], None
    for frame in small():
        shade = (frame @ axis - 255 * np.minimum(axis, 0).sum()).clip(0, 255).astype(np.uint8)
        shade = cv2.GaussianBlur(shade, (0, 0), 1.5)
        if last is not None:
            flow = cv2.calcOpticalFlowFarneback(last, shade, None, 0.5, 3, 15, 3, 5, 1.1, 0)
            motion.append(_directions(flow.reshape(-1, 2)))
        last = shade
    return np.stack(motion)


def _telling_axis(frames: Iterable[np.ndarray]) -> np.ndarray:
    """The mixture of red, green and blue that changes most from frame to frame, float32 [3], to a range of 255: a red
    ball on a green field may be invisible in grey."""
    products = np.zeros((3, 3))
    for first, second in pairwise(frames):
        moved = (second.astype(np.float32) - first).reshape(-1, 3)
        products += moved.T @ moved
    axis = np.linalg.eigh(products)[1][:, -1]
    return (axis * (1.0 if axis.sum() >= 0 else -1.0) / np.abs(axis).sum()).astype(np.float32)


def _directions(flow: np.ndarray) -> np.ndarray:
    """Mean length of flow [P, 2] in each direction, shared between neighbouring bins; float64 [DIRECTIONS]."""
    lengths = np.maximum(np.hypot(flow[:, 0], flow[:, 1]) - SLOWEST, 0)
    turn = np.arctan2(flow[:, 1], flow[:, 0]) / (2 * np.pi) * DIRECTIONS
    low = np.floor(turn).astype(int)
    high = np.bincount((low + 1) % DIRECTIONS, lengths * (turn - low), DIRECTIONS)
    return (np.bincount(low % DIRECTIONS, lengths * (low + 1 - turn), DIRECTIONS) + high) / len(flow)


def _contrast(rows: np.ndarray, width: int, drift: float, still: float = 0.0) -> np.ndarray:
    """Distance of the mean of `width` rows before each of the places 0 to n from that of as many after it, less `drift`
    times the distances of their halves, which are as large together where rows drift evenly; float64 [n + 1]."""
    half = width // 2
    edges = ((-width, 0), (0, width), (-width, -half), (-half, 0), (0, half), (half, width))
    before, after, *halves = (_shape(_means(rows, *edge), still) for edge in edges)
    within = _distance(halves[0], halves[1]) + _distance(halves[2], halves[3])
    return np.maximum(_distance(before, after) - drift * within, 0)


def _means(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    """Means of the rows from `low` to `high`, counted from each of the places 0 to n; zero where there are none."""
    n, at = len(rows), np.arange(len(rows) + 1)
    sums = np.concatenate([np.zeros_like(rows[:1]), np.cumsum(rows, axis=0, dtype=np.float64)])
    first, end = np.clip(at + low, 0, n), np.clip(at + high, 0, n)
    return (sums[end] - sums[first]) / np.maximum(end - first, 1)[:, None]


def _shape(rows: np.ndarray, still: float) -> np.ndarray:
    """Histograms that sum to 1, with a bin of `still` beside the others."""
    rows = np.c_[rows, np.full(len(rows), still)]
    return rows / np.maximum(rows.sum(1, keepdims=True), 1e-9)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one - other).sum(1) / 2


def _check(frames: np.ndarray, **positive: float) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
        raise ValueError(
            f"frames: expected uint8 [N, H, W, 3], got {frames.dtype} {list(frames.shape)}; read them with read_video"
        )
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {value}; give frames or seconds above 0")
