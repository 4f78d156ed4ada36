"""Video files to frames and back, with PyAV. Files come from strangers: only known containers, with limits."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lct.data.atomic import new_file

# The suffix forces the demuxer: left to guess, FFmpeg opens a text file that names another file as a playlist.
CONTAINERS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi", ".ts": "mpegts",
}  # fmt: skip
MAX_PIXELS = 4096 * 2304
MAX_BYTES = 2 << 30
DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")  # Matroska's tag, such as 00:00:01.600000000

Resize = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Film:
    """frames uint8 [N, H, W, 3] in RGB with square pixels, taken as evenly spaced, `fps` of them in a second."""

    frames: np.ndarray
    fps: float


def read_video(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, max_frames: int | None = None, resize: Resize | None = None
) -> Film:
    """Decode the first video stream of a file whole.

    max_pixels  the largest frame accepted; the decoder refuses it before it allocates
    max_frames  the longest film accepted; by default as many frames as 2 GiB hold
    resize      maps the film's (height, width) to the size wanted, applied while decoding; the film's own by default

    Raises FileNotFoundError for a missing file; ValueError for an unknown suffix, a file that is not what its suffix
    says, a frame or film over the limits, and a file that is empty, damaged or shorter than its container declares
    (mpegts declares no length, so a truncated one cannot be told).
    """
    with _opened(path, max_pixels) as (container, stream):
        frames: list[np.ndarray] = []
        limit = max_frames
        for frame in (picture.upright(resize) for picture in _decoded(path, container, stream)):
            limit = max(MAX_BYTES // frame.nbytes, 1) if limit is None else limit
            if len(frames) == limit:
                raise ValueError(
                    f"{path}: expected at most {limit} frames of {frame.shape[1]}x{frame.shape[0]}, got more; "
                    "split the film, or pass max_frames to read_video"
                )
            frames.append(frame)
        return Film(np.stack(frames), float(_rate(path, stream)))


def iterate_video(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, resize: Resize | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames of `read_video` one by one, uint8 [H, W, 3], for films that memory does not hold."""
    for picture in _film(path, max_pixels):
        yield picture.upright(resize)


