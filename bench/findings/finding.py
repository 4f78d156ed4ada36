"""What a study returns: a claim of the paper, what was measured, and whether it holds here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from findings.metrics import Measured
from lct.data.scenes import SceneSample
from lct.data.toy import ToyScenes
from lct.evaluate import Mean95

SEED, SINGLE_SEED = 23, 29
"""Of the held-out scenes and single shots. The studies were written, and their settings chosen, with 7 and 11."""


@dataclass(frozen=True)
class Row:
    """One number of a finding: the mean over scenes of `what` it is, with `condition` saying of which way or shots."""

    what: str
    condition: str
    value: Mean95


@dataclass(frozen=True)
class Series:
    """One line of a finding's plot, or one mark a name where x are names; `panel` is the part that it stands in."""

    name: str
    x: Sequence[float | str]
    y: Sequence[Mean95]
    panel: str = ""


@dataclass(frozen=True)
class Finding:
    """One finding of the paper at small scale.

    name, paper  in words, and where the paper says it
    claim        what the paper found
    outcome      what was measured, one sentence with numbers
    holds        whether that is what the paper found
    tried        where it does not: what else was tried, with numbers
    """

    name: str
    paper: str
    claim: str
    outcome: str
    holds: bool
    rows: Sequence[Row]
    axes: tuple[str, str]
    plot: Sequence[Series]
    tried: str = ""

    def to_dict(self) -> dict[str, Any]:
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN becomes None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


def said(value: Mean95, digits: int = 3) -> str:
    """ "0.110 ± 0.020"."""
    return (
        f"{value.mean:.{digits}f}" if not isfinite(value.half) else f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"
    )


@dataclass(frozen=True)
class World:
    """The held-out scenes that studies draw from.

    scenes  how many; each study says where it takes fewer
    """

    scenes: int
    toy: ToyScenes = field(default_factory=lambda: ToyScenes("returning", max_shots=9))

    def draw(self, shots: int, **options) -> list[SceneSample]:
        """As many scenes of so many shots; see `ToyScenes.evaluation_scene`."""
        return [self.toy.evaluation_scene(i, SEED, shots, **options) for i in range(self.scenes)]

    def singles(self) -> list[SceneSample]:
        """Single shots, every sixth with a character that comes in, four times as many as scenes."""
        return [
            self.toy.evaluation_scene(i, SINGLE_SEED, 1, (0,), (0,) if i % 6 == 0 else (), "single")
            for i in range(4 * self.scenes)
        ]


def mean(measured: Measured, name: str, shots: slice = slice(None)) -> Mean95:
    """A score's mean over scenes, of some of their shots."""
    return Mean95.of(measured.per_scene(name, shots).tolist())


def rows_of(found: Mapping[str, Measured], names: Sequence[str], shots: slice = slice(None), of: str = "") -> list[Row]:
    """Rows of several scores under several conditions; `of` says which shots."""
    return [Row(name, f"{way}{of}", mean(m, name, shots)) for name in names for way, m in found.items()]


def by_shot(name: str, measured: Measured, score: str, panel: str = "") -> Series:
    """A score of every shot that has one, counted from 1."""
    values = measured[score]
    numbers = [i for i in range(values.shape[1]) if np.isfinite(values[:, i]).any()]
    return Series(name, [i + 1 for i in numbers], [Mean95.of(values[:, i].tolist()) for i in numbers], panel)


def columns(m: Measured) -> dict[str, float]:
    """What stands in the paper's tables, as toy stand-ins for its columns, from 0 to 1."""
    found = {"quality": 1 - mean(m, "misfit").mean, "text": mean(m, "text").mean}
    consistency = 1 - mean(m, "identity").mean
    return found | ({"consistency": consistency} if np.isfinite(consistency) else {})


def tried(what: str, settings: Mapping[str, Callable[[], Mean95]]) -> str:
    """What else was tried where a finding does not hold, measured on the same scenes."""
    return (
        f"Tried as well, {what}: "
        + "; ".join(f"{said(measured())} {name}" for name, measured in settings.items())
        + "."
    )


ELSEWHERE: dict[str, dict[str, Any]] = {
    "without guidance": {"guidance": 1.0},
    "with guidance 3": {"guidance": 3.0},
    "in 8 steps": {"steps": 8},
}
"""Settings that are tried where a finding does not hold at the usual ones."""


def above(value: Mean95, least: float = 0.0) -> bool:
    """Clearly more than `least`: the whole interval is."""
    return value.mean - value.half > least


def below(value: Mean95, most: float) -> bool:
    """Clearly less than `most`."""
    return value.mean + value.half < most
