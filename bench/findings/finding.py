"""What a study returns: a claim of the paper, what was measured, and whether it holds here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from lct.data.scenes import SceneSample
from lct.data.toy import ToyScenes
from lct.evaluate import Mean95

SEED, SINGLE_SEED = 7, 11  # of the held-out scenes and single shots


@dataclass(frozen=True)
class Row:
    """One number of a finding: of `what`, under `condition`. paired: its interval is of differences scene by scene."""

    what: str
    condition: str
    value: Mean95
    scenes: int


@dataclass(frozen=True)
class Series:
    """One line of a finding's plot."""

    name: str
    x: Sequence[float]
    y: Sequence[Mean95]


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


Study = Callable[..., Finding]
