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
    sees = "all"                                  # * earlier shots: "all", "recent:K", "relevant:K", or numbers: [1, 3]

Shots are counted from 1. A number under `sees` may be that of a later shot, where that one is made before.
A file may come from a stranger: it names no paths, and every mistake is one line that says how to mend it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import tomli_w
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lct.data.atomic import new_file, new_folder
from lct.data.scenes import SHOT_CUT, SceneSample, ShotSample
from lct.data.stored import Stored
from lct.data.table import REQUIRED, Table, is_file_name, is_flag, is_integer, is_integers, is_positive, is_text

SCENE, LATENTS = "scene.toml", "latents.safetensors"
MAX_SHOTS = 9  # of a scene in training (§ 4)
MOST_SHOTS = 1000  # of a file: a director's scene may be long
MAX_BYTES = 1 << 20
HAND_TYPED_CUT = re.compile(r"\[\s*shot\s*cut\s*\]", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
SEES = re.compile(r"all|(recent|relevant):[1-9][0-9]{0,3}")


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
    """One shot. size (T, H, W) in latent pixels; media names given latents; frames is a range of the source film; sees
    is "all", "recent:K", "relevant:K", or the numbers of the shots it sees, counted from 1."""

    prompt: str
    cut: bool
    size: tuple[int, int, int] | None = None
    seed: int | None = None
    media: str | None = None
    frames: tuple[int, int] | None = None
    sees: str | tuple[int, ...] | None = None


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

    Raises FileNotFoundError for a missing file; ValueError for what is unknown, of a wrong type or out of range, for
    `[SHOT CUT]` typed by hand, for no shots or more than 1000, and for media missing or not of the size stated.
    """
    path = Path(path)
    path = path / SCENE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a scene file, found nothing; give the folder that holds {SCENE}")
    with path.open("rb") as file:
        scene = parse_scene(file.read(MAX_BYTES + 1), str(path))
    if any(shot.media for shot in scene.shots):
        _check_media(Table({}, str(path)), scene, _shapes(path.parent / LATENTS))
    return scene


def parse_scene(text: str | bytes, name: str) -> SceneFile:
    """The scene that a text says, checked as by `read_scene` but for its media; errors call the text `name`."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_BYTES} bytes, got more; shorten the prompts")
    try:
        document = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: expected TOML in UTF-8, got {error}; mend the file there") from error
    return _scene(Table(document, name))


def scene_text(scene: SceneFile, name: str = SCENE) -> str:
    """The text of a scene, which `parse_scene` turns back into it; ValueError where that would refuse it."""
    document = _document(scene)
    _scene(Table(document, name))  # before TOML is made of it, which has no word for None
    text = _toml(document)
    parse_scene(text, name)
    return text


def write_scene(folder: str | Path, scene: SceneFile, latents: Mapping[str, Any] | None = None) -> None:
    """Write a scene folder, whole or not at all.

    latents  float [T, H, W, C] arrays or CPU tensors by key, `<media>.video` and `<media>.images`; stored as float32

    Raises ValueError where `read_scene` would refuse the result, and where `folder` exists and is not empty.
    """
    table = Table({}, str(Path(folder) / SCENE))
    text = scene_text(scene, table.file)
    arrays = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in (latents or {}).items()}
    _check_media(table, parse_scene(text, table.file), {key: array.shape for key, array in arrays.items()})
    unnamed = set(arrays) - {f"{shot.media}.{part}" for shot in scene.shots for part in ("video", "images")}
    if unnamed:
        table.fail("latents", "only keys that a shot names", sorted(unnamed), "set the shot's media")
    with new_folder(folder) as temporary:
        (temporary / SCENE).write_text(text, encoding="utf-8")
        if arrays:
            save_file(arrays, temporary / LATENTS)


