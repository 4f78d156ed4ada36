"""VBench and EntityBench: what they would read is there, what VBench writes is read, what is foreign is told."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind tests/, which has a film.py too

from findings.tables import TABLE_1, markdown, our_row  # noqa: E402
from findings.vbench import commands, read_json, read_results, to_bytes, write_custom, write_entitybench  # noqa: E402

from lct.data.video import read_video  # noqa: E402

PROMPT = 'A cat / a dog: "50 %" \n of 猫 \' ' + "very " * 200 + "long"
FIVE = ("aesthetic_quality", "imaging_quality", "subject_consistency", "background_consistency", "overall_consistency")


def shot(value, frames=2):
    return np.full((frames, 16, 16, 3), value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scenes of two shots and of one, one shot left out; a prompt stands twice."""
    videos = {"in/the park": [(PROMPT, shot(0.25)), (PROMPT, shot(0.5, 3))], "b": [None, ("a dog", shot(0.75))]}
    return write_custom(tmp_path_factory.mktemp("vbench") / "it's here", videos, 8.0)


NAMES = ("scene-0001_shot-001.mp4", "scene-0001_shot-002.mp4", "scene-0002_shot-002.mp4")
SCORES = {
    "aesthetic_quality": (0.5, 0.7, 0.4),
    "imaging_quality": (60.0, 70.0, 50.0),
    "subject_consistency": (0.9, 1.0, 0.8),
    "background_consistency": (0.8, 0.9, 1.0),
    "overall_consistency": (0.25, 0.35, -0.1),
}


def as_vbench(scores=SCORES, prefix="videos/"):
    """Results as VBench's code writes them: imaging quality in percent a video, but as a fraction over all."""
    record = {}
    for name, values in scores.items():
        mean = sum(values) / len(values) / (100 if name == "imaging_quality" else 1)
        entries = [{"video_path": prefix + n, "video_results": v} for n, v in zip(NAMES, values, strict=True)]
        record[name] = [mean, entries]
    record["subject_consistency"][0] += 0.01  # weighed by frames
    record["background_consistency"][1][0]["cnt_per_video"] = 1
    return record


def results(folder, record, name="results_2026-01-01-00:00:00_eval_results.json"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(record if isinstance(record, str) else json.dumps(record, indent=4))
    return file


# What VBench reads


def test_every_shot_is_a_film_with_its_prompt(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "prompts.json", "videos"]
    assert tuple(sorted(path.name for path in (folder / "videos").iterdir())) == NAMES
    prompts = json.loads((folder / "prompts.json").read_text(encoding="ascii"))
    assert prompts == {NAMES[0]: PROMPT, NAMES[1]: PROMPT, NAMES[2]: "a dog"}
    film = read_video(folder / "videos" / NAMES[1])
    assert film.frames.shape == (3, 16, 16, 3) and film.fps == 8 and abs(film.frames.mean() - 128) < 3
    index = json.loads((folder / "index.json").read_text())["files"]
    assert [tuple(index[name].values()) for name in NAMES] == [("in/the park", 1), ("in/the park", 2), ("b", 2)]


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ({"a": [("p", shot(0.5)), ("p", shot(0.5, 1))]}, "'a', shot 2: expected two frames"),
        ({"a": [(" ", shot(0.5))]}, "'a', shot 1: expected a prompt"),
        ({"a": [("p", shot(1.5))]}, r"in \[0, 1\], got float64"),
        ({"a": [("p", shot(np.nan))]}, r"in \[0, 1\]"),
        ({"a": [("p", shot(7))]}, r"int64 \[2, 16, 16, 3\]"),
        ({"a": [("p", np.zeros((2, 0, 4, 3)))]}, r"\[2, 0, 4, 3\]"),
        ({"a": [None]}, "a shot at least"),
        ({}, "a shot at least"),
    ],
)
def test_what_vbench_cannot_score_is_refused_and_nothing_is_left(tmp_path, videos, message):
    with pytest.raises(ValueError, match=message):
        write_custom(tmp_path / "out", videos, 8)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_kept(folder):
    with pytest.raises(ValueError, match="does not exist or is empty"):
        write_custom(folder, {"a": [("p", shot(0.5))]}, 8)


