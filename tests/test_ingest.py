"""Films to scenes: the cuts of a real film, the scenes of films whose truth is known, and bad input."""

from itertools import pairwise

import numpy as np
import pytest
from film import CUTS, fetch_film
from toy_film import toy_film

from lct.data.folder import SceneFolder
from lct.data.ingest import find_cuts, fit, group_scenes, ingest
from lct.data.latents import PixelCodec
from lct.data.scenefile import GlobalPrompt, load_sample, read_scene
from lct.data.toy import ToyScenes
from lct.data.video import read_video, write_video

pytest.importorskip("av", reason="needs PyAV: pip install -e '.[video]'")
pytest.importorskip("scenedetect", reason="needs PySceneDetect: pip install -e '.[video]'")


@pytest.fixture(scope="module")
def real_film():
    try:
        return fetch_film()
    except OSError as error:
        pytest.skip(f"the film could not be fetched: {error}")


def make_film(seed, preset="one_character", scenes=None):
    """A toy film of 3 or 4 scenes with 2 to 4 shots each, all of one frame size."""
    rng = np.random.default_rng(seed)
    toys = ToyScenes(preset, max_shots=4)
    drawn = [toys.sample("cut", rng) for _ in range(40)]
    size = drawn[0].shots[0].latents.shape[1:3]
    same = [scene for scene in drawn if scene.shots[0].latents.shape[1:3] == size]
    return toy_film(same[: scenes or int(rng.integers(3, 5))])


def f1(found, true):
    """F1 of two lists, film by film, of frames that must agree exactly."""
    right = sum(len(set(a) & set(b)) for a, b in zip(found, true, strict=True))
    return 2 * right / (sum(map(len, found)) + sum(map(len, true)))


def starts(scenes):
    return [spans[0][0] for spans in scenes[1:]]


@pytest.mark.network
def test_the_real_film_is_cut_where_it_is_cut(real_film):
    film = read_video(real_film)
    assert film.frames.shape == (250, 272, 640, 3) and film.fps == 25
    assert find_cuts(film.frames, film.fps) == list(CUTS)


@pytest.mark.network
def test_the_real_film_is_ingested(real_film, tmp_path):
    report = ingest(real_film, tmp_path / "out", side=96, stride=4, fps=8)
    assert report.cuts == CUTS and report.frames == 250 and report.fps == 25
    bounds = [0, *CUTS, 250]
    assert [span for spans in report.scenes for span in spans] == list(pairwise(bounds))
    assert sum(map(sum, report.durations)) == pytest.approx(10)
    sizes = [size for scene in report.sizes for size in scene]
    assert [size[0] for size in sizes] == [10, 15, 20, 16, 18, 3]  # 8 of 25 frames, rounded up
    assert str(report).startswith("250 frames at 25 fps; cuts at 30, 76, 137, 187, 242; ")
    assert {size[1:] for size in sizes} == {(16, 36)}  # 64 x 144 = 96² pixels, and the aspect ratio of 640 x 272


def test_cuts_and_scenes_of_toy_films():
    films = [make_film(seed, preset) for preset in ("one_character", "two_characters") for seed in range(4)]
    cuts = [find_cuts(film.frames, 25) for film in films]
    scenes = [group_scenes(film.frames, found) for film, found in zip(films, cuts, strict=True)]
    assert f1(cuts, [film.cuts for film in films]) >= 0.95
    assert f1([starts(found) for found in scenes], [film.scene_starts[1:] for film in films]) >= 0.9


def test_scenes_of_true_cuts():
    films = [make_film(seed, "three_characters") for seed in range(6)]
    scenes = [group_scenes(film.frames, film.cuts) for film in films]
    assert f1([starts(found) for found in scenes], [film.scene_starts[1:] for film in films]) >= 0.9


def test_a_change_of_light_that_moves_slowly_is_no_cut():
    ramp = np.linspace(20, 230, 60).astype(np.uint8)[:, None, None, None]
    assert find_cuts(np.broadcast_to(ramp, (60, 32, 32, 3)), 25) == []


def test_a_still_film_with_noise_is_one_shot():
    rng = np.random.default_rng(0)
    frames = np.clip(rng.normal(120, 3, (40, 32, 32, 3)), 0, 255).astype(np.uint8)
    assert find_cuts(frames, 25) == []
    assert group_scenes(frames, []) == [[(0, 40)]]


