"""VBench and EntityBench, which run elsewhere: the folders that they read, commands, and a reader of VBench's results.

"VBench focuses on shot-level quality" (§ 4.1): every shot is a video of its own. The formats are those of the code at
github.com/Vchitect/VBench 45e79ec (0.1.5) and github.com/Catherine-R-He/EntityBench 3776439.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lct.data.atomic import new_folder
from lct.data.table import Table, is_integer, is_text
from lct.data.video import write_video
from lct.evaluate import Mean95

DIMENSIONS = {
    "aesthetic_quality": "aesthetic",
    "imaging_quality": "quality",
    "subject_consistency": "consistency",
    "background_consistency": "consistency",
    "overall_consistency": "text",
}
"""VBench's dimensions and the column of `tables.COLUMNS` that each belongs to, or is half of."""
PER_VIDEO_IN_PERCENT = ("imaging_quality",)  # its mean over all videos is a fraction again
VIDEOS, PROMPTS, INDEX, RESULTS = "videos", "prompts.json", "index.json", "results"
EPISODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_BYTES = 64 << 20
AGAIN = "run the lines of commands(folder) again"

Shots = Sequence[tuple[str, np.ndarray] | None]


def write_custom(folder: str | Path, videos: Mapping[str, Shots], fps: float) -> Path:
    """Write what VBench's custom_input mode reads; returns the folder, which must be new or empty.

    videos  by scene, its shots in order, each its prompt and frames [T, H, W, 3], uint8 or floats in [0, 1]; None
            leaves a shot out, such as one that was given, and the others keep their numbers

    `videos/` holds an mp4 a shot under a name that says nothing of its prompt, `prompts.json` the prompt of each file
    name (VBench's --prompt_file), `index.json` scene and shot of each, from 1. VBench's text encoder reads 32 tokens
    and drops the rest, so that a prompt should begin with what the shot shows.

    Raises ValueError, and leaves nothing behind, for an empty prompt and for a shot of one frame: VBench divides by the
    number of pairs of frames.
    """
    with new_folder(folder) as temporary:
        prompts, index = {}, {}
        for i, (scene, shots) in enumerate(videos.items(), 1):
            for j, shot in enumerate(shots, 1):
                if shot is None:
                    continue
                (prompt, frames), where = shot, f"videos: scene {scene!r}, shot {j}"
                if not isinstance(prompt, str) or not prompt.strip():
                    raise ValueError(f"{where}: expected a prompt, got {prompt!r}; VBench scores a shot against it")
                name = f"scene-{i:04d}_shot-{j:03d}.mp4"
                write_video(temporary / VIDEOS / name, _moving(frames, where), fps)
                prompts[name], index[name] = prompt, {"scene": scene, "shot": j}
        if not index:
            raise ValueError("videos: expected a shot at least, got none; pass {scene: [(prompt, frames), …]}")
        # VBench opens both in the machine's own encoding: JSON in ASCII reads the same in all
        (temporary / PROMPTS).write_text(json.dumps(prompts, indent=1), encoding="ascii")
        (temporary / INDEX).write_text(json.dumps({"files": index}, indent=1), encoding="ascii")
    return Path(folder)


def commands(folder: str | Path) -> list[str]:
    """Shell lines that score a folder of `write_custom` with VBench's command, to be run in order in its environment.

    The paper does not say which version of VBench it used, nor which dimensions stand behind its columns. Here Quality
    is imaging_quality (frames shrunk to 512 pixels on the longer side, VBench's default) and Text is
    overall_consistency, the ViCLIP similarity of a video and its prompt; the raw scores of both lie where the paper's
    do. Nor does it say whether a shot's prompt was taken with or without the global prompt and the tag [SHOT CUT]: what
    `write_custom` was given is used as it is. VBench's README does not list overall_consistency for custom_input, its
    code accepts it.
    """
    _index(Path(folder))
    # `vbench evaluate` passes its arguments through a second shell: relative names need no quoting there
    lines = [
        f"vbench evaluate --mode custom_input --dimension {name} --videos_path {VIDEOS} --prompt_file {PROMPTS} "
        f"--output_path {RESULTS}/{name}"
        for name in DIMENSIONS
    ]
    return [f"cd {shlex.quote(str(folder))}", *lines]


