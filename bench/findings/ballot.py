"""A blind user study as in the paper's Table 1: HTML ballots, the key that opens them, and the average human ranking.

The paper asked participants to put consistency from shot to shot over appearance (§ 4.1). Its scores add up to 10 over
4 methods and are better when higher: they are n + 1 − rank, averaged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from findings.vbench import read_json, to_bytes
from lct.data.atomic import new_file, new_folder
from lct.data.table import Table, is_text
from lct.data.video import write_video
from lct.evaluate import Mean95
from lct.report import CSS

FILMS, LETTERS = "films", string.ascii_uppercase
RESAMPLES = 10_000
QUESTION = "Which film holds together best from shot to shot?"
ADVICE = (
    "Rank the films of every scene. Look first at what should stay the same across the cuts: who is there, what they "
    "wear and hold, where they are, and how the story goes on. How good a single shot looks comes second."
)
STEPS = (
    "Rank 1 is the best, and no two films of a scene share a rank. Watch and change your mind as often as you like. "
    "At the end press Download my ballot and send that file back: the page itself sends nothing."
)

Film = str | Path | Sequence[np.ndarray]


@dataclass(frozen=True)
class Entry:
    """A film as a ballot shows it: its file, what is in it, and, in the key alone, whose it is."""

    file: str
    sha256: str
    method: str


def write_ballots(
    folder: str | Path,
    key: str | Path,
    films: Mapping[str, Mapping[str, Film]],
    fps: float = 8.0,
    *,
    ballots: int = 1,
    seed: int = 0,
    about: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write pages ballot-001.html … and their films into a new folder, and the key beside it; returns the pages.

    key      a new JSON file outside of the folder: it alone says which letter is which method
    films    by method and scene: an mp4, or the scene's shots in order, each frames [T, H, W, 3], uint8 or in [0, 1],
             shown at `fps`; every method has the same scenes. An mp4 is copied as it is, with whatever its header tells
    ballots  one page for every participant: each has its own order of letters in every scene, drawn from `seed`
    about    by scene, a line shown above its films, such as its story; the names of scenes are not shown

    Sizes, lengths and frame rates that differ give a method away: make the films alike. A page needs the films beside
    it and nothing else, and puts the ranks into a file that the participant sends back.

    Raises ValueError, and leaves nothing behind, for fewer than 2 or more than 26 methods, for methods with different
    scenes, for what is no film, and where the key exists already or lies within the folder.
    """
    folder, key = Path(folder), Path(key)
    methods, scenes = list(films), _scenes(films)
    if key.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"key: expected a file outside of {folder}, got {key}; participants get the folder whole")
    if key.exists():
        raise ValueError(f"key: expected a new file, got {key}; ballots of an older study need it, choose another name")
    if ballots < 1 or seed < 0:
        raise ValueError(f"ballots, seed: expected at least 1 and 0, got {ballots} and {seed}; use for example 12, 0")
    for scene in about or {}:
        if scene not in scenes:
            raise ValueError(f"about: expected names of scenes, got {scene!r}; use one of {', '.join(scenes)}")
    with new_folder(folder) as temporary:
        places = [(method, scene) for method in methods for scene in scenes]
        entries: dict[tuple[str, str], Entry] = {}
        # written in the shuffled order too, so that neither names nor times of files tell
        for number, i in enumerate(np.random.default_rng([seed]).permutation(len(places)).tolist(), 1):
            method, scene = places[i]
            path = temporary / FILMS / f"film-{number:03d}.mp4"
            _write_film(path, films[method][scene], fps, f"films: {method}, {scene}")
            entries[places[i]] = Entry(f"{FILMS}/{path.name}", _sha256(path), method)
        opened = {}
        for number in range(1, ballots + 1):
            shown = []
            for i, scene in enumerate(scenes):
                order = np.random.default_rng([seed, number, i]).permutation(len(methods))
                shown.append((scene, [entries[methods[j], scene] for j in order]))
            name, digest = _identity(number, shown)
            page = _page(name, digest, shown, about or {})
            (temporary / f"ballot-{number:03d}.html").write_text(page, encoding="utf-8")
            opened[name] = {
                "number": number,
                "hash": digest,
                "scenes": [{"scene": scene, "films": [vars(entry) for entry in row]} for scene, row in shown],
            }
        with new_file(key) as unfinished:
            unfinished.write_text(json.dumps({"methods": methods, "ballots": opened}, indent=1), encoding="ascii")
    return [folder / f"ballot-{number:03d}.html" for number in range(1, ballots + 1)]