def test_grey_scenes_are_told_apart_by_light_and_not_by_the_noise_of_their_hue():
    rng = np.random.default_rng(0)
    tints = np.array([[0, 1, -1], [1, 0, 2], [0, 0, 0], [0, 2, 0]]) + np.array([60, 60, 200, 200])[:, None]
    frames = (tints.repeat(10, axis=0)[:, None, None] + rng.integers(-2, 3, (40, 16, 16, 3))).astype(np.uint8)
    assert group_scenes(frames, [10, 20, 30]) == [[(0, 10), (10, 20)], [(20, 30), (30, 40)]]


def test_long_runs_are_divided_evenly():
    frames = np.zeros((40, 8, 8, 3), np.uint8)
    assert [len(scene) for scene in group_scenes(frames, list(range(2, 40, 2)))] == [7, 6, 7]
    assert [len(scene) for scene in group_scenes(frames, [10, 20, 30], max_shots=3)] == [2, 2]


@pytest.mark.parametrize("height, width", [(272, 640), (1080, 1920), (480, 480), (64, 64), (1920, 1080)])
def test_fit_keeps_area_and_aspect(height, width):
    new = fit(height, width, 480, 16)
    assert new[0] % 16 == new[1] % 16 == 0
    assert new[0] * new[1] == pytest.approx(480**2, rel=0.05)
    assert new[0] / new[1] == pytest.approx(height / width, rel=0.05)


def test_ingested_scenes_show_the_film(tmp_path):
    film = make_film(2)
    write_video(tmp_path / "toy.mp4", film.frames, 24)
    report = ingest(tmp_path / "toy.mp4", tmp_path / "out", side=64, stride=4, fps=6, max_frames=4, max_shots=9)
    assert starts(report.scenes) == list(film.scene_starts[1:]) and report.cuts == film.cuts

    shots = 0
    for index, spans in enumerate(report.scenes):
        folder = tmp_path / "out" / f"scene-{index:03d}"
        scene, sample = read_scene(folder), load_sample(folder)
        assert scene.global_prompt == GlobalPrompt() and scene.fps == 6 and scene.source == "toy.mp4"
        assert scene.codec == "pixel/4"
        for entry, shot, (start, end), size in zip(scene.shots, sample.shots, spans, report.sizes[index], strict=True):
            times = range(start, end, 4)[:4]
            assert entry.frames == (start, min(end, start + 16))
            assert entry.prompt == "" and entry.cut == (len(spans) > 1)
            assert shot.latents.shape == (*size, 3) == (len(times), 16, 16, 3) and shot.images.shape == (4, 16, 16, 3)
            expected = PixelCodec(4).encode(film.frames[list(times)]).numpy()
            # H.264 halves the resolution of colour
            assert np.abs(shot.latents - expected).mean() < 0.05
            shots += 1
    assert shots == len(film.cuts) + 1

    rng = np.random.default_rng(0)
    folder = SceneFolder(tmp_path / "out")
    assert all(folder.sample(kind, rng).shots for kind in ("single", "cut", "no_cut"))


def long_film(seed=0, lengths=(36, 48, 30)):
    """A toy film of one long shot, four segments of 36, 48, 30 and 36 frames, between two short shots with cuts."""
    toys, rng = ToyScenes("one_character"), np.random.default_rng(seed)
    cut, no_cut = (
        toy_film([toys.sample(kind, rng, n)], frames_per_shot=lengths) for kind, n in (("cut", 1), ("no_cut", 4))
    )
    frames = np.concatenate([cut.frames, no_cut.frames, cut.frames[::-1]])
    seams = [36, 72, 120, 150, 186]
    return frames, list(pairwise(seams))


def test_long_shots_are_divided_at_their_events(tmp_path):
    frames, segments = long_film()
    write_video(tmp_path / "long.mp4", frames, 24)
    options = {"side": 64, "stride": 4, "fps": 8, "max_frames": 16}
    report = ingest(tmp_path / "long.mp4", tmp_path / "out", divide=True, **options)
    assert report.cuts == (36, 186) and len(report.divided) == 1
    assert np.abs(np.array(report.divided[0]) - segments).max() <= 3
    seconds = [(end - start) / 24 for start, end in report.divided[0]]
    told = "long-000: frames 36 to 186 without cut, in segments of " + ", ".join(f"{s:.1f} s" for s in seconds)
    assert str(report).splitlines()[-1] == told

    folder = tmp_path / "out" / "long-000"
    scene, sample = read_scene(folder), load_sample(folder)
    assert scene.global_prompt == GlobalPrompt() and (scene.fps, scene.codec) == (8, "pixel/4")
    assert [shot.frames for shot in scene.shots] == list(report.divided[0])
    for shot, (start, end) in zip(sample.shots, report.divided[0], strict=True):
        assert not shot.cut and shot.images.shape == (4, 16, 16, 3)
        expected = PixelCodec(4).encode(frames[start:end:3]).numpy()
        assert shot.latents.shape == expected.shape and np.abs(shot.latents - expected).mean() < 0.05

    plain = ingest(tmp_path / "long.mp4", tmp_path / "plain", **options)
    assert plain.divided == () and plain.scenes == report.scenes and str(report).startswith(str(plain))
    scenes = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["long-000", *scenes]
    for name in scenes:
        for path in (tmp_path / "plain" / name).iterdir():
            assert path.read_bytes() == (tmp_path / "out" / name / path.name).read_bytes()
    drawn = SceneFolder(tmp_path / "out").sample("no_cut", np.random.default_rng(0))
    assert all(np.array_equal(a.latents, b.latents) for a, b in zip(drawn.shots, sample.shots, strict=True))


