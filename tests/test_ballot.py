"""The blind user study: no page tells a method, ranks come back through the key, a bad ballot is named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind tests/, which has a film.py too

from findings.ballot import read_ballots, write_ballots  # noqa: E402

from lct.data.video import read_video, write_video  # noqa: E402

METHODS, SCENES = ("keyframes", "isolated", "joint"), ("park", "</script><b>", "__proto__")
QUALITY = {"joint": 0, "isolated": 1, "keyframes": 2}  # the order in which the participants like them


def shots(value):
    return [np.full((1, 16, 16, 3), value), np.full((2, 16, 16, 3), value)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of three methods, three scenes and four participants; the film of `joint` in the park is a file."""
    root = tmp_path_factory.mktemp("study")
    films = {m: {s: shots((3 * i + j) / 10) for j, s in enumerate(SCENES)} for i, m in enumerate(METHODS)}
    films["joint"]["park"] = root / "lct-joint.mp4"
    write_video(films["joint"]["park"], np.full((3, 16, 16, 3), 200, np.uint8), 8)
    about = {"park": "A dog & a <cat> meet."}
    write_ballots(root / "study", root / "key.json", films, 8, ballots=4, about=about)
    return root


def key(study):
    return json.loads((study / "key.json").read_text())


def ballot(study, number=1, like=None):
    """A ballot as the page makes it, from a participant who likes the methods in this order."""
    (name,) = [name for name in key(study)["ballots"] if name.startswith(f"{number:03d}-")]
    shown = key(study)["ballots"][name]
    ranks = []
    for scene in shown["scenes"]:
        liked = [(like or QUALITY)[film["method"]] for film in scene["films"]]
        order = {letter: 1 + sorted(liked).index(value) for letter, value in zip("ABC", liked, strict=True)}
        ranks.append({"scene": scene["scene"], "ranks": order})
    return {"ballot": name, "hash": shown["hash"], "ranks": ranks}


