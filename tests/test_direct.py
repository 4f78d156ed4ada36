"""The director's workflow: takes are a graph, nothing is lost, everything can be typed, and the page does the same."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from lct.cli import main
from lct.data.scenefile import GlobalPrompt, SceneFile, ShotEntry, read_scene, write_scene
from lct.data.video import read_video, write_video
from lct.direct.board import Board, Settings
from lct.direct.studio import Studio
from lct.direct.terminal import act, actions
from lct.model.mmdit import MMDiT
from lct.sample import Sampling, SceneRequest, ShotRequest, autoregressive
from lct.train.runs import run
from lct.train.weights import digest_of, load_model, save_weights

pytest.importorskip("av")

SIZE = (2, 8, 8)
PROMPTS = ("wide shot of Character 1", "close-up of Character 2", "wide shot of Character 1 and Character 2")
SCENE = SceneFile(
    GlobalPrompt({"1": "a wanderer", "2": "a traveller"}, "by day", "They wander about."),
    tuple(ShotEntry(prompt, True, SIZE) for prompt in PROMPTS),
    fps=4.0,
)


def small_weights(folder: Path, visibility: str) -> Path:
    """Random weights: what a shot looks like does not matter here, only that it depends on everything it should."""
    base = run("tiny_causal")
    model = replace(base.model, blocks=1, width=32, heads=1, kv_heads=1, mlp_width=64)
    config = replace(base, model=model, visibility=visibility)
    torch.manual_seed(0)
    made = MMDiT(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    file = folder / f"{visibility}.safetensors"
    save_weights(file, made.state_dict(), config)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights(tmp_path_factory.mktemp("weights"), "context_causal")


def settings(weights: Path, **options) -> Settings:
    return Settings(**{"weights": str(weights), "digest": digest_of(weights), "steps": 2} | options)


@pytest.fixture
def studio(tmp_path, weights):
    write_scene(tmp_path / "scene", SCENE)
    return Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def states(studio: Studio) -> list[str]:
    return [studio.state(i) for i in range(len(studio.board.cards))]


def shown(studio: Studio, shot: int) -> np.ndarray:
    return load_file(studio.take_folder(studio.board.cards[shot - 1].take) / "latents.safetensors")["video"]


# -- takes form a graph ------------------------------------------------------------------------------------------------


def test_a_scene_shot_by_shot(studio):
    assert states(studio) == ["empty"] * 3
    for shot in (1, 2, 3):
        (take,) = studio.make()
        folder = studio.take_folder(take)
        assert sorted(p.name for p in folder.iterdir()) == ["latents.safetensors", "sheet.png", "shot.mp4", "take.json"]
        assert read_video(folder / "shot.mp4").frames.shape == (*SIZE, 3) and shown(studio, shot).shape == (*SIZE, 3)
        assert Image.open(folder / "sheet.png").width > 100
    assert states(studio) == ["made"] * 3
    with pytest.raises(ValueError, match="every shot has a take"):
        studio.make()


def test_a_take_is_what_the_sampler_makes_of_its_inputs(studio, weights):
    studio.make(all=True)
    model, config = load_model(weights)
    sampling = Sampling.of(config, steps=2, guidance=1.5, history_time=0.1)
    shots = tuple(ShotRequest(f"[SHOT CUT] {prompt}", (2, 2, 2), i) for i, prompt in enumerate(PROMPTS))
    made = autoregressive(model, [SceneRequest(SCENE.global_prompt.text(), shots)], sampling)[0]
    for i, rows in enumerate(made):
        latents = torch.from_numpy(shown(studio, i + 1))
        patches = latents.reshape(2, 2, 4, 2, 4, 3).permute(0, 1, 3, 2, 4, 5).reshape(8, 48)
        torch.testing.assert_close(patches, rows, atol=1e-5, rtol=1e-5)


def test_rerolling_leaves_every_other_file_untouched_and_marks_what_saw_it(studio):
    studio.make(all=True)
    before, third = hashes(studio.folder), shown(studio, 3)
    studio.reroll(2)
    after = hashes(studio.folder)
    assert {name: after[name] for name in before} == before
    new = {Path(name).parts[0:2] for name in after.keys() - before.keys()}
    assert len(new) == 2 and {parts[0] for parts in new} == {"boards", "takes"}
    assert states(studio) == ["made", "made", "stale"] and np.array_equal(shown(studio, 3), third)
    assert studio.board.cards[1].seed == 2
    studio.refresh()
    assert states(studio) == ["made"] * 3 and not np.array_equal(shown(studio, 3), third)


def test_a_shot_that_does_not_see_it_is_not_stale(studio):
    studio.sees(3, "1")
    studio.make(all=True)
    studio.reroll(2)
    assert states(studio) == ["made"] * 3
    studio.reroll(1)
    assert states(studio) == ["made", "stale", "stale"]


def test_the_order_of_the_history_matters_and_can_be_chosen(studio):
    studio.make(all=True)
    first = shown(studio, 3)
    studio.sees(3, "2", "1")
    assert states(studio) == ["made", "made", "stale"]
    studio.refresh(3)
    assert not np.array_equal(shown(studio, 3), first)
    assert studio.inputs(studio.board.cards[2].take)["saw"] == [studio.board.cards[i].take for i in (1, 0)]
    studio.sees(3, "all")
    studio.refresh()
    assert np.array_equal(shown(studio, 3), first)  # found again, not made again


def test_asking_again_for_what_was_made_finds_it(studio, monkeypatch):
    studio.make(all=True)
    studio.reroll(1)
    monkeypatch.setattr(Studio, "_generate", lambda *_: pytest.fail("made again"))
    studio.reroll(1, seed=0)
    assert states(studio) == ["made"] * 3


def test_kept_takes_are_left_alone(studio):
    studio.make(all=True)
    studio.keep(3)
    studio.reroll(1)
    assert states(studio) == ["made", "stale", "stale"]
    studio.refresh()
    assert states(studio) == ["made", "made", "stale"] and studio.board.cards[2].kept
    studio.refresh(3)
    assert states(studio) == ["made"] * 3


def test_names_are_never_used_twice(studio):
    studio.make(all=True)
    studio.extend("wide shot of Character 1")
    first = studio.board.cards[3].name
    studio.undo()
    studio.extend("wide shot of Character 2")
    assert studio.board.cards[3].name != first and len(studio.takes(4)) == 1


def test_shots_that_have_a_take_are_not_made_again(studio):
    studio.make(all=True)
    with pytest.raises(ValueError, match="shot 3 has a take"):
        studio.make(3)
    studio.sees(3, "none")
    studio.keep(2)
    studio.reroll(2)
    assert states(studio) == ["made", "made", "stale"] and not studio.board.cards[1].kept
    studio.refresh()
    assert studio.inputs(studio.board.cards[2].take)["saw"] == []


def test_shots_do_not_see_themselves_through_others(studio):
    with pytest.raises(ValueError, match="sees itself through others"):
        studio.sees(2, "3")
    studio.sees(3, "1")
    studio.sees(2, "3")
    assert studio.board.in_order() == [0, 2, 1]
    studio.make(1)
    studio.make(3)
    studio.make(2)
    studio.reroll(1)
    studio.refresh()
    assert states(studio) == ["made"] * 3


def test_going_back_to_an_earlier_take(studio):
    (first,) = studio.make()
    studio.reroll(1)
    studio.prompt(1, "wide shot of Character 2")
    assert states(studio)[0] == "stale" and len(studio.takes(1)) == 2
    studio.keep(1, first)
    card = studio.board.cards[0]
    assert (card.take, card.prompt, card.seed, card.kept) == (first, PROMPTS[0], 0, True) and states(studio)[
        0
    ] == "made"
    with pytest.raises(ValueError, match="take: expected one of"):
        studio.keep(1, "shot-9-0")


def test_a_shot_waits_for_those_that_it_sees(studio):
    before = hashes(studio.folder)
    with pytest.raises(ValueError, match="shot 3 sees shot 1, of which there is no take"):
        studio.make(3)
    assert hashes(studio.folder) == before


# -- nothing is lost ---------------------------------------------------------------------------------------------------


def test_undo_takes_back_one_action_each(studio):
    boards = [studio.board]
    for act_ in (
        lambda: studio.make(all=True),
        lambda: studio.reroll(1),
        lambda: studio.refresh(),
        lambda: studio.extend("close-up of Character 1", cut=False),
        lambda: studio.sees(4, "recent:1"),
        lambda: studio.prompt(2, "wide shot of Character 2"),
        lambda: studio.remove(3),
        lambda: studio.fork("other"),
        lambda: studio.add("establishing shot"),
    ):
        act_()
        boards.append(studio.board)
    takes = hashes(studio.folder / "takes")
    for board in reversed(boards[:-1]):
        studio.undo()
        assert studio.board == board
    with pytest.raises(ValueError, match="nothing was done yet"):
        studio.undo()
    assert hashes(studio.folder / "takes") == takes


def test_a_crash_in_the_middle_resumes_where_it_stopped(studio, monkeypatch):
    generate, made = Studio._generate, []

    def crashing(self, board, index, inputs, name):
        if index == 1:
            raise KeyboardInterrupt
        generate(self, board, index, inputs, name)
        made.append(index)

    monkeypatch.setattr(Studio, "_generate", crashing)
    with pytest.raises(KeyboardInterrupt):
        studio.make(all=True)
    again = Studio(studio.folder)
    assert states(again) == ["made", "empty", "empty"]
    monkeypatch.setattr(Studio, "_generate", generate)
    again.make(all=True)
    assert states(again) == ["made"] * 3 and made == [0]


def test_a_take_written_but_not_on_the_board_is_found(studio, monkeypatch):
    written = Studio._write_board
    monkeypatch.setattr(Studio, "_write_board", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        studio.make()
    monkeypatch.setattr(Studio, "_write_board", written)
    monkeypatch.setattr(Studio, "_generate", lambda *_: pytest.fail("made again"))
    studio.make()
    assert states(studio)[0] == "made"


def test_two_who_act_at_once_are_told(studio):
    """Also where the other's board has the same turn: after an undo, or begun at the same time."""
    decided = studio.board
    other = Studio(studio.folder)
    for action in (lambda: other.fork("other"), lambda: (other.undo(), other.fork("another"))):
        action()
        before, branch = hashes(studio.folder), studio.board.branch
        with pytest.raises(ValueError, match="somebody else acted"):
            studio._write_board(replace(decided, branch="mine"))
        assert hashes(studio.folder) == before and studio.board.branch == branch


