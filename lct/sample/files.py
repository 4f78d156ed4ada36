"""A scene file in, latents, films and a contact sheet out."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lct.data.atomic import check_vacant, new_file, new_folder
from lct.data.latents import Codec, PixelCodec, patchify, size_in_patches, unpatchify
from lct.data.scenefile import SceneFile, ShotEntry, load_shot, media_of, read_scene, write_scene
from lct.data.scenes import ShotSample, shot_prompt, single_prompt
from lct.data.video import video_package, write_video
from lct.draw import contact_sheet
from lct.model.config import Memory, ModelConfig
from lct.model.mmdit import MMDiT
from lct.pretrained.pipeline import Pipeline
from lct.sample.autoregressive import autoregressive
from lct.sample.joint import joint
from lct.sample.request import Sampling, SceneRequest, ShotRequest
from lct.sample.select import CONTEXT, choose

SHEET, SCENE = "contact-sheet.png", "scene"
DEFAULT_FPS = 6.0


class Asked(NamedTuple):
    """What a scene file asks for; the shots that it gives by their index."""

    file: SceneFile
    folder: Path
    fps: float
    codec: Codec
    given: dict[int, ShotSample]
    request: SceneRequest


def asked(
    config: ModelConfig, scene_path: Path, context: int = CONTEXT, fps: float | None = None,
    pipeline: Pipeline | None = None,
) -> Asked:  # fmt: skip
    """What a scene file asks of a model, see `sample_scene`. ValueError where a shot has no size or one that the
    model's patch does not divide, where given latents are not the model's, and where all shots are given;
    FileNotFoundError where there is none."""
    video_package("av")
    if pipeline is not None:
        pipeline.check(config)
    file = read_scene(scene_path)
    folder = scene_path if scene_path.is_dir() else scene_path.parent
    rate, codec = rate_of(file, fps, pipeline), codec_of(file.codec, scene_path, pipeline)
    given = {i: load_shot(folder, file, i) for i, entry in enumerate(file.shots) if entry.media is not None}
    if len(given) == len(file.shots):
        raise ValueError(f"{scene_path}: every shot has media, nothing to generate; add a [[shot]] without media")
    shared, prompts = prompts_read(file, context)
    shots = tuple(request_of(config, folder, i, entry, prompts[i], given.get(i)) for i, entry in enumerate(file.shots))
    return Asked(file, folder, rate, codec, given, SceneRequest(shared, shots))


def sample_scene(
    model: MMDiT,
    scene_path: Path,
    out: Path,
    sampling: Sampling,
    visibility: str,
    mode: str | None = None,
    fps: float | None = None,
    impl: str = "auto",
    context: int = CONTEXT,
    pipeline: Pipeline | None = None,
    memory: Memory | None = None,
) -> Path:
    """Generate every shot of a scene file that has no media, into the new folder `out`; then decode all shots there.

    visibility  what the weights were trained with; context-causal ones generate over a KV cache
    mode        "auto-regressive", "joint", or None for what suits the visibility
    fps         of the films; None for the scene file's own
    context     shots that one sees by default, itself included: as many as the weights had in training
    pipeline    whose transformer the weights were tuned from: its text encoders read the prompts, its VAE makes frames
    memory      of finished shots, where it should not be that of a plain cache

    `out` holds `scene/` (the scene file and all latents, whole or not at all), `shot-N.mp4` and a contact sheet.
    Latents are on disk before they are decoded: see `decode_scene`. Raises, before anything is generated, what `asked`
    raises.
    """
    check_vacant(out)
    file, folder, fps, codec, given, request = asked(model.config, scene_path, context, fps, pipeline)
    shots = request.shots
    if pipeline is not None:
        pipeline.speak_for(model)
        pipeline.prepare(request.prompts)

    causal = visibility == "context_causal"
    mode = mode or ("auto-regressive" if causal else "joint")
    cached = causal and len(sampling.history_times) == 1
    chosen = _chosen(folder, file, context)
    if chosen is not None and (mode == "joint" or not cached):
        if any(entry.sees is not None for entry in file.shots):
            raise ValueError(
                f"{folder}: sees: expected weights tuned with context_causal, one history time and the auto-regressive "
                "mode where shots are chosen; leave sees out, or use lct direct"
            )
        chosen = None
    if memory is not None and (mode == "joint" or not cached):
        raise ValueError(
            "memory: goes with a cache, which needs context-causal weights, one history time, no joint mode"
        )
    if mode == "joint":
        (latents,) = joint(model, [request], sampling, visibility, impl)
    else:
        (latents,) = autoregressive(model, [request], sampling, visibility, cached, impl, chosen, memory)
    videos = [
        given[i].latents if i in given else unpatchify(rows.float().cpu(), shot.video, model.config.patch).numpy()
        for i, (rows, shot) in enumerate(zip(latents, shots, strict=True))
    ]
    entries = tuple(
        replace(entry, seed=shot.seed, media=f"shot-{i}", size=video.shape[:3])
        for i, (entry, shot, video) in enumerate(zip(file.shots, shots, videos, strict=True))
    )
    arrays = {f"shot-{i}.video": video for i, video in enumerate(videos)}
    arrays |= {f"shot-{i}.images": shot.images for i, shot in given.items() if len(shot.images)}
    with new_folder(out) as temporary:
        named = file.codec if pipeline is None else codec.name
        write_scene(temporary / SCENE, replace(file, shots=entries, codec=named), arrays)
    try:
        return decode_scene(out / SCENE, out, fps, pipeline, given)
    except Exception as error:
        command = ["lct", "decode", str(out / SCENE), "--out", str(out), "--fps", f"{fps:g}"]
        command += [] if pipeline is None else ["--pipeline", str(pipeline.folder)]
        error.add_note(f"the latents are in {out / SCENE}; `{shlex.join(command)}` makes films of them")
        raise


def prompts_read(file: SceneFile, context: int) -> tuple[str | None, list[str]]:
    """The global prompt and each shot's as weights read them; see `single_prompt` for a context of one shot."""
    shared = None if file.global_prompt is None else file.global_prompt.text()
    if context == 1:
        return None, [single_prompt(shared, entry.prompt) for entry in file.shots]
    return shared, [shot_prompt(entry.prompt, entry.cut) for entry in file.shots]


