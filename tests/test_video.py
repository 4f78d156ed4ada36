"""Video files in and out, and what strangers may hand in instead of a video."""

import io
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from lct.data.atomic import new_file, new_folder
from lct.data.video import CONTAINERS, Stills, iterate_video, read_video, write_video

av = pytest.importorskip("av", reason="needs PyAV: pip install -e '.[video]'")


def moving(frames=20, height=48, width=64):
    """Smooth gradients that move, which H.264 keeps nearly as they are; uint8 [frames, height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([2 * x + y, 3 * y, 120 + x - y], -1) % 256
    smooth = np.abs(picture - 128) + 60
    return np.stack([np.roll(smooth, i, 1) for i in range(frames)]).astype(np.uint8)


def mux(path, form, codec="libx264", frames=None, rotation=0, coded=None, aspect=None, times=None, **options):
    """Write a film with any container and codec, as other programs would.

    coded   options of the codec
    aspect  of its pixels, width over height
    times   of its frames, in 25ths of a second
    """
    frames = moving() if frames is None else frames
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=25, options=coded)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = i if times is None else times[i], Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def truncate(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def refused(path, *words, error=ValueError, **options):
    """The file is refused in one line that names it and holds these words, by both readers."""
    for read in (read_video, lambda *args, **kwargs: list(iterate_video(*args, **kwargs))):
        with pytest.raises(error) as caught:
            read(path, **options)
        message = str(caught.value)
        assert "\n" not in message and path.name in message and "expected" in message
        assert all(word in message for word in words), message


@pytest.mark.parametrize("height, width", [(64, 64), (48, 64), (33, 47), (2, 2)])
def test_round_trip(tmp_path, height, width):
    frames = moving(12, height, width)
    write_video(tmp_path / "film.mp4", frames, 8)
    film = read_video(tmp_path / "film.mp4")
    assert film.fps == 8 and film.frames.dtype == np.uint8
    assert film.frames.shape == (12, height + height % 2, width + width % 2, 3)
    # an edge of the picture jumps as it rolls, and chroma has half the resolution
    assert np.abs(film.frames[:, :height, :width].astype(int) - frames).mean() < 8
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_the_same_frames_give_the_same_bytes(tmp_path):
    written = set()
    for _ in range(30):
        write_video(tmp_path / "film.mp4", moving(), 25)
        written.add((tmp_path / "film.mp4").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("fps", [30000 / 1001, 23.976, 12.5])
def test_frame_rate_survives(tmp_path, fps):
    write_video(tmp_path / "film.mp4", moving(6), fps)
    assert read_video(tmp_path / "film.mp4").fps == pytest.approx(fps, rel=1e-4)


def test_writing_again_replaces(tmp_path):
    for frames in (4, 7):
        write_video(tmp_path / "film.mp4", moving(frames), 8)
    assert len(read_video(tmp_path / "film.mp4").frames) == 7


@pytest.mark.parametrize(
    "name, form, codec",
    [("a.mov", "mov", "mpeg4"), ("a.MKV", "matroska", "libx264"), ("a.webm", "webm", "libvpx"),
     ("a.avi", "avi", "mpeg4"), ("a.ts", "mpegts", "libx264")],
)  # fmt: skip
def test_every_container_is_read_whole(tmp_path, name, form, codec):
    film = read_video(mux(tmp_path / name, form, codec))
    assert film.frames.shape == (20, 48, 64, 3) and film.fps == 25


def test_iterating_gives_the_same_frames_resized_while_decoding(tmp_path):
    path = mux(tmp_path / "a.mp4", "mp4")
    film = read_video(path, resize=lambda height, width: (height // 2, width // 4))
    assert film.frames.shape == (20, 24, 16, 3)
    small = list(iterate_video(path, resize=lambda height, width: (height // 2, width // 4)))
    assert np.array_equal(film.frames, np.stack(small))


@pytest.mark.parametrize(
    "name, form, codec",
    [("a.mp4", "mp4", "libx264"), ("a.mov", "mov", "mpeg4"), ("a.mkv", "matroska", "libx264"),
     ("a.webm", "webm", "libvpx"), ("a.avi", "avi", "mpeg4"), ("b.avi", "avi", "libx264"),
     ("a.ts", "mpegts", "libx264"), ("b.ts", "mpegts", "mpeg2video")],
)  # fmt: skip
@pytest.mark.parametrize("coded", [{}, {"bf": "2", "g": "50"}])
def test_stills_are_the_films_frames(tmp_path, name, form, codec, coded):
    """However few of a film's pictures it can begin from, and back again."""
    path = mux(tmp_path / name, form, codec, moving(120, width=128), coded=coded)
    film = read_video(path).frames
    stills = Stills()
    for numbers in ([0, 3, 119], [4, 5], [90], [90, 91], [], [118, 119]):
        assert all(np.array_equal(x, film[i]) for i, x in zip(numbers, stills.of(path, numbers), strict=True)), numbers
    with pytest.raises(ValueError, match="expected a frame 120, the film ends before"):
        stills.of(path, [100, 120])
    assert np.array_equal(stills.of(path, [7])[0], film[7])