def test_one_undo_does_not_take_back_what_another_did(studio, monkeypatch):
    generate, other = Studio._generate, Studio(studio.folder)

    def between(self, board, index, inputs, name):
        generate(self, board, index, inputs, name)
        if index == 0:
            monkeypatch.setattr(Studio, "_generate", generate)

    monkeypatch.setattr(Studio, "_generate", between)
    studio.make()
    other.prompt(3, "close-up of Character 1")
    studio.make(2)
    studio.undo()
    assert studio.board.cards[2].prompt == "close-up of Character 1" and states(studio) == ["made", "empty", "empty"]


def test_a_damaged_board_is_named(studio):
    studio.fork("other")
    newest = sorted((studio.folder / "boards").iterdir())[-1]
    newest.write_text(newest.read_text()[:40])
    with pytest.raises(ValueError, match=f"{newest.name}.*remove the file"):
        studio.make()


def test_branches(studio):
    studio.make(all=True)
    studio.fork("dusk")
    studio.reroll(1)
    dusk = studio.board
    studio.switch("main")
    assert states(studio) == ["made"] * 3 and studio.board.cards[0].seed == 0
    studio.switch("dusk")
    assert studio.board.cards == dusk.cards and states(studio) == ["made", "stale", "stale"]
    for wrong, message in ((lambda: studio.fork("main"), "new name"), (lambda: studio.switch("dawn"), "dusk")):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_board_comes_back_from_its_text(studio):
    studio.sees(3, "2", "1")
    studio.make()
    studio.extend("close-up", size=SIZE, sees="1")
    assert Board.from_json(studio.board.to_json()) == studio.board
    for text in ("", "[]", "{}", '{"cards": 3}'):
        with pytest.raises(ValueError, match="expected a board"):
            Board.from_json(text)


