"""Scenes on disk, drawn from like the toy scenes; latents are read when they are asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lct.data.latents import divides_in_time
from lct.data.scenefile import MAX_SHOTS, SCENE, SceneFile, read_scene, stored_shots
from lct.data.scenes import SceneSample, ShotSample, single_prompt

KINDS = ("single", "cut", "no_cut")


class StoredScenes:
    """Scenes whose shots all have latents on disk; a sample reads only what it shows, when that is asked for.

    root       where they lie, as errors name it
    scenes     their scene files, and `shots`, of each the shots with latents
    max_shots  most shots of a sample, 2 to 9
    """

    def __init__(
        self,
        root: Path,
        scenes: Sequence[SceneFile],
        shots: Sequence[tuple[ShotSample, ...]],
        max_shots: int = MAX_SHOTS,
    ):
        if not 2 <= max_shots <= MAX_SHOTS:
            raise ValueError(f"max_shots: expected 2 to {MAX_SHOTS}, got {max_shots}; choose one of these")
        self.root, self.scenes, self.shots, self.max_shots = root, scenes, shots, max_shots
        self._beginnings: dict[tuple[str, int], list[tuple[int, int]]] = {}

    def sample(self, kind: str, rng: np.random.Generator, shots: int | None = None) -> SceneSample:
        """Draw one scene; `rng` advances.

        kind   "single": one shot on its own, what the scene shares told in its prompt (`single_prompt`); "cut":
               consecutive shots of a scene with cuts; "no_cut": consecutive segments of a scene without cuts, such as
               `ingest` divides long shots into; where there is none, one shot of pixels divided in time into parts of
               about equal length
        shots  their number; by default as many as the scene has, up to max_shots, and two parts of a divided shot

        Raises ValueError where the folders hold nothing of this kind and number.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}; choose one of these")
        if shots is not None and not 1 <= shots <= MAX_SHOTS:
            raise ValueError(f"shots: expected 1 to {MAX_SHOTS}, got {shots}; choose one of these")
        places = self._places(kind, shots or 2)
        scene, index = places[int(rng.integers(len(places)))]
        if kind == "single":
            return self._single(scene, index)
        if self._has(kind, scene, shots or 2):
            return self._consecutive(scene, rng, shots)
        return self._divided(scene, index, shots or 2)

    def _has(self, kind: str, scene: int, least: int) -> bool:
        """Whether a scene has `least` shots or more, all after a cut; or for "no_cut" two or more without any cut."""
        cuts = [shot.cut for shot in self.scenes[scene].shots]
        return len(cuts) >= least and (all(cuts) if kind == "cut" else not any(cuts) and len(cuts) > 1)

    def _places(self, kind: str, least: int) -> list[tuple[int, int]]:
        """(scene, shot) of everything a sample of this kind can begin from; ValueError where there is nothing."""
        if (kind, least) not in self._beginnings:
            self._beginnings[kind, least] = self._find_places(kind, least)
        return self._beginnings[kind, least]

    def _find_places(self, kind: str, least: int) -> list[tuple[int, int]]:
        places = [(i, 0) for i in range(len(self.scenes)) if self._has(kind, i, least)]
        if kind == "single" or (kind == "no_cut" and not places):
            places = [
                (i, s)
                for i, shots in enumerate(self.shots)
                for s, shot in enumerate(shots)
                if kind == "single" or (divides_in_time(self.scenes[i].codec) and len(shot.latents) >= least)
            ]
        if not places:
            need = {
                "single": "a shot",
                "cut": f"a scene of {least} shots with cuts",
                "no_cut": f"a scene of {least} shots without cuts, or a shot of {least} frames of pixels",
            }
            more = "ingest more film, with --divide" if kind == "no_cut" else "ingest more film"
            raise ValueError(
                f"{self.root}: expected {need[kind]} for kind {kind!r}, got none; {more}, or leave the kind out: "
                f"--data.{kind.replace('_', '-')} 0"
            )
        return places

    def check(self, kinds: Iterable[str], patch: tuple[int, int, int], channels: int) -> None:
        """ValueError where a kind cannot be drawn, the patch (frames, height, width) does not divide some shot, or its
        latents have other channels.

        It looks at sizes alone, so that it can stand before any work.
        """
        for kind in kinds:
            self._places(kind, 2)
        mixed = sum(len({shot.cut for shot in scene.shots}) > 1 for scene in self.scenes)
        if mixed:
            warnings.warn(
                f"{self.root}: {mixed} scenes have shots with and without a cut; they are drawn as single shots alone",
                stacklevel=2,
            )
        for shots in self.shots:
            for index, shot in enumerate(shots):
                shape = shot.latents.shape
                where = getattr(shot.latents, "file", self.root / "").parent
                if shape[3] != channels:
                    raise ValueError(
                        f"{where}: shot {index + 1}: expected latents of {channels} channels, as the model has, got "
                        f"{shape[3]}; ingest or encode for this model"
                    )
                if any(n % p for n, p in zip(shape, patch, strict=False)):
                    raise ValueError(
                        f"{where}: shot {index + 1}: the patch {patch} does not divide its latents {shape[:3]}; "
                        f"ingest with --patch {max(patch[1:])}"
                    )

    def _single(self, scene: int, index: int) -> SceneSample:
        shot = self._shot(scene, index)
        return SceneSample(None, (replace(shot, prompt=single_prompt(self._prompt(scene), shot.prompt), cut=False),))

    def _consecutive(self, scene: int, rng: np.random.Generator, shots: int | None) -> SceneSample:
        have = len(self.scenes[scene].shots)
        count = shots or min(have, self.max_shots)
        first = int(rng.integers(have - count + 1))
        return SceneSample(self._prompt(scene), tuple(self._shot(scene, first + i) for i in range(count)))

    def _divided(self, scene: int, index: int, parts: int) -> SceneSample:
        shot = self._shot(scene, index)

        def pieces(rows: int) -> list[slice]:
            split = np.array_split(range(rows), parts)
            return [slice(int(part[0]), int(part[-1]) + 1) if len(part) else slice(0) for part in split]

        # images are in order of time, so an equal share of them falls to each part
        both = zip(pieces(len(shot.latents)), pieces(len(shot.images)), strict=True)
        segments = tuple(ShotSample(shot.latents[a], shot.prompt, False, shot.images[b]) for a, b in both)
        return SceneSample(self._prompt(scene), segments)

    def _shot(self, scene: int, index: int) -> ShotSample:
        return self.shots[scene][index]

    def _prompt(self, scene: int) -> str | None:
        shared = self.scenes[scene].global_prompt
        return None if shared is None else shared.text()


