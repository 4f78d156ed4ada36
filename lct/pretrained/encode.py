"""Ingested scenes to what a large model trains on: VAE latents and text features, scene by scene (§ 3.2.1, § 4).

A scene that is finished is skipped, so that encoding goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lct.data.atomic import new_folder
from lct.data.folder import scene_folders
from lct.data.ingest import ShotFrames, encode_shots, fit, shot_frames
from lct.data.scenefile import SceneFile, ShotEntry, read_scene, write_scene
from lct.data.video import film_fps, iterate_video, video_package
from lct.pretrained.features import TEXT, prompts_of, read_features, write_features
from lct.pretrained.pipeline import Pipeline
from lct.progress import counting


def encode(
    scenes: Path,
    pipeline: Pipeline,
    films: Path,
    out: Path,
    side: int = 480,
    fps: float = 24.0,
    max_frames: int = 121,
) -> list[Path]:
    """Encode every scene under `scenes` into `out`, under the same names; returns the folders that were written.

    films       folder that holds the films which the scenes name
    side        frames get the area side · side in pixels, with the film's aspect ratio (§ 4: 480)
    fps         frames per second that latents show; at most the film's
    max_frames  most frames of a shot; fewer by up to time_stride − 1, so that the VAE's stride in time divides them.
                What a segment without cut leaves over begins the next one, so that nothing is lost at their seam

    Each folder holds the scene file with its prompts, `shot-N.video` and `shot-N.images`, and `text.safetensors`; the
    null prompt lies in `out`. ValueError or FileNotFoundError, before anything is encoded, for a film that is missing,
    for scenes that no film was cut into, and for shots longer than `max_frames` that another goes on from.
    """
    video_package("av")
    if out.resolve().is_relative_to(scenes.resolve()):
        raise ValueError(f"out: expected a folder beside {scenes}, got {out}, whose scenes would be encoded again")
    read = {folder: read_scene(folder) for folder in scene_folders(scenes)}
    for folder, scene in read.items():
        if scene.source is None or any(shot.frames is None for shot in scene.shots):
            raise ValueError(f"{folder}: expected a scene that lct ingest cut from a film, got one without frames")
        if not (films / scene.source).is_file():
            raise FileNotFoundError(f"{films / scene.source}: no such film, though {folder} was cut from it")
    steps = {source: _step(films / source, fps) for source in {str(scene.source) for scene in read.values()}}
    codec = pipeline.codec
    multiple = codec.stride * max(pipeline.config.patch[1:])
    plans = {f: _plans(f, s, max_frames, steps[str(s.source)], codec.time_stride) for f, s in read.items()}
    areas = {source: _area(films / source, side, multiple, codec.stride) for source in steps}
    left = {}
    for folder, scene in read.items():
        video = [(*areas[str(scene.source)], plan.span) for plan in plans[folder]]
        if not _is_finished(out / folder.relative_to(scenes), scene, video, codec.name, fps):
            left[folder] = scene
    out.mkdir(parents=True, exist_ok=True)
    if left or not (out / TEXT).is_file():
        _write_null(out, pipeline)
    written = []
    with counting("encode", len(read), len(read) - len(left)) as advance:
        for group in _passes(left):
            source = str(left[group[0]].source)
            media = encode_shots(films / source, [plan for f in group for plan in plans[f]], codec, side, multiple)
            for folder in group:
                target = out / folder.relative_to(scenes)
                _write(target, left[folder], plans[folder], media, pipeline, fps)
                written.append(target)
                advance(str(folder.relative_to(scenes)))
    return written


def _write_null(out: Path, pipeline: Pipeline) -> None:
    """The null prompt's rows in `out`; ValueError where those there are another pipeline's."""
    (null,) = pipeline.encode([""])
    if not (out / TEXT).is_file():
        write_features(out / TEXT, {"": null})
        return
    there = read_features(out / TEXT, "")
    if there is None or there.shape != null.shape or (there - null).norm() > 0.05 * null.norm():
        raise ValueError(f"{out / TEXT}: was encoded with another pipeline; encode into another folder")


def _write(target: Path, scene: SceneFile, plans: list[ShotFrames], media: Iterator, pipeline: Pipeline, fps: float):
    latents, entries = {}, []
    for i, shot in enumerate(scene.shots):
        plan, video, images = next(media)
        latents |= {f"shot-{i}.video": video, f"shot-{i}.images": images}
        entries.append(replace(shot, size=video.shape[:3], media=f"shot-{i}", frames=plan.span))
    with new_folder(target) as temporary:
        encoded = replace(scene, shots=tuple(entries), fps=fps, codec=pipeline.codec.name)
        write_scene(temporary, encoded, latents)
        prompts = prompts_of(scene)
        write_features(temporary / TEXT, dict(zip(prompts, pipeline.encode(prompts), strict=True)))


def _plans(folder: Path, scene: SceneFile, most: int, step: float, time_stride: int) -> list[ShotFrames]:
    """The frames of each shot; a segment that goes on where the last one ended begins where its latents end."""
    plans: list[ShotFrames] = []
    last = -1
    for i, shot in enumerate(scene.shots):
        start, end = _span(shot)
        if start < last:
            raise ValueError(
                f"{folder}: shot {i + 1}: expected frames from {last} on, where shot {i} ends, got {[start, end]}; "
                "put the shots in the film's order, or into scenes of their own"
            )
        if not shot.cut and start == last:
            start = plans[-1].span[1]
            if (lost := (last - start) / step) >= time_stride:
                raise ValueError(
                    f"max_frames: shot {i} of {folder} is {lost:.0f} frames longer than {most}, and shot {i + 1} goes "
                    "on from it without a cut; raise it, or ingest shorter segments"
                )
        plans.append(shot_frames((start, end), step, most, time_stride))
        last = end
    return plans


def _passes(scenes: dict[Path, SceneFile]) -> list[list[Path]]:
    """Groups of scenes of one film, one behind the other in it, so that each group decodes it once."""
    groups: list[tuple[str, int, list[Path]]] = []
    for folder, scene in sorted(scenes.items(), key=lambda item: (item[1].source, item[1].shots[0].frames, item[0])):
        first, last = _span(scene.shots[0])[0], _span(scene.shots[-1])[1]
        for i, (source, end, group) in enumerate(groups):
            if source == scene.source and end <= first:
                groups[i] = (source, last, [*group, folder])
                break
        else:
            groups.append((str(scene.source), last, [folder]))
    return [group for _, _, group in groups]


def _span(shot: ShotEntry) -> tuple[int, int]:
    assert shot.frames is not None  # checked before anything is encoded
    return shot.frames


def _is_finished(folder: Path, scene: SceneFile, video: list, codec: str, fps: float) -> bool:
    """Whether a scene is encoded, with these heights, widths and frames of its shots; ValueError where something else
    of it is."""
    if not (folder / TEXT).is_file():
        return False
    there = read_scene(folder)
    found = [(*(shot.size or (0, 0, 0))[1:], shot.frames) for shot in there.shots]
    prompts = [[(shot.prompt, shot.cut) for shot in s.shots] for s in (there, scene)]
    own, asked = (
        (there.source, there.global_prompt, there.codec, there.fps),
        (scene.source, scene.global_prompt, codec, fps),
    )
    rows = [read_features(folder / TEXT, prompt) is not None for prompt in prompts_of(scene)]
    if not all(rows) or prompts[0] != prompts[1] or found != video or own != asked:
        raise ValueError(
            f"{folder}: was encoded with other prompts, frames, sizes, fps, another film or another pipeline; remove "
            "it to encode it anew"
        )
    return True


def _area(film: Path, side: int, multiple: int, stride: int) -> tuple[int, int]:
    """Height and width of latents."""
    first = next(iterate_video(film, resize=lambda height, width: fit(height, width, side, multiple)))
    return first.shape[0] // stride, first.shape[1] // stride


def _step(film: Path, fps: float) -> float:
    """Frames of the film per frame that latents show; 23.976 in a second pass for 24."""
    own = film_fps(film)
    if own < fps <= 1.01 * own:
        return 1.0
    if fps > own:
        raise ValueError(f"fps: expected at most the {own:g} frames per second of {film}, got {fps:g}; lower it")
    return own / fps