def read_results(folder: str | Path, results: str | Path | None = None) -> dict[str, dict]:
    """Scores in percent from VBench's `*_eval_results.json` for the shots of `write_custom`'s folder.

    results  one such file, or a folder that holds some, at any depth, each dimension once; by default folder/results

    Returns "columns": by column of `tables.COLUMNS`, the mean over scenes of their shots' means, with a 95 % interval,
    fit for `tables.our_row`; "scenes": by scene and column, the same over the scene's shots; "vbench": by dimension,
    VBench's own mean, which weighs shots by their frames in subject and background consistency. A column whose
    dimensions were not all scored is left out; other dimensions of VBench are passed over.

    Raises ValueError, with the file's name, for what is damaged, has been made from other videos, covers not all of
    them or compared them with other prompts; FileNotFoundError where there is none.
    """
    folder = Path(folder)
    index, prompts = _index(folder), read_json(folder / PROMPTS)
    by_dimension: dict[str, dict[str, float]] = {}
    overall: dict[str, float] = {}
    found_in: dict[str, Path] = {}
    for file in _result_files(Path(results) if results is not None else folder / RESULTS):
        content = read_json(file)
        for dimension in (name for name in DIMENSIONS if name in content):
            if dimension in found_in:
                first = found_in[dimension]
                raise ValueError(f"{file}: expected {dimension} once, got it in {first} too; delete the older file")
            overall[dimension], by_dimension[dimension] = _dimension(file, content, dimension, set(index))
            found_in[dimension] = file
            if dimension == "overall_consistency":
                _check_prompts(file, prompts)
    if not found_in:
        raise ValueError(f"{results or folder}: expected one of {', '.join(DIMENSIONS)}, got none of them; {AGAIN}")
    shots: dict[str, dict[str, list[float]]] = {}
    for column in dict.fromkeys(DIMENSIONS.values()):
        parts = [name for name, of in DIMENSIONS.items() if of == column]
        if all(name in by_dimension for name in parts):
            for file, (scene, _) in index.items():
                score = float(np.mean([by_dimension[name][file] for name in parts]))
                shots.setdefault(column, {}).setdefault(scene, []).append(score)
    names = dict.fromkeys(scene for scene, _ in index.values())
    return {
        "columns": {c: Mean95.of([float(np.mean(v)) for v in scenes.values()]) for c, scenes in shots.items()},
        "scenes": {name: {column: Mean95.of(scenes[name]) for column, scenes in shots.items()} for name in names},
        "vbench": overall,
    }


def write_entitybench(
    folder: str | Path, episodes: Mapping[str, Sequence[Sequence[np.ndarray | None]]], fps: float
) -> Path:
    """Write the films of EntityBench's episodes as <episode>/<scene>_<shot>.mp4, numbered from 001; returns the folder.

    episodes  by the name of an episode's script (without .json), its scenes in order, each its shots' frames
              [T, H, W, 3], uint8 or floats in [0, 1]; None leaves a shot out, which EntityBench skips

    Raises ValueError, and leaves nothing behind, for a name that is no script's, and for a shot of one frame.
    """
    with new_folder(folder) as temporary:
        for episode, scenes in episodes.items():
            if not EPISODE.fullmatch(episode):
                raise ValueError(f"episodes: expected the name of a script without .json, got {episode!r}; rename it")
            for i, shots in enumerate(scenes, 1):
                for j, frames in enumerate(shots, 1):
                    where = f"episodes: {episode}, scene {i}, shot {j}"
                    if max(i, j) > 999:
                        raise ValueError(f"{where}: expected numbers of three digits, got more; split the episode")
                    if frames is not None:
                        write_video(temporary / episode / f"{i:03d}_{j:03d}.mp4", _moving(frames, where), fps)
        if not any(temporary.iterdir()):
            raise ValueError("episodes: expected a shot at least, got none; pass {episode: [[frames, …], …]}")
    return Path(folder)


