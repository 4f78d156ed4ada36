"""One HTML page that shows what a run did: text, pictures, films and tables of numbers against their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from lct.data.atomic import new_file

# A wide picture keeps this many pixels on a phone and scrolls sideways, so that its labels stay legible.
CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b2430; --soft: #5d6775; --rule: #dde2e8; --bar: #f5f7f9;
  --good: #00734f; --bad: #b3400c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e4e8ed; --soft: #9aa5b1; --rule: #323a44; --bar: #1c2229; --good: #4fc79a;
    --bad: #f08a52; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 1.5rem; font-weight: 650; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .75rem; font-weight: 600; }
p { max-width: 44rem; margin: .75rem 0; white-space: pre-line; }
figure { margin: 1.25rem 0; }
.wide { overflow-x: auto; border-radius: .5rem; }
figure img { display: block; max-width: max(100%, 34rem); height: auto; background: #fff; border-radius: .5rem; }
figure video { display: block; width: 24rem; max-width: 100%; border-radius: .5rem; background: #000;
  image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 44rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; overflow-wrap: normal; }
th, td { padding: .5rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; background: var(--bar); }
tbody th { font-weight: 400; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { table { font-size: .85rem; } th, td { padding: .5rem .4rem; } }
.pass { color: var(--good); white-space: nowrap; }
.fail { color: var(--bad); white-space: nowrap; font-weight: 600; }
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; line breaks are kept."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image file beside the page; `text` stands below it and is read aloud in its place."""

    file: str
    text: str


@dataclass(frozen=True)
class Video:
    """An mp4 beside the page, shown in a loop."""

    file: str
    text: str


@dataclass(frozen=True)
class Metric:
    """One number as shown ("0.12 ± 0.03"), its target ("≤ 0.15"), and whether it is met (None: no target)."""

    name: str
    value: str
    target: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Metrics:
    """A table of numbers."""

    rows: tuple[Metric, ...]


Section = Heading | Text | Picture | Video | Metrics


def write_page(folder: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write `folder`/index.html, which shows the sections in order; returns its path.

    The page needs nothing but the files beside it: no script, no font, no network. All text is escaped.
    ValueError, before anything is written, where a picture or a video is not a file within `folder`.
    """
    folder = Path(folder)
    body = "\n".join(_section(folder, section) for section in sections)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""
    path = folder / "index.html"
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _section(folder: Path, section: Section) -> str:
    match section:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Picture(file, text):
            image = f'<img src="{_source(folder, file)}" alt="{escape(text)}" loading="lazy">'
            return f'<figure><div class="wide">{image}</div>{_caption(text)}</figure>'
        case Video(file, text):
            film = f'<video controls loop muted playsinline preload="metadata" src="{_source(folder, file)}"></video>'
            return f"<figure>{film}{_caption(text)}</figure>"
        case Metrics(rows):
            return _table(rows)
    raise TypeError(f"sections: expected Heading, Text, Picture, Video or Metrics, got {section!r}")


def _source(folder: Path, file: str) -> str:
    """The file's address, relative to the page."""
    path, root = (folder / file).resolve(), folder.resolve()
    if not path.is_file() or not path.is_relative_to(root):
        raise ValueError(f"sections: expected the name of a file within {folder}, got {file!r}")
    return escape(quote(path.relative_to(root).as_posix()))


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _table(rows: Sequence[Metric]) -> str:
    lines = "\n".join(
        f'<tr><th scope="row">{escape(row.name)}</th><td class="number">{escape(row.value)}</td>'
        f'<td class="number">{escape(row.target)}</td>{_mark(row.passed)}</tr>'
        for row in rows
    )
    head = (
        '<th scope="col">metric</th><th scope="col" class="number">value</th><th scope="col" class="number">target</th>'
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}<th scope="col">met</th></tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _mark(passed: bool | None) -> str:
    """A sign and a word, so that the colour is not needed to tell them apart."""
    if passed is None:
        return "<td></td>"
    return '<td class="pass">✓ yes</td>' if passed else '<td class="fail">✗ no</td>'
