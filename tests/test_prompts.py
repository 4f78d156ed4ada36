"""Prompts: what the linter finds; captioners and planners that are real commands, good, slow to learn and hostile."""

import json
import shutil
import struct
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lct.data.prompts import CAPTION, PLAN, ask, caption, caption_all, characters, plan, problems
from lct.data.scenefile import (
    GlobalPrompt,
    SceneFile,
    ShotEntry,
    parse_scene,
    read_scene,
    rewrite_scene,
    scene_text,
    write_scene,
)
from lct.data.video import write_video

CAST = {"1": "a young man with blonde hair, dark jacket", "2": "a young woman with brown curls, light dress"}
SHIP = GlobalPrompt(CAST, "the deck of a ship at sunset", "Character 2 meets Character 1. He guides her.")
# the per-shot prompts of Fig. 2, pronouns and all
PAPER = (
    "Close up shot of Character 1 looking back. The background now shows an orange sky and part of the mast structure.",
    "Wide shot showing Character 2 walks towards Character 1 near the railing on the right.",
    "Close up of Character 1 embracing Character 2 from behind and instruct her, as she keeps her eyes closed.",
    "Medium shot of Character 2, standing near a railing. The ship's structure is in the background. She is speaking.",
)


def scene(*prompts, shared=SHIP, cut=True):
    return SceneFile(shared, tuple(ShotEntry(prompt, cut) for prompt in prompts))


# ---- what is wrong with prompts


def test_the_papers_example_has_no_problems():
    assert problems(scene(*PAPER)) == []


def test_shots_with_and_without_cut_may_stand_side_by_side():
    shots = tuple(ShotEntry(prompt, i % 2 == 0) for i, prompt in enumerate(PAPER))
    assert problems(SceneFile(SHIP, shots)) == []


@pytest.mark.parametrize("cut", [True, False])
def test_a_single_shot_needs_no_second_tier(cut):
    for shared in (None, GlobalPrompt()):
        found = problems(scene("A man walks to the boat. He smiles.", shared=shared, cut=cut))
        assert [line.split(";")[0] for line in found] == (
            ["shot 1: cut = true on a single shot without global prompt"] if cut else []
        )


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (scene(*PAPER, "Character 3 waves."), ["shot 5: names Character 3, not described; write 3 = "]),
        (scene(*PAPER, "Character 1 and Character Rose-2. "), ["shot 5: names Character Rose-2, not described"]),
        (scene(*PAPER[:1]), ["global: no shot names Character 2; "]),
        (scene(*PAPER, " "), ["shot 5: the prompt is empty; "]),
        (
            scene(*PAPER, "The man and a young woman talk."),
            ['shot 5: "the man" may be', 'shot 5: "a young woman" may be'],
        ),
        (
            scene(*PAPER, "Over the shoulder of THE  Girl."),
            ['shot 5: "the girl" may be anyone; write who it is, such as'],
        ),
        (scene(*PAPER, "Behind Character 1 another boy runs."), ['shot 5: "another boy" may be anyone; ']),
        (scene(*PAPER, "Wide shot, she waits. She turns to Character 1."), ['shot 5: "she" may be anyone; ']),
        (scene(*PAPER, "Close-up of his face."), ['shot 5: "his" may be anyone; ']),
        (scene(*PAPER, shared=None), ["global: there is no environment; ", "global: there is no story; ", *[""] * 6]),
        (scene(*PAPER, shared=GlobalPrompt(CAST, "a ship")), ["global: there is no story; write story = "]),
        (scene(*PAPER, shared=GlobalPrompt(CAST, " ", "rain")), ["global: there is no environment; "]),
        (scene(*PAPER, shared=GlobalPrompt(CAST | {"2": ""}, "a ship", "rain")), ["global: Character 2 has no descr"]),
        (
            scene(*PAPER, shared=GlobalPrompt(CAST, "a ship", "Character 9 sinks it")),
            ["global: story names Character 9"],
        ),
    ],
)
def test_a_problem_is_one_line_with_its_place_and_fix(wrong, expected):
    found = problems(wrong)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start) and "; " in line and "\n" not in line