def to_bytes(frames: np.ndarray, where: str) -> np.ndarray:
    """uint8 [T, H, W, 3] of such frames or of floats in [0, 1]; `where` opens the ValueError for anything else."""
    frames = np.asarray(frames)
    shaped = frames.ndim == 4 and frames.shape[-1] == 3 and 0 not in frames.shape
    if shaped and frames.dtype == np.uint8:
        return frames
    if shaped and np.issubdtype(frames.dtype, np.floating) and frames.min() >= 0 and frames.max() <= 1:
        return np.round(255 * frames).astype(np.uint8)
    raise ValueError(
        f"{where}: expected frames [T, H, W, 3], uint8 or in [0, 1], got {frames.dtype} {list(frames.shape)}"
        f"{' outside of it' if shaped else ''}; clip or convert them"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file that may come from a stranger.

    Raises FileNotFoundError where there is none, ValueError where it is not whole, holds NaN or names a key twice.
    """
    content = _json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}; is it the right file?")
    return content


def _json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key that stands twice")
        return found

    def refused(constant: str) -> Any:
        raise ValueError(f"{constant}, which is no number")

    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, found {'a folder' if path.is_dir() else 'nothing'}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}; is this the file?")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{path}: expected whole JSON, got {why}; the file is damaged, fetch it again") from error


def _moving(frames: np.ndarray, where: str) -> np.ndarray:
    pixels = to_bytes(frames, where)
    if len(pixels) < 2:
        raise ValueError(f"{where}: expected two frames at least, got 1; pass None to leave an image out")
    return pixels


def _index(folder: Path) -> dict[str, tuple[str, int]]:
    """Scene and shot by file name."""
    path, fix = folder / INDEX, "write the folder with write_custom again"
    files = Table(read_json(path), str(path)).take(
        "files", lambda x: isinstance(x, dict) and len(x) > 0, "file names", fix
    )
    index = {}
    for name, entry in files.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {name}: expected scene and shot, got {type(entry).__name__}; {fix}")
        place = Table(entry, str(path), f"{name}: ")
        shot = place.take("shot", lambda x: is_integer(x, 1), "a number from 1", fix)
        index[name] = (place.take("scene", is_text, "a scene's name", fix), shot)
    return index


def _result_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*_eval_results.json")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise FileNotFoundError(f"{path}: expected *_eval_results.json of VBench, found nothing; {AGAIN}")
    return files


def _dimension(file: Path, content: dict, dimension: str, names: set[str]) -> tuple[float, dict[str, float]]:
    """VBench's own mean of a dimension and the score of each file, in percent."""
    value = content[dimension]
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
        raise ValueError(f"{file}: {dimension}: expected [mean, [a record a video]], got something else; {AGAIN}")
    percent = 1.0 if dimension in PER_VIDEO_IN_PERCENT else 100.0
    scores: dict[str, float] = {}
    for i, entry in enumerate(value[1], 1):
        record = Table(entry if isinstance(entry, dict) else {}, str(file), f"{dimension}: video {i}: ")
        path = record.take("video_path", is_text, "the path of a video", AGAIN)
        name = re.split(r"[\\/]", path)[-1]
        if name not in names:
            record.fail("video_path", f"a file that {INDEX} names", path, "read it with the folder it was made from")
        if name in scores:
            record.fail("video_path", "each video once", path, AGAIN)
        # a cosine may pass 1 by rounding; before June 2024 VBench summed subject consistency over frames
        score = record.take("video_results", lambda x: _within(x, 100.1 / percent), "a score", "update VBench to 0.1.5")
        scores[name] = percent * score
    if missing := sorted(names - set(scores)):
        raise ValueError(f"{file}: {dimension}: expected every video, got none of {missing[0]}; {AGAIN}")
    # every mean, however it weighs the videos, lies between them; 0.01 for sums in another order
    mean, low, high = value[0], min(scores.values()) - 0.01, max(scores.values()) + 0.01
    if not (_within(mean, 1.001) and low <= 100 * mean <= high):
        raise ValueError(
            f"{file}: {dimension}: expected a mean of its videos, {low / 100:.4f} to {high / 100:.4f}, got {mean!r}; "
            f"update VBench to 0.1.5 and {AGAIN}"
        )
    return 100 * mean, scores


def _within(value: Any, limit: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


def _check_prompts(file: Path, prompts: dict) -> None:
    """VBench tells the prompts that it used beside its results: without --prompt_file they are the files' names."""
    info = file.with_name(file.name.replace("_eval_results.json", "_full_info.json"))
    if info == file or not info.is_file():
        return
    try:
        used = {re.split(r"[\\/]", entry["video_list"][0])[-1]: entry["prompt_en"] for entry in _json(info)}
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{info}: expected VBench's list of videos and prompts, got another; {AGAIN}") from error
    for name, prompt in used.items():
        if prompt != prompts.get(name):
            raise ValueError(f"{info}: {name}: expected its prompt in {PROMPTS}, got {prompt!r}; {AGAIN}")