def rewrite_scene(folder: str | Path, scene: SceneFile) -> None:
    """Replace the scene file in a folder, whole or not at all, and leave its latents alone.

    Raises ValueError where `read_scene` would refuse the result.
    """
    path = Path(folder) / SCENE
    text = scene_text(scene, str(path))
    _check_media(Table({}, str(path)), parse_scene(text, str(path)), _shapes(path.parent / LATENTS))
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_sample(folder: str | Path) -> SceneSample:
    """All shots of a scene with their latents; ValueError where a shot has no media."""
    scene = read_scene(folder)
    shots = tuple(load_shot(folder, scene, index) for index in range(len(scene.shots)))
    return SceneSample(None if scene.global_prompt is None else scene.global_prompt.text(), shots)


def load_shot(folder: str | Path, scene: SceneFile, index: int) -> ShotSample:
    """Shot `index` of the scene in `folder` with its latents; K = 0 images where none are stored."""
    media, shot = media_of(folder, scene, index), scene.shots[index]
    with safe_open(Path(folder) / LATENTS, framework="np") as stored:
        video = stored.get_tensor(f"{media}.video")
        images = stored.get_tensor(f"{media}.images") if f"{media}.images" in set(stored.keys()) else video[:0]
    return ShotSample(video, shot.prompt, shot.cut, images)


def stored_shots(folder: str | Path, scene: SceneFile) -> tuple[ShotSample, ...]:
    """All shots of a scene with latents that stay on disk until they are asked for; ValueError where one has none."""
    file = Path(folder) / LATENTS
    shapes = _shapes(file)

    def shot(index: int, entry: ShotEntry) -> ShotSample:
        media = media_of(folder, scene, index)
        video = Stored(file, f"{media}.video", shapes[f"{media}.video"])
        none = (0, *video.shape[1:])
        images = Stored(file, f"{media}.images", shapes.get(f"{media}.images", none))
        return ShotSample(cast(np.ndarray, video), entry.prompt, entry.cut, cast(np.ndarray, images))

    return tuple(shot(i, entry) for i, entry in enumerate(scene.shots))


def media_of(folder: str | Path, scene: SceneFile, index: int) -> str:
    """The name of a shot's latents; ValueError where it has none."""
    media = scene.shots[index].media
    if media is None:
        table = Table({}, str(Path(folder) / SCENE), f"shot {index + 1}: ")
        table.fail("media", "the name of given latents", None, f"add them to {LATENTS} and name them here")
    return media


def _document(scene: SceneFile) -> dict[str, Any]:
    """The scene as TOML values; what is None is left out."""
    document = {"source": scene.source, "codec": scene.codec, "fps": scene.fps}
    if scene.global_prompt is not None:
        document["global"] = asdict(scene.global_prompt)
    document["shot"] = [_present(asdict(shot)) for shot in scene.shots]
    return _present(document)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _toml(document: Mapping[str, Any]) -> str:
    """TOML as one would write it by hand: a [[shot]] before each, lists of integers on one line."""
    shared = {key: value for key, value in document.items() if key != "shot"}
    shots = (f"\n[[shot]]\n{tomli_w.dumps(shot)}" for shot in document["shot"])
    text = "".join((tomli_w.dumps(shared), *shots)).lstrip()
    return re.sub(r"= \[\n((?:    \d+,\n)+)\]", lambda match: f"= [{' '.join(match[1].split())[:-1]}]", text)


def _scene(table: Table) -> SceneFile:
    table.only("source", "codec", "fps", "global", "shot")
    shots = table.tables("shot")
    if not 1 <= len(shots) <= MOST_SHOTS:
        table.fail("shot", f"1 to {MOST_SHOTS} shots", len(shots), "add a [[shot]], or split the scene")
    shared = table.table("global")
    return SceneFile(
        global_prompt=None if shared is None else _global_prompt(shared),
        shots=tuple(_shot(shot, i, len(shots)) for i, shot in enumerate(shots, 1)),
        fps=table.take(
            "fps", is_positive, "frames per second, above 0 and at most 1e6", "write for example fps = 8.0", None
        ),
        source=table.take(
            "source", is_file_name, "the film's name alone", 'write for example source = "film.mp4"', None
        ),
        codec=table.take("codec", is_text, "a codec's name", 'write for example codec = "pixel/8"', None),
    )


