"""What goes against a director: odd orders of actions, odd words, damaged files, others who act, machines too small."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_direct import SCENE, SIZE, hashes, settings, small_weights, states

from lct.data.scenefile import ShotEntry, write_scene
from lct.direct.open import open_studio
from lct.direct.studio import Studio
from lct.direct.terminal import act
from lct.sample import select
from lct.train.weights import load_model, save_weights

pytest.importorskip("av")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights(tmp_path_factory.mktemp("weights"), "context_causal")


@pytest.fixture
def studio(tmp_path, weights):
    write_scene(tmp_path / "scene", SCENE)
    return Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))


@pytest.fixture
def face(tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "face.png")
    return tmp_path / "face.png"


def test_no_action_lets_shots_see_themselves_through_others(studio, face):
    """Media see nothing, so a shot may see them that sees it no more once it is made."""
    studio.make(1)
    take = studio.board.cards[0].take
    studio.give(1, face)
    studio.sees(1, "2")
    studio.make(2)
    before = hashes(studio.folder)
    for action in (lambda: studio.reroll(1), lambda: studio.keep(1, take)):
        with pytest.raises(ValueError, match="shot 1 sees itself through others"):
            action()
    assert hashes(studio.folder) == before
    studio.refresh()


def test_a_shot_made_instead_of_media_is_like_any_other(studio, face):
    studio.make(1)
    studio.give(2, face)
    studio.make(3)
    studio.reroll(2)
    inputs = studio.inputs(studio.board.cards[1].take)
    assert inputs["saw"] == [studio.board.cards[0].take] and inputs["size"] == list(SIZE)
    assert states(studio) == ["made", "made", "stale"]


def test_shots_are_made_behind_those_that_they_see(tmp_path):
    write_scene(tmp_path / "scene", SCENE)
    studio = Studio.begin(tmp_path / "scene", tmp_path / "project", settings(small_weights(tmp_path, "bidirectional")))
    studio.sees(3, "1")
    studio.sees(2, "1", "3")
    assert [name[:6] for name in studio.make(all=True)] == ["shot-1", "shot-3", "shot-2"]
    assert states(studio) == ["made"] * 3


def test_words_are_shown_as_they_are(studio, capsys):
    studio.prompt(1, "a sign reading [/exit], [neon] at 5:cat:6")
    studio.fork("[/b]")
    act(studio, ["status"])
    shown = capsys.readouterr().out
    assert "branch [/b]" in shown and "[/exit], [neon] at 5:cat:6" in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_scene_that_does_not_fit_is_told_and_nothing_is_written(studio, monkeypatch, error):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(Studio, "_generate", fails)
    before = hashes(studio.folder)
    with pytest.raises(ValueError, match="shot 4: not enough memory; make it smaller"):
        studio.extend("a shot too many", sees="none")
    assert hashes(studio.folder) == before


def test_damaged_files_are_named_and_lost_takes_are_made_again(studio, tmp_path):
    studio.make(all=True)
    (studio.folder / "takes" / ".DS_Store").touch()
    (studio.folder / "takes" / "notes").mkdir()
    studio.add("another shot")
    folder = studio.take_folder(studio.board.cards[0].take)
    whole = hashes(folder)
    (folder / "latents.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"latents\.safetensors: damaged .*; remove its folder, `refresh`"):
        studio.reroll(2)
    (folder / "take.json").write_text("{")
    with pytest.raises(ValueError, match=r"take\.json: damaged .*; remove its folder, `refresh`"):
        states(studio)
    (folder / "take.json").unlink()
    assert states(studio)[0] == "stale"
    with pytest.raises(ValueError, match="expected a folder that does not exist or is empty"):
        studio.refresh(1)
    shutil.rmtree(folder)
    studio.refresh(1)
    assert states(studio)[:3] == ["made"] * 3 and hashes(folder).keys() == whole.keys()
    assert hashes(folder)["latents.safetensors"] == whole["latents.safetensors"]
    boards = sorted((studio.folder / "boards").iterdir())
    boards[1].write_text("{")
    with pytest.raises(ValueError, match=boards[1].name):
        studio.fork("other")
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    with pytest.raises(ValueError, match=r"huge\.png: expected at most 67108864 pixels"):
        studio.give(1, huge)


def test_a_shot_that_was_asked_for_is_not_mistaken_for_another(studio, monkeypatch):
    """Somebody removes a shot while several are made."""
    for shot in (1, 2, 3):
        studio.sees(shot, "none")
    studio.make(3)
    studio.keep(3)
    studio.prompt(3, "other words")
    kept, other, generate = studio.board.cards[2], Studio(studio.folder), Studio._generate

    def and_remove(self, board, index, inputs, name):
        generate(self, board, index, inputs, name)
        monkeypatch.setattr(Studio, "_generate", generate)

    monkeypatch.setattr(Studio, "_generate", and_remove)
    monkeypatch.setattr(studio, "report", lambda line: other.remove(2))
    with pytest.raises(ValueError, match="shot-2 is no longer on the board"):
        studio.make(1, 2)
    assert [card.name for card in studio.board.cards] == ["shot-1", "shot-3"] and studio.board.cards[1] == kept


def test_keeping_gives_the_card_what_its_take_was_made_of(studio, face):
    studio.prompt(1, " wide shot, a blank before")
    studio.make(1)
    studio.keep(1)
    assert states(studio)[0] == "made" and studio.board.cards[0].kept
    made = studio.board.cards[0]
    studio.give(1, face)
    given = studio.board.cards[0]
    studio.prompt(1, "other words", cut=False)
    studio.keep(1, given.take)
    assert studio.board.cards[0] == replace(given, kept=True)
    studio.keep(1, made.take)
    assert studio.board.cards[0] == made


def test_branches_give_no_name_twice(studio):
    studio.fork("b")
    studio.switch("main")
    studio.add("of main")
    studio.switch("b")
    studio.add("of b")
    assert studio.board.cards[-1].name == "shot-5"
    studio.remove(4)
    studio.add("once more")
    assert studio.board.cards[-1].name == "shot-6"


def test_other_weights_see_as_many_shots_as_they_know(tmp_path, weights):
    write_scene(tmp_path / "scene", SCENE)
    model, config = load_model(weights)
    alone = tmp_path / "alone.safetensors"
    save_weights(
        alone, model.state_dict(), replace(config, data=replace(config.data, shots=1, single=1.0, cut=0.0, no_cut=0.0))
    )
    options = {"scene": tmp_path / "scene", "steps": 2}
    studio = open_studio(weights=str(alone), **options)
    assert [studio.board.seen(i) for i in range(3)] == [[], [], []]
    studio.make(all=True)
    with pytest.raises(ValueError, match="knows single shots"):
        studio.extend("another", sees="1 2")
    assert len(studio.board.cards) == 3
    studio = open_studio(weights=str(weights), fps=9.0, **options)
    assert [studio.board.seen(i) for i in range(3)] == [[], [0], [0, 1]] and studio.board.fps == 9.0
    assert Path(studio.board.settings.weights).is_absolute()


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"guidance": float("nan")}, {"history_time": 1.5}, {"fps": -1.0}], ids=str
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path, weights, options):
    write_scene(tmp_path / "scene", SCENE)
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        open_studio(tmp_path / "scene", str(weights), **{"steps": 2} | options)
    assert not (tmp_path / "scene-direct").exists()
    studio = open_studio(tmp_path / "scene", str(weights), steps=2)
    before = hashes(studio.folder)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        open_studio(tmp_path / "scene", **options)
    assert hashes(studio.folder) == before


def test_two_scene_files_in_a_folder_have_a_project_each(tmp_path, weights):
    for name, prompt in (("scene.toml", "wide shot"), ("two.toml", "close-up")):
        write_scene(tmp_path / "s", replace(SCENE, shots=(ShotEntry(prompt, True, SIZE),)))
        shutil.move(tmp_path / "s" / "scene.toml", tmp_path / name)
    for name in ("scene.toml", "two.toml"):
        shutil.move(tmp_path / name, tmp_path / "s" / name)
    one, two = (open_studio(tmp_path / "s" / name, str(weights)) for name in ("scene.toml", "two.toml"))
    assert (one.folder.name, two.folder.name) == ("s-direct", "s-two-direct")
    assert (one.board.cards[0].prompt, two.board.cards[0].prompt) == ("wide shot", "close-up")


def test_media_that_are_not_numbers_are_refused(tmp_path, weights):
    shots = (replace(SCENE.shots[0], media="shot-0"), *SCENE.shots[1:])
    write_scene(
        tmp_path / "scene", replace(SCENE, shots=shots), {"shot-0.video": np.full((*SIZE, 3), np.nan, np.float32)}
    )
    with pytest.raises(ValueError, match="shot 1: its latents hold NaN"):
        Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))
    assert not (tmp_path / "project").exists()


def test_long_scenes_are_looked_at_in_little_time(tmp_path, weights, monkeypatch):
    """300 shots took a minute for every action when each pair of shots counted all words anew, to look for circles."""
    shots = tuple(ShotEntry(f"Character {i % 7} walks past lamp {i} of the street", True, SIZE) for i in range(300))
    write_scene(tmp_path / "scene", replace(SCENE, shots=shots))
    chosen = []
    monkeypatch.setattr("lct.direct.board.choose", lambda *words: chosen.append(words) or select.choose(*words))
    select._words.cache_clear()
    studio = Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))
    studio.prompt(2, "close-up of Character 2")
    studio.sees(3, "1")
    assert not chosen
    assert [len(studio.board.seen(i)) for i in (2, 9, 299)] == [1, 8, 8]
    assert select._words.cache_info().misses <= 301