def test_segments_longer_than_the_limit_are_divided_and_many_are_told_in_several_folders(tmp_path):
    frames, _ = long_film()
    write_video(tmp_path / "long.mp4", frames, 24)
    report = ingest(
        tmp_path / "long.mp4", tmp_path / "out", side=64, stride=4, fps=8, max_frames=6, max_shots=4, divide=True
    )
    spans = [span for segments in report.divided for span in segments]
    assert (spans[0][0], spans[-1][1]) == (36, 186) and all(a[1] == b[0] for a, b in pairwise(spans))
    assert max(end - start for start, end in spans) <= 18  # 6 of 8 frames a second, in 24
    assert len(report.divided) > 1 and all(2 <= len(segments) <= 4 for segments in report.divided)
    for i, segments in enumerate(report.divided):
        shots = read_scene(tmp_path / "out" / f"long-{i:03d}").shots
        assert [shot.frames for shot in shots] == list(segments)  # nothing is left out


def test_a_film_without_long_shots_has_none_to_divide(tmp_path):
    film = make_film(2)
    write_video(tmp_path / "toy.mp4", film.frames, 24)
    report = ingest(tmp_path / "toy.mp4", tmp_path / "out", side=64, stride=4, fps=6, divide=True)
    assert report.divided == () and not list((tmp_path / "out").glob("long-*"))


def test_ingest_is_deterministic(tmp_path):
    write_video(tmp_path / "toy.mp4", make_film(3, scenes=1).frames, 24)
    for out in ("a", "b"):
        ingest(tmp_path / "toy.mp4", tmp_path / out, side=64, stride=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert files and all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "found nothing"),
        (lambda path: path.touch(), "empty file"),
        (lambda path: path.write_text("hello"), "something else"),
        (lambda path: path.write_text("ffconcat version 1.0\nfile 'good.mp4'\n"), "something else"),
        (lambda path: path.write_bytes((path.parent / "good.mp4").read_bytes()[:5000]), "truncated"),
    ],
)
def test_bad_films_leave_nothing_behind(tmp_path, make, words):
    write_video(tmp_path / "good.mp4", make_film(0, scenes=1).frames, 8)
    make(tmp_path / "bad.mp4")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ingest(tmp_path / "bad.mp4", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_failure_in_the_midst_leaves_nothing_behind(tmp_path, monkeypatch):
    write_video(tmp_path / "toy.mp4", make_film(2).frames, 24)
    encoded = iter(range(3))

    def fails_later(codec, frames):
        if next(encoded, None) is None:
            raise OSError("disk full")
        return encode(codec, frames)

    encode = PixelCodec.encode
    monkeypatch.setattr(PixelCodec, "encode", fails_later)
    with pytest.raises(OSError, match="disk full"):
        ingest(tmp_path / "toy.mp4", tmp_path / "out", side=64, stride=4)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.mp4"]


@pytest.mark.parametrize(
    "arguments, words",
    [({"fps": 25}, "fps: expected at most the film's 24"), ({"side": 0}, "side: expected a positive"),
     ({"max_shots": 10}, "max_shots: expected at most 9"), ({"fps": float("nan")}, "fps: expected a positive")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(tmp_path, arguments, words):
    write_video(tmp_path / "toy.mp4", np.zeros((8, 32, 32, 3), np.uint8), 24)
    with pytest.raises(ValueError, match=words):
        ingest(tmp_path / "toy.mp4", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_content_is_not_written_to(tmp_path):
    with pytest.raises(ValueError, match="does not exist or is empty"):
        ingest(tmp_path / "any.mp4", tmp_path.parent)
