"""Two tiers of prompts: what a captioner and a planner are asked for, a command that answers, and what is wrong with
the prompts of a scene (§ 3.2.1, § 4.1).

No model is called here: a command of the user's own reads `{"instructions": "…", "files": ["/…/shot-1-frame-1.png"]}`
on its standard input and writes its answer to its standard output.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired

import numpy as np
from PIL import Image

from lct.data.folder import scene_folders
from lct.data.scenefile import (
    SCENE,
    GlobalPrompt,
    SceneFile,
    ShotEntry,
    load_shot,
    parse_scene,
    read_scene,
    rewrite_scene,
)
from lct.data.video import Stills, film_fps, spread

Checked = tuple[SceneFile, list[str]]
Shown = tuple[float | None, list[np.ndarray]]  # seconds of a shot, and some of its frames

RULES = """\
Prompts have two tiers.
The global prompt holds what the shots share: characters, environment, story.
- Describe every character that matters once, under an ID: age, build, face, hair, clothes. Characters look the same in
  all shots, so leave out what changes.
- environment: where and when it plays, light and colours. story: what happens, in one to three sentences.
Each shot has a prompt of its own: one event, what the camera shows from where, in one to three sentences.
- Begin with the framing: establishing shot, wide shot, medium shot, close-up, over the shoulder, point of view.
- Refer to characters only as "Character ID", such as Character 1: never "the man", "a woman", "the girl", and "he" or
  "she" only after the ID in the same prompt. Do not describe them again.
- A shot that shows nobody names nobody. Every character described is named in some shot.
- Never type [SHOT CUT]: cut = true says that a shot follows a cut or opens a scene with cuts, cut = false that it is a
  segment of one long take and goes on where the one before it ends, or a single shot.

Answer with TOML and nothing else, in exactly this form:

[global]
environment = "the deck of a ship at sunset, orange and yellow sky"
story = "Character 2 meets Character 1 at the railing."
[global.characters]
1 = "a young man with blonde hair, dark jacket over a light shirt"
2 = "a young woman with brown curls, light dress and a necklace"
[[shot]]
prompt = "Close-up of Character 1 looking back at Character 2, part of the mast behind."
cut = true
"""

CAPTION = f"""\
The attached pictures are frames of the shots of one film scene, in order. Describe the scene for a model that learns to
generate it: only what can be seen, no names of actors, no guesses.

{RULES}
One [[shot]] for each shot, in the order of the film, with the cut that is given below.
"""

PLAN = f"""\
Turn the idea below into a scene for a model that generates one shot after the other and keeps characters and places the
same in all of them.

{RULES}size = [16, 30, 30]