def saved(folder, content, name="ballot.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


# The pages


def test_nothing_that_participants_get_names_a_method(study):
    files = sorted(path for path in (study / "study").rglob("*") if path.is_file())
    films = [path for path in files if path.suffix == ".mp4"]
    assert [path.name for path in films] == [f"film-{i:03d}.mp4" for i in range(1, 10)]
    assert [path.name for path in files if path not in films] == [f"ballot-{i:03d}.html" for i in range(1, 5)]
    for page in files:
        content = page.read_bytes()
        assert not any(method.encode() in content for method in (*METHODS, "lct"))


def test_a_page_needs_the_films_and_nothing_else(study):
    for path in (study / "study").glob("*.html"):
        page = path.read_text(encoding="utf-8")
        sources = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert len(sources) == 9 and len(set(sources)) == 9
        assert all((path.parent / source).is_file() for source in sources)
        assert not re.search(
            r"https?:|//\w|url\(|@import|fetch\(|XMLHttpRequest|sendBeacon|WebSocket|localStorage", page
        )
        assert "A dog &amp; a &lt;cat&gt; meet." in page and "</script><b>" not in page


def test_the_key_knows_every_film(study):
    for shown in key(study)["ballots"].values():
        for scene in shown["scenes"]:
            for film in scene["films"]:
                frames = read_video(study / "study" / film["file"]).frames
                value = 255 * (3 * METHODS.index(film["method"]) + SCENES.index(scene["scene"])) / 10
                joint_in_park = film["method"] == "joint" and scene["scene"] == "park"
                assert len(frames) == 3 and abs(frames.mean() - (200 if joint_in_park else value)) < 3


def test_orders_differ_between_scenes_and_ballots_and_come_from_the_seed(study, tmp_path):
    def orders(content):
        shown = [scene for entry in content["ballots"].values() for scene in entry["scenes"]]
        return [tuple(film["method"] for film in scene["films"]) for scene in shown]

    assert len(set(orders(key(study)))) > 3
    made = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        films = {m: {str(s): shots(0.5) for s in range(4)} for m in METHODS}
        write_ballots(tmp_path / name, tmp_path / f"{name}.json", films, 8, ballots=2, seed=seed)
        made.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert made[0] == made[1] and orders(made[0]) != orders(made[2])


def test_the_numbers_of_films_follow_neither_methods_nor_scenes(study):
    shown = [film for entry in key(study)["ballots"].values() for scene in entry["scenes"] for film in scene["films"]]
    by_number = [method for _, method in sorted({(film["file"], film["method"]) for film in shown})]
    runs = sum(a == b for a, b in zip(by_number, by_number[1:], strict=False))
    assert len(by_number) == 9 and runs < 6 and [by_number[i::3] for i in range(3)] != [[m] * 3 for m in METHODS]


def test_every_letter_shows_every_method_about_as_often(tmp_path):
    films = {m: {str(s): shots(0.5) for s in range(3)} for m in METHODS}
    write_ballots(tmp_path / "a", tmp_path / "key.json", films, 8, ballots=60)
    content = json.loads((tmp_path / "key.json").read_text())
    first = [scene["films"][0]["method"] for entry in content["ballots"].values() for scene in entry["scenes"]]
    assert all(40 < first.count(method) < 80 for method in METHODS)


FILMS = {"a": {"s": shots(0.1)}, "b": {"s": shots(0.2)}}


@pytest.mark.parametrize(
    ("films", "options", "message"),
    [
        ({"a": {"s": shots(0.1)}}, {}, "2 to 26 methods, got 1"),
        ({str(i): {"s": shots(0.1)} for i in range(27)}, {}, "2 to 26 methods, got 27"),
        ({"a": {"s": shots(0.1)}, "b": {"t": shots(0.1)}}, {}, "same scenes of a and b, got 's'"),
        ({"a": {}, "b": {}}, {}, "a scene at least"),
        (FILMS | {"c": {"s": "none.mp4"}}, {}, "c, s: expected an mp4 file, got none.mp4"),
        (FILMS | {"c": {"s": []}}, {}, "c, s: expected shots of one size, got no shot"),
        (FILMS | {"c": {"s": [*shots(0.1), np.zeros((1, 8, 8, 3))]}}, {}, "one size, got 16x16, 16x16, 8x8"),
        (FILMS | {"c": {"s": [np.full((1, 8, 8, 3), 2.0)]}}, {}, r"c, s, shot 1: expected frames .* in \[0, 1\]"),
        (FILMS, {"ballots": 0}, "ballots, seed"),
        (FILMS, {"seed": -1}, "ballots, seed"),
        (FILMS, {"about": {"t": "x"}}, "names of scenes, got 't'"),
    ],
)
def test_what_makes_no_study_is_refused_and_nothing_is_left(tmp_path, films, options, message):
    with pytest.raises(ValueError, match=message):
        write_ballots(tmp_path / "a", tmp_path / "key.json", films, 8, **options)
    assert not list(tmp_path.iterdir())


def test_the_key_stays_apart_and_is_never_overwritten(tmp_path):
    for inside in ("a/key.json", "a/../a/b/key.json"):
        with pytest.raises(ValueError, match="key: expected a file outside"):
            write_ballots(tmp_path / "a", tmp_path / inside, FILMS, 8)
    (tmp_path / "key.json").write_text("old")
    with pytest.raises(ValueError, match="key: expected a new file"):
        write_ballots(tmp_path / "a", tmp_path / "key.json", FILMS, 8)
    assert (tmp_path / "key.json").read_text() == "old" and not (tmp_path / "a").exists()


# The way back


def test_scores_are_n_plus_1_less_the_rank_averaged(study, tmp_path):
    likes = [QUALITY, QUALITY, QUALITY, {"keyframes": 0, "joint": 1, "isolated": 2}]
    files = [saved(tmp_path, ballot(study, i, like), f"{i}.json") for i, like in enumerate(likes, 1)]
    found = read_ballots(files, study / "key.json")
    assert {name: score.mean for name, score in found.items()} == {"joint": 2.75, "isolated": 1.75, "keyframes": 1.5}
    assert list(found) == ["joint", "isolated", "keyframes"]
    assert all(score.half == pytest.approx(0, abs=1e-9) for score in found.values())  # all scenes alike
    assert sum(score.mean for score in found.values()) == pytest.approx(1 + 2 + 3)


def test_the_interval_is_that_of_a_bootstrap_over_scenes(study, tmp_path):
    """By hand: one of three scenes is ranked the other way round, so the best method has scores 1, 3, 3."""
    content = ballot(study)
    content["ranks"][0]["ranks"] = {letter: 4 - rank for letter, rank in content["ranks"][0]["ranks"].items()}
    found = read_ballots([saved(tmp_path, content)], study / "key.json")
    assert found["joint"].mean == pytest.approx(7 / 3) and found["isolated"].mean == 2
    # means 1, 5/3, 7/3, 3 have probabilities 1, 6, 12, 8 of 27: 2.5 % lies in the first, 97.5 % in the last
    assert found["joint"].half == pytest.approx(1) and found["isolated"].half == 0
    assert read_ballots([saved(tmp_path, content)], study / "key.json") == found


def test_one_scene_has_no_interval(tmp_path):
    write_ballots(tmp_path / "a", tmp_path / "key.json", FILMS, 8)
    (name, shown), *_ = json.loads((tmp_path / "key.json").read_text())["ballots"].items()
    content = {"ballot": name, "hash": shown["hash"], "ranks": [{"scene": "s", "ranks": {"A": 1, "B": 2}}]}
    found = read_ballots([saved(tmp_path, content)], tmp_path / "key.json")
    assert all(np.isnan(score.half) for score in found.values())
    assert next(iter(found)) == shown["scenes"][0]["films"][0]["method"]


def changed(change):
    def make(content):
        change(content)
        return content

    return make


def ranks(content, ranked):
    content["ranks"][1]["ranks"] = ranked


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: json.dumps(b)[:-9], "expected whole JSON"),
        (lambda b: "", "expected whole JSON"),
        (lambda b: "[" * 100_000, "expected whole JSON"),
        (lambda b: [b], "a JSON object"),
        (lambda b: json.dumps(b).replace('"A": 1', '"A": 1, "A": 2').replace('"A": 2', '"A": 2, "A": 1'), "twice"),
        (changed(lambda b: b.update(ballot="009-00000000")), "a ballot of this key"),
        (changed(lambda b: b.update(ballot=["x"])), "a ballot of this key"),
        (changed(lambda b: b.update(hash="0" * 64)), "the hash in the key"),
        (changed(lambda b: b.pop("hash")), "the hash in the key, got nothing"),
        (changed(lambda b: b.update(ranks={})), "a list of scenes"),
        (changed(lambda b: b["ranks"].pop()), "all 3 scenes, got 'none for __proto__'"),
        (changed(lambda b: b["ranks"].append(b["ranks"][0])), "each scene once, got 'park'"),
        (changed(lambda b: b["ranks"].insert(0, None)), "scene 1: scene: expected a scene of this ballot"),
        (changed(lambda b: b["ranks"][1].update(scene="zoo")), "a scene of this ballot, got 'zoo'"),
        (changed(lambda b: ranks(b, {"A": 1, "B": 1, "C": 2})), "scene 2: ranks: expected each rank from 1 to 3 once"),
        (changed(lambda b: ranks(b, {"A": 1, "B": 2})), "each rank from 1 to 3"),
        (changed(lambda b: ranks(b, {"A": 1, "B": 2, "D": 3})), "each rank from 1 to 3"),
        (changed(lambda b: ranks(b, {"A": 0, "B": 1, "C": 2})), "each rank from 1 to 3"),
        (changed(lambda b: ranks(b, {"A": 1.0, "B": 2, "C": 3})), "each rank from 1 to 3"),
        (changed(lambda b: ranks(b, {"A": True, "B": 2, "C": 3})), "each rank from 1 to 3"),
        (changed(lambda b: ranks(b, {"A": "1", "B": 2, "C": 3})), "each rank from 1 to 3"),
        (changed(lambda b: ranks(b, {"A": [1], "B": 2, "C": 3})), "each rank from 1 to 3"),
        (changed(lambda b: ranks(b, [1, 2, 3])), "ranks by letter"),
    ],
)
def test_a_damaged_ballot_is_named(study, tmp_path, make, message):
    good = saved(tmp_path, ballot(study, 2), "good.json")
    bad = saved(tmp_path, make(ballot(study)), "bad.json")
    with pytest.raises(ValueError, match=message) as error:
        read_ballots([good, bad], study / "key.json")
    assert str(error.value).startswith(f"{bad}: ") and "\n" not in str(error.value)