def test_the_commands_score_the_papers_dimensions(folder, tmp_path):
    first, *lines = map(shlex.split, commands(folder))
    assert first == ["cd", str(folder)] and len(lines) == len(FIVE)
    for line, dimension in zip(lines, FIVE, strict=True):
        assert line[:2] == ["vbench", "evaluate"]
        options = dict(zip(line[2::2], line[3::2], strict=True))
        assert options == {
            "--mode": "custom_input",
            "--dimension": dimension,
            "--videos_path": "videos",
            "--prompt_file": "prompts.json",
            "--output_path": f"results/{dimension}",
        }
        assert (folder / options["--videos_path"]).is_dir() and (folder / options["--prompt_file"]).is_file()
    with pytest.raises(FileNotFoundError, match="index.json"):
        commands(tmp_path)


# What VBench writes


def test_scores_are_means_over_scenes_in_percent(folder, tmp_path):
    found = read_results(folder, results(tmp_path, as_vbench()))
    assert {name: round(score.mean, 6) for name, score in found["columns"].items()} == {
        "aesthetic": 50.0,  # of the scenes' means 60 and 40
        "quality": 57.5,  # 65 and 50
        "consistency": 90.0,  # (85 + 95) / 2 and 90
        "text": 10.0,  # 30 and −10
    }
    assert found["columns"]["aesthetic"].half == pytest.approx(12.7062 * 10)
    assert found["scenes"]["in/the park"]["consistency"].mean == pytest.approx(90)
    assert found["scenes"]["in/the park"]["consistency"].half == pytest.approx(12.7062 * 5)
    assert found["scenes"]["b"]["quality"].mean == 50 and np.isnan(found["scenes"]["b"]["quality"].half)
    assert found["vbench"]["imaging_quality"] == pytest.approx(60)
    assert found["vbench"]["subject_consistency"] == pytest.approx(91)
    assert "50.00 ± 127.06" in markdown(TABLE_1, [our_row("ours", found["columns"])])


def test_a_file_for_each_dimension_in_the_folders_of_the_commands(folder, tmp_path):
    for name, value in as_vbench(prefix="C:\\elsewhere\\videos\\").items():
        results(tmp_path / name, {name: value})
    apart = read_results(folder, tmp_path)
    together = read_results(folder, results(tmp_path / "one", as_vbench()))
    assert (apart["columns"], apart["vbench"]) == (together["columns"], together["vbench"])
    assert apart["scenes"]["in/the park"] == together["scenes"]["in/the park"]


def test_columns_that_were_not_scored_are_left_out(folder, tmp_path):
    record = as_vbench()
    kept = {name: record[name] for name in ("aesthetic_quality", "subject_consistency")} | {
        "motion_smoothness": [1, []]
    }
    found = read_results(folder, results(tmp_path, kept))
    assert list(found["columns"]) == ["aesthetic"] and set(found["vbench"]) == set(kept) - {"motion_smoothness"}


def changed(change):
    record = as_vbench()
    change(record)
    return record


def entry(record, i, dimension="overall_consistency"):
    return record[dimension][1][i]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("", "expected whole JSON"),
        ('{"aesthetic_quality": [0.5, [', "expected whole JSON"),
        ("[" * 100_000, "expected whole JSON"),
        ('{"aesthetic_quality": [NaN, []]}', "NaN"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[1]", "a JSON object, got a list"),
        ({"text": [1, []]}, "got none of them"),
        ({"text_alignment": 3}, "got none of them"),
        ({"overall_consistency": 0.3}, r"expected \[mean"),
        ({"overall_consistency": [0.3, [], []]}, r"expected \[mean"),
        (changed(lambda r: r["overall_consistency"][1].pop()), "every video, got none of scene-0002_shot-002.mp4"),
        (changed(lambda r: entry(r, 1).update(video_path="videos/cat.mp4")), "index.json names, got 'videos/cat.mp4'"),
        (changed(lambda r: entry(r, 1).update(video_path=NAMES[0])), "each video once"),
        (changed(lambda r: entry(r, 1).update(video_results=10.98)), "video 2: video_results: expected a score"),
        (changed(lambda r: entry(r, 1).update(video_results=True)), "video_results: expected a score, got True"),
        (changed(lambda r: entry(r, 1).update(video_results=10**400)), "video_results: expected a score"),
        (changed(lambda r: entry(r, 1).pop("video_path")), "the path of a video, got nothing"),
        (changed(lambda r: r["overall_consistency"][1].insert(0, "x")), "the path of a video, got nothing"),
        (changed(lambda r: r["imaging_quality"].__setitem__(0, 60.0)), "a mean of its videos"),
        (changed(lambda r: r["overall_consistency"].__setitem__(0, 0.9)), "a mean of its videos"),
        (changed(lambda r: r["overall_consistency"].__setitem__(0, None)), "a mean of its videos, .* got None"),
    ],
)
def test_what_is_damaged_or_foreign_is_told_with_the_files_name(folder, tmp_path, record, message):
    with pytest.raises(ValueError, match=message) as error:
        read_results(folder, results(tmp_path, record))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_same_dimension_twice_is_told(folder, tmp_path):
    for name in ("a_eval_results.json", "b/b_eval_results.json"):
        results(tmp_path, as_vbench(), name)
    with pytest.raises(ValueError, match="aesthetic_quality once"):
        read_results(folder, tmp_path)