def codec_of(name: str | None, path: Path, pipeline: Pipeline | None) -> Codec:
    """What turns latents of the codec called `name` into frames: the pipeline's VAE, or what the name says. ValueError
    for latents of another."""
    codec = PixelCodec.named(name or "pixel/1") if pipeline is None else pipeline.codec
    if name not in (None, codec.name):
        raise ValueError(
            f"{path}: its latents are those of {name}, the pipeline's of {codec.name}; name the pipeline they are from"
        )
    return codec


def decode_scene(
    scene: Path, out: Path, fps: float | None = None, pipeline: Pipeline | None = None, given: Collection[int] = ()
) -> Path:
    """`shot-N.mp4` of every shot of a scene with latents, and a contact sheet, in the folder `out`; one shot at a time.

    fps    of the films; None for the scene file's own
    given  shots that the sheet marks as given
    """
    video_package("av")
    file = read_scene(scene)
    codec, rate = codec_of(file.codec, scene, pipeline), rate_of(file, fps, pipeline)
    for i in range(len(file.shots)):
        media_of(scene, file, i)
    out.mkdir(parents=True, exist_ok=True)
    shown = []
    for i in range(len(file.shots)):
        frames = codec.decode(load_shot(scene if scene.is_dir() else scene.parent, file, i).latents).numpy()
        with new_file(out / f"shot-{i}.mp4") as temporary:
            write_video(temporary, frames, rate)
        shown.append(frames)
    captions = [shot_prompt(entry.prompt, entry.cut) for entry in file.shots]
    with new_file(out / SHEET) as temporary:
        contact_sheet([("scene", shown)], captions, given={("scene", i) for i in given}).save(temporary)
    return out


def rate_of(file: SceneFile, fps: float | None, pipeline: Pipeline | None) -> float:
    fps = (file.fps or (DEFAULT_FPS if pipeline is None else pipeline.fps)) if fps is None else fps
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps: expected a positive number of frames per second, got {fps}")
    return fps


def _chosen(folder: Path, file: SceneFile, context: int) -> list[list[int]] | None:
    """The earlier shots that each one sees, where the file says so or not all fit a context as in training."""
    if all(entry.sees is None for entry in file.shots) and len(file.shots) <= context:
        return None
    prompts = [entry.prompt for entry in file.shots]
    chosen = []
    for i, entry in enumerate(file.shots):
        chosen.append(choose(entry.sees, prompts, i, context))
        if max(chosen[-1], default=-1) >= i:
            raise ValueError(
                f"{folder}: shot {i + 1}: sees: expected earlier shots where a scene is made in one go, got "
                f"{entry.sees}; make it with lct direct"
            )
    return chosen


def request_of(
    config: ModelConfig, folder: Path, index: int, entry: ShotEntry, prompt: str, given: ShotSample | None
) -> ShotRequest:
    """The request for shot `index`; errors count shots from 1, as a reader of the file does."""
    where, patch, channels = f"{folder}: shot {index + 1}", config.patch, config.latent_channels
    size = entry.size if given is None else given.latents.shape[:3]
    if size is None:
        raise ValueError(f"{where} has neither size nor media; give it size = [frames, height, width]")
    if any(n % p or n < p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"{where}: expected a size that the patch {patch} divides, got {tuple(size)}")
    if given is not None and given.latents.shape[3] != channels:
        raise ValueError(f"{where}: expected latents of {channels} channels, got {given.latents.shape[3]}")
    if given is not None and not np.isfinite(given.latents).all():
        raise ValueError(f"{where}: its latents hold NaN or infinity; encode it again")
    rows = None if given is None else patchify(torch.from_numpy(given.latents), patch)
    seed = index if entry.seed is None else entry.seed
    return ShotRequest(prompt, size_in_patches(size, patch), seed, rows)