def _global_prompt(table: Table) -> GlobalPrompt:
    table.only("characters", "environment", "story")
    characters = table.table("characters") or Table({}, table.file)
    for name in characters.values:
        if not NAME.fullmatch(name):
            characters.fail("ID", "letters, digits, . _ and -", name, 'write for example 1 = "a man"')
    people = {name: _prompt(characters, name) for name in characters.values}
    return GlobalPrompt(people, _prompt(table, "environment", ""), _prompt(table, "story", ""))


def _shot(table: Table, number: int, shots: int) -> ShotEntry:
    table.only("prompt", "cut", "size", "seed", "media", "frames", "sees")
    size = table.take(
        "size", is_integers(3, 1), "three positive integers, frames, height, width", "write size = [4, 30, 30]", None
    )
    frames = table.take(
        "frames", is_integers(2, 0), "two integers, first frame and end", "write frames = [0, 30]", None
    )
    if frames and frames[0] >= frames[1]:
        table.fail("frames", "a first frame before the end", frames, "write for example frames = [0, 30]")
    sees = table.take(
        "sees",
        lambda value: _is_sees(value, number, shots),
        f'"all", "recent:K", "relevant:K", or distinct numbers of 1 to {shots} without {number}, the shot itself',
        'write for example sees = "recent:3" or sees = [1, 2]',
        None,
    )
    return ShotEntry(
        prompt=_prompt(table, "prompt"),
        cut=table.take("cut", is_flag, "true or false", "write cut = true in a scene of several shots with cuts"),
        size=size and tuple(size),
        seed=table.take("seed", is_integer, "an integer from 0 up", "write for example seed = 7", None),
        media=table.take("media", _is_name, "a name without folders", 'write for example media = "shot-0"', None),
        frames=frames and tuple(frames),
        sees=tuple(sees) if isinstance(sees, list) else sees,
    )


def _is_sees(value: Any, number: int, shots: int) -> bool:
    if is_text(value):
        return SEES.fullmatch(value) is not None
    others = isinstance(value, list | tuple) and all(is_integer(item, 1) and item <= shots for item in value)
    return others and number not in value and len(set(value)) == len(value)


def _is_name(value: Any) -> bool:
    return is_text(value) and NAME.fullmatch(value) is not None


def _prompt(table: Table, key: str, default: Any = REQUIRED) -> str:
    text = table.take(key, is_text, "text in quotes", f'write {key} = "…"', default)
    if HAND_TYPED_CUT.search(text):
        table.fail(key, f"no {SHOT_CUT} typed by hand", text, "remove it and set cut = true on the shot")
    return text


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all latents in a file by key, without reading them; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="np") as stored:
            slices = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118
            for key, part in slices.items():
                if part.get_dtype() != "F32":
                    raise ValueError(f"{path}: {key}: expected dtype F32, got {part.get_dtype()}; convert it")
            return {key: tuple(part.get_shape()) for key, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, got a damaged file ({error}); write it again") from error


def _check_media(table: Table, scene: SceneFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where a shot's latents are missing or not of the size stated."""
    for i, shot in enumerate(scene.shots):
        if shot.media is None:
            continue
        where = f"shot {i + 1}: media"
        video, images = shapes.get(f"{shot.media}.video"), shapes.get(f"{shot.media}.images")
        if video is None:
            table.fail(where, f"{shot.media}.video in {LATENTS}", sorted(shapes) or None, "add it or remove media")
        if len(video) != 4 or 0 in video:
            table.fail(where, f"{shot.media}.video of shape [T, H, W, C]", video, "write it again")
        if images is not None and (len(images) != 4 or images[1:] != video[1:]):
            table.fail(where, f"{shot.media}.images of shape [K, *{list(video[1:])}]", images, "resize them")
        if shot.size is not None and shot.size != video[:3]:
            table.fail(f"shot {i + 1}: size", f"that of {shot.media}.video, {list(video[:3])}", shot.size, "correct it")