def test_a_ballot_counts_once_and_none_is_too_few(study, tmp_path):
    files = [saved(tmp_path, ballot(study), name) for name in ("a.json", "copy of a.json")]
    with pytest.raises(ValueError, match=r"copy of a.json: expected each ballot once"):
        read_ballots(files, study / "key.json")
    with pytest.raises(ValueError, match="a ballot at least"):
        read_ballots([], study / "key.json")
    with pytest.raises(FileNotFoundError, match="none.json"):
        read_ballots([tmp_path / "none.json"], study / "key.json")


def test_the_key_of_another_study_with_the_same_seed_does_not_fit(study, tmp_path):
    films = {m: {s: shots(0.9) for s in SCENES} for m in METHODS}
    write_ballots(tmp_path / "a", tmp_path / "other.json", films, 8, ballots=4)
    with pytest.raises(ValueError, match="ballot: expected a ballot of this key"):
        read_ballots([saved(tmp_path, ballot(study))], tmp_path / "other.json")


def first_films(content):
    return next(iter(content["ballots"].values()))["scenes"][0]["films"]


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.update(methods=["joint"]),
        lambda k: k.update(methods="abc"),
        lambda k: k.update(ballots=[]),
        lambda k: first_films(k).reverse(),
        lambda k: first_films(k)[0].update(method="joint") or first_films(k)[1].update(method="joint"),
        lambda k: first_films(k)[0].pop("file"),
        lambda k: first_films(k).append({}),
        lambda k: next(iter(k["ballots"].values())).update(number="1"),
        lambda k: k["ballots"].update({next(iter(k["ballots"])): None}),
    ],
)
def test_a_damaged_key_is_named(study, tmp_path, change):
    content = key(study)
    change(content)
    path = saved(tmp_path, content, "key.json")
    with pytest.raises(ValueError, match=r"key.json: .*use the key as write_ballots left it"):
        read_ballots([saved(tmp_path, ballot(study))], path)


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
ACT = """
<pre id="out"></pre>
<script>
const said = [], blobs = [];
const button = document.getElementById("download");
const choose = (i, values) => selects(scenes[i]).forEach((select, j) => {
  select.value = values[j];
  select.dispatchEvent(new Event("change", { bubbles: true }));
});
const press = () => { button.click(); said.push([saying.textContent, blobs.length]); };
URL.createObjectURL = blob => { blobs.push(blob); return "#"; };
said.push([saying.textContent, blobs.length]);
press();
choose(0, [2, 3, 1]); choose(1, [1, 1, 3]);
said.push([scenes[1].querySelector(".problem").textContent,
  selects(scenes[1]).filter(select => select.getAttribute("aria-invalid") === "true").length]);
press();
choose(1, [1, 2, 3]); choose(2, [3, 2, 1]);
said.push([scenes[1].querySelector(".problem").textContent, blobs.length]);
press();
blobs[0].text().then(text => document.getElementById("out").textContent = JSON.stringify({ said, text }));
</script>
</body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium, and none is on the path")
def test_the_page_asks_for_every_rank_and_makes_the_ballot(study, tmp_path):
    page = (study / "study" / "ballot-003.html").read_text(encoding="utf-8")
    acted = study / "study" / "acted.html"
    acted.write_text(page.replace("</body>", ACT), encoding="utf-8")
    try:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=2000", "--dump-dom", acted.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        acted.unlink()
    out = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.DOTALL)
    assert out, done.stderr[-2000:]
    result = json.loads(out[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    name = next(name for name in key(study)["ballots"] if name.startswith("003-"))
    assert result["said"] == [
        ["0 of 3 scenes ranked", 0],
        ["Scene 1 is not ranked yet: give every film a rank of its own.", 0],
        ["More than one film has rank 1.", 2],
        ["Scene 2 is not ranked yet: give every film a rank of its own.", 0],
        ["", 0],
        [f"Thank you. Please send back the file ballot-{name}.json from your downloads.", 1],
    ]
    made = json.loads(result["text"])
    assert made["ballot"] == name and [row["scene"] for row in made["ranks"]] == list(SCENES)
    assert [list(row["ranks"].values()) for row in made["ranks"]] == [[2, 3, 1], [1, 2, 3], [3, 2, 1]]
    found = read_ballots([saved(tmp_path, result["text"])], study / "key.json")
    assert sum(score.mean for score in found.values()) == pytest.approx(6)