@pytest.mark.parametrize(("name", "form"), [("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.ts", "mpegts")])
def test_frames_keep_their_numbers_however_unevenly_they_are_spaced(tmp_path, name, form):
    """As a phone's films are; with a gap, and beginning late."""
    times = [100 + i * (1 if i < 20 else 3) + (50 if i > 40 else 0) for i in range(60)]
    path = mux(tmp_path / name, form, frames=moving(60), times=times)
    film, numbers = read_video(path).frames, [0, 19, 21, 40, 41, 59]
    assert len(film) == 60
    assert all(np.array_equal(x, film[i]) for i, x in zip(numbers, Stills().of(path, numbers), strict=True))


@pytest.mark.parametrize(("name", "form"), [("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.avi", "avi")])
def test_a_film_that_begins_late_is_whole_until_it_is_cut_off(tmp_path, name, form):
    late = [i + 30 for i in range(100)]
    path = mux(tmp_path / name, form, "mpeg4", moving(100, 96, 128), times=late, coded={"g": "10"})
    assert len(read_video(path).frames) == 100
    if form != "mp4":  # whose index goes first
        refused(truncate(path, 0.7), "truncated or damaged")


@pytest.mark.parametrize(("name", "form"), [("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.ts", "mpegts")])
def test_films_of_wide_pixels_are_read_with_square_ones(tmp_path, name, form):
    """PAL at 16 : 9, and what a stranger might write."""
    frames = moving(4, 144, 176)
    wide = mux(tmp_path / name, form, frames=frames, aspect=Fraction(16, 11))
    asked = []
    assert read_video(wide).frames.shape == (4, 144, 256, 3)
    read_video(wide, resize=lambda height, width: asked.append((height, width)) or (height, width))
    assert set(asked) == {(144, 256)}
    assert read_video(mux(tmp_path / f"b{name}", form, frames=frames, aspect=Fraction(900, 1))).frames.shape[2] == 176