@pytest.mark.parametrize(
    "prompt",
    ["Character 1 lights the man-made torch.", "The theatre, where Character 1 sheds light.", "Hershey bars, snow.",
     "First-person view of the ship's mast", "the side of a boat: humans wave to Character 2"],
)  # fmt: skip
def test_what_only_looks_ambiguous_is_let_through(prompt):
    assert problems(scene(*PAPER, prompt)) == []


def test_characters_are_named_by_their_id_alone():
    assert characters("Character 2's hat. Character 10, Character Tom-B. and Character 2; Characters talk") == [
        "2", "10", "Tom-B",
    ]  # fmt: skip


@pytest.mark.parametrize("template", [CAPTION, PLAN])
def test_the_answer_that_a_template_shows_is_a_scene_without_problems(template):
    shown = template[template.index("[global]") :].split("\n\n")[0]
    example = parse_scene(shown, "example")
    assert problems(example) == [] and example.shots[0].cut
    assert example.shots[0].size == ((16, 30, 30) if template is PLAN else None)
    assert "[SHOT CUT]" in template and '"the man"' in template and "establishing" in template


# ---- commands


@pytest.fixture
def command(tmp_path):
    """Makes a command of Python code that finds its request in `asked` and the number of earlier calls in `calls`."""
    folder = tmp_path / "command"
    folder.mkdir()

    def make(code, name="script.py"):
        script = folder / name
        script.write_text(
            "import json, os, pathlib, sys, time\nasked = json.load(sys.stdin)\n"
            "log = pathlib.Path(__file__).with_suffix('.log')\n"
            "calls = len(log.read_text().split()) if log.exists() else 0\n"
            f"log.open('a').write('call\\n')\n{code}\n"
        )
        return [sys.executable, "-I", "-S", str(script)]

    make.calls = lambda name="script.log": len((folder / name).read_text().split())
    return make


def test_a_command_is_given_instructions_and_absolute_paths_and_no_shell(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.png").touch()
    words = ["$(touch hacked)", "; touch hacked", "*"]
    answer = ask([*command("print(json.dumps([asked, sys.argv[1:]]))"), *words], "“Tell” me\n", ["a b.png"])
    asked, seen = json.loads(answer)
    assert asked == {"instructions": "“Tell” me\n", "files": [str(tmp_path / "a b.png")]}
    assert seen == words and not (tmp_path / "hacked").exists()


def test_a_command_need_not_read_its_input():
    assert ask([sys.executable, "-I", "-S", "-c", "print('yes')"], "x" * 200_000) == "yes\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('a' * 40_000, 'no such model', file=sys.stderr); sys.exit(3)", "got exit code 3; .*a no such model$"),
        ("os.kill(os.getpid(), 9)", "got exit code -9; mend it, it said: nothing"),
        ("sys.stdout.buffer.write(b'ab\\xff')", r"got bytes that are not UTF-8 \(invalid start byte at 2\)"),
        ("sys.stdout.write('x' * (1 << 20) + 'y')", "got more than 1048576 bytes"),
        ("while True: print('x' * 10_000, flush=True)", "got more than 1048576 bytes"),
        (
            "print('\\x1b[2J \\n bad key', file=sys.stderr); sys.exit(1)",
            r"exit code 1; mend it, it said: \[2J bad key$",
        ),
    ],
)
def test_a_command_that_fails_is_told_in_one_line(command, code, words):
    with pytest.raises(ValueError, match=words) as caught:
        ask(command(code), "go", timeout=20)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "code",
    [
        "time.sleep(30)",
        "print('half', flush=True); os.close(1); os.close(2); time.sleep(30)",
        "while True: os.write(2, b'busy' * (1 << 18))",
    ],
)
def test_a_command_that_does_not_end_is_ended(command, code):
    began = time.monotonic()
    with pytest.raises(ValueError, match="got none within 0.4 s; mend it"):
        ask(command(code), "go", timeout=0.4)
    assert time.monotonic() - began < 5


