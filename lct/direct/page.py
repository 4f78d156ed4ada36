"""The board as a local web page: a thumbnail a shot, with keep, re-roll and extend. Needs gradio (extra `direct`).

Every button calls the method of `Studio` that the terminal calls; the page knows nothing that the board does not.
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lct.direct.studio import FILM, MISTAKES, SHEET, TAKES, Studio

CSS = """
.shot { border: 1px solid var(--border-color-primary); border-radius: .6rem; padding: .75rem; max-width: 20rem;
  min-width: 14rem !important; }
.shot video, .shot img { image-rendering: pixelated; border-radius: .4rem; }
.shot .row { flex-wrap: nowrap; gap: .5rem; }
.shot button { min-width: 0; }
.state { font-size: .8rem; padding: .1rem .5rem; border-radius: 1rem; border: 1px solid currentColor;
  white-space: nowrap; }
.empty { color: var(--body-text-color-subdued); } .given { color: #0b7285; } .made { color: #00734f; }
.stale { color: #b3400c; font-weight: 600; }
.dark .given { color: #66d9e8; } .dark .made { color: #4fc79a; } .dark .stale { color: #f08a52; }
@media (max-width: 40rem) { .shot { max-width: none; } }
"""
COLUMNS = 4


def build(studio: Studio) -> Any:
    """The page as a gradio `Blocks`, not yet served. ImportError, with what to install, where gradio is missing."""
    gr = _gradio()

    def acting(action: Callable[..., Any]) -> Callable[..., Any]:
        """What a button does: the action, then a redrawn board; a mistake is shown, and the board stands as before."""

        def do(turn: int, *arguments: Any) -> int:
            try:
                action(*arguments)
            except MISTAKES as error:
                raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
            return turn + 1

        return do

    with gr.Blocks(title=f"{studio.folder.name} · LCT", analytics_enabled=False) as page:
        turn = gr.State(0)  # the board is drawn anew when it changes

        @gr.render(inputs=[turn])
        def draw(_: int) -> None:
            board = studio.board
            states = [studio.state(i, board) for i in range(len(board.cards))]
            shared = "" if board.global_prompt is None else board.global_prompt.text()
            gr.Markdown(f"## {_plain(studio.folder.name)} · {_plain(board.branch)}\n\n{_plain(shared)}")
            with gr.Row():
                make = gr.Button("Make next", variant="primary", interactive="empty" in states, elem_id="make")
                refresh = gr.Button(f"Refresh {states.count('stale')} stale", interactive="stale" in states)
                undo = gr.Button("Undo", elem_id="undo")
                for button, action in ((make, studio.make), (refresh, studio.refresh), (undo, studio.undo)):
                    button.click(acting(action), [turn], [turn])
            for first in range(0, len(board.cards), COLUMNS):
                with gr.Row(equal_height=False):
                    for i in range(first, min(first + COLUMNS, len(board.cards))):
                        with gr.Column(elem_classes="shot", elem_id=f"shot-{i + 1}"):
                            _shot(gr, studio, board, i, states[i], turn, acting)
            with gr.Row(equal_height=True):
                hint = "Close-up of Character 1 …"
                prompt = gr.Textbox(label="Extend with", placeholder=hint, interactive=True, scale=6)
                cut = gr.Checkbox(value=True, label="after a cut", interactive=True, scale=1)
                extend = gr.Button("Extend", elem_id="extend", scale=1)
                extend.click(acting(studio.extend), [turn, prompt, cut], [turn])

    return page


def _shot(gr, studio: Studio, board, index: int, state: str, turn, acting) -> None:
    card, number = board.cards[index], index + 1

    def here() -> int:
        return studio.board.place(card.name) + 1

    seen = ", ".join(str(i + 1) for i in board.seen(index)) or "nothing"
    label = f"{state}{', kept' if card.kept else ''}"
    gr.HTML(
        f"<b>{number}</b> <span class='state {state}'>{label}</span><br>{'' if card.cut else '↪ '}"
        f"{html.escape(card.prompt)}<br><small>sees {seen} · seed {card.seed}</small>"
    )
    if card.take is not None:
        folder = studio.take_folder(card.take)
        gr.Video(str(folder / FILM), show_label=False, autoplay=True, loop=True, height=220)
        with gr.Accordion("Frames", open=False):
            gr.Image(str(folder / SHEET), show_label=False)
    with gr.Row():
        if card.take is None:
            gr.Button("Make", size="sm", min_width=60).click(acting(lambda: studio.make(here())), [turn], [turn])
        else:
            keep = gr.Button("Keep", size="sm", min_width=60, interactive=not card.kept, elem_id=f"keep-{number}")
            keep.click(acting(lambda: studio.keep(here())), [turn], [turn])
            if state != "given":
                reroll = gr.Button("Re-roll", size="sm", min_width=60, elem_id=f"reroll-{number}")
                reroll.click(acting(lambda: studio.reroll(here())), [turn], [turn])
    takes = studio.takes(number)
    if len(takes) > 1:
        labels = [(f"seed {studio.inputs(take).get('seed', '–')}", take) for take in takes]
        choice = gr.Dropdown(labels, value=card.take, label="Takes", interactive=True)
        choice.input(acting(lambda take: studio.keep(here(), take)), [turn, choice], [turn])
    with gr.Accordion("Change", open=False):
        text = gr.Textbox(card.prompt, label="Prompt", interactive=True)
        change = gr.Button("Change prompt", size="sm")
        change.click(acting(lambda prompt: studio.prompt(here(), prompt)), [turn, text], [turn])
        rule = card.sees if isinstance(card.sees, str) else "none" if card.sees == () else seen if card.sees else ""
        hint = "what fits, or all, recent:2, relevant:3, none, or numbers"
        sees = gr.Textbox(rule, label="Sees", placeholder=hint, interactive=True)
        choose = gr.Button("Change what it sees", size="sm")
        choose.click(acting(lambda words: studio.sees(here(), *words.split())), [turn, sees], [turn])


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return html.escape(text).replace("*", "\\*").replace("_", "\\_").replace("[", "\\[")


def serve(studio: Studio, port: int = 0, browser: bool = True, wait: bool = True) -> str:
    """Serve the page on this machine alone, until interrupted or, without `wait`, until the process ends; its address.

    Nothing is fetched from the network: no fonts, no statistics.
    """
    gr = _gradio()
    takes = Path(studio.folder / TAKES).resolve()
    _, address, _ = build(studio).launch(
        server_name="127.0.0.1",
        server_port=port or None,
        inbrowser=browser,
        prevent_thread_lock=not wait,
        allowed_paths=[str(takes)],
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        quiet=not wait,
    )
    return address


def _gradio() -> Any:
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ImportError(f"the page needs gradio ({error}); pip install -e '.[direct]', or use the terminal") from None
