"""Every action of a director, each a method that can be called from a terminal, a script or the page.

A project is a folder: `boards/` holds the board after every action, `takes/` a folder per take. No take is ever
removed: undoing goes back a board, and a take that was made once is found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lct.data.atomic import check_vacant, new_file, new_folder
from lct.data.latents import Codec, patchify, size_in_patches, unpatchify
from lct.data.scenefile import load_shot, parse_scene, read_scene, scene_text, write_scene
from lct.data.scenes import SHOT_CUT, shot_prompt, single_prompt
from lct.data.video import video_package, write_video
from lct.direct.board import Board, Card, Inputs, Settings, take_name
from lct.direct.media import encoded
from lct.draw import contact_sheet
from lct.kernels.select import unvalidated
from lct.model.config import Memory
from lct.pretrained.pipeline import Pipeline, pipeline_of
from lct.sample import Sampling, SceneRequest, ShotRequest, autoregressive, joint
from lct.sample.files import codec_of, rate_of, request_of
from lct.sample.select import CONTEXT, choose
from lct.train.config import TrainConfig
from lct.train.weights import available, config_of, digest_of, load_model

BOARDS, TAKES = "boards", "takes"
NAME = re.compile(r"shot-(\d+)")
TAKE, LATENTS, FILM, SHEET = "take.json", "latents.safetensors", "shot.mp4", "sheet.png"

MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)  # what a person can mend
Report = Callable[[str], None]


class Studio:
    """A project and the actions on it. Shots are counted from 1, as in a scene file.

    folder  of a project that `begin` made
    report  told of every take as it is made
    history_device  where keys and values of what a shot sees are kept; None: with the model
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "cpu",
        impl: str = "auto",
        report: Report = lambda line: None,
        history_device: str | None = None,
    ):
        self.folder, self.device, self.impl, self.report = Path(folder), device, impl, report
        self.history_device = None if history_device is None else str(available(history_device, "memory.device"))
        if not (self.folder / BOARDS).is_dir():
            raise ValueError(
                f"{self.folder}: expected a director's project; begin one with lct direct SCENE --weights …"
            )
        self._loaded: tuple[tuple[str | None, ...], Any, Any] | None = None
        self._parts: Pipeline | None = None
        self._last = ""  # key of the board that this studio wrote last

    @classmethod
    def begin(
        cls, scene: Path, folder: Path, settings: Settings, fps: float | None = None, context: int = CONTEXT, **options
    ):
        """Make a project of a scene file; shots with media become given takes. Raises what `read_scene` raises, and
        ValueError where `folder` exists and is not empty."""
        check_vacant(folder)
        video_package("av")
        file = read_scene(scene)
        rate = rate_of(file, fps, None if settings.pipeline is None else Pipeline(settings.pipeline))
        board, config = Board.of(file, settings, rate, context), config_of(settings.weights).model
        source = scene if scene.is_dir() else scene.parent
        with new_folder(folder) as temporary:
            (temporary / BOARDS).mkdir()
            (temporary / TAKES).mkdir()
            studio = cls(temporary, **options)
            studio._check_settings(settings)
            board = replace(board, codec=codec_of(file.codec, scene, studio._pipeline(settings)).name)
            for i, entry in enumerate(file.shots):
                if entry.media is not None:
                    shot = load_shot(source, file, i)
                    request_of(config, source, i, entry, entry.prompt, shot)  # its model may not take it
                    board = studio._given(board, i, shot.latents, f"shot {i + 1} of {scene.name}")
            studio._write_board(replace(board, action=f"begin with {scene.name}"))
        return cls(folder, **options)

    @classmethod
    def open(cls, folder: Path, changes: dict[str, Any], fps: float | None = None, **options) -> Studio:
        """An existing project; `changes` of its settings make every take stale that was made with others. `fps` is that
        of films from now on."""
        studio = cls(folder, **options)
        board = studio.board
        settings = replace(board.settings, **changes)
        if studio.history_device is not None or settings != board.settings:
            studio._check_settings(settings)
        context = config_of(settings.weights).data.shots if settings.digest != board.settings.digest else board.context
        rate = board.fps if fps is None else rate_of(board.to_scene([None] * len(board.cards)), fps, None)
        new = replace(board, settings=settings, context=context, fps=rate)
        if new != board:
            codec_of(board.codec, folder, studio._pipeline(settings))
            words = [*changes, *(() if fps is None else ("fps",))]
            studio._write_board(replace(new, action=f"settings {' '.join(words)}"))
        return studio

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def board(self) -> Board:
        """The board as it stands, read anew: another process may have acted."""
        return _read_board(self._boards()[-1])

    def _boards(self) -> list[Path]:
        found = sorted((self.folder / BOARDS).glob("[0-9]*.json"))
        if not found:
            raise ValueError(f"{self.folder}: expected a board in {BOARDS}/, found none; begin the project again")
        return found

    def take_folder(self, take: str) -> Path:
        return self.folder / TAKES / take

    def inputs(self, take: str) -> Inputs:
        """What a take was made from."""
        file = self.take_folder(take) / TAKE
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: damaged ({error}); remove its folder, `refresh` makes the take again") from None

    def takes(self, shot: int) -> list[str]:
        """All takes of a shot, oldest first."""
        name = self.board.cards[self.board.number(shot)].name
        found = (p for p in (self.folder / TAKES).glob(f"{name}-*") if (p / TAKE).is_file())
        own = [p for p in found if self.inputs(p.name)["shot"] == name]
        return [p.name for p in sorted(own, key=lambda p: ((p / TAKE).stat().st_mtime_ns, p.name))]

    def state(self, index: int, board: Board | None = None) -> str:
        """ "empty", "given", "made" or "stale"."""
        board = board or self.board
        card = board.cards[index]
        if card.take is None or card.given:
            return "given" if card.given else "empty"
        lost = not (self.take_folder(card.take) / TAKE).is_file()  # made again, it is the same
        return "stale" if lost or board.is_stale(index, self.inputs(card.take)) else "made"

    # -- making --------------------------------------------------------------------------------------------------

    def make(self, *shots: int, all: bool = False) -> list[str]:
        """Make the takes that are missing: of the shots named, of all, or of the first that has none."""
        board = self.board
        order = board.in_order()
        empty = [i + 1 for i in order if board.cards[i].take is None]
        todo = list(shots) or (empty if all else empty[:1])
        if not todo:
            raise ValueError("make: every shot has a take; `reroll` one, `refresh` stale ones, or `extend` the scene")
        numbers = sorted({board.number(shot) for shot in todo}, key=order.index)
        made = [i + 1 for i in numbers if board.cards[i].take is not None]
        if made:
            raise ValueError(
                f"make: shot {made[0]} has a take; `reroll {made[0]}` makes another, `refresh` a stale one"
            )
        action, names = f"make {' '.join(map(str, todo))}", [board.cards[i].name for i in numbers]
        return [self._take(self.board.place(name), action, again=i > 0) for i, name in enumerate(names)]

    def reroll(self, shot: int, seed: int | None = None) -> list[str]:
        """A new take of one shot, with a new seed; no other file changes, and shots that saw it become stale."""
        board = self.board
        index = board.number(shot)
        if seed is None:
            seed = 1 + max([board.cards[index].seed, *(self.inputs(t).get("seed", 0) for t in self.takes(shot))])
        return [self._take(index, f"reroll {shot}", seed=seed, kept=False)]

    def refresh(self, *shots: int) -> list[str]:
        """Make stale takes anew, with their seeds over the history as it is now: those named, or all but kept ones."""
        board, done = self.board, []
        named = [board.number(shot) for shot in shots]
        wanted = [i for i in board.in_order() if (i in named if shots else not board.cards[i].kept)]
        for name in [board.cards[i].name for i in wanted]:  # a take that changes makes those stale that see it
            if self.state(self.board.place(name)) == "stale":
                done.append(self._take(self.board.place(name), "refresh", again=bool(done)))
        return done

    def extend(
        self,
        prompt: str,
        cut: bool = True,
        size: tuple[int, int, int] | None = None,
        seed: int | None = None,
        sees: str | None = None,
    ) -> list[str]:
        """One more shot at the end, and its take: after a cut, or going on without one (§ 4.3). Its size is that of the
        last shot that was not given, its seed its number."""
        board = self.board
        card = Card("", prompt, cut, size or self._usual_size(board), len(board.cards) if seed is None else seed)
        board = self._with_one_more(board, card, f"extend {prompt}")
        if sees is not None:
            board = self._seeing(board, len(board.cards) - 1, sees.split())
        self._check(board)
        return [self._take(len(board.cards) - 1, board.action, board=board)]

    # -- deciding ------------------------------------------------------------------------------------------------

    def keep(self, shot: int, take: str | None = None) -> None:
        """Approve a shot's take, or another take of it, whose prompt, size and seed the shot then has."""
        board = self.board
        index = board.number(shot)
        take = take or board.cards[index].take
        if take is None or take not in self.takes(shot):
            raise ValueError(f"take: expected one of {self.takes(shot)}, got {take!r}; `make {shot}` makes one")
        made_from = self.inputs(take)
        size = made_from.get("size") or self._latents(take).shape[:3]  # media's own
        marked = made_from["prompt"].startswith(SHOT_CUT)
        changes: dict[str, Any] = {
            "prompt": made_from["prompt"].removeprefix(SHOT_CUT).removeprefix(" ") if marked else made_from["prompt"],
            "cut": marked,
            "size": tuple(int(n) for n in size),
            "seed": made_from["seed"],
            "given": "media" in made_from,
        }
        self._write_board(board.with_card(index, f"keep {shot}", take=take, kept=True, **changes))

    def sees(self, shot: int, *choice: str) -> None:
        """Choose which shots a shot sees, and in which order: `all`, `recent:2`, `relevant:3`, `none`, or numbers;
        without a choice, what fits."""
        board = self.board
        changed = self._seeing(board, board.number(shot), choice)
        self._check(changed)
        self._write_board(replace(changed, action=f"sees {shot} {' '.join(choice)}"))

    def _seeing(self, board: Board, index: int, choice: Sequence[str]) -> Board:
        choice = [word for part in choice for word in part.replace(",", " ").split()]
        if choice in ([], ["none"]):
            return board.with_card(index, board.action, sees=() if choice else None)
        if not all(word.isdecimal() for word in choice):
            choose(" ".join(choice), [c.prompt for c in board.cards[: index + 1]], index)
            return board.with_card(index, board.action, sees=choice[0])
        numbers = [board.number(int(word)) for word in choice]
        if index in numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"sees: expected other shots, each once, got {' '.join(choice)} for shot {index + 1}")
        return board.with_card(index, board.action, sees=tuple(board.cards[i].name for i in numbers))

    def prompt(self, shot: int, text: str, cut: bool | None = None) -> None:
        """Another prompt for a shot, and perhaps another transition to it. Its take becomes stale; given media get the
        new prompt, and the shots that see them become stale."""
        board = self.board
        index = board.number(shot)
        card = board.cards[index]
        changed = board.with_card(index, f"prompt {shot}", prompt=text, cut=card.cut if cut is None else cut)
        self._check(changed)
        if card.given:
            take = str(card.take)
            changed = self._given(changed, index, self._latents(take), self.inputs(take)["source"])
        self._write_board(changed)

    def give(self, shot: int, file: Path) -> None:
        """Media of one's own for a shot, a picture or a film: it conditions the shots that see it (§ 4.3)."""
        board = self.board
        index = board.number(shot)
        latents = encoded(Path(file), board.cards[index].size, self._codec(board), board.fps)
        self._write_board(replace(self._given(board, index, latents, Path(file).name), action=f"give {shot} {file}"))

    def add(self, prompt: str, file: Path | None = None, cut: bool = True) -> None:
        """One more shot at the end without making it, or with media of one's own."""
        board = self.board
        card = Card("", prompt, cut, self._usual_size(board), len(board.cards))
        board = self._with_one_more(board, card, f"add {prompt}")
        self._check(board)
        if file is not None:
            size = board.cards[-1].size
            latents = encoded(Path(file), size, self._codec(board), board.fps)
            board = self._given(board, len(board.cards) - 1, latents, Path(file).name)
        self._write_board(board)

    def remove(self, shot: int) -> None:
        """Take a shot off the board; its takes stay on disk."""
        board = self.board
        index = board.number(shot)
        if len(board.cards) == 1:
            raise ValueError("remove: expected another shot beside it; a scene has at least one")
        cards = board.cards[:index] + board.cards[index + 1 :]
        self._write_board(replace(board, cards=cards, action=f"remove {shot}"))

    def fork(self, name: str) -> None:
        """Go on under another name; `switch` comes back to this branch as it is now."""
        if name in self.branches():
            raise ValueError(f"fork: expected a new name, got {name!r}; `switch {name}` goes there")
        self._write_board(replace(self.board, branch=name, action=f"fork {name}"))

    def switch(self, name: str) -> None:
        """Go on with another branch where it was left."""
        branches = self.branches()
        if name not in branches:
            raise ValueError(f"switch: expected one of {sorted(branches)}, got {name!r}; `fork {name}` makes one")
        board = self.board
        self._write_board(replace(branches[name], key=board.key, named=board.named, action=f"switch {name}"))

    def branches(self) -> dict[str, Board]:
        """Every branch, as it was left."""
        boards = [_read_board(path) for path in self._boards()]
        return {board.branch: board for board in boards}

    def undo(self) -> str:
        """Go back to the board before the last action, which is returned. Takes stay on disk."""
        last = self.board
        if last.turn == 0:
            raise ValueError("undo: nothing was done yet")
        undone = list(takewhile(lambda path: _read_board(path).turn == last.turn, reversed(self._boards())))
        for path in undone:
            path.unlink()
        return last.action

    def export(self, out: Path) -> Path:
        """The scene as one film, a contact sheet, and a scene folder with all latents, in a new folder."""
        board = self.board
        check_vacant(out)
        missing = [i + 1 for i, card in enumerate(board.cards) if card.take is None]
        if missing:
            raise ValueError(f"export: shots {missing} have no take; `make --all` makes them, `remove` leaves one out")
        latents = [self._latents(str(card.take)) for card in board.cards]
        media = [f"shot-{i}" for i in range(len(latents))]
        sized = tuple(replace(c, size=x.shape[:3]) for c, x in zip(board.cards, latents, strict=True))
        codec = self._codec(board)
        frames = [codec.decode(x).numpy() for x in latents]
        with new_folder(out) as temporary:
            arrays = {f"{name}.video": x for name, x in zip(media, latents, strict=True)}
            write_scene(temporary / "scene", replace(board, cards=sized).to_scene(media), arrays)
            if len({x.shape[1:] for x in frames}) == 1:
                write_video(temporary / "film.mp4", np.concatenate(frames), board.fps)
            else:
                self.report("the shots differ in size: there is a film of each, and none of all")
            for i, shown in enumerate(frames):
                write_video(temporary / f"shot-{i + 1}.mp4", shown, board.fps)
            captions = [shot_prompt(c.prompt, c.cut) for c in board.cards]
            contact_sheet([(board.branch, frames)], captions).save(temporary / "contact-sheet.png")
        return out

    # -- within --------------------------------------------------------------------------------------------------

    def _check(self, board: Board) -> None:
        """What a scene file refuses, such as `[SHOT CUT]` typed by hand, is refused here."""
        parse_scene(scene_text(board.to_scene([None] * len(board.cards))), str(self.folder))

    def _usual_size(self, board: Board) -> tuple[int, int, int] | None:
        """The size of the last shot that was not given."""
        made = [card.size for card in board.cards if not card.given]
        return (made or [board.cards[-1].size])[-1]

    def _with_one_more(self, board: Board, card: Card, action: str) -> Board:
        """The board with a card at the end, under a name that no card and no take ever had."""
        names = [NAME.match(name) for name in (*(c.name for c in board.cards), *os.listdir(self.folder / TAKES))]
        number = 1 + max(board.named, *(int(name[1]) for name in names if name))
        return replace(board, cards=(*board.cards, replace(card, name=f"shot-{number}")), action=action, named=number)

    def _write_board(self, board: Board, again: bool = False) -> None:
        """Make this the board; `again` as part of this studio's action before, so that one `undo` takes both back.

        ValueError where the board that it was made from no longer stands: somebody else acted, and would be undone.
        """
        _check_circle(board)
        folder = self.folder / BOARDS
        boards = sorted(folder.glob("[0-9]*.json"))
        now = self.board if boards else board
        if board.key != now.key:
            raise ValueError(f"{self.folder}: somebody else acted on this project just now; look and try again")
        turn = now.turn + (not (again and now.key == self._last)) if boards else 0
        board = replace(board, turn=turn, key=uuid.uuid4().hex)
        path = folder / f"{int(boards[-1].stem) + 1 if boards else 1:06d}.json"
        try:
            with new_file(path, replaces=False) as temporary:
                temporary.write_text(board.to_json(), encoding="utf-8")
        except FileExistsError:
            raise ValueError(f"{path}: somebody else acted on this project just now; look and try again") from None
        self._last = board.key

    def _take(self, index: int, action: str, again: bool = False, board: Board | None = None, **changes: Any) -> str:
        """Find or make the take that a shot asks for, put it on the board, and return its name; see `_write_board`."""
        board = board or self.board
        if board.cards[index].given:  # no longer, and it need not be as large as the media were
            changes |= {"given": False, "size": self._usual_size(board)}
        board = board.with_card(index, action, **changes)
        _check_circle(board)
        inputs = board.wanted(index)
        name = take_name(inputs)
        if not (self.take_folder(name) / TAKE).is_file():
            check_vacant(self.take_folder(name))
            try:
                self._generate(board, index, inputs, name)
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)):
                    raise
                raise ValueError(
                    f"shot {index + 1}: not enough memory; make it smaller, let it see fewer shots, or keep those in "
                    "8 bits or elsewhere, --memory.fp8 True --memory.device cpu"
                ) from error
        self._show(name, board)
        kept = board.cards[index].kept and board.cards[index].take == name
        self._write_board(board.with_card(index, action, take=name, kept=kept, given=False), again)
        self.report(f"shot {index + 1}: {self.take_folder(name)}")
        return name

    def _sized(self, board: Board, index: int) -> tuple[int, int, int]:
        """The size of a shot to make; ValueError where the model cannot make it."""
        size, patch = board.cards[index].size, self._model(board.settings)[0].config.patch
        if size is None or any(n % p or n < p for n, p in zip(size, patch, strict=True)):
            raise ValueError(f"shot {index + 1}: expected a size that the patch {patch} divides, got {size}")
        return size

    def _generate(self, board: Board, index: int, inputs: Inputs, name: str) -> None:
        model, config = self._model(board.settings)
        patch, card, s = model.config.patch, board.cards[index], board.settings
        size = self._sized(board, index)
        sampling = _sampling(config, s)
        seen = board.seen(index)
        if seen and config.data.shots == 1:
            raise ValueError(f"sees: {s.weights} knows single shots; choose with `sees {index + 1} none`")
        history = [self._history(board, i, patch, s.history_time) for i in seen]
        shared, prompt = inputs["global"], inputs["prompt"]
        if config.data.shots == 1:
            shared, prompt = None, single_prompt(shared, card.prompt)
        parts = self._pipeline(s)
        if parts is not None:
            parts.prepare([shared or "", prompt, *(shot.prompt for shot in history), ""])
        new = ShotRequest(prompt, size_in_patches(size, patch), card.seed)
        if config.visibility == "context_causal":
            request = SceneRequest(shared, (*history, new))
            rows = autoregressive(model, [request], sampling, impl=self.impl, memory=self._memory(s))[0][-1]
        else:  # a shot may see what comes after it: given shots 1 and 3, make 2
            before = tuple(shot for i, shot in zip(seen, history, strict=True) if i < index)
            after = tuple(shot for i, shot in zip(seen, history, strict=True) if i > index)
            request = SceneRequest(shared, (*before, new, *after))
            rows = joint(model, [request], sampling, config.visibility, self.impl)[0][len(before)]
        latents = unpatchify(rows.float().cpu(), new.video, patch).numpy()
        self._write_take(name, inputs, latents, board)

    def _history(self, board: Board, index: int, patch: tuple[int, int, int], time: float) -> ShotRequest:
        """A finished shot as what a new one sees: given media at t = 0, takes at t_c, with noise of their own seeds."""
        take = str(board.cards[index].take)
        made_from, latents = self.inputs(take), self._latents(take)
        rows = patchify(torch.from_numpy(latents), patch)
        seed, when = (0, 0.0) if board.cards[index].given else (made_from["seed"], time)
        return ShotRequest(made_from["prompt"], size_in_patches(latents.shape, patch), seed, rows, when)

    def _check_settings(self, settings: Settings) -> None:
        """ValueError where weights and pipeline do not belong together, before anything is written."""
        config, parts = config_of(settings.weights), self._pipeline(settings)
        _sampling(config, settings)
        if self._memory(settings) is not None and config.visibility != "context_causal":
            raise ValueError(
                f"memory.fp8, memory.device: {settings.weights} keep no history, only weights tuned with "
                "context_causal do; leave both out, or turn 8 bits off with --memory.fp8 False"
            )
        if parts is not None:
            parts.check(config.model)
        elif not config.model.vocabulary:
            raise ValueError(
                f"pipeline: {settings.weights} reads features of a pipeline's text encoders; name its folder"
            )

    def _memory(self, settings: Settings) -> Memory | None:
        """Of what a shot sees. A pool beside a whole context would be kept twice: contexts are made block by block."""
        if self.history_device is None and not settings.fp8:
            return None
        return Memory(self.history_device, settings.fp8, layered=True)

    def _model(self, settings: Settings):
        key = (settings.digest, settings.pipeline, settings.dtype)
        if self._loaded is None or self._loaded[0] != key:
            if digest_of(settings.weights) != settings.digest:
                raise ValueError(f"weights: {settings.weights} is no longer what this project began with; put it back")
            self._loaded = None  # let go of before there is another
            model, config = load_model(settings.weights, self.device, settings.pipeline, settings.dtype)
            parts = self._pipeline(settings)
            if parts is not None:
                parts.speak_for(model)
            dtype = Sampling(dtype=settings.dtype).compute_dtype(model)
            if advice := unvalidated(self.impl, model.video_out.weight.device, dtype):
                self.report(advice)
            self._loaded = (key, model, config)
        return self._loaded[1:]

    def _pipeline(self, settings: Settings) -> Pipeline | None:
        """The parts of a pipeline that the settings name, loaded as they are asked for."""
        if settings.pipeline is not None and (self._parts is None or self._parts.folder != Path(settings.pipeline)):
            self._parts = pipeline_of(Path(settings.pipeline), self.device, settings.dtype)
        return None if settings.pipeline is None else self._parts

    def _codec(self, board: Board) -> Codec:
        return codec_of(board.codec, self.folder, self._pipeline(board.settings))

    def _latents(self, take: str) -> np.ndarray:
        file = self.take_folder(take) / LATENTS
        try:
            return load_file(file)["video"]
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged ({error}); remove its folder, `refresh` makes the take again") from None

    def _given(self, board: Board, index: int, latents: np.ndarray, source: str) -> Board:
        card = board.cards[index]
        digest = hashlib.sha256(np.ascontiguousarray(latents).tobytes()).hexdigest()
        prompt = shot_prompt(card.prompt, card.cut)
        inputs = {"shot": card.name, "prompt": prompt, "media": digest, "source": source, "seed": card.seed}
        name = take_name(inputs)
        self._write_take(name, inputs, latents, board)
        size = tuple(int(n) for n in latents.shape[:3])
        return board.with_card(index, board.action, take=name, size=size, given=True, kept=False)

    def _write_take(self, name: str, inputs: Inputs, latents: np.ndarray, board: Board) -> None:
        """A take's latents, and then, should that fail to be made up for later, what a person looks at."""
        if not (self.take_folder(name) / TAKE).is_file():
            with new_folder(self.take_folder(name)) as temporary:
                try:
                    save_file({"video": np.ascontiguousarray(latents, np.float32)}, temporary / LATENTS)
                except SafetensorError as error:
                    raise OSError(f"{self.take_folder(name)}: could not be written ({error})") from None
                (temporary / TAKE).write_text(json.dumps(inputs, indent=1, ensure_ascii=False), encoding="utf-8")
        self._show(name, board)

    def _show(self, name: str, board: Board) -> None:
        """Film and contact sheet of a take, made where they are missing."""
        folder = self.take_folder(name)
        if (folder / FILM).is_file() and (folder / SHEET).is_file():
            return
        frames = self._codec(board).decode(np.ascontiguousarray(self._latents(name))).numpy()
        with new_file(folder / FILM) as temporary:
            write_video(temporary, frames, board.fps)
        with new_file(folder / SHEET) as temporary:
            contact_sheet([(name, [frames])], [self.inputs(name)["prompt"]]).save(temporary)


def _read_board(file: Path) -> Board:
    try:
        return Board.from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; remove the file to go back to the board before it") from None


def _sampling(config: TrainConfig, s: Settings) -> Sampling:
    names = ("steps", "guidance", "history_guidance", "history_time", "dtype")
    return Sampling.of(config, **{name: getattr(s, name) for name in names})


def _check_circle(board: Board) -> None:
    found = board.circle()
    if found is not None:
        raise ValueError(f"sees: shot {found + 1} sees itself through others; let one of them see others")