class Stills:
    """Frames of films by their numbers, as `iterate_video` counts them, in whatever file: a seek by time would find
    others where frames are spaced unevenly, and where a file begins within pictures that need others before them.

    One film is decoded at a time, on from the last frame asked for while numbers rise, else from its beginning.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS, resize: Resize | None = None):
        self.max_pixels, self.resize = max_pixels, resize
        self._path: Path | None = None
        self._frames: Iterator[_Picture] = iter(())
        self._next = 0

    def of(self, path: str | Path, numbers: Iterable[int]) -> list[np.ndarray]:
        """uint8 [H, W, 3] of each of these frames. ValueError where the film ends before; what `read_video` raises."""
        found = []
        for number in numbers:
            if Path(path) != self._path or number < self._next:
                self._path, self._frames, self._next = Path(path), _film(path, self.max_pixels), 0
            picture = next(islice(self._frames, number - self._next, None), None)
            if picture is None:
                self._path = None
                raise ValueError(f"{path}: expected a frame {number}, the film ends before; is it another film?")
            found.append(picture.upright(self.resize))
            self._next = number + 1
        return found


def spread(span: tuple[int, int], count: int) -> list[int]:
    """Up to `count` frames of a shot, first and end, each in the middle of an equal part of it."""
    start, end = span
    count = min(count, end - start)
    return [start + (2 * i + 1) * (end - start) // (2 * count) for i in range(count)]


def film_fps(path: str | Path, max_pixels: int = MAX_PIXELS) -> float:
    """Frames per second of a film, without decoding it; raises what `read_video` raises."""
    with _opened(path, max_pixels) as (_, stream):
        return float(_rate(path, stream))


def write_video(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 [N, H, W, 3] RGB frames as an H.264 mp4; an odd height or width is padded by its last row or column.

    Raises ValueError for another suffix, dtype or shape, for no frames and for fps <= 0; the file appears whole or not
    at all and replaces an older one.
    """
    frames = np.asarray(frames)
    if Path(path).suffix.lower() != ".mp4":
        raise ValueError(f"{path}: expected a name that ends in .mp4, got {Path(path).suffix!r}; rename it")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames: expected uint8 [N, H, W, 3] with nothing empty, got {frames.dtype} {list(frames.shape)}; "
            "decode latents with PixelCodec.decode"
        )
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps: expected a positive number of frames per second, got {fps}; use for example 8.0")
    av = video_package("av")
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    with new_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        # with x264's macroblock tree the same small frames gave other bytes on about one run in twenty
        options = {"crf": "16", "x264-params": "mbtree=0"}
        # 30000/1001 and its like survive the trip through a float
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def video_package(name: str) -> Any:
    """Import a package of the `video` extra; ValueError that says how to install it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name}: expected this package, got {error}; pip install -e '.[video]'") from error


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The container and its first film; FFmpeg's errors leave as one-line ValueErrors that name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a video file, found {'a folder' if path.is_dir() else 'nothing'}")
    if path.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{path}: expected one of {' '.join(CONTAINERS)}, got {path.suffix!r}; convert it to mp4")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected a video, got an empty file (0 bytes); fetch it again")
    av = video_package("av")
    try:
        # resolve(): a relative name such as "http:x.mp4" would be taken for an address
        name, form = str(path.resolve()), CONTAINERS[path.suffix.lower()]
        with av.open(name, format=form, options={"protocol_whitelist": "file"}) as container:
            cover = av.stream.Disposition.attached_pic  # is a video stream to FFmpeg
            stream = next((s for s in container.streams.video if cover not in s.disposition), None)
            if stream is None:
                raise ValueError(f"{path}: expected a video stream, got none; is it sound alone, or cut off?")
            if stream.codec_context is None:
                raise ValueError(f"{path}: expected a codec that FFmpeg knows, got another; convert it to H.264")
            _check_pixels(path, stream.codec_context, max_pixels)
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(
            f"{path}: expected a whole {path.suffix} file, got one that is damaged, truncated or something else "
            f"({error.strerror}); fetch or convert it again"
        ) from error


def _check_pixels(path: str | Path, picture: Any, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise ValueError(
            f"{path}: expected frames of at most {max_pixels} pixels, got {picture.width}x{picture.height}; "
            "scale the film down or raise max_pixels"
        )


def _rate(path: str | Path, stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError(f"{path}: expected a frame rate, got none; convert the film to mp4")
    return rate


class _Picture(NamedTuple):
    """A decoded frame.

    turns   quarter turns that set it upright: the display matrix of a phone's film
    aspect  width of its pixels over their height
    """

    frame: Any
    turns: int
    aspect: Fraction

    def upright(self, resize: Resize | None) -> np.ndarray:
        """uint8 [H, W, 3] in RGB, with square pixels."""
        height, width = self.frame.height, round(self.frame.width * self.aspect)
        height, width = (width, height) if self.turns % 2 else (height, width)
        height, width = resize(height, width) if resize else (height, width)
        height, width = (width, height) if self.turns % 2 else (height, width)
        picture = self.frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
        return np.ascontiguousarray(np.rot90(picture, self.turns))


def _film(path: str | Path, max_pixels: int) -> Iterator[_Picture]:
    with _opened(path, max_pixels) as (container, stream):
        yield from _decoded(path, container, stream)


def _decoded(path: str | Path, container: Any, stream: Any) -> Iterator[_Picture]:
    """Decode frames of one size; ValueError where there are none, or fewer than the container declares."""
    first, count, end = None, 0, 0.0
    ratio = stream.sample_aspect_ratio
    aspect = ratio if ratio and 0.25 <= ratio <= 4 else Fraction(1)
    for frame in container.decode(stream):
        turns = round(frame.rotation / 90) % 4
        if first is None:
            first, start = (frame.width, frame.height, turns), frame.time or 0.0
            if container.format.name.startswith("matroska"):  # what it declares begins at 0, however late this one is
                start = min(start, 0.0)
        if (frame.width, frame.height, turns) != first:
            raise ValueError(
                f"{path}: expected all frames {first[0]}x{first[1]}, got {frame.width}x{frame.height} at frame "
                f"{count}; convert the film to one size"
            )
        count += 1
        end = (frame.time or 0.0) - start + float((frame.duration or 0) * frame.time_base)
        yield _Picture(frame, turns, aspect)
    rate, declared = float(_rate(path, stream)), _declared_seconds(container, stream)
    slack = max(2 / rate, 0.01 * declared)
    # an edit list hides frames that the container counts: of its two figures the smaller holds; avi counts gaps, too
    counted = min(stream.frames / rate, declared) if container.format.name != "avi" else 0.0
    if count == 0 or end < declared - slack or count / rate < counted - slack:
        raise ValueError(
            f"{path}: expected the {declared:.2f} s that the container declares, got {count} frames, {end:.2f} s; "
            "the file is truncated or damaged, fetch it again"
        )


def _declared_seconds(container: Any, stream: Any) -> float:
    """The stream's length as its header has it, which a truncation leaves as it was; 0 where none is written."""
    if stream.frames and container.format.name == "avi":
        return float(stream.frames / stream.average_rate)
    if tag := DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = tag.groups()
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        return container.duration / 1e6
    return 0.0