def test_what_a_command_started_ends_with_it(command, tmp_path):
    code = f"time.sleep(0.8) if os.fork() else (time.sleep(1.2), open({str(tmp_path / 'late')!r}, 'w'))"
    with pytest.raises(ValueError, match="got none within 0.5 s"):
        ask(command(code), "go", timeout=0.5)
    time.sleep(1.0)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-captioner-here"], "command: expected a program, got 'no-such-captioner-here': .*; check its path"),
        (["a\0b"], "command: expected a program"),
        ([], "command: expected a program and its arguments, got "),
        ("python caption.py", "command: expected a program and its arguments, got 'python caption.py'; split it"),
    ],
)
def test_what_is_no_command_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        ask(words, "go")


# ---- a captioner


def good(shots=3, **extra):
    """The TOML of a right answer, with further values in its last shot."""
    entries = [ShotEntry(f"Medium shot {i} of Character {i % 2 + 1}.", True) for i in range(shots)]
    text = scene_text(SceneFile(SHIP, tuple(entries)))
    return text + "\n".join(f"{key} = {value}" for key, value in extra.items())


@pytest.fixture
def folder(tmp_path):
    """A scene as `ingest` leaves it: latents and everything but prompts."""
    rng, latents, shots = np.random.default_rng(0), {}, []
    for i, frames in enumerate((5, 1, 4)):
        latents[f"shot-{i}.video"] = rng.uniform(-1, 1, (frames, 4, 6, 3)).astype(np.float32)
        shots.append(ShotEntry("", True, (frames, 4, 6), i, f"shot-{i}", (9 * i, 9 * i + 5)))
    path = tmp_path / "scene-000"
    write_scene(path, SceneFile(GlobalPrompt(), tuple(shots), 8.0, "ship.mp4", "pixel/8"), latents)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_captioner_sees_frames_and_its_prompts_are_written(command, folder):
    before, latents = read_scene(folder), contents(folder)["latents.safetensors"]
    copy = "pathlib.Path(__file__).with_name('seen.json').write_text(json.dumps([asked['instructions'], ["
    copy += "(os.path.basename(p), open(p, 'rb').read(24).hex()) for p in asked['files']]]))\n"
    words = command(f"{copy}print({good()!r})")
    done = caption(folder, words)
    assert read_scene(folder) == done and problems(done) == []
    assert done.global_prompt == SHIP and [shot.prompt[:13] for shot in done.shots] == [
        f"Medium shot {i}" for i in range(3)
    ]
    for shot, old in zip(done.shots, before.shots, strict=True):
        assert (shot.cut, shot.size, shot.seed, shot.media, shot.frames) == (
            old.cut, old.size, old.seed, old.media, old.frames,
        )  # fmt: skip
    assert (done.fps, done.source, done.codec) == (8.0, "ship.mp4", "pixel/8")
    assert contents(folder)["latents.safetensors"] == latents and len(contents(folder)) == 2

    asked, files = json.loads((folder.parent / "command" / "seen.json").read_text())
    assert asked.startswith(CAPTION) and "shot 2: cut = true, 0.1 s, shot-2-frame-1.png\n" in asked
    names = [f"shot-1-frame-{k}.png" for k in (1, 2, 3)] + ["shot-2-frame-1.png"]
    assert [name for name, _ in files] == names + [f"shot-3-frame-{k}.png" for k in (1, 2, 3)]
    for _, head in files:
        png = bytes.fromhex(head)
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (48, 32)