def read_ballots(files: Sequence[str | Path], key: str | Path) -> dict[str, Mean95]:
    """Per method the average human ranking, the best first: n + 1 − rank, over scenes and ballots.

    With half the width of the interval that holds 95 % of the means of 10 000 draws of scenes with replacement, from a
    fixed seed; NaN for one scene. Fit for the column user_study of `tables.our_row`.

    Raises ValueError that names the file where a ballot is damaged or not whole, ranks two films alike, does not belong
    to the key, or was handed in twice; FileNotFoundError where one is missing.
    """
    methods, keys = _read_key(Path(key))
    scores: dict[str, dict[str, list[int]]] = {}
    seen: dict[str, Path] = {}
    for file in map(Path, files):
        name, ranks = _read_ballot(file, keys)
        if name in seen:
            raise ValueError(f"{file}: expected each ballot once, got {name} in {seen[name]} too; remove one of them")
        seen[name] = file
        for scene, ranked in ranks.items():
            for method, rank in ranked.items():
                scores.setdefault(scene, {}).setdefault(method, []).append(len(methods) + 1 - rank)
    if not seen:
        raise ValueError("files: expected a ballot at least, got none; pass the files that participants sent back")
    table = np.array([[np.mean(of[method]) for method in methods] for of in scores.values()])
    draws = np.random.default_rng(0).integers(0, len(table), (RESAMPLES, len(table)))
    low, high = np.percentile(table[draws].mean(1), [2.5, 97.5], axis=0)
    halves = (high - low) / 2 if len(table) > 1 else np.full(len(methods), np.nan)
    means = dict(zip(methods, map(Mean95, table.mean(0).tolist(), halves.tolist()), strict=True))
    return dict(sorted(means.items(), key=lambda item: -item[1].mean))


def _scenes(films: Mapping[str, Mapping[str, Film]]) -> list[str]:
    if not 2 <= len(films) <= len(LETTERS):
        raise ValueError(f"films: expected 2 to 26 methods, got {len(films)}; there is a letter for each")
    first, *others = films
    scenes = list(films[first])
    for method in others:
        if set(films[method]) != set(scenes):
            odd = sorted(set(films[method]) ^ set(scenes))[0]
            raise ValueError(f"films: expected the same scenes of {first} and {method}, got {odd!r} of one; drop it")
    if not scenes:
        raise ValueError("films: expected a scene at least, got none; pass {method: {scene: film}}")
    return scenes


