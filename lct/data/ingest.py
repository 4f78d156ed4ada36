"""Films to scene folders: cuts, scenes, and latents of every shot (§ 3.2.1 data processing; § 4 native sizes).

The film is decoded twice, small to find cuts and scenes, then at the training size, so that only small frames and the
latents of one shot are in memory; a third time where long shots are divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from lct.data.atomic import check_vacant, new_folder
from lct.data.events import Span, colours, select_long
from lct.data.latents import Codec, PixelCodec
from lct.data.scenefile import MAX_SHOTS, GlobalPrompt, SceneFile, ShotEntry, write_scene
from lct.data.video import Stills, read_video, spread, video_package

THUMBNAIL = 160
# On real film the weakest cut changes 3.1 times as much as the frames around it, the strongest camera motion 1.8 times;
# a change of less than 5 of 255 is noise or a key frame of the encoder, however still its surroundings are.
CUT_RATIO, CUT_CHANGE = 2.5, 5.0
SHORTEST_SHOT = 0.2
SCENE_DISTANCE = 0.4
IMAGES = 4


@dataclass(frozen=True)
class IngestReport:
    """What became of a film.

    fps, frames  of the film
    cuts         first frame of every shot but the first
    scenes       per scene, per shot: (first frame, end)
    sizes        per scene, per shot: (T, H, W) in latent pixels
    durations    per scene, per shot: seconds in the film
    divided      per long shot, per segment: (first frame, end)
    """

    fps: float
    frames: int
    cuts: tuple[int, ...]
    scenes: tuple[tuple[Span, ...], ...]
    sizes: tuple[tuple[tuple[int, int, int], ...], ...]
    durations: tuple[tuple[float, ...], ...]
    divided: tuple[tuple[Span, ...], ...] = ()

    def __str__(self) -> str:
        """One line for the film, one for each scene and each long shot that was divided."""
        cuts = ", ".join(map(str, self.cuts)) or "none"
        lines = [f"{self.frames} frames at {self.fps:g} fps; cuts at {cuts}; {len(self.scenes)} scenes"]
        for i, (sizes, durations) in enumerate(zip(self.sizes, self.durations, strict=True)):
            shots = (f"{T}x{H}x{W} ({seconds:.1f} s)" for (T, H, W), seconds in zip(sizes, durations, strict=True))
            lines.append(f"scene-{i:03d}: {', '.join(shots)}")
        for i, spans in enumerate(self.divided):
            parts = ", ".join(f"{(end - start) / self.fps:.1f} s" for start, end in spans)
            lines.append(f"long-{i:03d}: frames {spans[0][0]} to {spans[-1][1]} without cut, in segments of {parts}")
        return "\n".join(lines)


def ingest(
    path: str | Path,
    out: str | Path,
    *,
    side: int = 480,
    stride: int = 8,
    patch: int = 4,
    fps: float = 8.0,
    max_frames: int = 64,
    max_shots: int = MAX_SHOTS,
    divide: bool = False,
) -> IngestReport:
    """Cut a film into scenes of shots and write `out/scene-000/`, `out/scene-001/`, …, all of them or nothing.

    side        frames get the area side · side in pixels, with the film's aspect ratio (§ 4: 480)
    stride      pixels per latent pixel of the codec
    patch       latent pixels per patch; height and width are rounded to multiples of patch · stride
    fps         frames per second that a shot's latents show; at most the film's
    max_frames  most latent frames of a shot; what comes after them is left out
    max_shots   most shots of a scene
    divide      also write `out/long-000/`, …: every long shot with much change, its segments as shots without cut
                (`select_long`); one longer than `max_frames` is divided evenly, so that nothing is left out between
                two, and a shot of more than `max_shots` segments makes several folders

    Each folder holds a scene file with empty prompts, and per shot `shot-N.video` [T, H, W, C] and `shot-N.images`
    [K, H, W, C], up to 4 of its frames encoded as images. Deterministic. Raises what `read_video` raises, and
    ValueError for arguments out of range and where `out` exists and is not empty.
    """
    check_vacant(out)
    _check_positive(side=side, stride=stride, patch=patch, fps=fps, max_frames=max_frames, max_shots=max_shots)
    small = read_video(path, resize=_thumbnail)
    if fps > small.fps:
        raise ValueError(f"fps: expected at most the film's {small.fps:g} frames per second, got {fps:g}; lower it")
    cuts = find_cuts(small.frames, small.fps)
    scenes = group_scenes(small.frames, cuts, max_shots)
    step, codec = small.fps / fps, PixelCodec(stride)
    divided = _divide(small.frames, small.fps, scenes, int(max_frames * step), max_shots) if divide else []

    def write(folder: Path, kind: str, groups: list[list[Span]]) -> list[tuple[tuple[int, int, int], ...]]:
        shots = [shot_frames(span, step, max_frames) for spans in groups for span in spans]
        encoded, sizes = encode_shots(path, shots, codec, side, patch * stride), []
        for i, spans in enumerate(groups):
            latents, entries, cut = {}, [], kind == "scene" and len(spans) > 1
            for s, (shot, video, images) in enumerate(next(encoded) for _ in spans):
                latents |= {f"shot-{s}.video": video, f"shot-{s}.images": images}
                entries.append(ShotEntry("", cut, video.shape[:3], media=f"shot-{s}", frames=shot.span))
            scene = SceneFile(GlobalPrompt(), tuple(entries), fps, Path(path).name, codec.name)
            write_scene(folder / f"{kind}-{i:03d}", scene, latents)
            sizes.append(tuple(entry.size for entry in entries))
        return sizes

    with new_folder(out) as folder:
        sizes = write(folder, "scene", scenes)
        write(folder, "long", divided)
    durations = tuple(tuple((end - start) / small.fps for start, end in spans) for spans in scenes)
    return IngestReport(
        fps=small.fps,
        frames=len(small.frames),
        cuts=tuple(cuts),
        scenes=tuple(map(tuple, scenes)),
        sizes=tuple(sizes),
        durations=durations,
        divided=tuple(map(tuple, divided)),
    )


def find_cuts(frames: Iterable[np.ndarray], fps: float) -> list[int]:
    """First frame of every shot but the first, by PySceneDetect's AdaptiveDetector.

    frames  uint8 [N, H, W, 3] in RGB, or any iterable of [H, W, 3]; only about 160 pixels a side are looked at

    A cut is where hue, saturation and value change by at least 2.5 times the mean change of the two frames before and
    after, so that neither fast motion nor a fixed threshold decides. No shot is shorter than 0.2 s but the last.
    """
    detectors, common = video_package("scenedetect.detectors"), video_package("scenedetect.common")
    detector = detectors.AdaptiveDetector(
        adaptive_threshold=CUT_RATIO, min_content_val=CUT_CHANGE, min_scene_len=max(round(SHORTEST_SHOT * fps), 1)
    )
    cuts = []
    for i, frame in enumerate(frames):
        step = max(round(max(frame.shape[:2]) / THUMBNAIL), 1)
        now = common.FrameTimecode(i, float(fps))
        cuts += detector.process_frame(now, np.ascontiguousarray(frame[::step, ::step, ::-1]))
    return [cut.frame_num for cut in cuts]


def group_scenes(frames: np.ndarray, cuts: list[int], max_shots: int = MAX_SHOTS) -> list[list[Span]]:
    """Shots as (first frame, end), grouped into scenes.

    frames  uint8 [N, H, W, 3] in RGB; cuts as of `find_cuts`

    A shot opens a new scene where the colour histogram of its frames shares less than 60 % with the mean histogram of
    the scene so far (1 − Σ min > 0.4). A run longer than `max_shots` is divided into parts of about equal length.
    """
    bounds = [0, *cuts, len(frames)]
    runs: list[list[Span]] = []
    seen: list[np.ndarray] = []
    for span in pairwise(bounds):
        shown = colours([frames[i] for i in spread(span, 3)])
        if not runs or 1 - np.minimum(shown, np.mean(seen, axis=0)).sum() > SCENE_DISTANCE:
            runs.append([])
            seen = []
        runs[-1].append(span)
        seen.append(shown)
    return [part for run in runs for part in _parts(run, max_shots)]


def _divide(frames: np.ndarray, fps: float, scenes: list[list[Span]], most: int, max_shots: int) -> list[list[Span]]:
    """Segments of the long shots, none of more than `most` frames, at most `max_shots` together and at least two."""
    chosen = select_long(frames, fps, [span for spans in scenes for span in spans])
    runs = [[part for segment in segments for part in _evenly(segment, most)] for segments in chosen]
    return [part for run in runs for part in _parts(run, max_shots) if len(part) > 1]


def _evenly(span: Span, most: int) -> list[Span]:
    start, end = span
    count = math.ceil((end - start) / most)
    return list(pairwise(start + round(i * (end - start) / count) for i in range(count + 1)))


def _parts(run: list[Span], most: int) -> list[list[Span]]:
    count = math.ceil(len(run) / most)
    edges = [round(i * len(run) / count) for i in range(count + 1)]
    return [run[start:end] for start, end in pairwise(edges)]


def _thumbnail(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, THUMBNAIL / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def fit(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Height and width of about side² pixels with the aspect ratio kept, rounded to multiples."""
    scale = side / math.sqrt(height * width)
    height, width = (max(round(edge * scale / multiple), 1) * multiple for edge in (height, width))
    return height, width


