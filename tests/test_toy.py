"""Toy scenes are pure, keep identity out of the text, and can be read back from their pixels."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_film import toy_film

import lct.data.readout
import lct.data.toy
from lct.data.readout import CHANCE, colour_error, hue, hue_spread, read_shot, score_shots
from lct.data.toy import (
    KINDS,
    LIGHT_WORDS,
    LIGHTS,
    MOTIONS,
    PRESETS,
    SHAPES,
    TEXTURES,
    ToyScenes,
    corner_of,
    sky_rows,
    step,
    to_frames,
)

COLOURS = {
    "red",
    "orange",
    "yellow",
    "green",
    "cyan",
    "blue",
    "violet",
    "purple",
    "magenta",
    "pink",
    "brown",
    "grey",
    "hue",
}


def draw(preset="one_character", seed=0, count=300, **options):
    toy, rng = ToyScenes(preset, **options), np.random.default_rng(seed)
    return [toy.sample(KINDS[i % 3], rng) for i in range(count)]


def blur(frames):
    """A wider blur than any that the readout's templates know: the mean over 3 x 3 pixels."""
    padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def read_back(scenes, change=lambda frames: frames):
    """Mean scores of all shots and of those of each framing."""
    scores = []
    for scene in scenes:
        shots = score_shots([change(to_frames(shot.latents)) for shot in scene.shots], scene.truth)
        scores += [(event.framing, score) for event, score in zip(scene.truth.shots, shots, strict=True)]

    def mean(key, framing=None):
        return float(np.nanmean([score[key] for got, score in scores if framing in (None, got)]))

    print({key: round(mean(key), 4) for key in scores[0][1]})
    return mean


def texts(scene):
    return [shot.prompt for shot in scene.shots] + ([scene.global_prompt] if scene.global_prompt else [])


def words(text):
    return re.findall(r"[A-Za-z-]+|\d+", text)


def test_truth_is_read_back():
    mean = read_back(draw())
    assert mean("colour_error") <= 0.04 and mean("background_error") <= 0.04
    assert mean("motion") >= 0.99 and mean("framing") >= 0.99
    assert mean("light") == 1 and mean("visible") == 1 and mean("place") == 1 and mean("corner") >= 0.99
    assert mean("shape") >= 0.95 and mean("shape", "close-up") >= 0.99


def test_truth_is_read_back_through_noise():
    rng = np.random.default_rng(1)
    mean = read_back(draw(), lambda frames: frames + 0.05 * rng.standard_normal(frames.shape))
    assert mean("motion") >= 0.97 and mean("colour_error") <= 0.08 and mean("corner") >= 0.97
    assert mean("light") == 1 and mean("framing") >= 0.97 and mean("shape") >= 0.95


def test_truth_is_read_back_through_blur():
    mean = read_back(draw(count=150), blur)
    assert mean("motion") >= 0.97 and mean("colour_error") <= 0.08 and mean("framing") >= 0.97


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_read_back(preset):
    mean = read_back(draw(preset, count=90))
    assert mean("motion") >= 0.99 and mean("light") == 1 and mean("framing") >= 0.99
    assert mean("colour_error") <= 0.04 and mean("shape") >= 0.95 and mean("texture") >= 0.95
    assert mean("corner") >= 0.9  # one that starts beside a middle line may be read on its other side


def test_scores_tell_wrong_from_right():
    scenes = draw(count=60)[1::3]
    toy = ToyScenes()
    scene = toy.evaluation_scene(0, seed=0, shots=4)
    other = toy.evaluation_scene(1, seed=0, shots=4)
    right = score_shots([to_frames(shot.latents) for shot in scene.shots], scene.truth)
    wrong = score_shots([to_frames(shot.latents) for shot in other.shots], scene.truth)
    assert all(score["colour_error"] < 0.05 for score in right)
    apart = colour_error(scene.truth.characters[0].rgb, other.truth.characters[0].rgb)
    assert np.allclose([score["colour_error"] for score in wrong], apart, atol=0.05)
    empty = score_shots([np.full((3, 16, 16, 3), 0.4)], scene.truth)[0]
    assert empty["visible"] == empty["shape"] == empty["motion"] == empty["corner"] == empty["framing"] == 0
    assert empty["colour_error"] == CHANCE
    with pytest.raises(ValueError, match="shots: expected at most"):
        score_shots([np.zeros((3, 16, 16, 3))] * 10, scenes[0].truth)


def test_chance_level():
    rgbs = [scene.truth.characters[0].rgb for scene in draw(count=600)]
    chance = np.mean([colour_error(a, b) for a, b in zip(rgbs[::2], rgbs[1::2], strict=True)])
    print("chance colour error", chance)
    assert chance == pytest.approx(CHANCE, abs=0.03)


