"""From the words of a command line to a project: begun, or found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lct.data.scenefile import SCENE
from lct.direct.board import Settings
from lct.direct.studio import BOARDS, Studio
from lct.pretrained.pipeline import INDEX, Pipeline
from lct.sample.request import usual_dtype
from lct.train.weights import ASSET, config_of, digest_of


def open_studio(
    scene: Path,
    weights: str | None = None,
    project: Path | None = None,
    fps: float | None = None,
    device: str = "cpu",
    impl: str = "auto",
    history_device: str | None = None,
    **settings: float | str | None,
) -> Studio:
    """The project of a scene, made where there is none.

    scene     a scene file, its folder, or the project itself; `project` is SCENE-direct beside it by default, of a file
              with a name of its own SCENE-NAME-direct
    settings  fields of `Settings`; those that are not None change a project's
    history_device  see `Studio`

    ValueError where a project is to be made and no weights are named.
    """
    home = (scene if scene.is_dir() else scene.parent).resolve()
    stem = f"{home.name}-{scene.stem}" if scene.is_file() and scene.name != SCENE else home.name
    project = project or (scene if (scene / BOARDS).is_dir() else home.with_name(f"{stem}-direct"))
    changes: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if weights is not None:
        # the next call may come from elsewhere
        weights = weights if weights.startswith(ASSET) else str(Path(weights).resolve())
        changes |= {"weights": weights, "digest": digest_of(weights)}
        if (Path(weights) / INDEX).is_file():
            changes.setdefault("pipeline", weights)
    if "pipeline" in changes:
        changes["pipeline"] = str(Path(changes["pipeline"]).resolve())
        changes["parts"] = Pipeline(changes["pipeline"]).digest
    machine = {"device": device, "impl": impl, "history_device": history_device, "report": print}
    if (project / BOARDS).is_dir():
        return Studio.open(project, changes, fps, **machine)
    if weights is None:
        raise ValueError(f"weights: expected those to begin {project} with; add --weights FILE")
    config = config_of(weights)
    if dtype := usual_dtype(config, device):
        changes.setdefault("dtype", dtype)
    return Studio.begin(scene, project, Settings(**changes), fps, config.data.shots, **machine)