# -- extending, giving, composing --------------------------------------------------------------------------------------


def test_extending_with_and_without_a_cut(studio):
    studio.make(all=True)
    studio.extend("wide shot of Character 1", cut=False)
    studio.extend("wide shot of Character 1", sees="recent:2")
    prompts = [studio.inputs(card.take)["prompt"] for card in studio.board.cards[3:]]
    assert prompts == ["wide shot of Character 1", "[SHOT CUT] wide shot of Character 1"]
    assert [len(studio.inputs(c.take)["saw"]) for c in studio.board.cards[3:]] == [3, 2]
    before = hashes(studio.folder)
    for wrong, message in (
        (lambda: studio.extend("[SHOT CUT] Character 1"), "no .SHOT CUT. typed by hand"),
        (lambda: studio.extend("Character 1", sees="6"), "expected other shots"),
        (lambda: studio.extend("Character 1", sees="relevant:0"), "relevant:K"),
        (lambda: studio.extend("Character 1", size=(2, 7, 8)), "that the patch"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert hashes(studio.folder) == before


def test_a_long_scene_sees_what_fits(studio):
    studio.make(all=True)
    for i in range(8):
        studio.extend(f"{('wide', 'close-up')[i % 2]} of Character {1 + i % 2}")
    assert studio.board.seen(8) == list(range(8))
    seen = studio.board.seen(10)
    assert len(seen) == 8 and seen == sorted(seen)


def test_media_of_ones_own(studio, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "face.png")
    write_video(tmp_path / "street.mp4", rng.integers(0, 255, (8, 16, 16, 3), np.uint8), 8.0)
    studio.give(1, tmp_path / "face.png")
    studio.give(2, tmp_path / "street.mp4")
    assert states(studio) == ["given", "given", "empty"]
    assert shown(studio, 1).shape == (1, 8, 8, 3) and shown(studio, 2).shape == (2, 8, 8, 3)
    studio.make()
    before = shown(studio, 1)
    studio.prompt(1, "close-up of Character 1")
    assert states(studio) == ["given", "given", "stale"] and np.array_equal(shown(studio, 1), before)
    studio.extend("wide shot of Character 2")
    assert studio.board.cards[3].size == SIZE
    for file, message in ((tmp_path / "no.png", "expected a picture"), (tmp_path / "scene", "expected a picture")):
        with pytest.raises(ValueError, match=message):
            studio.give(3, file)


def test_given_media_of_the_scene_file_are_kept_bitwise(tmp_path, weights):
    video = np.random.default_rng(0).standard_normal((*SIZE, 3)).astype(np.float32)
    shots = (replace(SCENE.shots[0], media="a"), *SCENE.shots[1:])
    write_scene(tmp_path / "scene", replace(SCENE, shots=shots), {"a.video": video})
    studio = Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))
    assert states(studio) == ["given", "empty", "empty"] and np.array_equal(shown(studio, 1), video)
    studio.make(all=True)
    scene = read_scene(studio.export(tmp_path / "out") / "scene")
    assert [shot.prompt for shot in scene.shots] == list(PROMPTS)
    assert np.array_equal(load_file(tmp_path / "out" / "scene" / "latents.safetensors")["shot-0.video"], video)