@dataclass(frozen=True)
class ShotFrames:
    """Which frames of the film a shot's latents show; span covers all of them."""

    span: Span
    video: tuple[int, ...]
    images: tuple[int, ...]


def shot_frames(span: Span, step: float, max_frames: int, time_stride: int = 1) -> ShotFrames:
    """Every `step`-th frame of a shot, from its first, at most `max_frames` of them; one and a multiple of the codec's
    stride in time."""
    start, end = span
    count = min(math.ceil((end - start) / step), max_frames)
    count -= (count - 1) % time_stride
    end = min(end, start + math.ceil(count * step))
    video = tuple(start + int(i * step) for i in range(count))
    return ShotFrames((start, end), video, tuple(spread((start, end), IMAGES)))


def encode_shots(
    path: str | Path, shots: list[ShotFrames], codec: Codec, side: int, multiple: int
) -> Iterator[tuple[ShotFrames, np.ndarray, np.ndarray]]:
    """Yield every shot with its video latents [T, H, W, C] and image latents [K, H, W, C], decoding the film once."""
    stills = Stills(resize=lambda height, width: fit(height, width, side, multiple))
    for shot in shots:
        wanted = sorted({*shot.video, *shot.images})
        frames = dict(zip(wanted, stills.of(path, wanted), strict=True))
        video = codec.encode(np.stack([frames[i] for i in shot.video]))
        images = codec.encode_images(np.stack([frames[i] for i in shot.images]))
        yield shot, video.numpy(), images.numpy()


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}; see its meaning in `ingest`")
    if arguments["max_shots"] > MAX_SHOTS:
        raise ValueError(f"max_shots: expected at most {MAX_SHOTS}, got {arguments['max_shots']}; lower it")