def _write_film(path: Path, film: Film, fps: float, where: str) -> None:
    if isinstance(film, str | Path):
        if Path(film).suffix.lower() != ".mp4" or not Path(film).is_file():
            raise ValueError(f"{where}: expected an mp4 file, got {film}; write it with write_video")
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(film, path)  # its times stay behind
        return
    shots = [to_bytes(shot, f"{where}, shot {i}") for i, shot in enumerate(film, 1)]
    if len({shot.shape[1:] for shot in shots}) != 1:
        sizes = ", ".join(f"{shot.shape[2]}x{shot.shape[1]}" for shot in shots) or "no shot"
        raise ValueError(f"{where}: expected shots of one size, got {sizes}; scale them to one")
    write_video(path, np.concatenate(shots), fps)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(number: int, shown: Sequence[tuple[str, Sequence[Entry]]]) -> tuple[str, str]:
    """A ballot's id and the hash of what it shows, in which no method stands: it is on the page."""
    content = [number, [[scene, [[entry.file, entry.sha256] for entry in row]] for scene, row in shown]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return f"{number:03d}-{digest[:8]}", digest


# The way back


def _read_key(path: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The methods, and by ballot its hash and, by scene and letter, whose film it was."""
    fix = "use the key as write_ballots left it"
    content = Table(read_json(path), str(path))
    methods = content.take("methods", _is_names, "names of methods", fix)
    ballots = {}
    for name, entry in content.take("ballots", lambda x: isinstance(x, dict), "ballots by id", fix).items():
        try:
            shown = [(row["scene"], [Entry(**film) for film in row["films"]]) for row in entry["scenes"]]
            whole = _identity(entry["number"], shown) == (name, entry["hash"])
            whole = whole and all(sorted(film.method for film in row) == sorted(methods) for _, row in shown)
            letters = {scene: {LETTERS[i]: film.method for i, film in enumerate(row)} for scene, row in shown}
        except (TypeError, KeyError, ValueError, IndexError):
            whole = False
        if not whole:
            content.fail("ballots", "what its hash says", name, fix)
        ballots[name] = {"hash": entry["hash"], "letters": letters}
    return methods, ballots


def _read_ballot(file: Path, keys: Mapping[str, dict]) -> tuple[str, dict[str, dict[str, int]]]:
    """A ballot's id and, by scene and method, its rank."""
    ballot, fix = Table(read_json(file), str(file)), "ask for the file that the page made"
    name = ballot.take("ballot", lambda x: is_text(x) and x in keys, "a ballot of this key", "use the study's own key")
    ballot.take("hash", lambda x: x == keys[name]["hash"], "the hash in the key", "use the study's own key")
    letters = keys[name]["letters"]
    rows = ballot.take("ranks", lambda x: isinstance(x, list), "a list of scenes", fix)
    ranks = {}
    for i, row in enumerate(rows, 1):
        place = Table(row if isinstance(row, dict) else {}, str(file), f"scene {i}: ")
        scene = place.take("scene", lambda x: is_text(x) and x in letters, "a scene of this ballot", fix)
        given = place.take("ranks", lambda x: isinstance(x, dict), "ranks by letter", fix)
        if set(given) != set(letters[scene]) or not _is_permutation(list(given.values())):
            place.fail("ranks", f"each rank from 1 to {len(letters[scene])} once, by letter", given, fix)
        if scene in ranks:
            place.fail("scene", "each scene once", scene, fix)
        ranks[scene] = {whose: given[letter] for letter, whose in letters[scene].items()}
    if missing := [scene for scene in letters if scene not in ranks]:
        ballot.fail("ranks", f"all {len(letters)} scenes", f"none for {missing[0]}", fix)
    return name, ranks


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(is_text, value))


def _is_permutation(ranks: list) -> bool:
    return all(type(rank) is int for rank in ranks) and sorted(ranks) == list(range(1, len(ranks) + 1))


# The page

STYLE = """
body { padding-bottom: 0; }
main { padding-bottom: 2rem; }
.scene { margin: 3rem 0; }
.top { display: flex; align-items: center; justify-content: space-between; gap: 1rem; margin-bottom: 1rem; }
.top h2 { margin: 0; }
.scene > p { margin: 0 0 1rem; }
/* two rows of films and what stands around them fit on the screen of a laptop */
.films { --tall: min(20rem, 32vh); display: grid; gap: 1.5rem 1.25rem;
  grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.films figure { margin: 0; }
.films video { width: 100%; max-height: var(--tall); object-fit: contain; image-rendering: auto; }
.films video.small { height: var(--tall); image-rendering: pixelated; }
.films label { display: flex; align-items: center; gap: .75rem; margin-top: .5rem; }
.letter { font-weight: 600; margin-right: auto; }
select, button { font: inherit; color: var(--ink); background: var(--page); min-height: 2.75rem; padding: 0 .85rem;
  border: 1px solid var(--line); border-radius: .5rem; cursor: pointer; }
select { min-width: 8rem; }
select[aria-invalid="true"] { border-color: var(--bad); box-shadow: 0 0 0 1px var(--bad); }
button:hover { background: var(--bar); }
:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
:root { --line: #8a94a1; }
@media (prefers-color-scheme: dark) { :root { --line: #6b7784; } }
.scene > .problem { color: var(--bad); min-height: 1.6em; margin: .5rem 0 0; }
.end { position: sticky; bottom: 0; display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.25rem;
  padding: .75rem 0; background: var(--page); border-top: 1px solid var(--rule); }
.end p { margin: 0 auto 0 0; }
.end button { color: var(--page); background: var(--ink); border-color: var(--ink); font-weight: 600; }
.end button:hover { opacity: .85; }
@media (max-width: 40rem) { .films { --tall: 15rem; grid-template-columns: minmax(0, 1fr); }
  .end button { width: 100%; } }
"""

SCRIPT = """
const ballot = JSON.parse(document.getElementById("ballot").textContent);
const scenes = [...document.querySelectorAll(".scene")];
const selects = scene => [...scene.querySelectorAll("select")];
const saying = document.getElementById("saying");

function ranked(scene) {
  const values = selects(scene).map(select => select.value);
  const shared = value => value && values.filter(other => other === value).length > 1;
  selects(scene).forEach(select => select.setAttribute("aria-invalid", Boolean(shared(select.value))));
  const twice = values.find(shared);
  scene.querySelector(".problem").textContent = twice ? `More than one film has rank ${twice}.` : "";
  return !twice && !values.includes("");
}

function renew() {
  const done = scenes.filter(ranked).length;
  saying.textContent = `${done} of ${scenes.length} scenes ranked`;
  return done === scenes.length;
}

function download() {
  if (!renew()) {
    const scene = scenes.find(scene => !ranked(scene));
    const open = selects(scene).find(select => !select.value || select.getAttribute("aria-invalid") === "true");
    saying.textContent = `Scene ${scenes.indexOf(scene) + 1} is not ranked yet: give every film a rank of its own.`;
    open.scrollIntoView({ block: "center" });
    open.focus({ preventScroll: true });
    return;
  }
  const ranks = scenes.map((scene, i) => ({
    scene: ballot.scenes[i],
    ranks: Object.fromEntries(selects(scene).map(select => [select.dataset.letter, Number(select.value)])),
  }));
  const text = JSON.stringify({ ballot: ballot.id, hash: ballot.hash, ranks }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `ballot-${ballot.id}.json`;
  link.click();
  saying.textContent = `Thank you. Please send back the file ${link.download} from your downloads.`;
}

scenes.forEach(scene => {
  const videos = [...scene.querySelectorAll("video")];
  // a film of few pixels is shown larger, pixel by pixel
  const fit = video => video.classList.toggle("small", video.videoWidth > 0 && video.videoWidth < 200);
  videos.forEach(video => { fit(video); video.addEventListener("loadedmetadata", () => fit(video)); });
  scene.querySelector("button").addEventListener("click", () => videos.forEach(video => {
    video.currentTime = 0;
    video.play();
  }));
  scene.addEventListener("change", renew);
});
document.getElementById("download").addEventListener("click", download);
renew();
"""


def _page(name: str, digest: str, shown: Sequence[tuple[str, Sequence[Entry]]], about: Mapping[str, str]) -> str:
    # "<" would let a scene's name end the script element
    data = json.dumps({"id": name, "hash": digest, "scenes": [scene for scene, _ in shown]}).replace("<", "\\u003c")
    scenes = "\n".join(_scene(i, len(shown), row, about.get(scene, "")) for i, (scene, row) in enumerate(shown, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ballot {name}</title>
<style>{CSS}{STYLE}</style>
</head>
<body>
<main>
<h1>{QUESTION}</h1>
<p>{ADVICE}</p>
<p>{STEPS}</p>
<noscript><p>This page needs JavaScript to put your ranks into a file.</p></noscript>
<script type="application/json" id="ballot">{data}</script>
{scenes}
</main>
<div class="end"><p id="saying" role="status"></p><button type="button" id="download">Download my ballot</button></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _scene(number: int, count: int, row: Sequence[Entry], about: str) -> str:
    story = f"<p>{escape(about)}</p>\n" if about else ""
    ranks = ["1, best", *map(str, range(2, len(row))), f"{len(row)}, last"]
    options = "".join(f'<option value="{i}">{text}</option>' for i, text in enumerate(ranks, 1))
    figures = "\n".join(
        f'<figure><video controls loop muted playsinline preload="auto" src="{entry.file}"></video>'
        f'<label><span class="letter">Film {letter}</span> Rank <select data-letter="{letter}" autocomplete="off">'
        f'<option value="">choose</option>{options}</select></label></figure>'
        for letter, entry in zip(LETTERS, row, strict=False)
    )
    return f"""<section class="scene">
<div class="top"><h2>Scene {number} of {count}</h2><button type="button">Play all</button></div>
{story}<div class="films" style="--columns: {3 if len(row) % 3 == 0 or len(row) > 4 else 2}">
{figures}
</div>
<p class="problem" role="alert"></p>
</section>"""
