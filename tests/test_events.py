"""Events of long shots: those of toy films are found, what is none is not, the picture shows them where they are."""

from dataclasses import replace
from itertools import accumulate, cycle, islice

import numpy as np
import pytest
from toy_film import toy_film

from lct.data.toy import PRESETS, ToyScenes, ToyTruth

pytest.importorskip("cv2", reason="needs OpenCV: pip install -e '.[video]'")

from lct.data.events import EVENT, change, find_events, peaks, select_long
from lct.draw.change import HEIGHT, MARGIN, MARK, TOP, change_picture

FPS, SHORTEST, NEAR = 25, 0.4, 3
LENGTHS = (12, 18, 24)


def long_film(preset, index, noise=0.0, segments=5, lengths=LENGTHS):
    """A toy film of one long shot, and the first frame of every segment whose motion differs from the one before."""
    scene = ToyScenes(preset).evaluation_scene(index, seed=11, shots=segments, kind="no_cut")
    return noisy(toy_film([scene], frames_per_shot=lengths).frames, noise, index), seams(scene, lengths)


def seams(scene, lengths=LENGTHS):
    starts = accumulate(islice(cycle(lengths), len(scene.shots) - 1))
    motions = [shot.motion for shot in scene.truth.shots]
    return [start for start, a, b in zip(starts, motions, motions[1:], strict=False) if a != b]


def noisy(frames, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8) if sigma else frames


def f1(pairs):
    """F1 of (found, true) over films; an event counts as found once, within NEAR frames."""
    right = 0
    for found, true in pairs:
        left = list(true)
        for frame in found:
            nearest = min(left, key=lambda other: abs(other - frame), default=None)
            if nearest is not None and abs(nearest - frame) <= NEAR:
                left.remove(nearest)
                right += 1
    return 2 * right / max(sum(len(found) + len(true) for found, true in pairs), 1)