class SceneFolder(StoredScenes):
    """Scenes under `root`, at any depth, such as `ingest` writes.

    skip  leave out, with a warning, scenes that are wrong or lack latents

    Raises FileNotFoundError where no scene is found, ValueError for a scene file that is wrong or lacks latents.
    """

    def __init__(self, root: str | Path, max_shots: int = MAX_SHOTS, skip: bool = False):
        scenes, shots = [], []
        for folder in scene_folders(Path(root)):
            try:
                scene = read_scene(folder)
                shots.append(stored_shots(folder, scene))
                scenes.append(scene)
            except ValueError as error:
                if not skip:
                    raise
                warnings.warn(f"a scene is left out: {error}", stacklevel=2)
        super().__init__(Path(root), scenes, shots, max_shots)


def whole_files(root: Path, name: str) -> list[Path]:
    """The files of this name under `root`, at any depth and through links; but not in a folder that has a leading dot,
    which its writer did not finish."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [f for f in folders if f[0] != "." and not _goes_back(Path(folder) / f)]
        found += [Path(folder) / name] if name in files else []
    return sorted(found)


def _goes_back(path: Path) -> bool:
    """Whether it is a link to what it lies in, which would have no end."""
    return path.is_symlink() and path.resolve() in {above.resolve() for above in path.parents}


def scene_folders(root: Path) -> list[Path]:
    """The folders of scenes under `root`, at any depth; FileNotFoundError where there is none."""
    folders = [file.parent for file in whole_files(root, SCENE)]
    if not folders:
        raise FileNotFoundError(f"{root}: expected folders that hold {SCENE}, found none; make some with lct ingest")
    return folders