def test_a_captioner_may_see_the_film_itself(command, folder, tmp_path):
    """Frames of the film's own size, of the right moments, one a second."""
    frames = np.zeros((23, 64, 96, 3), np.uint8)
    frames[:] = 10 * np.arange(23, dtype=np.uint8)[:, None, None, None]
    write_video(tmp_path / "ship.mp4", frames, 1.0)
    copy = "shutil.copytree(os.path.dirname(asked['files'][0]), pathlib.Path(__file__).with_name('seen'))\n"
    words = command(f"import shutil\n{copy}print({good()!r})")
    assert problems(caption(folder, words, films=tmp_path)) == []
    seen = {f.name: np.asarray(Image.open(f)) for f in (folder.parent / "command" / "seen").iterdir()}
    numbers = {f"shot-{i + 1}-frame-{k + 1}.png": 9 * i + k for i in range(3) for k in range(5)}
    assert seen.keys() == numbers.keys()
    assert all(abs(int(np.median(x)) - 10 * numbers[n]) <= 3 and x.shape == (64, 96, 3) for n, x in seen.items())


def test_scenes_of_a_film_are_described_in_its_order_and_only_once(command, folder, tmp_path):
    """Nothing of a scene that has prompts is written, and one that is named itself is described again."""
    frames = np.zeros((23, 64, 96, 3), np.uint8)
    write_video(tmp_path / "ship.mp4", frames, 1.0)
    root = tmp_path / "scenes"
    scene = read_scene(folder)
    for i, name in enumerate(("b", "a", "c")):
        shutil.copytree(folder, root / name)
        shots = tuple(replace(s, frames=(6 * i + 2 * k, 6 * i + 2 * k + 2)) for k, s in enumerate(scene.shots))
        rewrite_scene(root / name, replace(scene, shots=shots))
    done = caption(root / "a", command(f"print({good()!r})"))
    again = command(f"print({good().replace('Medium shot', 'Wide shot')!r})")
    assert [(f.name, now) for f, now in caption_all(root, again, tmp_path)] == [("b", True), ("a", False), ("c", True)]
    assert read_scene(root / "a") == done and read_scene(root / "c").shots[0].prompt.startswith("Wide")
    assert list(caption_all(root / "a", again)) == [(root / "a", True)]
    assert read_scene(root / "a").shots[0].prompt.startswith("Wide")


def test_a_captioner_is_not_shown_another_film(command, folder, tmp_path):
    write_video(tmp_path / "ship.mp4", np.zeros((12, 16, 16, 3), np.uint8), 1.0)
    with pytest.raises(ValueError, match=r"ship.mp4: expected a frame 12, the film ends before"):
        caption(folder, command(f"print({good()!r})"), films=tmp_path)


def test_a_cut_is_the_films_and_not_the_captioners(command, folder):
    words = command(f"print({good().replace('cut = true', 'cut = false')!r})")
    assert all(shot.cut for shot in caption(folder, words).shots)


def test_an_answer_may_be_wrapped(command, folder):
    words = command(f"print('Here it is:\\n```toml\\n' + {good()!r} + '```\\nAnything else?')")
    assert caption(folder, words).global_prompt == SHIP


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (good().replace("Character 1.", "the man."), "'shot 1: \"the man\" may be anyone'"),
        (
            good().replace("Medium", "[SHOT CUT] Medium"),
            "'answer: shot 1: prompt: expected no [SHOT CUT] typed by hand'",
        ),
        (good(2), "'answer: expected 3 shots, got 2'"),
        ("I cannot help with that.", "'answer: expected TOML in UTF-8'"),
    ],
)
def test_a_captioner_is_told_what_is_wrong_and_mends_it(command, folder, wrong, told):
    words = command(f"print({good()!r} if {told} in asked['instructions'] else {wrong!r})")
    assert problems(caption(folder, words)) == []
    assert command.calls() == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            good().replace("ium", "ium Character 7, Character 8, Character 9"),
            "got: shot 1: names Character 7, .* …; ask",
        ),
        (good().replace("Medium", "[shot cut]"), r"expected no \[SHOT CUT\] typed by hand"),
        ("a = " + "[" * 9000, "after 3 tries, got: answer: expected TOML"),
        ("not = 'a scene\x1b[2J'", "after 3 tries, got: answer: expected TOML"),
        (good(media="'../../secret'"), "media: expected a name without folders"),
        (good(prompt=3), "answer: expected TOML"),
        ("", "answer: shot: expected 1 to 1000 shots, got 0"),
    ],
)
def test_a_captioner_that_never_learns_changes_nothing(command, folder, answer, words):
    before = contents(folder)
    with pytest.raises(ValueError, match=words) as caught:
        caption(folder, command(f"print({answer!r})"))
    assert contents(folder) == before and command.calls() == 3
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_captioner_that_fails_is_not_asked_again(command, folder):
    before = contents(folder)
    for code, words in (
        ("sys.exit('no key')", "exit code 1; .*no key"),
        ("print('x' * (2 << 20))", "more than 1048576"),
    ):
        with pytest.raises(ValueError, match=words):
            caption(folder, command(code))
    assert contents(folder) == before and command.calls() == 2