def test_hue_spread_sees_collapse():
    rgbs = [scene.truth.characters[0].rgb for scene in draw(count=200)]
    assert hue((1.0, 0.0, 0.0)) == 0 and hue((0.0, 1.0, 0.0)) == pytest.approx(1 / 3)
    assert hue_spread(rgbs) > 0.85 and hue_spread([rgbs[0]] * 9) < 1e-6
    assert hue_spread([(1.0, 0.0, 0.03), (1.0, 0.03, 0.0)]) < 0.01


def test_readings_of_a_still_frame_and_of_values_out_of_range():
    scene = ToyScenes().evaluation_scene(0, seed=0, shots=1)
    frames = to_frames(scene.shots[0].latents)
    reading = read_shot(frames[:1])
    assert reading.visible and reading.motion is None and reading.shape == scene.truth.characters[0].shape
    assert read_shot(3 * frames - 1).motion == scene.truth.shots[0].motion


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 5.0])
def test_anything_can_be_read(spread):
    rng = np.random.default_rng(0)
    for height, width in ((16, 16), (12, 20)):
        reading = read_shot(0.5 + spread * rng.standard_normal((3, height, width, 3)))
        assert np.isfinite(reading.background_rgb).all() and not (reading.visible and spread <= 0.1)
        assert reading.character_rgb is None or np.isfinite(reading.character_rgb).all()
    for frames in (np.full((3, 16, 16, 3), np.nan), np.zeros((16, 16, 3))):
        with pytest.raises(ValueError, match="frames: expected finite"):
            read_shot(frames)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_pure(preset, kind):
    for seed in range(5):
        a, b = (ToyScenes(preset).sample(kind, np.random.default_rng(seed)) for _ in range(2))
        assert a.truth == b.truth and texts(a) == texts(b)
        assert all(np.array_equal(x.latents, y.latents) for x, y in zip(a.shots, b.shots, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_scenes_are_well_formed(preset):
    config, lengths, sizes = PRESETS[preset], set(), set()
    for i, scene in enumerate(draw(preset, count=150, max_shots=9)):
        kind = KINDS[i % 3]
        assert (scene.global_prompt is None) == (kind == "single")
        assert {"single": 1, "cut": 1, "no_cut": 2}[kind] <= len(scene.shots) <= (1 if kind == "single" else 9)
        assert len(scene.truth.characters) == config.characters
        for shot in scene.shots:
            assert shot.cut == (kind == "cut") and "CUT" not in shot.prompt
            assert shot.latents.dtype == np.float32 and np.abs(shot.latents).max() <= 1
            assert np.array_equal(shot.images, shot.latents)
            lengths.add(len(shot.latents))
            sizes.add(shot.latents.shape[1:3])
    assert lengths == set(config.frames) and sizes == set(config.sizes)


def test_number_of_shots():
    toy, rng = ToyScenes(max_shots=3), np.random.default_rng(0)
    assert {len(toy.sample("cut", rng).shots) for _ in range(40)} == {1, 2, 3}
    assert {len(toy.sample("no_cut", rng).shots) for _ in range(40)} == {2, 3}
    assert len(toy.sample("no_cut", rng, shots=9).shots) == 9
    for call in (
        lambda: ToyScenes(max_shots=10),
        lambda: toy.sample("cut", rng, shots=10),
        lambda: toy.evaluation_scene(0, 0, shots=0),
    ):
        with pytest.raises(ValueError, match="shots: expected"):
            call()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"one_character, returning, two_characters, three_characters, got 'hard'"):
        ToyScenes("hard")
    with pytest.raises(ValueError, match="kind: expected one of single, cut, no_cut"):
        ToyScenes().sample("film", np.random.default_rng(0))


@pytest.mark.parametrize("preset", PRESETS)
def test_segments_of_a_long_shot_are_continuous(preset):
    toy, rng = ToyScenes(preset), np.random.default_rng(0)
    for _ in range(50):
        scene = toy.sample("no_cut", rng)
        frames, height, width, _ = scene.shots[0].latents.shape
        for before, after in zip(scene.truth.shots, scene.truth.shots[1:], strict=False):
            stride = step(before.framing, frames, height, width)
            last = np.array(before.start) + (frames - 1) * stride * np.array(MOTIONS[before.motion])
            assert np.allclose(np.array(after.start) - last, stride * np.array(MOTIONS[before.motion]))
            assert after.motion != before.motion
            assert (after.who, after.framing, after.place) == (before.who, before.framing, before.place)


def test_characters_stay_below_the_sky_and_move_as_far_as_they_should():
    toy, rng = ToyScenes(), np.random.default_rng(0)
    for _ in range(100):
        scene = toy.sample("cut", rng)
        for shot, event in zip(scene.shots, scene.truth.shots, strict=True):
            assert np.allclose(to_frames(shot.latents)[:, : sky_rows(16)], LIGHTS[scene.truth.light], atol=1e-6)
            if event.who is not None:
                ground = to_frames(shot.latents)[:, 3:]
                rows, columns = np.nonzero(np.abs(ground - ground.mean(0)).max((0, 3)) > 0.05)
                moved = max(np.ptp(rows), np.ptp(columns)) + 1
                assert moved >= (2.5 if event.framing == "close-up" else 5)


@pytest.mark.parametrize("preset", PRESETS)
def test_identity_is_never_in_the_text(preset):
    banned = COLOURS | {*SHAPES, *TEXTURES}
    for scene in draw(preset):
        for text in texts(scene):
            assert not banned & {word.lower() for word in words(text)}


@pytest.mark.parametrize("preset", PRESETS)
def test_light_stands_in_the_global_prompt_alone(preset):
    for scene in draw(preset):
        light = LIGHT_WORDS[scene.truth.light]
        if scene.global_prompt is None:
            assert scene.shots[0].prompt.endswith(" " + light)
        else:
            assert light in scene.global_prompt
            assert not set(LIGHTS) & {word for shot in scene.shots for word in words(shot.prompt)}


def test_prompts():
    toy, rng = ToyScenes(), np.random.default_rng(0)
    prompts = {shot.prompt for _ in range(300) for shot in toy.sample("cut", rng).shots}
    assert {
        "close-up of Character 1, bottom right, moving left in the meadow",
        "wide shot of Character 1, bottom left, moving up by the harbour",
        "establishing shot of the street",
    } <= prompts
    story = {toy.sample("cut", rng).global_prompt for _ in range(50)}
    assert "Character 1: a wanderer. The scene is set at night. Character 1 wanders about." in story


def test_corners():
    assert [corner_of(y, x, 16, 20) for y, x in ((0, 0), (7.9, 9.9), (8, 9.9), (7.9, 10), (15, 19))] == [
        "top left", "top left", "bottom left", "top right", "bottom right",
    ]  # fmt: skip
    for scene in draw():
        for shot, event in zip(scene.shots, scene.truth.shots, strict=True):
            assert event.start is None or event.corner == corner_of(*event.start, *shot.latents.shape[1:3])
            assert (event.start is None) == (event.corner is None)


def test_vocabulary_is_small():
    known = {word for preset in PRESETS for scene in draw(preset) for text in texts(scene) for word in words(text)}
    print(len(known), sorted(known))
    assert len(known) <= 50


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_scenes(preset):
    toy = ToyScenes(preset)
    cast = toy.config.characters
    hues = set()
    for index in range(20):
        scene = toy.evaluation_scene(index, seed=0, shots=6)
        assert scene.truth == toy.evaluation_scene(index, seed=0, shots=6).truth
        assert all(shot.cut for shot in scene.shots) and len(scene.shots) == 6
        assert [event.who for event in scene.truth.shots] == [i % cast for i in range(6)]
        for before, after in zip(scene.truth.shots, scene.truth.shots[cast:], strict=False):
            assert {before.framing, after.framing} == {"wide shot", "close-up"}
        hues.update(character.rgb for character in scene.truth.characters)
    assert len(hues) == 20 * cast
    assert toy.evaluation_scene(0, 0, 2).truth != toy.evaluation_scene(0, 1, 2).truth


def test_film_has_its_cuts_where_it_says():
    toy, rng = ToyScenes(), np.random.default_rng(0)
    scenes = [toy.sample("cut", rng, shots=3), toy.sample("no_cut", rng, shots=3), toy.sample("single", rng)]
    film = toy_film(scenes, scale=4, frames_per_shot=(12, 18))
    assert film.frames.dtype == np.uint8 and film.frames.shape == (12 + 18 + 12 + 18 + 12 + 18 + 12, 64, 64, 3)
    assert film.cuts == (12, 30, 42, 90) and film.scene_starts == (0, 42, 90)
    change = np.abs(np.diff(film.frames.astype(int), axis=0)).mean((1, 2, 3))
    at_cuts = change[np.array(film.cuts) - 1]
    assert at_cuts.min() > 2 * np.delete(change, np.array(film.cuts) - 1).max()


@pytest.mark.parametrize("kind", KINDS)
def test_film_is_the_scene_enlarged(kind):
    scene = ToyScenes().sample(kind, np.random.default_rng(1))
    frames = np.concatenate([to_frames(shot.latents) for shot in scene.shots])
    film = toy_film([scene], scale=2, frames_per_shot=(3,))
    smaller = film.frames.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)) / 255
    assert np.abs(smaller - frames).max() < 0.1
    longer = toy_film([scene], scale=1, frames_per_shot=(12,)).frames / 255
    assert np.abs(longer[0] - frames[0]).max() < 0.01
    assert kind == "no_cut" or np.abs(longer[-1] - frames[-1]).max() < 0.01
    with pytest.raises(ValueError, match="one frame size"):
        toy_film([])


@pytest.mark.parametrize("module", [lct.data.toy, lct.data.readout])
def test_only_numpy_is_needed(module):
    nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text())))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    outside = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside <= {"numpy", "numpy.typing", "lct.data.scenes", "lct.data.toy"}