# 64 films a row, scored by the same code, are all found: F1 1.00 without noise and 0.99 or more with it.
@pytest.mark.parametrize("noise", [0, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_events_of_toy_films_are_found(preset, noise):
    films = [long_film(preset, index, noise) for index in range(4)]
    assert f1([(find_events(frames, FPS, SHORTEST), true) for frames, true in films]) >= 0.95


def test_f1_of_wrong_events_is_low():
    true = [long_film("one_character", index)[1] for index in range(3)]
    assert all(len(events) == 4 for events in true)
    assert f1([(events, events) for events in true]) == 1 and f1([([], events) for events in true]) == 0
    assert f1([([event + 4 for event in events], events) for events in true]) < 0.5
    assert f1([(list(range(0, 84, 12)), events) for events in true]) < 0.9


def straight_on(index):
    """A scene whose two segments go on in the same direction at the same speed, and one that turns back instead."""
    scene = ToyScenes("one_character").evaluation_scene(index, seed=3, shots=2, kind="no_cut")
    first = replace(scene.truth.shots[0], motion="right", framing="wide shot", start=(9.0, 3.0))
    films = []
    for motion in ("right", "left"):
        truth: ToyTruth = replace(scene.truth, shots=(first, replace(first, motion=motion, start=(9.0, 8.0))))
        films.append(replace(scene, truth=truth))
    return films


@pytest.mark.parametrize("index", range(4))
def test_segments_of_the_same_motion_have_no_event_between_them(index):
    same, turned = (toy_film([scene], frames_per_shot=(18,)).frames for scene in straight_on(index))
    assert find_events(same, FPS, SHORTEST) == [] and change(same, FPS, SHORTEST)[10:-10].max() < EVENT / 2
    (event,) = find_events(turned, FPS, SHORTEST)
    assert abs(event - 18) <= 1


def test_a_film_run_backwards_changes_in_the_same_places():
    frames, true = long_film("one_character", 1)
    forward, backward = (np.array(find_events(part, FPS, SHORTEST)) for part in (frames, frames[::-1]))
    assert len(forward) == len(true) and np.abs(forward - (len(frames) - backward)[::-1]).max() <= 1


@pytest.mark.parametrize("noise", [0, 8])
def test_one_motion_noise_and_an_even_change_of_light_are_no_events(noise):
    rng = np.random.default_rng(0)
    still = np.full((50, 48, 64, 3), 120, np.uint8)
    light = np.broadcast_to(np.linspace(30, 200, 50).astype(np.uint8)[:, None, None, None], still.shape)
    ground = rng.integers(0, 200, (48, 120, 3), dtype=np.uint8).repeat(2, 1)
    pan = np.stack([ground[:, i : i + 64] for i in range(0, 100, 2)])
    single = toy_film([ToyScenes("two_characters").sample("single", rng)], frames_per_shot=(50,)).frames
    for frames in (still, light, pan, single):
        assert find_events(noisy(frames, noise), FPS, SHORTEST) == []


def test_something_that_appears_is_an_event_though_nothing_moves():
    frames = np.full((60, 48, 64, 3), 120, np.uint8)
    frames[31:, 8:40, 8:50] = (200, 40, 40)
    assert f1([(find_events(noisy(frames, 4), FPS, SHORTEST), [31])]) == 1


def test_light_that_fades_quickly_is_an_event_though_nothing_moves():
    light = np.interp(np.arange(60), (27, 33), (200, 60)).astype(np.uint8)[:, None, None, None]
    frames = light * np.ones((1, 48, 64, 3), np.uint8)
    assert f1([(find_events(noisy(frames, 4), FPS, SHORTEST), [30])]) == 1


def test_what_moves_is_seen_in_colours_that_are_alike_in_grey():
    frames = np.full((48, 48, 64, 3), (0, 130, 0), np.uint8)  # 0.587 · 130 = 0.299 · 255
    for i in range(48):
        frames[i, 16:32, (x := 4 + min(i, 48 - i) * 2) : x + 12] = (255, 0, 0)
    assert find_events(frames, FPS, SHORTEST) == [24]


def test_the_measure_has_one_value_a_frame_whatever_the_length_and_size():
    rng = np.random.default_rng(0)
    for shape in ((0, 8, 8), (1, 8, 8), (2, 8, 8), (7, 5, 300), (12, 300, 200)):
        measure = change(rng.integers(0, 256, (*shape, 3), dtype=np.uint8), 8)
        assert measure.shape == shape[:1] and measure.dtype == np.float32
        assert np.isfinite(measure).all() and (measure >= 0).all() and (measure <= 1).all()


def test_large_frames_have_the_events_of_small_ones():
    frames, true = long_film("two_characters", 0)
    large = frames.repeat(3, 1).repeat(3, 2)
    assert f1([(find_events(large, FPS, SHORTEST), true)]) == 1


def test_peaks_are_apart_from_each_other_and_from_the_ends():
    measure = np.zeros(40, np.float32)
    measure[[3, 12, 16, 30, 37]] = (0.9, 0.5, 0.6, 0.3, 0.9)
    assert peaks(measure, 5, 0.2) == [16, 30] and peaks(measure, 3, 0.2) == [3, 12, 16, 30, 37]
    assert peaks(measure, 5, 0.4) == [16] and peaks(np.full(40, 0.1), 5, 0.2) == []


def test_long_shots_with_change_are_chosen():
    one, true = long_film("one_character", 0, lengths=(30, 36, 42))
    short, still = one[:60], np.repeat(one[:1], 100, axis=0)
    film = np.concatenate([short, one, still])
    shots = [(0, 60), (60, 60 + len(one)), (60 + len(one), len(film))]
    ((*segments,),) = select_long(film, FPS, shots)
    assert (segments[0][0], segments[-1][1]) == shots[1] and all(
        a[1] == b[0] for a, b in zip(segments, segments[1:], strict=False)
    )
    assert f1([([start - 60 for start, _ in segments[1:]], true)]) == 1
    assert len(select_long(film, FPS, shots, long=2)) == 2 and select_long(film, FPS, shots, long=60) == []
    # one event in thirteen seconds is not much
    slow = np.concatenate([np.repeat(one[:1], 260, axis=0), one[:30]])
    assert len(find_events(slow, FPS)) == 1 and select_long(slow, FPS, [(0, len(slow))]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((4, 8, 8, 3)), 8), "frames: expected uint8 .*, got float64 "),
        ((np.zeros((4, 8, 8), np.uint8), 8), "frames: expected uint8"),
        ((np.zeros((4, 0, 8, 3), np.uint8), 8), "frames: expected uint8"),
        ((np.zeros((4, 8, 8, 3), np.uint8), 0), "fps: expected a positive number, got 0"),
        ((np.zeros((4, 8, 8, 3), np.uint8), float("nan")), "fps: expected a positive"),
        ((np.zeros((4, 8, 8, 3), np.uint8), 8, -1), "window: expected a positive"),
    ],
)
def test_change_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        change(*arguments)


# ---- the picture


def test_the_picture_marks_events_and_shows_frames_where_they_are():
    (first, true), (second, more) = (long_film("two_characters", index) for index in range(2))
    second = second[:, : first.shape[1], : first.shape[2]]
    film = np.concatenate([first, second])
    picture = np.asarray(change_picture(film, FPS, [len(first)], SHORTEST, width=1200))
    assert picture.shape[1] == 1200 and all((edge == 255).all() for edge in (picture[0], picture[:, 0], picture[:, -1]))
    ribbon = TOP + HEIGHT + 3  # only the marks of events cross the gap above the ribbon
    marked = np.flatnonzero((picture[ribbon] == MARK).all(-1))
    starts = marked[np.diff(marked, prepend=-9) > 1]
    events = [*true, *(len(first) + event for event in more)]
    expected = [MARGIN + (1200 - 2 * MARGIN) * event / len(film) for event in events]
    assert len(starts) == 8 and np.abs(starts - expected).max() < (NEAR + 1) * 1128 / len(film)


def test_the_picture_fits_any_film():
    for shape, cuts in (((1, 8, 8), []), ((3, 8, 8), [1, 2]), ((40, 20, 200), [20]), ((40, 200, 20), [])):
        for width in (400, 1200):
            assert change_picture(np.zeros((*shape, 3), np.uint8), 8, cuts, width=width).width == width


@pytest.mark.parametrize("cuts", [[0], [5, 5], [8, 3], [10]])
def test_the_picture_refuses_cuts_that_are_none(cuts):
    with pytest.raises(ValueError, match="cuts: expected 1 to 9, in order, got"):
        change_picture(np.zeros((10, 8, 8, 3), np.uint8), 8, cuts)
