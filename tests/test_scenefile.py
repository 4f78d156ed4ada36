"""The scene file: what it says comes back, every mistake is one line with its fix, and nothing is ever half-written."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lct.data.folder import SceneFolder
from lct.data.scenefile import (
    GlobalPrompt,
    SceneFile,
    ShotEntry,
    load_sample,
    parse_scene,
    read_scene,
    rewrite_scene,
    scene_text,
    write_scene,
)

SHIP = GlobalPrompt({"1": "a young man", "2": "a young woman"}, "the deck of a ship", "1 meets 2")
SHOT = '[[shot]]\nprompt = "a"\ncut = true\n'


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def two_shots():
    """A scene of two given shots, and its latents."""
    shots = (
        ShotEntry("close-up of Character 1", True, (4, 2, 3), 7, "shot-0", (0, 30)),
        ShotEntry("“wide” shot\nof Character 2", True, (2, 2, 3), None, "shot-1", sees=(1,)),
    )
    latents = {"shot-0.video": noise(4, 2, 3, 3), "shot-0.images": noise(5, 2, 3, 3), "shot-1.video": noise(2, 2, 3, 3)}
    return SceneFile(SHIP, shots, 8.0, "ship.mp4", "pixel/8"), latents


def test_global_prompt_text_is_character_environment_story():
    expected = "Character 1: a young man; Character 2: a young woman; the deck of a ship; 1 meets 2"
    assert SHIP.text() == expected
    assert GlobalPrompt(story="rain").text() == "rain" and GlobalPrompt().text() == ""


def test_what_is_written_is_read(tmp_path):
    scene, latents = two_shots()
    write_scene(tmp_path / "scene", scene, latents)
    assert read_scene(tmp_path / "scene") == scene
    assert read_scene(tmp_path / "scene" / "scene.toml") == scene
    assert "size = [4, 2, 3]\n" in (tmp_path / "scene" / "scene.toml").read_text()


def test_a_text_is_a_scene_and_back():
    scene, _ = two_shots()
    text = scene_text(scene)
    assert parse_scene(text, "text") == parse_scene(text.encode(), "text") == scene
    assert text.index("[global]") < text.index("[global.characters]") < text.index("[[shot]]")
    assert text.count("[[shot]]\n") == 2 and "\nsees = [1]\n" in text
    with pytest.raises(ValueError, match="^answer: shot 1: cut: expected true or false"):
        parse_scene("[[shot]]\nprompt = 'a'", "answer")
    with pytest.raises(ValueError, match="^board: expected at most 1048576 bytes, got more; shorten the prompts"):
        scene_text(SceneFile(None, (ShotEntry("ä" * (1 << 19), True),)), "board")


def test_a_file_holds_up_to_1000_shots(tmp_path):
    scene = SceneFile(SHIP, tuple(ShotEntry(f"shot {i}", True, sees="recent:9") for i in range(1000)))
    write_scene(tmp_path / "film", scene)
    assert read_scene(tmp_path / "film") == scene


@pytest.mark.parametrize("sees", ["all", "recent:1", "relevant:8", "recent:9999", [], [1], [1, 3], [3, 1]])
def test_what_a_shot_sees_is_kept(tmp_path, sees):
    (tmp_path / "scene.toml").write_text(f"{SHOT}{SHOT}sees = {sees!r}\n{SHOT}")
    expected = tuple(sees) if isinstance(sees, list) else sees
    scene = read_scene(tmp_path)
    assert [shot.sees for shot in scene.shots] == [None, expected, None]
    assert parse_scene(scene_text(scene), "again") == scene


@pytest.mark.parametrize(
    "sees",
    ["[2]", "[0]", "[4]", "[1, 1]", "[True]", "['1']", "1", "'recent:0'", "'newest'", "'recent:12345'", "'all '"],
)
def test_what_a_shot_cannot_see_is_refused(tmp_path, sees):
    (tmp_path / "scene.toml").write_text(f"{SHOT}{SHOT}sees = {sees.lower()}\n{SHOT}")
    kinds = r'"all", "recent:K", "relevant:K", or distinct numbers of 1 to 3 without 2, the shot itself'
    with pytest.raises(ValueError, match=f"shot 2: sees: expected {kinds}, got {re.escape(sees)}; write for example"):
        read_scene(tmp_path)


def test_a_hand_written_file_needs_only_prompt_and_cut(tmp_path):
    (tmp_path / "scene.toml").write_text(SHOT)
    assert read_scene(tmp_path) == SceneFile(None, (ShotEntry("a", True),))


def test_the_file_in_the_docstring_is_valid(tmp_path):
    from lct.data import scenefile

    example = scenefile.__doc__.split("\n\n")[1]
    (tmp_path / "scene.toml").write_text(example)
    save_file({"shot-0.video": noise(4, 30, 30, 3)}, tmp_path / "latents.safetensors")
    scene = read_scene(tmp_path)
    assert scene.global_prompt.text().startswith("Character 1: a young man with blonde hair; Character 2: ")
    assert scene.shots[0].size == (4, 30, 30) and scene.fps == 8


def test_load_sample(tmp_path):
    scene, latents = two_shots()
    write_scene(tmp_path / "scene", scene, {key: torch.from_numpy(value) for key, value in latents.items()})
    sample = load_sample(tmp_path / "scene")
    assert sample.global_prompt == SHIP.text()
    assert [(shot.prompt, shot.cut) for shot in sample.shots] == [(shot.prompt, True) for shot in scene.shots]
    assert np.array_equal(sample.shots[0].latents, latents["shot-0.video"])
    assert np.array_equal(sample.shots[0].images, latents["shot-0.images"])
    assert sample.shots[1].images.shape == (0, 2, 3, 3) and sample.shots[1].latents.dtype == np.float32


def test_load_sample_needs_media_for_every_shot(tmp_path):
    (tmp_path / "scene.toml").write_text(SHOT)
    with pytest.raises(ValueError, match=r"scene.toml: shot 1: media: expected .*, got nothing; "):
        load_sample(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "shot: expected 1 to 1000 shots, got 0"),
        ("shot = []", "shot: expected 1 to 1000 shots, got 0"),
        (SHOT * 1001, "shot: expected 1 to 1000 shots, got 1001; .*split"),
        ("shot = 3", "shot: expected an array of tables, got 3"),
        ("[shot]\nprompt = 'a'", "shot: expected an array of tables"),
        (SHOT + "promt = 'b'", "shot 1: key: expected one of prompt, .*, got 'promt'; perhaps you meant prompt"),
        ("shots = 1\n" + SHOT, "key: expected one of .*, got 'shots'; perhaps you meant shot"),
        ("[[shot]]\ncut = true", "shot 1: prompt: expected text in quotes, got nothing; write prompt"),
        ("[[shot]]\nprompt = 'a'", "shot 1: cut: expected true or false, got nothing; write cut"),
        ("[[shot]]\nprompt = 3\ncut = true", "shot 1: prompt: expected text in quotes, got 3"),
        ("[[shot]]\nprompt = 'a'\ncut = 'yes'", "shot 1: cut: expected true or false, got 'yes'"),
        ("[[shot]]\nprompt = '[SHOT CUT] a'\ncut = true", r"shot 1: prompt: expected no \[SHOT CUT\] typed by hand"),
        ("[[shot]]\nprompt = 'a [shot  cut]'\ncut = true", "set cut = true"),
        ("[global]\nstory = '[SHOT CUT]'\n" + SHOT, r"global: story: expected no \[SHOT CUT\]"),
        (SHOT + "size = [1, -2, 3]", r"shot 1: size: expected three positive integers, .*, got \[1, -2, 3\]; write"),
        (SHOT + "size = [1.5, 2, 3]", "shot 1: size: expected three positive integers"),
        (SHOT + "size = [2, 3]", "shot 1: size: expected three positive integers"),
        (SHOT + "size = [true, 2, 3]", "shot 1: size: expected three positive integers"),
        (SHOT + "size = 4", "shot 1: size: expected three positive integers"),
        (SHOT + "seed = -1", "shot 1: seed: expected an integer from 0 up, got -1"),
        (SHOT + "seed = true", "shot 1: seed: expected an integer"),
        (SHOT + "seed = 99999999999999999999", "shot 1: seed: expected an integer"),
        (SHOT + "frames = [30, 0]", "shot 1: frames: expected a first frame before the end"),
        (SHOT + "frames = [-1, 3]", "shot 1: frames: expected two integers"),
        (SHOT + "media = 'shot-0'", "shot 1: media: expected shot-0.video in latents.safetensors, got nothing"),
        (SHOT + SHOT + "media = 4", "shot 2: media: expected a name without folders, got 4"),
        ("fps = 0\n" + SHOT, "fps: expected frames per second, above 0 and at most 1e6, got 0"),
        ("fps = nan\n" + SHOT, "fps: expected"),
        ("fps = 1" + "0" * 400 + "\n" + SHOT, "fps: expected"),
        ("source = 1\n" + SHOT, "source: expected the film's name"),
        ("source = '../film.mp4'\n" + SHOT, "source: expected the film's name alone"),
        ("source = '/film.mp4'\n" + SHOT, "source: expected the film's name alone"),
        ("source = '..'\n" + SHOT, "source: expected the film's name alone"),
        ("global = 'x'\n" + SHOT, "global: expected a table, got 'x'"),
        ("[global]\ncharacter = 'x'\n" + SHOT, "global: key: expected .*; perhaps you meant characters"),
        ("[global.characters]\n1 = 2\n" + SHOT, "global: characters: 1: expected text in quotes, got 2"),
        ("[global.characters]\n'Dr.' = 'a'\n" + SHOT, "global: characters: ID: expected letters"),
        ("[global.characters]\n'1: x;\\n' = 'a'\n" + SHOT, "global: characters: ID: expected letters"),
        ("[[shot]\n", "expected TOML in UTF-8"),
        ("a = " + "[" * 5000, "expected TOML in UTF-8"),
        ("source = '" + "x" * (1 << 20) + "'", "expected at most 1048576 bytes"),
    ],
)
def test_mistakes_are_one_line_that_names_file_key_and_fix(tmp_path, text, words):
    (tmp_path / "scene.toml").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_scene(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'scene.toml'}: ") and "\n" not in message and "; " in message
    assert len(message) < 500


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "a\\\\b", "..", ".hidden", "", "a\\nb", "c:x"])
def test_media_names_cannot_leave_the_folder(tmp_path, name):
    (tmp_path / "scene.toml").write_text(f'{SHOT}media = "{name}"')
    with pytest.raises(ValueError, match="media: expected a name without folders") as caught:
        read_scene(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "scene.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected TOML in UTF-8"):
        read_scene(tmp_path)


def test_a_missing_file_says_where_it_was_sought(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scene.toml: expected a scene file, found nothing"):
        read_scene(tmp_path)


@pytest.mark.parametrize(
    "stored, words",
    [
        ({"other.video": noise(1, 2, 2, 3)}, r"expected shot-0.video in .*, got \['other.video'\]"),
        ({"shot-0.video": noise(2, 2, 3)}, r"of shape \[T, H, W, C\], got \(2, 2, 3\)"),
        ({"shot-0.video": noise(0, 2, 2, 3)}, r"of shape \[T, H, W, C\]"),
        ({"shot-0.video": noise(2, 2, 2, 3)}, r"shot 1: size: expected that of shot-0.video, \[2, 2, 2\], got"),
        ({"shot-0.video": noise(1, 2, 2, 3), "shot-0.images": noise(1, 4, 4, 3)}, r"shot-0.images of shape \[K, "),
        ({"shot-0.video": noise(1, 2, 2, 3).astype(np.float64)}, "expected dtype F32, got F64"),
        (b"not safetensors at all", "expected safetensors, got a damaged file"),
    ],
)
def test_latents_that_do_not_fit_are_refused(tmp_path, stored, words):
    (tmp_path / "scene.toml").write_text(SHOT + "media = 'shot-0'\nsize = [1, 2, 2]")
    if isinstance(stored, bytes):
        (tmp_path / "latents.safetensors").write_bytes(stored)
    else:
        save_file(stored, tmp_path / "latents.safetensors")
    with pytest.raises(ValueError, match=words):
        read_scene(tmp_path)


@pytest.mark.parametrize(
    "scene, latents, words",
    [
        (SceneFile(None, ()), {}, "1 to 1000 shots, got 0"),
        (SceneFile(None, (ShotEntry("a", True),) * 1001), {}, "1 to 1000 shots, got 1001"),
        (SceneFile(None, (ShotEntry("[SHOT CUT] a", True),)), {}, "typed by hand"),
        (SceneFile(None, (ShotEntry(None, True),)), {}, "prompt: expected text"),
        (SceneFile(None, (ShotEntry("a", True, media="../a"),)), {"../a.video": noise(1, 2, 2, 3)}, "without folders"),
        (SceneFile(None, (ShotEntry("a", True, media="a"),)), {}, "expected a.video"),
        (SceneFile(None, (ShotEntry("a", True),)), {"a.video": noise(1, 2, 2, 3)}, r"names?, got \['a.video'\]"),
    ],
)
def test_nothing_is_written_of_a_scene_that_would_not_be_read(tmp_path, scene, latents, words):
    with pytest.raises(ValueError, match=words):
        write_scene(tmp_path / "deep" / "scene", scene, latents)
    assert not list(tmp_path.iterdir())


def test_a_scene_is_never_overwritten(tmp_path):
    scene, latents = two_shots()
    write_scene(tmp_path / "scene", scene, latents)
    before = {path.name: path.read_bytes() for path in (tmp_path / "scene").iterdir()}
    with pytest.raises(ValueError, match="remove it or choose another"):
        write_scene(tmp_path / "scene", SceneFile(None, (ShotEntry("b", False),)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "scene").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["scene"]


def test_rewriting_a_scene_leaves_its_latents_alone(tmp_path):
    scene, latents = two_shots()
    write_scene(tmp_path / "scene", scene, latents)
    before = {path.name: path.read_bytes() for path in (tmp_path / "scene").iterdir()}
    new = replace(scene, shots=(scene.shots[0], replace(scene.shots[1], prompt="wide shot")))
    rewrite_scene(tmp_path / "scene", new)
    after = {path.name: path.read_bytes() for path in (tmp_path / "scene").iterdir()}
    assert read_scene(tmp_path / "scene") == new and after.keys() == before.keys()
    assert after["latents.safetensors"] == before["latents.safetensors"]
    for wrong, words in (
        (replace(new.shots[0], prompt="[SHOT CUT] a"), "typed by hand"),
        (replace(new.shots[0], media="shot-9"), "expected shot-9.video"),
        (replace(new.shots[0], size=(1, 2, 3)), "shot 1: size: expected that of shot-0.video"),
    ):
        with pytest.raises(ValueError, match=words):
            rewrite_scene(tmp_path / "scene", replace(new, shots=(wrong, new.shots[1])))
    assert {path.name: path.read_bytes() for path in (tmp_path / "scene").iterdir()} == after


def write_folders(root):
    """A scene of three cut shots, a single shot of one frame, and what an interrupted writer may leave behind."""
    names = [f"shot-{i}" for i in range(3)]
    shots = tuple(ShotEntry(f"prompt {i}", True, media=name) for i, name in enumerate(names))
    latents = {f"{name}.video": noise(i + 2, 2, 2, 3, seed=i) for i, name in enumerate(names)}
    latents |= {f"{name}.images": noise(4, 2, 2, 3, seed=i) for i, name in enumerate(names)}
    write_scene(root / "film" / "scene-000", SceneFile(SHIP, shots), latents)
    single = SceneFile(GlobalPrompt(), (ShotEntry("alone", False, media="a"),))
    write_scene(root / "film" / "scene-001", single, {"a.video": noise(1, 2, 2, 3)})
    (root / "film" / ".scene-002.tmp").mkdir()
    (root / "film" / ".scene-002.tmp" / "scene.toml").write_text("half")
    return SceneFolder(root)


def test_scene_folder_kinds(tmp_path):
    folder, rng = write_folders(tmp_path), np.random.default_rng(0)
    prompts = set()
    for _ in range(20):
        (shot,) = (single := folder.sample("single", rng)).shots
        prompts.add(shot.prompt)
        assert single.global_prompt is None and not shot.cut
    assert prompts == {f"{SHIP.text()}. prompt {i}" for i in range(3)} | {"alone"}

    cut = folder.sample("cut", rng)
    assert cut.global_prompt == SHIP.text() and all(shot.cut for shot in cut.shots)
    assert [shot.prompt for shot in cut.shots] == ["prompt 0", "prompt 1", "prompt 2"]
    pairs = {tuple(shot.prompt[-1] for shot in folder.sample("cut", rng, 2).shots) for _ in range(20)}
    assert pairs == {("0", "1"), ("1", "2")}

    divided = folder.sample("no_cut", rng)
    shots = {shot.prompt: shot for shot in load_sample(tmp_path / "film" / "scene-000").shots}
    whole = shots[divided.shots[0].prompt]
    assert len(divided.shots) == 2 and not any(shot.cut for shot in divided.shots)
    assert np.array_equal(np.concatenate([shot.latents for shot in divided.shots]), whole.latents)
    assert np.array_equal(np.concatenate([shot.images for shot in divided.shots]), whole.images)


def write_long(root, name, frames, cut=False):
    """A scene of segments, one for each number of frames."""
    shots = tuple(ShotEntry(f"{name} {i}", cut, media=f"s{i}") for i in range(len(frames)))
    latents = {f"s{i}.video": noise(n, 2, 2, 3, seed=i) for i, n in enumerate(frames)}
    write_scene(root / name, SceneFile(SHIP, shots), latents)


def test_segments_of_a_long_shot_are_drawn_before_shots_are_divided(tmp_path):
    write_folders(tmp_path)
    write_long(tmp_path, "long-000", [2, 3, 4, 5, 2])
    folder, rng = SceneFolder(tmp_path, max_shots=4), np.random.default_rng(0)
    drawn = set()
    for _ in range(30):
        sample = folder.sample("no_cut", rng)
        assert sample.global_prompt == SHIP.text() and not any(shot.cut for shot in sample.shots)
        drawn.add(tuple(shot.prompt for shot in sample.shots))
        for shot in sample.shots:
            i = int(shot.prompt[-1])
            assert np.array_equal(shot.latents, noise([2, 3, 4, 5, 2][i], 2, 2, 3, seed=i))
    assert drawn == {tuple(f"long-000 {i}" for i in range(a, a + 4)) for a in (0, 1)}
    pairs = {folder.sample("no_cut", rng, 2).shots[0].prompt for _ in range(40)}
    assert pairs == {f"long-000 {i}" for i in range(4)}
    # no scene has so many segments: a shot of six frames would do, but there is none
    with pytest.raises(
        ValueError, match="a shot of 6 frames of pixels .* with --divide, or leave the kind out: --data.no-cut 0"
    ):
        folder.sample("no_cut", rng, 6)
    write_long(tmp_path, "other", [6, 1])
    parts = SceneFolder(tmp_path).sample("no_cut", rng, 6).shots
    assert [shot.prompt for shot in parts] == ["other 0"] * 6 and all(len(shot.latents) == 1 for shot in parts)


def test_scenes_that_mix_cuts_and_segments_belong_to_neither_kind(tmp_path):
    shots = tuple(ShotEntry(f"{cut}", cut, media=f"s{i}") for i, cut in enumerate((True, False)))
    latents = {f"s{i}.video": noise(3, 2, 2, 3, seed=i) for i in range(2)}
    write_scene(tmp_path / "mixed", SceneFile(SHIP, shots), latents)
    folder, rng = SceneFolder(tmp_path), np.random.default_rng(0)
    with pytest.raises(ValueError, match="expected a scene of 2 shots with cuts"):
        folder.sample("cut", rng)
    assert len({shot.prompt for shot in folder.sample("no_cut", rng).shots}) == 1  # one shot, divided
    with pytest.warns(UserWarning, match="1 scenes have shots with and without a cut"):
        folder.check(["single"], (1, 1, 1), 3)


def test_latents_of_a_vae_are_never_divided(tmp_path):
    """Their first frame is encoded otherwise than those after it, so that a second half would be no clip."""
    for codec in ("wan/vae", "pixel/8"):
        scene = SceneFile(SHIP, (ShotEntry("a", True, media="s"),), codec=codec)
        write_scene(tmp_path / codec, scene, {"s.video": noise(5, 2, 2, 3)})
    rng = np.random.default_rng(0)
    assert len(SceneFolder(tmp_path / "pixel").sample("no_cut", rng).shots) == 2
    with pytest.raises(ValueError, match="expected a scene of 2 shots without cuts.* got none"):
        SceneFolder(tmp_path / "wan").check(["no_cut"], (1, 1, 1), 3)


def test_a_sample_is_a_function_of_the_generator(tmp_path):
    folder = write_folders(tmp_path)
    for kind in ("single", "cut", "no_cut"):
        first, second = (folder.sample(kind, np.random.default_rng(3)) for _ in range(2))
        assert all(np.array_equal(a.latents, b.latents) for a, b in zip(first.shots, second.shots, strict=True))


def test_max_shots_bounds_a_cut_sample(tmp_path):
    write_folders(tmp_path)
    assert len(SceneFolder(tmp_path, max_shots=2).sample("cut", np.random.default_rng(0)).shots) == 2


def test_scene_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        SceneFolder(tmp_path / "nowhere")
    folder, rng = write_folders(tmp_path), np.random.default_rng(0)
    with pytest.raises(ValueError, match="expected a scene of 4 shots with cuts"):
        folder.sample("cut", rng, 4)
    with pytest.raises(ValueError, match="or a shot of 5 frames of pixels"):
        folder.sample("no_cut", rng, 5)
    with pytest.raises(ValueError, match="kind: expected one of single, cut, no_cut, got 'both'"):
        folder.sample("both", rng)
    write_scene(tmp_path / "film" / "to-generate", SceneFile(None, (ShotEntry("a", False),)))
    with pytest.raises(ValueError, match="shot 1: media"):
        SceneFolder(tmp_path)