Vary the framing from shot to shot: wide, medium, close-up; show the place in an establishing shot without characters
before or between the others, and let characters come back after shots without them. The first shot has cut = true as
well, where others have.
size is [frames, height, width]; take the one below, or fewer frames for a short shot; 1 is a still picture.
"""

FRAMES, MOST_FRAMES = 3, 8  # of every shot that a captioner sees
SIDE = 1024  # pixels of the longer one of what it sees of films
MOST_BYTES = 1 << 20  # of an answer
TAIL = 300  # characters of a command's last words, and of an answer's faults, that an error shows
CHARACTER = re.compile(r"\bCharacter\s+([A-Za-z0-9][A-Za-z0-9._-]*)")
PEOPLE = "man|woman|boy|girl|guy|lady|gentleman|person|child|kid|men|women|boys|girls|figure|stranger"
AMBIGUOUS = re.compile(
    rf"\b(?:the|an?|this|that|another|two|both)\s+(?:(?!the\b|an?\b|of\b|and\b)[\w-]+\s+){{0,2}}?(?:{PEOPLE})(?![\w-])",
    re.IGNORECASE,
)
PRONOUN = re.compile(r"\b(?:he|she|him|her|his|hers|himself|herself)\b", re.IGNORECASE)
FENCED = re.compile(r"^.*?```(?:toml)?[ \t]*\n(.*?)```.*", re.DOTALL)  # models like to wrap what they write


def characters(prompt: str) -> list[str]:
    """IDs of the characters that a prompt names as "Character ID", in order, each once."""
    return list(dict.fromkeys(name.rstrip(".-") for name in CHARACTER.findall(prompt)))


def problems(scene: SceneFile) -> list[str]:
    """What is wrong with the two tiers of prompts, one line each: where, what, the fix. Shots are counted from 1.

    A pronoun is clear after a character that the same prompt names, as in the paper's Fig. 2, and ambiguous without.
    """
    shared = scene.global_prompt or GlobalPrompt()
    found = [] if len(scene.shots) == 1 and not shared.text() else _global_problems(shared)
    if len(scene.shots) == 1 and scene.shots[0].cut and not shared.text():
        found.append("shot 1: cut = true on a single shot without global prompt; write cut = false, or add [global]")
    for i, shot in enumerate(scene.shots, 1):
        found += [f"shot {i}: {problem}" for problem in _shot_problems(shot.prompt, shared)]
    named = {name for shot in scene.shots for name in characters(shot.prompt)}
    absent = [name for name in shared.characters if name not in named]
    return found + [f"global: no shot names Character {name}; name it in a shot, or remove it" for name in absent]


def _global_problems(shared: GlobalPrompt) -> list[str]:
    found = []
    for name, description in shared.characters.items():
        if not description.strip():
            found.append(f'global: Character {name} has no description; write {name} = "…" under [global.characters]')
    for key, text in (("environment", shared.environment), ("story", shared.story)):
        if not text.strip():
            found.append(f'global: there is no {key}; write {key} = "…" under [global]')
        found += [f"global: {key} {problem}" for problem in _unknown(text, shared)]
    return found


def _shot_problems(prompt: str, shared: GlobalPrompt) -> list[str]:
    if not prompt.strip():
        return ['the prompt is empty; write what the shot shows, prompt = "…"']
    found = _unknown(prompt, shared)
    if not shared.characters:
        return found
    first = CHARACTER.search(prompt)
    vague = [match[0] for match in AMBIGUOUS.finditer(prompt)]
    vague += [match[0] for match in PRONOUN.finditer(prompt[: first.start()] if first else prompt)]
    example = next(iter(shared.characters))
    for words in dict.fromkeys(" ".join(word.lower().split()) for word in vague):
        found.append(f'"{words}" may be anyone; write who it is, such as Character {example}')
    return found


def _unknown(text: str, shared: GlobalPrompt) -> list[str]:
    unknown = [name for name in characters(text) if name not in shared.characters]
    return [f'names Character {name}, not described; write {name} = "…" under [global.characters]' for name in unknown]


def ask(command: Sequence[str], instructions: str, attach: Sequence[Path] = (), timeout: float = 600) -> str:
    """The answer of a command to instructions and files.

    command  a program and its arguments, as words; no shell reads them
    attach   files whose absolute paths the command is given
    timeout  seconds until the command and what it started are ended

    Raises ValueError, with the command's last words, where it is not found, fails, takes too long, or answers with more
    than 1 MiB or with something other than UTF-8.
    """
    if isinstance(command, str) or not command:
        raise ValueError(f"command: expected a program and its arguments, got {command!r}; split it with shlex")
    request = {"instructions": instructions, "files": [str(Path(path).resolve()) for path in attach]}
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(request).encode())
        given.seek(0)
        try:
            process = Popen(list(command), stdin=given, stdout=PIPE, stderr=PIPE, start_new_session=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"command: expected a program, got {command[0]!r}: {error}; check its path") from error
    with process:
        try:
            answer, words, fault = _listen(process, timeout)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # a session of its own: what it started ends with it
    if not fault:
        try:
            return answer.decode()
        except UnicodeDecodeError as error:
            fault = f"bytes that are not UTF-8 ({error.reason} at {error.start})"
    said = _one_line(words.decode(errors="replace"))[-TAIL:] or "nothing"
    raise ValueError(f"command: expected an answer of {command[0]!r}, got {fault}; mend it, it said: {said}")


def _listen(process: Popen, timeout: float) -> tuple[bytes, bytes, str]:
    """Standard output, the end of standard error, and what went wrong: "" where nothing did."""
    answer, words, deadline = b"", b"", time.monotonic() + timeout
    late = f"none within {timeout:g} s"
    with selectors.DefaultSelector() as streams:
        for stream in (process.stdout, process.stderr):
            streams.register(stream, selectors.EVENT_READ)  # type: ignore[arg-type]
        while streams.get_map():
            left = deadline - time.monotonic()
            ready = streams.select(left) if left > 0 else []
            if not ready:
                return answer, words, late
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                if not part:
                    streams.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    answer += part
                else:
                    words = (words + part)[-4 * TAIL :]
            if len(answer) > MOST_BYTES:
                return answer, words, f"more than {MOST_BYTES} bytes"
    with suppress(TimeoutExpired):
        process.wait(max(deadline - time.monotonic(), 0))
    code = process.returncode
    return answer, words, late if code is None else f"exit code {code}" if code else ""


def caption_all(root: Path, command: Sequence[str], films: Path | None = None) -> Iterator[tuple[Path, bool]]:
    """Let a command describe every scene under `root` that has no prompts, or `root` itself, a scene, in any case; see
    `caption`. Yields each folder, in the order of their films, and whether it was described now."""
    if (root if root.is_file() else root / SCENE).is_file():
        caption(root, command, films=films)
        yield root, True
        return
    read = {folder: read_scene(folder) for folder in scene_folders(root)}
    stills = Stills(resize=_small)
    for folder in sorted(read, key=lambda f: (read[f].source or "", read[f].shots[0].frames or (0, 0), f)):
        described = all(shot.prompt.strip() for shot in read[folder].shots)
        if not described:
            caption(folder, command, films=films, stills=stills)
        yield folder, not described


def caption(
    folder: str | Path,
    command: Sequence[str],
    tries: int = 3,
    films: str | Path | None = None,
    stills: Stills | None = None,
) -> SceneFile:
    """Let a command describe the shots of a scene folder from a few frames of each, and write the prompts into it.

    folder   with latents, as `ingest` makes it; only prompts and the global prompt of its scene file change
    tries    how often the command is asked; each time but the first with its last answer and what is wrong with it
    films    folder of the film that the scene was cut from: frames then come from there, sharp, one a second, 3 to 8 of
             a shot; else three a shot come from its latents, as small as these are
    stills   that went through earlier scenes of the film

    Returns the new scene. Raises what `ask` raises, and ValueError for a shot without latents, or without frames of a
    film, and where the last answer is still wrong; the file is then as it was.
    """
    folder = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    scene = read_scene(folder)

    def check(text: str) -> Checked:
        answer = _parsed(text, len(scene.shots))
        shots = [replace(shot, prompt=new.prompt) for shot, new in zip(scene.shots, answer.shots, strict=True)]
        return replace(scene, global_prompt=answer.global_prompt, shots=tuple(shots)), []

    with tempfile.TemporaryDirectory() as temporary:
        files, lines = [], []
        shown = _of_latents(folder, scene) if films is None else _of_film(Path(films), folder, scene, stills)
        for i, (shot, (seconds, frames)) in enumerate(zip(scene.shots, shown, strict=True)):
            names = [f"shot-{i + 1}-frame-{k + 1}.png" for k in range(len(frames))]
            for name, frame in zip(names, frames, strict=True):
                files.append(Path(temporary) / name)
                Image.fromarray(frame).save(files[-1])
            length = f"{seconds:.1f} s, " if seconds else ""
            lines.append(f"shot {i + 1}: cut = {str(shot.cut).lower()}, {length}{', '.join(names)}\n")
        captioned = _tried(command, f"{CAPTION}\n{''.join(lines)}", check, files, tries)
    rewrite_scene(folder, captioned)
    return captioned


def _of_latents(folder: Path, scene: SceneFile) -> Iterator[Shown]:
    from lct.data.latents import PixelCodec

    codec = PixelCodec.named(scene.codec or "pixel/1")
    for i in range(len(scene.shots)):
        latents = load_shot(folder, scene, i).latents
        frames = codec.decode(latents[spread((0, len(latents)), FRAMES)]).numpy()
        yield (len(latents) / scene.fps if scene.fps else None), list(frames)


def _small(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, SIDE / max(height, width))
    return round(height * scale), round(width * scale)


def _of_film(films: Path, folder: Path, scene: SceneFile, stills: Stills | None) -> Iterator[Shown]:
    if scene.source is None or any(shot.frames is None for shot in scene.shots):
        raise ValueError(f"{folder}: expected a scene that lct ingest cut from a film, got one without frames")
    film, stills = films / scene.source, stills or Stills(resize=_small)
    rate = film_fps(film)
    spans = [shot.frames for shot in scene.shots if shot.frames is not None]
    for start, end in spans:
        count = min(max(round((end - start) / rate), FRAMES), MOST_FRAMES)
        yield (end - start) / rate, stills.of(film, spread((start, end), count))


def plan(idea: str, command: Sequence[str], shots: int, size: tuple[int, int, int], tries: int = 3) -> SceneFile:
    """The scene that a command makes of an idea (§ 4.1), for `write_scene`.

    shots  their number
    size   (T, H, W) in latent pixels of a shot; the command may give one fewer frames
    tries  as of `caption`

    Raises what `ask` raises, and ValueError for arguments out of range and where the last answer is still wrong.
    """
    if not idea.strip() or shots < 1 or len(size) != 3 or min(size) < 1:
        got = f"{idea[:40]!r}, {shots} and {tuple(size)}"
        raise ValueError(f"plan: expected an idea, 1 shot or more and three positive sizes, got {got}; correct them")

    def check(text: str) -> Checked:
        answer, faults = _parsed(text, shots), []
        entries = tuple(ShotEntry(s.prompt, s.cut, s.size or size, s.seed, sees=s.sees) for s in answer.shots)
        for i, (frames, *area) in enumerate([entry.size or size for entry in entries], 1):
            if area != [*size[1:]] or frames > size[0]:
                faults.append(f"shot {i}: size: expected {list(size)} or fewer frames; write {list(size)}")
        return SceneFile(answer.global_prompt, entries), faults

    request = f"{PLAN}\nNumber of shots: {shots}\nsize = {list(size)}\nThe idea: {idea.strip()}\n"
    return _tried(command, request, check, (), tries)


def _parsed(text: str, shots: int) -> SceneFile:
    answer = parse_scene(FENCED.sub(r"\1", text), "answer")
    if len(answer.shots) != shots:
        raise ValueError(f"answer: expected {shots} shots, got {len(answer.shots)}; write one [[shot]] for each")
    return answer


def _tried(
    command: Sequence[str], instructions: str, check: Callable[[str], Checked], attach: Sequence[Path], tries: int
) -> SceneFile:
    """The scene that `check` makes of the first answer without faults; it raises ValueError or names some itself."""
    if tries < 1:
        raise ValueError(f"tries: expected at least 1, got {tries}; 3 is usual")
    request, fault = instructions, ""
    for _ in range(tries):
        answer = ask(command, request, attach)
        try:
            scene, faults = check(answer)
            fault = "\n".join([*faults, *problems(scene)])
            if not fault:
                return scene
        except ValueError as error:
            fault = str(error)
        request = f"{instructions}\nYour last answer:\n\n{answer}\n\nis refused:\n{fault}\nMend it, answer in whole.\n"
    fault = textwrap.shorten(_one_line(fault), TAIL, placeholder=" …")
    raise ValueError(f"command: expected prompts that hold after {tries} tries, got: {fault}; ask a stronger model")


def _one_line(text: str) -> str:
    """Without line ends and what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
