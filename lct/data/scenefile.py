"""The scene file: two tiers of prompts and the shots of one scene, `scene.toml` beside `latents.safetensors` (§ 3.2.1).

    fps = 8.0                                     # of given latents; may be left out, as everything marked *
    [global]                                      # * a single shot has no second tier of prompts
    environment = "the deck of a ship at sunset"  # *
    story = "Character 2 meets Character 1"       # *
    [global.characters]                           # *
    1 = "a young man with blonde hair"
    2 = "a young woman with brown curls"
    [[shot]]
    prompt = "Close-up of Character 1 looking back"
    cut = true                                    # false for a segment of one long take, and for a single shot
    size = [4, 30, 30]                            # * frames, height, width in latent pixels
    seed = 7                                      # *
    media = "shot-0"                              # * given: `shot-0.video` and perhaps `shot-0.images` of the latents
    frames = [0, 30]                              # * first and one past the last frame of the film it was cut from

A file may come from a stranger: it names no paths, and every mistake is one line that says how to mend it.
"""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tomli_w
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lct.data.atomic import new_folder
from lct.data.sceneschema import Table, fail
from lct.data.scenes import SceneSample, ShotSample

SCENE, LATENTS = "scene.toml", "latents.safetensors"
MAX_SHOTS = 9
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class GlobalPrompt:
    """What the shots share. characters: ID to description, in the order in which they are told."""

    characters: Mapping[str, str] = field(default_factory=dict)
    environment: str = ""
    story: str = ""

    def text(self) -> str:
        """[Character] [Environment] [Story] as one line, "Character 1: …; Character 2: …; environment; story"."""
        people = (f"Character {name}: {description}" for name, description in self.characters.items())
        return "; ".join(part for part in (*people, self.environment, self.story) if part)


@dataclass(frozen=True)
class ShotEntry:
    """One shot. size (T, H, W) in latent pixels; media names given latents; frames is a range of the source film."""

    prompt: str
    cut: bool
    size: tuple[int, int, int] | None = None
    seed: int | None = None
    media: str | None = None
    frames: tuple[int, int] | None = None


@dataclass(frozen=True)
class SceneFile:
    """The scene that a file describes.

    fps     frames per second of the latents
    source  name of the film it was cut from
    codec   what made the latents, such as "pixel/8"
    """

    global_prompt: GlobalPrompt | None
    shots: tuple[ShotEntry, ...]
    fps: float | None = None
    source: str | None = None
    codec: str | None = None


def read_scene(path: str | Path) -> SceneFile:
    """Read and check a scene; `path` is its folder or its toml file.

    Raises FileNotFoundError for a missing file; ValueError for anything in it that is unknown, of a wrong type or range,
    for `[SHOT CUT]` typed by hand, no shots or more than nine, and media that are missing or not of the size stated.
    """
    path = Path(path)
    path = path / SCENE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a scene file, found nothing; give the folder that holds {SCENE}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}; shorten the prompts")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected TOML in UTF-8, got {error}; mend the file there") from error
    scene = _scene(Table(document, str(path)))
    if any(shot.media for shot in scene.shots):
        _check_media(path, scene, _shapes(path.parent / LATENTS))
    return scene


def write_scene(folder: str | Path, scene: SceneFile, latents: Mapping[str, Any] | None = None) -> None:
    """Write a scene folder, whole or not at all.

    latents  float [T, H, W, C] arrays or CPU tensors by key, `<media>.video` and `<media>.images`; stored as float32

    Raises ValueError where `read_scene` would refuse the result, and where `folder` exists and is not empty.
    """
    path = Path(folder) / SCENE
    document = _document(scene)
    scene = _scene(Table(document, str(path)))
    arrays = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in (latents or {}).items()}
    _check_media(path, scene, {key: array.shape for key, array in arrays.items()})
    text = tomli_w.dumps(document)
    with new_folder(folder) as temporary:
        (temporary / SCENE).write_text(text, encoding="utf-8")
        if arrays:
            save_file(arrays, temporary / LATENTS)


def load_sample(folder: str | Path) -> SceneSample:
    """All shots of a scene with their latents; ValueError where a shot has no media."""
    scene = read_scene(folder)
    return SceneSample(
        scene.global_prompt and scene.global_prompt.text(),
        tuple(load_shot(folder, scene, i) for i in range(len(scene.shots))),
    )


def load_shot(folder: str | Path, scene: SceneFile, index: int) -> ShotSample:
    """Shot `index` of the scene in `folder` with its latents; it has no images where the folder holds none."""
    folder, shot = Path(folder), scene.shots[index]
    folder = folder.parent if folder.is_file() else folder
    if shot.media is None:
        fail(folder / SCENE, f"shot {index + 1}: media", "a name of given latents", None, "give the shot's latents")
    with safe_open(folder / LATENTS, framework="np") as stored:
        video = stored.get_tensor(f"{shot.media}.video")
        has_images = f"{shot.media}.images" in stored.keys()  # noqa: SIM118 (not a dict)
        images = stored.get_tensor(f"{shot.media}.images") if has_images else video[:0]
    return ShotSample(video, shot.prompt, shot.cut, images)


def _scene(table: Table) -> SceneFile:
    table.only("fps", "source", "codec", "global", "shot")
    shots = table.tables("shot")
    if not 1 <= len(shots) <= MAX_SHOTS:
        table.fail("shot", f"1 to {MAX_SHOTS} shots", len(shots), "add a [[shot]], or split the scene")
    given = table.table("global")
    return SceneFile(
        given and _global_prompt(given),
        tuple(_shot(shot) for shot in shots),
        table.positive("fps"),
        table.text("source"),
        table.text("codec"),
    )


def _global_prompt(table: Table) -> GlobalPrompt:
    table.only("characters", "environment", "story")
    characters = table.table("characters")
    people = {} if characters is None else {name: characters.prompt(name) for name in characters.values}
    for name in people:
        if not name.replace("-", "").replace("_", "").isalnum():
            table.fail("characters", "IDs of letters, digits, - and _", name, "write for example 1 = \"a man\"")
    return GlobalPrompt(people, table.prompt("environment", ""), table.prompt("story", ""))


def _shot(table: Table) -> ShotEntry:
    table.only("prompt", "cut", "size", "seed", "media", "frames")
    frames = table.integers("frames", 2, 0, "frames = [0, 30]")
    if frames and frames[0] >= frames[1]:
        table.fail("frames", "a first frame before the end", list(frames), "write for example frames = [0, 30]")
    seed = table.integers("seed", None, 0, "seed = 7")
    return ShotEntry(
        table.prompt("prompt"),
        table.flag("cut"),
        table.integers("size", 3, 1, "size = [4, 30, 30]"),
        seed and seed[0],
        table.name("media"),
        frames,
    )
