"""A scene file in, latents, films and a contact sheet out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lct.data.atomic import check_vacant, new_folder
from lct.data.latents import PixelCodec, patchify, unpatchify
from lct.data.scenefile import SceneFile, ShotEntry, load_shot, read_scene, write_scene
from lct.data.scenes import shot_prompt
from lct.data.video import video_package, write_video
from lct.draw import contact_sheet
from lct.model.mmdit import MMDiT
from lct.sample.autoregressive import autoregressive
from lct.sample.joint import joint
from lct.sample.request import Sampling, SceneRequest, ShotRequest

SHEET, SCENE = "contact-sheet.png", "scene"


def sample_scene(model: MMDiT, scene_path: Path, out: Path, mode: str, sampling: Sampling, fps: float) -> Path:
    """Generate every shot of a scene file that has no media, into the new folder `out`, whole or not at all.

    mode  "auto-regressive" over a KV cache, for context-causal weights; "joint" for bidirectional ones

    `out` holds `scene/` (the scene file with all latents), `shot-N.mp4` and a contact sheet. ValueError where a shot
    has no size or one that the model's patch does not divide, and where all shots are given.
    """
    check_vacant(out)
    video_package("av")
    file = read_scene(scene_path)
    folder = scene_path if scene_path.is_dir() else scene_path.parent
    request, clean = _request(model, folder, file)
    if all(shot.given is not None for shot in request.shots):
        raise ValueError(f"{scene_path}: every shot has media, nothing to generate; add a [[shot]] without media")
    run = autoregressive if mode == "auto-regressive" else joint
    (latents,) = run(model, [request], sampling)
    patch = model.config.patch
    videos = [
        clean[i] if i in clean else unpatchify(rows.float().cpu(), shot.video, patch).numpy()
        for i, (rows, shot) in enumerate(zip(latents, request.shots, strict=True))
    ]
    entries = [
        replace(entry, seed=shot.seed, media=f"shot-{i}", size=videos[i].shape[:3])
        for i, (entry, shot) in enumerate(zip(file.shots, request.shots, strict=True))
    ]
    codec = PixelCodec(int((file.codec or "pixel/1").removeprefix("pixel/")))
    frames = [codec.decode(torch.from_numpy(np.ascontiguousarray(video))).numpy() for video in videos]
    with new_folder(out) as temporary:
        done = replace(file, shots=tuple(entries))
        write_scene(temporary / SCENE, done, {f"shot-{i}.video": video for i, video in enumerate(videos)})
        for i, shown in enumerate(frames):
            write_video(temporary / f"shot-{i}.mp4", shown, fps)
        captions = [shot_prompt(e.prompt, e.cut) + (" (given)" if i in clean else "") for i, e in enumerate(entries)]
        contact_sheet([("scene", frames)], captions).save(temporary / SHEET)
    return out


def _request(model: MMDiT, folder: Path, file: SceneFile) -> tuple[SceneRequest, dict[int, np.ndarray]]:
    shots, clean = [], {}
    for index, entry in enumerate(file.shots):
        given = None
        if entry.media is not None:
            clean[index] = load_shot(folder, file, index).latents
            entry = replace(entry, size=clean[index].shape[:3])
            given = patchify(torch.from_numpy(clean[index]), model.config.patch)
        prompt = shot_prompt(entry.prompt, entry.cut)
        seed = index if entry.seed is None else entry.seed
        shots.append(ShotRequest(prompt, _patches(folder, index, entry, model.config.patch), seed, given))
    return SceneRequest(None if file.global_prompt is None else file.global_prompt.text(), tuple(shots)), clean


def _patches(folder: Path, index: int, entry: ShotEntry, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    if entry.size is None:
        raise ValueError(f"{folder}: shot {index} has neither size nor media; give it size = [frames, height, width]")
    if any(n % p or n < p for n, p in zip(entry.size, patch, strict=True)):
        raise ValueError(f"{folder}: shot {index}: expected a size that the patch {patch} divides, got {entry.size}")
    frames, height, width = (n // p for n, p in zip(entry.size, patch, strict=True))
    return frames, height, width
