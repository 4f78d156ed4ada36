"""The director's desk in a terminal: what stands on the board, and actions typed one by one or given as one command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lct.direct.studio import FILM, MISTAKES, SHEET, Studio

STYLES = {"empty": "dim", "given": "cyan", "made": "green", "stale": "yellow"}
Positional = tyro.conf.Positional


def status(studio: Studio) -> None:
    """What stands on the board: every shot, what it sees, its take, and whether that is stale."""
    board = studio.board
    table = Table(title=Text(f"{studio.folder.name}, branch {board.branch}"), title_justify="left")
    for name in ("shot", "prompt", "sees", "seed", "take"):
        table.add_column(name, justify="right" if name in ("shot", "seed") else "left", overflow="fold")
    for i, card in enumerate(board.cards):
        state = studio.state(i, board)
        take = Text(f"{state}{', kept' if card.kept else ''}", STYLES[state])
        others = len(studio.takes(i + 1)) - (card.take is not None)
        if others > 0:
            take.append(f"  {others} more", "dim")
        sees = " ".join(str(n + 1) for n in board.seen(i)) or "–"
        mark = "" if card.cut else "↪ "  # goes on without a cut
        table.add_row(str(i + 1), Text(mark + card.prompt), sees, str(card.seed), take)
    Console().print(table)


def look(studio: Studio, shot: int) -> None:
    """Where the files of a shot's takes lie: film, contact sheet, settings."""
    card = studio.board.cards[studio.board.number(shot)]
    takes = studio.takes(shot)
    if not takes:
        print(f"shot {shot}: no take yet")
    for take in takes:
        print(f"{'*' if take == card.take else ' '} {take}  seed {studio.inputs(take).get('seed', '–')}")
        for file in (FILM, SHEET):
            print(f"    {studio.take_folder(take) / file}")


def actions(studio: Studio) -> dict[str, Callable[..., Any]]:
    """Every action by name, with arguments as they are typed. The page's buttons call the same methods of `Studio`."""

    def make(shots: Positional[tuple[int, ...]] = (), all: bool = False):
        studio.make(*shots, all=all)

    def reroll(shot: Positional[int], seed: int | None = None):
        studio.reroll(shot, seed)

    def keep(shot: Positional[int], take: Positional[str | None] = None):
        studio.keep(shot, take)

    def sees(shot: Positional[int], choice: Positional[tuple[str, ...]] = ()):
        studio.sees(shot, *choice)

    def refresh(shots: Positional[tuple[int, ...]] = ()):
        if not studio.refresh(*shots):
            print("nothing is stale")

    def prompt(shot: Positional[int], text: Positional[str], cut: Literal["as-it-is", "yes", "no"] = "as-it-is"):
        studio.prompt(shot, text, {"as-it-is": None, "yes": True, "no": False}[cut])

    def extend(
        prompt: Positional[str],
        cut: bool = True,
        size: tuple[int, int, int] | None = None,
        seed: int | None = None,
        sees: str | None = None,
    ):
        studio.extend(prompt, cut, size, seed, sees)

    def add(prompt: Positional[str], file: Positional[Path | None] = None, cut: bool = True):
        studio.add(prompt, file, cut)

    def give(shot: Positional[int], file: Positional[Path]):
        studio.give(shot, file)

    def remove(shot: Positional[int]):
        studio.remove(shot)

    def fork(name: Positional[str]):
        studio.fork(name)

    def switch(name: Positional[str]):
        studio.switch(name)

    def undo():
        print(f"undone: {studio.undo()}")

    def export(out: Positional[Path]):
        print(studio.export(out))

    def page(port: Annotated[int, tyro.conf.arg(help="0: any that is free")] = 0, browser: bool = True):
        from lct.direct.page import serve

        serve(studio, port, browser)

    def _status():
        status(studio)

    def _look(shot: Positional[int]):
        look(studio, shot)

    page.__doc__ = "The same board as a page of thumbnails in a browser of this machine."
    _status.__doc__, _look.__doc__ = status.__doc__, look.__doc__
    found = {"status": _status, "look": _look}
    for action in (make, reroll, keep, refresh, sees, prompt, extend, add, give, remove, fork, switch, undo, export):
        action.__doc__ = getattr(Studio, action.__name__).__doc__
        found[action.__name__] = action
    return found | {"page": page}


def act(studio: Studio, words: Sequence[str]) -> None:
    """Run one action, `make 3` or `extend "Character 1 leaves" --no-cut`; SystemExit for words that are no action."""
    tyro.extras.subcommand_cli_from_dict(actions(studio), args=list(words), prog="lct direct SCENE")


def converse(studio: Studio) -> None:
    """Ask for actions until the input ends; a mistake is one line, and the board stands as before."""
    status(studio)
    while True:
        try:
            line = input("direct> ")
        except EOFError:
            return
        if line.strip() in ("quit", "exit"):
            return
        try:
            words = shlex.split(line)
            if words:
                act(studio, ["--help"] if words == ["help"] else words)
                if words[0] not in ("status", "look", "help"):
                    status(studio)
        except SystemExit:
            continue
        except MISTAKES as error:
            print(f"lct: error: {' '.join(str(error).split())}", file=sys.stderr)
