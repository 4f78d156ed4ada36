"""Finished text features on disk: a safetensors file a scene, rows by the hash of their prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lct.data.atomic import new_file
from lct.data.folder import whole_files
from lct.data.scenefile import SceneFile
from lct.data.scenes import shot_prompt, single_prompt
from lct.data.shards import TEXT, Entry, is_packed, read_manifest, read_packed


def prompts_of(scene: SceneFile) -> list[str]:
    """Every prompt that training may ask of a scene: the global one, and its shots', in the scene and on their own."""
    shared = None if scene.global_prompt is None else scene.global_prompt.text()
    inside = [shot_prompt(shot.prompt, shot.cut) for shot in scene.shots]
    alone = [single_prompt(shared, shot.prompt) for shot in scene.shots]
    return list(dict.fromkeys([*inside, *alone, *([] if shared is None else [shared])]))


def write_features(file: Path, features: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Rows of prompts, in half precision by default."""
    with new_file(file) as temporary:
        save_file({_name(prompt): rows.to(dtype).contiguous() for prompt, rows in features.items()}, temporary)
        temporary.chmod(0o644)


class FeatureTable:
    """Rows of every prompt that was encoded under a folder of scenes, or packed; read when a prompt is asked for.

    Raises FileNotFoundError where there are none, ValueError, with the file's name, for damaged ones.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._packed: dict[str, Entry] = {}
        self._files: dict[str, Path] = {}
        if is_packed(self.root):
            for line in read_manifest(self.root):
                self._packed |= line.get("text", {})
        else:
            for file in whole_files(self.root, TEXT):
                self._files |= dict.fromkeys(_names(file), file)
        if not self._files and not self._packed:
            raise FileNotFoundError(f"{self.root}: expected {TEXT} of encoded scenes, found none; run lct encode first")
        self.tokenize = lru_cache(maxsize=64)(self._read)  # a prompt of Wan is 8 MB
        self.length = lru_cache(maxsize=None)(self._length)

    def check(self, prompts: Iterable[str]) -> None:
        """ValueError where a prompt was not encoded; before any training."""
        for prompt in prompts:
            if _name(prompt) not in self._packed:
                self._file(prompt)

    def _length(self, prompt: str) -> int:
        """L, without the rows."""
        if _name(prompt) in self._packed:
            return self._packed[_name(prompt)][1][0]
        with safe_open(self._file(prompt), "pt") as file:
            return file.get_slice(_name(prompt)).get_shape()[0]

    def _file(self, prompt: str) -> Path:
        file = self._files.get(_name(prompt))
        if file is None:
            raise ValueError(f"{self.root}: the prompt {prompt[:60]!r} was not encoded; run lct encode again")
        return file

    def _read(self, prompt: str) -> Tensor:
        """float32 [L, C]."""
        name = _name(prompt)
        if name in self._packed:
            return read_packed(self.root, f"text/{name}", self._packed[name]).float()
        rows = read_features(self._file(prompt), prompt)
        assert rows is not None  # the file was asked for its names
        return rows


def read_features(file: Path, prompt: str) -> Tensor | None:
    """Rows of a prompt, float32 [L, C]; None where the file has none."""
    with safe_open(file, "pt") as content:
        name = _name(prompt)
        return content.get_tensor(name).float() if name in set(content.keys()) else None


def _name(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or cut off ({error}); delete its scene and run lct encode again") from None