def test_a_cover_is_not_taken_for_the_film(tmp_path):
    """FFmpeg lists it as the first video stream where the file names it first."""
    plain = mux(tmp_path / "plain.mp4", "mp4").read_bytes()
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32)).save(jpeg, "JPEG")

    def box(kind, content):
        return struct.pack(">I4s", 8 + len(content), kind) + content

    def boxes(content):
        while content:
            size = struct.unpack(">I", content[:4])[0]
            yield content[4:8], content[8:size]
            content = content[size:]

    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + jpeg.getvalue()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    udta = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", cover)))
    parts = list(boxes(plain))
    index = [box(*part) for part in boxes(dict(parts)[b"moov"]) if part[0] != b"udta"]
    rest = b"".join(box(*part) for part in parts if part[0] != b"moov")
    (tmp_path / "cover.mp4").write_bytes(rest + box(b"moov", b"".join([index[0], udta, *index[1:]])))
    with av.open(str(tmp_path / "cover.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"
    assert len(read_video(tmp_path / "cover.mp4").frames) == 20


def test_a_folder_behind_a_link_is_filled(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "a").touch()
    assert (tmp_path / "there" / "a").is_file() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_turned_film_is_read_upright(tmp_path, degrees):
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    upright = read_video(mux(tmp_path / "a.mp4", "mp4", "mpeg4")).frames
    turned = read_video(mux(tmp_path / "b.mp4", "mp4", "mpeg4", rotation=degrees)).frames
    assert np.array_equal(turned, np.rot90(upright, degrees // 90, axes=(1, 2)))


def test_missing_empty_and_unknown_files_are_refused(tmp_path):
    refused(tmp_path / "none.mp4", "found nothing", error=FileNotFoundError)
    (tmp_path / "folder.mp4").mkdir()
    refused(tmp_path / "folder.mp4", "found a folder", error=FileNotFoundError)
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty file")
    (tmp_path / "film.m3u8").write_text("#EXTM3U\n")
    refused(tmp_path / "film.m3u8", ".mp4", "'.m3u8'")


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_text_with_a_video_suffix_is_refused(tmp_path, suffix):
    film = mux(tmp_path / "secret.mp4", "mp4")
    texts = ["hello\n" * 500, f"ffconcat version 1.0\nfile '{film.name}'\n", f"#EXTM3U\n#EXTINF:1,\n{film}\n"]
    for text in texts:
        path = tmp_path / f"text{suffix}"
        path.write_text(text)
        refused(path)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.1])
@pytest.mark.parametrize(
    "name, form, options",
    [("a.mp4", "mp4", {}), ("b.mp4", "mp4", {"movflags": "faststart"}), ("a.mkv", "matroska", {})],
)
def test_truncated_films_are_refused(tmp_path, name, form, options, share):
    path = truncate(mux(tmp_path / name, form, frames=moving(60), **options), share)
    refused(path, "truncated")


def test_a_film_of_no_frames_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    refused(tmp_path / "a.mkv")


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    refused(tmp_path / "a.mp4", "video stream")


def test_an_edit_list_that_hides_frames_is_no_truncation(tmp_path):
    with av.open(str(mux(tmp_path / "a.mp4", "mp4"))) as film, av.open(
        str(tmp_path / "b.mp4"), "w", format="mp4", options={"avoid_negative_ts": "disabled", "use_editlist": "1"}
    ) as edited:  # fmt: skip
        stream = edited.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (time - 5 * packet.duration for time in (packet.pts, packet.dts))
                packet.stream = stream
                edited.mux(packet)
    assert len(read_video(tmp_path / "b.mp4").frames) == 15


def test_limits(tmp_path):
    path = mux(tmp_path / "a.mp4", "mp4")
    refused(path, "at most 1000 pixels", "64x48", max_pixels=1000)
    with pytest.raises(ValueError, match="at most 19 frames"):
        read_video(path, max_frames=19)
    assert len(read_video(path, max_frames=20).frames) == 20
    huge = mux(tmp_path / "huge.mp4", "mp4", "mpeg4", np.zeros((1, 4096, 4096, 3), np.uint8))
    assert huge.stat().st_size < 200_000
    refused(huge, "4096x4096")


def test_frames_that_grow_later_do_not_get_round_the_limit(tmp_path):
    small, large = mux(tmp_path / "a.ts", "mpegts"), mux(tmp_path / "b.ts", "mpegts", frames=moving(20, 96, 128))
    small.write_bytes(small.read_bytes() + large.read_bytes())
    refused(small, "all frames 64x48", "128x96")
    refused(small, "damaged", max_pixels=64 * 48)


@pytest.mark.parametrize(
    "name, frames, fps, words",
    [
        ("a.avi", moving(1), 8, "ends in .mp4"),
        ("a.mp4", moving(1) / 255.0, 8, "expected uint8"),
        ("a.mp4", moving(1)[0], 8, "N, H, W, 3"),
        ("a.mp4", moving(1)[:0], 8, "nothing empty"),
        ("a.mp4", moving(1), 0, "positive number"),
        ("a.mp4", moving(1), float("nan"), "positive number"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, name, frames, fps, words):
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / "new" / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_broken_write_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "film.mp4").write_text("old")
    with pytest.raises(OSError, match="disk"), new_file(tmp_path / "film.mp4") as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="disk"), new_folder(tmp_path / "out") as temporary:
        (temporary / "half").touch()
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
    with pytest.raises(ValueError, match="remove it or choose another"), new_folder(tmp_path / "out"):
        pass


def test_without_pyav_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[video\]'"):
        read_video(tmp_path / "a.mp4")