def test_the_middle_shot_between_two_given_ones(tmp_path):
    """Interpolation: bidirectional weights see what comes after a shot too."""
    weights = small_weights(tmp_path, "bidirectional")
    rng = np.random.default_rng(0)
    arrays = {f"{name}.video": rng.standard_normal((*SIZE, 3)).astype(np.float32) for name in "ab"}
    first, second, third = SCENE.shots
    shots = (replace(first, media="a"), replace(second, sees=(1, 3)), replace(third, media="b"))
    write_scene(tmp_path / "scene", replace(SCENE, shots=shots), arrays)
    studio = Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))
    studio.make()
    between = shown(studio, 2)
    studio.sees(2, "1")
    studio.refresh(2)
    assert not np.allclose(shown(studio, 2), between, atol=1e-3)


def test_settings_and_weights_are_inputs(studio, weights, tmp_path):
    studio.make(all=True)
    again = Studio.open(studio.folder, {"steps": 3})
    assert states(again) == ["stale"] * 3
    again.undo()
    assert states(again) == ["made"] * 3
    shutil.copy(small_weights(tmp_path, "bidirectional"), tmp_path / "other.safetensors")
    moved = Studio.open(studio.folder, {"weights": str(tmp_path / "other.safetensors")})
    assert states(moved) == ["made"] * 3
    with pytest.raises(ValueError, match="no longer what this project began with"):
        moved.reroll(1)


def test_export(studio, tmp_path):
    with pytest.raises(ValueError, match=r"shots \[1, 2, 3\] have no take"):
        studio.export(tmp_path / "out")
    studio.make(all=True)
    out = studio.export(tmp_path / "out")
    assert read_video(out / "film.mp4").frames.shape == (6, 8, 8, 3)
    assert {p.name for p in out.iterdir()} >= {"scene", "film.mp4", "shot-1.mp4", "shot-3.mp4", "contact-sheet.png"}
    with pytest.raises(ValueError, match="does not exist or is empty"):
        studio.export(tmp_path / "out")


# -- everything can be typed -------------------------------------------------------------------------------------------


def test_every_action_of_the_studio_is_a_command():
    public = {name for name, value in vars(Studio).items() if not name.startswith("_") and callable(value)}
    looking = {"take_folder", "inputs", "takes", "state", "branches", "begin", "open"}
    assert public - looking <= set(actions(None)) and all(function.__doc__ for function in actions(None).values())


