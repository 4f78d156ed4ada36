"""The page: well-formed, complete, nothing from outside, and no text that becomes markup."""

from html.parser import HTMLParser

import pytest

from lct.report import Heading, Metric, Metrics, Picture, Text, Video, write_page

HOSTILE = "</p><script>alert('1')</script><img src=x onerror=\"x\"> & \"quoted\" 'too'"
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tags with their attributes, text by tag, and whether every tag is closed in order."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], {}, []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"png")
    (tmp_path / "a film & more.mp4").write_bytes(b"mp4")
    return tmp_path


def sections(text):
    return [
        Heading(text),
        Text(text),
        Picture("mask.png", text),
        Video("a film & more.mp4", text),
        Metrics((Metric(text, text, text, True), Metric("b", "1 ± 2", "≤ 3", False), Metric("c", "4"))),
    ]


def test_every_text_is_shown_as_it_is_and_none_becomes_markup(folder):
    page = Page(write_page(folder, HOSTILE, sections(HOSTILE)))
    plain = Page(write_page(folder, "title", sections("text")))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    for tag in ("title", "h1", "h2", "p", "figcaption", "th"):
        assert HOSTILE in page.text[tag], tag
    assert page.text["td"].count(HOSTILE) == 2
    assert page.named("img")[0]["alt"] == HOSTILE


def test_sections_come_in_order(folder):
    page = Page(write_page(folder, "t", [Heading("one"), Text("two"), Heading("three"), Text("four")]))
    assert [tag for tag, _ in page.tags if tag in ("h2", "p")] == ["h2", "p", "h2", "p"]
    assert page.text["h2"] == ["one", "three"] and page.text["p"] == ["two", "four"]


def test_media_are_relative_and_nothing_comes_from_elsewhere(folder):
    path = write_page(folder, "t", sections("text"))
    page = Page(path)
    assert path == folder / "index.html"
    assert page.named("img")[0]["src"] == "mask.png"
    film = page.named("video")[0]
    assert film["src"] == "a%20film%20%26%20more.mp4"
    assert {"controls", "loop", "muted"} <= set(film)
    source = path.read_text(encoding="utf-8")
    assert "http" not in source and "<script" not in source and "url(" not in source
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source


def test_metrics_say_in_words_what_was_met(folder):
    rows = Metric("a", "0.10 ± 0.02", "≤ 0.15", True), Metric("b", "2", "≥ 3", False), Metric("c", "5")
    page = Page(write_page(folder, "t", [Metrics(rows)]))
    assert page.text["td"] == ["0.10 ± 0.02", "≤ 0.15", "✓ yes", "2", "≥ 3", "✗ no", "5"]
    assert [cell.get("class") for cell in page.named("td")][2::3] == ["pass", "fail", None]


def test_files_outside_or_absent_are_refused_and_the_old_page_stays(folder):
    write_page(folder, "old", [])
    (folder.parent / "outside.png").write_bytes(b"png")
    for file in ("absent.png", "../outside.png", str(folder.parent / "outside.png"), ""):
        with pytest.raises(ValueError, match="file within"):
            write_page(folder, "new", [Picture(file, "")])
    with pytest.raises(TypeError, match="sections"):
        write_page(folder, "new", ["text"])
    assert Page(folder / "index.html").text["h1"] == ["old"]
    assert sorted(path.name for path in folder.iterdir()) == ["a film & more.mp4", "index.html", "mask.png"]


def test_an_empty_page_in_a_new_folder(tmp_path):
    page = Page(write_page(tmp_path / "new" / "folder", "t", []))
    assert page.text["h1"] == ["t"]
