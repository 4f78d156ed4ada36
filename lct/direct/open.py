"""From the words of a command line to a project: begun, or found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from lct.direct.board import Settings
from lct.direct.studio import BOARDS, Studio
from lct.train.checkpoint import digest_of

SETTINGS = ("steps", "guidance", "history_guidance", "history_time")


class Wanted(Protocol):
    """The options of `lct direct`."""

    scene: Path
    weights: str | None
    project: Path | None
    fps: float | None
    device: str
    impl: str


def open_studio(wanted: Wanted) -> Studio:
    """The project of a scene, made where there is none; options that are given change its settings.

    ValueError where a project is to be made and no weights are named.
    """
    scene = wanted.scene
    home = (scene if scene.is_dir() else scene.parent).resolve()
    project = wanted.project or (scene if (scene / BOARDS).is_dir() else home.with_name(f"{home.name}-direct"))
    changes: dict[str, Any] = {n: getattr(wanted, n) for n in SETTINGS if getattr(wanted, n) is not None}
    if wanted.weights is not None:
        changes |= {"weights": wanted.weights, "digest": digest_of(wanted.weights)}
    options: dict[str, Any] = {"device": wanted.device, "impl": wanted.impl, "report": print}
    if (project / BOARDS).is_dir():
        return Studio.open(project, changes, **options)
    if wanted.weights is None:
        raise ValueError(f"weights: expected those to begin {project} with; add --weights FILE")
    return Studio.begin(scene, project, Settings(**changes), wanted.fps, **options)