def test_a_scripted_session(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    write_scene(tmp_path / "scene", SCENE)

    def lct(*words: str) -> str:
        capsys.readouterr()
        assert main(["direct", "scene", *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert main(["direct", "scene", "status"]) == 2
    assert "add --weights FILE" in capsys.readouterr().err
    assert lct("--weights", str(weights), "--steps", "2", "status").count("empty") == 3
    assert "takes/shot-1-" in lct("make")
    lct("make", "--all")
    lct("reroll", "1", "--seed", "7")
    assert lct("status").count("stale") == 2 and "sheet.png" in lct("look", "1")
    lct("refresh")
    lct("sees", "3", "2", "1")
    lct("prompt", "2", "wide shot of Character 2", "--cut", "no")
    lct("extend", "close-up of Character 1", "--no-cut", "--seed", "3", "--sees", "1 2")
    lct("keep", "4")
    lct("fork", "night")
    lct("remove", "3")
    assert "undone: remove 3" in lct("undo")
    lct("export", "out")
    assert (tmp_path / "out" / "film.mp4").is_file()
    assert "night" in lct("status") and "kept" in lct("status")
    assert main(["direct", "scene", "make", "9"]) == 2
    assert "shot: expected 1 to 4, got 9" in capsys.readouterr().err


def test_a_conversation(studio, capsys, monkeypatch):
    from lct.direct.terminal import converse

    lines = iter(["make", "", "reroll 9", "nonsense", 'prompt 1 "wide shot', "make --all", "quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    converse(studio)
    printed = capsys.readouterr()
    assert states(studio) == ["made"] * 3
    assert "expected 1 to 3, got 9" in printed.err and "nonsense" in printed.err and "quotation" in printed.err


def test_words_that_are_no_action(studio):
    with pytest.raises(SystemExit):
        act(studio, ["rerol", "1"])


def test_project_folders_are_refused_before_any_work(tmp_path, weights):
    with pytest.raises(ValueError, match="expected a director's project"):
        Studio(tmp_path)
    write_scene(tmp_path / "scene", SCENE)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "file").write_text("mine")
    with pytest.raises(ValueError, match="does not exist or is empty"):
        Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))
    bad = SceneFile(None, (replace(SCENE.shots[0], size=None),), fps=4.0)
    write_scene(tmp_path / "sizeless", bad)
    studio = Studio.begin(tmp_path / "sizeless", tmp_path / "other", settings(weights))
    with pytest.raises(ValueError, match="has no size"):
        studio.make()
    assert json.loads((tmp_path / "other" / "boards" / "000001.json").read_text())["turn"] == 0


def test_a_scene_made_in_one_go_sees_what_its_file_says(tmp_path, weights):
    """`lct sample` and `lct direct` make the same shots of the same file."""
    shots = (*SCENE.shots[:2], replace(SCENE.shots[2], sees=(2, 1)))
    write_scene(tmp_path / "scene", replace(SCENE, shots=shots))
    assert main(["sample", str(tmp_path / "scene"), "--weights", str(weights), "--steps", "2"]) == 0
    studio = Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))
    studio.make(all=True)
    made = load_file(tmp_path / "scene-sample" / "scene" / "latents.safetensors")
    for i in range(2):
        np.testing.assert_allclose(shown(studio, i + 1), made[f"shot-{i}.video"], atol=1e-4)
    plain = Studio.begin(tmp_path / "scene", tmp_path / "other", settings(weights))
    plain.sees(3, "all")
    plain.make(all=True)
    # the sampler keeps the keys of the context that shots were made in, the director computes them anew
    assert np.abs(shown(studio, 3) - made["shot-2.video"]).max() < np.abs(shown(plain, 3) - made["shot-2.video"]).max()


def test_a_choice_that_cannot_be_kept_is_refused(tmp_path, capsys):
    write_scene(tmp_path / "scene", replace(SCENE, shots=(*SCENE.shots[:2], replace(SCENE.shots[2], sees="recent:1"))))
    weights = small_weights(tmp_path, "bidirectional")
    assert main(["sample", str(tmp_path / "scene"), "--weights", str(weights)]) == 2
    assert "sees: expected weights tuned with context_causal" in capsys.readouterr().err
    ahead = (replace(SCENE.shots[0], sees=(2,)), *SCENE.shots[1:])
    write_scene(tmp_path / "ahead", replace(SCENE, shots=ahead))
    causal = small_weights(tmp_path, "context_causal")
    assert main(["sample", str(tmp_path / "ahead"), "--weights", str(causal)]) == 2
    assert "make it with lct direct" in capsys.readouterr().err