def test_a_scene_without_latents_or_tries_cannot_be_captioned(command, folder, tmp_path):
    write_scene(tmp_path / "bare", scene("a"))
    with pytest.raises(ValueError, match="shot 1: media: expected the name of given latents"):
        caption(tmp_path / "bare", command(""))
    with pytest.raises(ValueError, match="tries: expected at least 1, got 0"):
        caption(folder, command(""), tries=0)


# ---- a planner

SIZE = (16, 30, 40)


def test_a_planner_turns_an_idea_into_a_scene_file(command, tmp_path):
    words = command(f"open(__file__ + '.asked', 'w').write(asked['instructions']); print({good(size=[1, 30, 40])!r})")
    planned = plan("two strangers\nmeet on a ship", words, 3, SIZE)
    assert [shot.size for shot in planned.shots] == [SIZE, SIZE, (1, 30, 40)] and planned.global_prompt == SHIP
    asked = (tmp_path / "command" / "script.py.asked").read_text()
    assert asked.startswith(PLAN)
    assert asked.endswith("Number of shots: 3\nsize = [16, 30, 40]\nThe idea: two strangers\nmeet on a ship\n")
    write_scene(tmp_path / "planned", planned)
    assert read_scene(tmp_path / "planned") == planned


@pytest.mark.parametrize("size", [[17, 30, 40], [16, 30, 44], [16, 15, 20]])
def test_a_planner_is_told_the_size_and_mends_it(command, size):
    told = "shot 3: size: expected [16, 30, 40] or fewer frames"
    words = command(f"print({good()!r} if {told!r} in asked['instructions'] else {good(size=size)!r})")
    assert all(shot.size == SIZE for shot in plan("a storm", words, 3, SIZE).shots)
    assert command.calls() == 2


def test_a_planner_gives_no_media_and_may_say_what_shots_see(command):
    words = command(f"print({good(media=chr(39) + 'shot-0' + chr(39), sees=[1], seed=5)!r})")
    assert plan("a storm", words, 3, SIZE).shots[-1] == ShotEntry(
        "Medium shot 2 of Character 1.", True, SIZE, 5, sees=(1,)
    )


def test_a_planner_that_never_learns_is_refused(command):
    with pytest.raises(ValueError, match="after 2 tries, got: answer: expected 4 shots, got 3; "):
        plan("a storm", command(f"print({good()!r})"), 4, SIZE, tries=2)
    assert command.calls() == 2


@pytest.mark.parametrize(
    ("idea", "shots", "size"), [(" ", 3, SIZE), ("a", 0, SIZE), ("a", 3, (0, 2, 2)), ("a", 3, (2, 2))]
)
def test_a_plan_of_nothing_is_refused(idea, shots, size):
    with pytest.raises(ValueError, match="plan: expected an idea, "):
        plan(idea, ["true"], shots, size)