def test_results_that_are_not_there_are_told(folder, tmp_path):
    for path in (None, tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match="_eval_results.json"):
            read_results(folder, path)


@pytest.mark.parametrize(
    "index", ["{}", '{"files": {}}', '{"files": {"a.mp4": 1}}', '{"files": {"a": {"scene": "b"}}}']
)
def test_an_index_that_is_damaged_is_told(tmp_path, index):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match="write the folder with write_custom again"):
        read_results(tmp_path)


def test_scores_against_other_prompts_are_told(folder, tmp_path):
    """VBench run without --prompt_file takes the files' names for prompts, and says so beside its results."""
    file = results(tmp_path, as_vbench(), "x_eval_results.json")

    def used(prompts):
        entries = [{"prompt_en": p, "video_list": [f"videos/{n}"]} for n, p in zip(NAMES, prompts, strict=True)]
        results(tmp_path, entries, "x_full_info.json")
        return read_results(folder, file)

    assert used([PROMPT, PROMPT, "a dog"])
    with pytest.raises(ValueError, match=r"x_full_info.json: scene-0001_shot-001.mp4: .* got 'scene-0001_shot'"):
        used(["scene-0001_shot", PROMPT, "a dog"])
    for other in ("{", "3", '[{"prompt_en": 1}]', '[{"video_list": []}]'):
        results(tmp_path, other, "x_full_info.json")
        with pytest.raises(ValueError, match="x_full_info.json"):
            read_results(folder, file)


def test_frames_become_bytes():
    frames = to_bytes(np.linspace(0, 1, 24).reshape(2, 2, 2, 3), "x")
    assert frames.dtype == np.uint8 and frames.min() == 0 and frames.max() == 255
    assert to_bytes(frames, "x") is frames


def test_a_file_of_another_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("findings.vbench.MAX_BYTES", 10)
    with pytest.raises(ValueError, match="at most 10 bytes, got 11"):
        read_json(results(tmp_path, " " * 9 + "{}"))


# EntityBench


def test_entitybench_finds_its_shots(tmp_path):
    name = "000020ca-f66b__run15__i0_j19__T240"
    out = write_entitybench(tmp_path / "films", {name: [[shot(0.5), None, shot(0.2)], [shot(0.7)]]}, 8)
    assert sorted(path.name for path in (out / name).iterdir()) == ["001_001.mp4", "001_003.mp4", "002_001.mp4"]
    assert abs(read_video(out / name / "001_003.mp4").frames.mean() - 51) < 3


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ({"../a": [[shot(0.5)]]}, "the name of a script"),
        ({"": [[shot(0.5)]]}, "the name of a script"),
        ({"a": [[shot(0.5, 1)]]}, "scene 1, shot 1: expected two frames"),
        ({"a": [[None] * 1000]}, "three digits"),
        ({"a": [[None]]}, "a shot at least"),
    ],
)
def test_what_entitybench_cannot_find_is_refused(tmp_path, episodes, message):
    with pytest.raises(ValueError, match=message):
        write_entitybench(tmp_path / "films", episodes, 8)
    assert not list(tmp_path.iterdir())
