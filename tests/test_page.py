"""The director's page in a headless browser: buttons do what the terminal's words do."""

import shutil

import pytest
from test_direct import SCENE, settings, small_weights, states

from lct.data.scenefile import write_scene
from lct.direct import page
from lct.direct.studio import Studio

pytest.importorskip("av")
pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_scene(folder / "scene", SCENE)
    weights = small_weights(folder, "context_causal")
    return Studio.begin(folder / "scene", folder / "project", settings(weights))


@pytest.fixture(scope="module")
def tab(studio):
    if BROWSER is None:
        pytest.skip(f"no browser found, looked for {', '.join(BROWSERS)}")
    address = page.serve(studio, browser=False, wait=False)
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        tab.asked = asked
        yield tab
        browser.close()


def wait_for(tab, shot: int, text: str) -> None:
    tab.locator(f"#shot-{shot} .state", has_text=text).wait_for(timeout=30_000)


def test_a_scene_by_its_buttons(studio, tab):
    for shot in (1, 2, 3):
        wait_for(tab, shot, "empty")
    for shot in (1, 2, 3):
        tab.locator("#make").click()
        wait_for(tab, shot, "made")
    assert states(studio) == ["made"] * 3
    video = tab.locator("#shot-1 video")
    video.wait_for(timeout=30_000)
    tab.wait_for_function("document.querySelector('#shot-1 video').readyState >= 1")
    tab.locator("#keep-2").click()
    wait_for(tab, 2, "kept")
    assert studio.board.cards[1].kept
    tab.locator("#reroll-1").click()
    wait_for(tab, 3, "stale")
    assert states(studio) == ["made", "stale", "stale"] and studio.board.cards[0].seed == 1
    tab.locator("#undo").click()
    wait_for(tab, 3, "made")
    tab.get_by_label("Extend with").fill("close-up of Character 2")
    tab.get_by_label("after a cut").uncheck()
    tab.locator("#extend").click()
    wait_for(tab, 4, "made")
    assert studio.inputs(studio.board.cards[3].take)["prompt"] == "close-up of Character 2"


def test_a_mistake_is_shown_and_changes_nothing(studio, tab):
    board = studio.board
    tab.get_by_label("Extend with").fill("[SHOT CUT] Character 1")
    tab.locator("#extend").click()
    tab.get_by_text("typed by hand").first.wait_for(timeout=30_000)
    assert studio.board == board


def test_what_another_process_did_is_not_overwritten(studio, tab):
    """A page that is open shows the newest board after its next action."""
    Studio(studio.folder).prompt(1, "wide shot of Character 2 <b>bold</b>")
    tab.locator("#keep-3").click()
    tab.locator("#shot-1", has_text="wide shot of Character 2 <b>bold</b>").wait_for(timeout=30_000)
    assert studio.board.cards[0].prompt == "wide shot of Character 2 <b>bold</b>" and studio.board.cards[2].kept


def test_nothing_is_asked_of_the_network(tab):
    assert tab.asked and all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in tab.asked), tab.asked
