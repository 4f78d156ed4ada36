"""Scene folders packed into few large files: safetensors shards and a JSON-lines manifest, a line a scene.

The manifest holds every scene file as it was, and shape and CRC-32 of every tensor: scenes are drawn without opening a
shard, and a damaged one is noticed when it is read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lct.data.atomic import new_folder
from lct.data.folder import StoredScenes, scene_folders
from lct.data.scenefile import LATENTS, MAX_SHOTS, SCENE, SceneFile, media_of, parse_scene, read_scene
from lct.data.scenes import ShotSample
from lct.data.stored import Damaged, Stored
from lct.data.table import is_file_name, is_integer, is_text

MANIFEST, TEXT = "manifest.jsonl", "text.safetensors"
SHARD = 1 << 30  # bytes of tensors after which the next shard is begun

Entry = tuple[str, list[int], int]  # shard, shape, CRC-32


def write_shards(
    root: str | Path, out: str | Path, size: int = SHARD, progress: Callable[[str], None] = lambda name: None
) -> Path:
    """Pack all scenes under `root`, with their latents and encoded text, into a new folder, whole or not at all.

    size  bytes of tensors after which the next shard is begun; a scene is never divided

    Raises what `scene_folders` and `read_scene` raise, and ValueError where a shot has no latents, before anything is
    written.
    """
    root = Path(root)
    scenes = {folder: read_scene(folder) for folder in scene_folders(root)}
    for folder, scene in scenes.items():
        for index in range(len(scene.shots)):
            media_of(folder, scene, index)
    with new_folder(out) as temporary:
        shard, lines, known = _Shard(temporary), [], set()
        if (root / TEXT).is_file():  # the null prompt's
            lines.append({"text": shard.take(root / TEXT, "text", known)})
        for folder in scenes:
            name = folder.relative_to(root).as_posix()
            line: dict[str, Any] = {"scene": name, "file": (folder / SCENE).read_text(encoding="utf-8")}
            line["latents"] = shard.take(folder / LATENTS, name)
            if (folder / TEXT).is_file():
                line["text"] = shard.take(folder / TEXT, "text", known)
            lines.append(line)
            if shard.bytes > size:
                shard.write()
            progress(name)
        shard.write()
        told = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (temporary / MANIFEST).write_text(told, encoding="utf-8")
    return Path(out)


class _Shard:
    """The shard that is being filled."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.held = folder, 0, dict[str, Tensor]()

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}.safetensors"

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.held.values())

    def take(self, file: Path, prefix: str, known: set[str] | None = None) -> dict[str, Entry]:
        """Where the tensors of a file will lie, by name; those in `known` lie elsewhere already."""
        entries = {}
        with safe_open(file, "pt") as content:
            for key in content.keys():  # noqa: SIM118
                if known is None or key not in known:
                    value = content.get_tensor(key).contiguous()
                    self.held[f"{prefix}/{key}"] = value
                    entries[key] = (self.name, list(value.shape), _crc(value))
        if known is not None:
            known |= entries.keys()
        return entries

    def write(self) -> None:
        if self.held:
            save_file(self.held, self.folder / self.name)
            (self.folder / self.name).chmod(0o644)  # safetensors writes files for their owner alone
            self.number, self.held = self.number + 1, {}


class _Line(NamedTuple):
    name: str
    scene: SceneFile
    latents: dict[str, Entry]


class SceneShards(StoredScenes):
    """Scenes that `write_shards` packed into the folder `root`.

    Raises FileNotFoundError where there is no manifest, ValueError, with the number of the line, for a damaged one.
    """

    def __init__(self, root: str | Path, max_shots: int = MAX_SHOTS, skip: bool = False):
        root = Path(root)  # nothing to skip here: what a shard holds is found out when it is read
        lines = [
            _Line(line["scene"], parse_scene(line["file"], f"{root / MANIFEST}: {line['scene']}"), line["latents"])
            for line in read_manifest(root)
            if "scene" in line
        ]
        shots = [self._stored(root, line) for line in lines]
        super().__init__(root, [line.scene for line in lines], shots, max_shots)

    def _stored(self, root: Path, line: _Line) -> tuple[ShotSample, ...]:
        def part(key: str) -> Stored:
            shard, shape, crc = line.latents[key]
            return Stored(root / shard, f"{line.name}/{key}", tuple(shape), crc=crc)

        shots = []
        for index, entry in enumerate(line.scene.shots):
            media = media_of(root / line.name, line.scene, index)
            if f"{media}.video" not in line.latents:
                raise ValueError(f"{root / MANIFEST}: {line.name}: shot {index + 1}: no latents; pack the scenes again")
            video = part(f"{media}.video")
            images = part(f"{media}.images") if f"{media}.images" in line.latents else video[:0]
            shots.append(ShotSample(cast(np.ndarray, video), entry.prompt, entry.cut, cast(np.ndarray, images)))
        return tuple(shots)


def is_packed(root: str | Path) -> bool:
    """Whether a folder holds packed scenes."""
    return (Path(root) / MANIFEST).is_file()


def read_manifest(root: Path) -> list[dict[str, Any]]:
    """The lines of a manifest."""
    file, lines = root / MANIFEST, []
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; pack scenes with lct pack")
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or ("scene" in values and not {"file", "latents"} <= values.keys()):
                raise ValueError("expected a scene with file and latents")
            if not all(is_text(values.get(key, "")) for key in ("scene", "file")):
                raise ValueError("scene, file: expected text")
            for key in ("latents", "text"):
                if not _is_entries(values.get(key, {})):
                    raise ValueError(f"{key}: expected a shard, a shape and a CRC-32 of each tensor")
        except ValueError as error:
            raise ValueError(f"{file}: line {number}: damaged ({error}); pack the scenes again") from None
        lines.append(values)
    return lines


def _is_entries(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(entry, list) and len(entry) == 3 and is_file_name(entry[0]) and is_integer(entry[2])
        and isinstance(entry[1], list) and all(map(is_integer, entry[1]))
        for entry in values.values()
    )  # fmt: skip


def read_packed(root: Path, name: str, entry: Entry) -> Tensor:
    """One tensor of a shard; `Damaged` where it does not match its CRC-32."""
    file = root / entry[0]
    try:
        with safe_open(file, "pt") as content:
            value = content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{file}: {name}: missing or damaged ({error}); pack the scenes again") from None
    if _crc(value) != entry[2]:
        raise Damaged(f"{file}: {name}: damaged, it does not match its CRC-32; pack the scenes again")
    return value


def _crc(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
