"""What generated toy shots show, as arrays [scenes, shots], and means over scenes with 95 % intervals.

Nothing here knows how a shot was made. Identity is compared with the truth where media of the truth were given, with a
character's own first appearance where nothing was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lct.data.readout import ShotReading, character_distance, colour_error, read_shot, score_reading
from lct.data.scenes import SceneSample
from lct.data.toy import to_frames, weave_rows
from lct.evaluate import Frames, Mean95

TEXT = ("visible", "enters", "motion", "corner", "framing", "place", "light")
"""What a shot's prompts name; `text` is their mean."""
JUMP, RECOLOURED = 2.5, 0.25
"""A seam is a cut where what is shown changes at once (place, framing, light, a colour, somebody who comes or goes), or
where a character jumps so many times as far as it moves from frame to frame. Detectors made for films look at how much
changes: they find 42 % of the true cuts between toy shots, whose characters move by a tenth of the frame at a time."""


@dataclass(frozen=True)
class Measured:
    """Scores of a batch of scenes by name, each float [scenes, shots], NaN where a shot has none.

    text                   share of what the prompts say that is right
    colour, background     hidden in the prompts: of the character and of the place, distance in RGB
    texture                hidden and fine: share of wrong textures of the character, half by chance
    weave                  hidden and fine: difference of its strength in the background, 0.05 where all is plain
    identity               the mean of colour and background
    misfit                 rms difference from the cleanest drawing of what is shown
    saturation, detail     less those of the true shot, weaves taken away: mean of max − min over RGB; rms of the second
                           differences
    gap                    shots since the character was last seen, 0 where it was not
    """

    scores: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.scores[name]

    def per_scene(self, name: str, shots: slice | Sequence[int] = slice(None)) -> np.ndarray:
        """Mean over some shots of every scene, [scenes]; NaN where none of them has a score."""
        return mean_known(self.scores[name][:, shots], 1)


def mean_known(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0).sum(axis)
    count = known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def measure(frames: Frames, samples: Sequence[SceneSample], given: Sequence[int] = ()) -> Measured:
    """Scores of scenes against their truth; given shots have none, but show whom later ones are compared with."""
    rows = [_scene(shots, sample, frozenset(given)) for shots, sample in zip(frames, samples, strict=True)]
    names = rows[0][0]
    return Measured({name: np.array([[shot[name] for shot in scene] for scene in rows]) for name in names})


def _scene(shots: Sequence[np.ndarray], sample: SceneSample, given: frozenset[int]) -> list[dict[str, float]]:
    truth = sample.truth
    known: dict[int, ShotReading | None] = {}  # a character's first appearance; None where it is the truth's own
    last: dict[int, int] = {}
    place: tuple[np.ndarray, float] | None = (np.asarray(truth.background_rgb), truth.weave) if given else None
    scores = []
    for i, shot in enumerate(shots):
        reading, want = read_shot(shot), truth.shots[i]
        s = score_reading(reading, truth, i)
        s["text"] = float(np.nanmean([s[name] for name in TEXT]))
        texture = s["texture"]
        s |= dict.fromkeys(("colour", "texture", "background", "weave"), np.nan) | {"gap": 0.0}
        if want.who is not None:
            s["gap"] = float(i - last.get(want.who, i))
            if want.who in known:
                first = known[want.who]
                rgb = truth.characters[want.who].rgb if first is None else first.character_rgb
                s["colour"] = character_distance(reading.character_rgb, rgb)
                s["texture"] = 1 - texture if first is None else float(reading.texture != first.texture)
            elif i in given or reading.visible:
                known[want.who] = None if i in given else reading
            last[want.who] = i
        if place is None:
            place = reading.background_rgb, reading.weave
        else:
            s["background"], s["weave"] = colour_error(reading.background_rgb, place[0]), abs(reading.weave - place[1])
        s["identity"] = (s["colour"] + s["background"]) / 2
        true = to_frames(sample.shots[i].latents)
        s["saturation"] = saturation(shot) - saturation(true)
        s["detail"] = detail(_unwoven(shot, reading.weave)) - detail(_unwoven(true, truth.weave))
        if i in given:
            s = {name: np.nan for name in s}
        scores.append(s)
    return scores


def _unwoven(frames: np.ndarray, weave: float) -> np.ndarray:
    return frames - weave * weave_rows(frames.shape[1])[:, None, None]


def saturation(frames: np.ndarray) -> float:
    """Mean of max − min over RGB of frames [T, H, W, 3]."""
    return float((frames.max(-1) - frames.min(-1)).mean())


def detail(frames: np.ndarray) -> float:
    """rms of the second differences of neighbouring pixels, across and down: what blur takes away first."""
    across = np.diff(frames, 2, axis=2)
    down = np.diff(frames, 2, axis=1)
    return float(np.sqrt((np.square(across).mean() + np.square(down).mean()) / 2))


def by_gap(measured: Measured, name: str, gaps: Sequence[tuple[int, int]]) -> list[Mean95]:
    """A score of shots whose character was last seen so many shots ago, (least, most) of each group; scene by scene."""
    gap, values = measured["gap"], measured[name]
    groups = [np.where((gap >= a) & (gap <= b), values, np.nan) for a, b in gaps]
    return [Mean95.of(mean_known(group, 1).tolist()) for group in groups]


@dataclass(frozen=True)
class Cuts:
    """Per scene, cuts found at a marked seam, marked seams, and cuts found elsewhere; each int [scenes]."""

    found: np.ndarray
    marked: np.ndarray
    false: np.ndarray

    def __add__(self, other: Cuts) -> Cuts:
        pairs = ((self.found, other.found), (self.marked, other.marked), (self.false, other.false))
        return Cuts(*(np.concatenate(pair) for pair in pairs))

    def f1(self, draws: int = 2000) -> Mean95:
        """F1 over all scenes, with a bootstrap interval over scenes of a fixed seed."""
        n = len(self.found)
        picks = np.random.default_rng(0).integers(n, size=(draws, n))
        scores = [self._f1(pick) for pick in picks]
        low, high = np.quantile(scores, (0.025, 0.975))
        return Mean95(self._f1(np.arange(n)), float(high - low) / 2, n)

    def _f1(self, pick: np.ndarray) -> float:
        found, marked, false = (x[pick].sum() for x in (self.found, self.marked, self.false))
        return float(2 * found / max(1, found + marked + false))


def cut_accuracy(frames: Frames, cuts: Sequence[Sequence[bool]]) -> Cuts:
    """Is there a cut at the seams where one is marked, and at no other?

    cuts  per scene and shot, True where a cut stands before the shot
    """
    counts = []
    for scene, before in zip(frames, cuts, strict=True):
        readings = [read_shot(shot) for shot in scene]
        at = np.array([_is_cut(*pair) for pair in zip(readings[:-1], readings[1:], strict=True)])
        wanted = np.array(before[1:], bool)
        counts.append(((at & wanted).sum(), wanted.sum(), (at & ~wanted).sum()))
    return Cuts(*np.array(counts).T)


def _is_cut(left: ShotReading, right: ShotReading) -> bool:
    if (left.place, left.framing, left.light) != (right.place, right.framing, right.light):
        return True  # the framing of an empty shot is one of its own
    if colour_error(left.background_rgb, right.background_rgb) > RECOLOURED:
        return True
    if left.centres is None or right.centres is None:
        return False
    if character_distance(left.character_rgb, right.character_rgb) > RECOLOURED:
        return True
    moves = [np.linalg.norm(np.diff(x, axis=0), axis=1) for x in (left.centres, right.centres)]
    usual = float(np.concatenate(moves).mean()) if any(map(len, moves)) else 0.0
    return bool(np.linalg.norm(right.centres[0] - left.centres[-1]) > JUMP * max(usual, 1.0))


def paired(a: np.ndarray, b: np.ndarray) -> Mean95:
    """a − b scene by scene, where both are known."""
    return Mean95.of((a - b).tolist())
