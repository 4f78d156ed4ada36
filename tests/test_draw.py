"""Pictures: every pair, token and frame is where, and in the colour, that the layout says."""

import itertools
import time

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from PIL import Image
from strategies import problems

from lct.draw import contact_sheet, mask_picture, positions_picture
from lct.draw.ink import GLOBAL, INK, PALETTE, PAPER, font, mix, plain, shot_names
from lct.draw.mask import UNSEEN, MaskGrid, pair_colour
from lct.draw.positions import _View
from lct.draw.sheet import LINES, NARROWEST, SheetGrid, _wrap
from lct.layout import SceneLayout, Shot

PROMPT = (12, (1, 1, 1), "global")
SCENE = [PROMPT, (9, (3, 4, 4), "shot"), (11, (1, 4, 4), "shot"), (14, (4, 4, 4), "shot")]
OTHER = [(10, (2, 4, 4), "shot"), (9, (1, 4, 4), "shot"), (7, (1, 2, 2), "shot")]
CASES = [
    ([SCENE], "isolated"),
    ([SCENE], "bidirectional"),
    ([SCENE], "context_causal"),
    ([SCENE], [[(), (), (), (1,)]]),
    ([SCENE, OTHER], "context_causal"),
    ([SCENE, OTHER], [[(), (), (1,), (2,)], [(), (), (0,)]]),
]


def build(scenes, visibility="context_causal"):
    return SceneLayout([[Shot(*shot) for shot in scene] for scene in scenes], visibility)


def key_colours(scenes):
    """The colour of every shot, in row order."""
    colours = []
    for scene in scenes:
        body = [PALETTE[i % len(PALETTE)] for i in range(len(scene))]
        colours += [GLOBAL, *body[:-1]] if scene[0][2] == "global" else body
    return colours


def check_mask(scenes, visibility, size):
    """The pixel in the middle of every (part, part) has the colour that the oracle's mask asks for."""
    image, grid = mask_picture(build(scenes, visibility), size), MaskGrid.of(build(scenes, visibility), size)
    visible, colours = oracle.mask(scenes, visibility), key_colours(scenes)
    counts = [n for scene in scenes for text, video, _ in scene for n in (text, int(np.prod(video)))]
    first_rows = np.cumsum([0, *counts])
    parts = [part for part, count in enumerate(counts) if count]
    for q, k in itertools.product(parts, parts):
        seen = visible[first_rows[q], first_rows[k]]
        texts = (1 - q % 2) + (1 - k % 2)
        expected = pair_colour(colours[k // 2], q // 2 == k // 2, texts) if seen else UNSEEN
        x, y = ((grid.edges[part] + grid.edges[part + 1]) // 2 for part in (k, q))
        assert image.getpixel((grid.left + x, grid.top + y)) == expected, (q, k)


@pytest.mark.parametrize(("scenes", "visibility"), CASES)
@pytest.mark.parametrize("size", [360, 720, 1440])
def test_mask_shows_every_pair_of_parts_as_the_oracle_sees_it(scenes, visibility, size):
    check_mask(scenes, visibility, size)


@settings(max_examples=60)
@given(problems())
def test_mask_of_any_layout(problem):
    scenes, visibility, _ = problem
    check_mask(scenes, visibility, 720)


def test_mask_is_to_scale_where_no_part_is_thin():
    rows = [0, 10, 42, 51, 67, 74, 78]
    assert MaskGrid.of(build([OTHER]), 780).edges == tuple(10 * row for row in rows)


def test_separators_are_light_between_shots_and_heavy_between_scenes():
    layout = build([SCENE, OTHER])
    image, grid = mask_picture(layout), MaskGrid.of(layout)
    inside = grid.edges[6] + 9  # in the text of scene 1's shot 3, away from every edge
    shot, scene = grid.edges[4], grid.edges[8]
    assert image.getpixel((grid.left + inside, grid.top + shot)) == PAPER
    assert [image.getpixel((grid.left + inside, grid.top + scene + d)) for d in (-1, 0, 1)] == [INK] * 3
    assert image.getpixel((grid.left + scene, grid.top + inside)) == INK


def test_tones_tell_own_from_context_and_text_from_video():
    for colour in (*PALETTE, GLOBAL):
        tones = {(own, texts): pair_colour(colour, own, texts) for own in (True, False) for texts in range(3)}
        assert len(set(tones.values()) | {UNSEEN, PAPER}) == 8
        for own in (True, False):
            assert sum(tones[own, 2]) < sum(tones[own, 1]) < sum(tones[own, 0])
        for texts in range(3):
            assert sum(tones[True, texts]) < sum(tones[False, texts]) < sum(UNSEEN)


def test_mask_of_170_thousand_rows_is_quick_and_keeps_the_smallest_parts():
    scene = [PROMPT, *((256, (16, 30, 40), "shot") for _ in range(9))]
    layout = build([scene])
    assert layout.rows > 170_000
    began = time.perf_counter()
    image = mask_picture(layout)
    assert time.perf_counter() - began < 1
    grid = MaskGrid.of(layout)
    assert all(b - a >= 4 for a, b in itertools.pairwise(grid.edges))
    middle = (grid.edges[1] + grid.edges[2]) // 2  # the single dummy token of the global prompt
    expected = pair_colour(GLOBAL, False, 0)
    assert image.getpixel((grid.left + middle, grid.top + grid.side - 20)) == expected


def test_many_shots_and_no_rows_can_be_drawn():
    mask_picture(build([[(3, (1, 1, 1), "shot")] * 60], "bidirectional"))
    mask_picture(build([[(0, (0, 0, 0), "shot")]]))
    positions_picture(build([[(0, (0, 0, 0), "shot")]]))


def test_names_count_from_one_with_and_without_a_global_prompt():
    assert shot_names([Shot(*shot) for shot in SCENE]) == ["global", "shot 1", "shot 2", "shot 3"]
    assert shot_names([Shot(*shot) for shot in OTHER]) == ["shot 1", "shot 2", "shot 3"]


# ---- positions


@pytest.mark.parametrize("text_scale", [1.0, 0.5])
def test_positions_of_all_tokens_are_where_the_oracle_puts_them(text_scale):
    layout, pixels = build([SCENE]), np.asarray(positions_picture(build([SCENE]), text_scale))
    view = _View.of(layout, 0, text_scale, 1200)
    colours = key_colours([SCENE])
    for row, place in zip(oracle.row_table([SCENE]), oracle.positions([SCENE], text_scale), strict=True):
        _, height, width = SCENE[row.shot][1]
        if row.stream == "text":
            expected, shift = mix(colours[row.shot], INK, 0.4), (0, 0, 0)
        elif row.index < height * width:  # the first frame, on the face towards the reader
            expected, shift = colours[row.shot], (-0.5, 0, 0)
        else:
            continue
        # The first video token may lie under the last dot of the text.
        if row.stream == "video" and row.index == 0:
            continue
        x, y = view.page(np.array(place) + shift).astype(int)
        assert tuple(pixels[y, x]) == expected, row


def test_every_scene_has_its_own_panel_from_zero():
    one, two = positions_picture(build([SCENE])), positions_picture(build([SCENE, SCENE]))
    assert two.size == (1200, 2 * one.height)
    below = np.asarray(two)[one.height + 90 :]
    assert np.array_equal(below, np.asarray(one)[90:])  # but for the title


@pytest.mark.parametrize("text_scale", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("width", [600, 1200])
def test_positions_stay_on_the_page(text_scale, width):
    scene = [(3, (1, 8, 8), "shot"), (2, (9, 1, 1), "shot"), (4, (1, 1, 9), "shot")]
    pixels = np.asarray(positions_picture(build([scene]), text_scale, width))
    assert pixels.shape[1] == width
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


# ---- contact sheets


def clips(seed, sizes):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


ROWS = [
    ("truth", clips(0, [(3, 16, 16), (1, 16, 16), (4, 12, 20)])),
    ("auto-regressive", clips(1, [(3, 16, 16), (2, 16, 16), (4, 12, 20)])),
    ("isolated", clips(2, [(3, 16, 16), (1, 20, 12)])),
]


def frames_of(image, grid, rows):
    for row, (_, shots) in enumerate(rows):
        for shot, clip in enumerate(shots):
            for index, frame in enumerate(clip):
                yield frame, grid.frame(row, shot, index), np.asarray(image.crop(grid.frame(row, shot, index)))


def test_sheet_shows_every_frame_where_it_says_each_pixel_a_square():
    image, grid = contact_sheet(ROWS), SheetGrid.of(ROWS)
    assert image.size == (grid.width, grid.height)
    covered = np.zeros(image.size[::-1], int)
    for frame, (left, top, right, bottom), shown in frames_of(image, grid, ROWS):
        assert np.array_equal(shown, frame.repeat(3, 0).repeat(3, 1))
        covered[top:bottom, left:right] += 1
    assert covered.max() == 1
    assert [grid.frame(2, 0, i)[0] - grid.lefts[0] for i in range(3)] == [0, 50, 100]
    assert all(grid.frame(0, shot, len(ROWS[0][1][shot]) - 1)[2] < grid.lefts[shot + 1] for shot in range(2))
    assert (np.diff(grid.lefts) > NARROWEST).all() and (np.diff(grid.tops) > 16 * 3).all()


def test_sheet_marks_given_shots_outside_their_frames():
    image, bare = contact_sheet(ROWS, given={("auto-regressive", 1)}), contact_sheet(ROWS)
    grid = SheetGrid.of(ROWS)
    for frame, _, shown in frames_of(image, grid, ROWS):
        assert np.array_equal(shown, frame.repeat(3, 0).repeat(3, 1))
    ys, xs = np.nonzero((np.asarray(image) != np.asarray(bare)).any(-1))
    left, top, _, bottom = grid.frame(1, 1, 0)
    right = grid.frame(1, 1, 1)[2]
    assert left - 8 <= xs.min() < left and right <= xs.max() < right + 8
    assert top - 8 <= ys.min() < top and bottom <= ys.max() < grid.tops[2]


def test_sheet_puts_prompts_above_the_frames_and_cuts_long_ones():
    captions = ["short", "one " * 200, "café by the sea"]
    image, grid = contact_sheet(ROWS, captions), SheetGrid.of(ROWS, LINES)
    for frame, _, shown in frames_of(image, grid, ROWS):
        assert np.array_equal(shown, frame.repeat(3, 0).repeat(3, 1))
    gaps = np.asarray(image)[: grid.tops[0] - 8, grid.lefts[1] - 20 : grid.lefts[1]]
    assert (gaps == 255).all(), "a prompt runs into the next shot"


@pytest.mark.parametrize("text", ["", "a", "word " * 100, "w" * 300, "x " + "w" * 300 + " y", "日本語 “quoted” café"])
def test_wrapped_lines_fit_their_column(text):
    lines = _wrap(text, 150)
    assert len(lines) <= LINES
    assert all(font(14).getlength(line) <= 150 for line in lines)
    if len(text) < 40:
        assert " ".join(lines) == plain(text)


def test_large_frames_are_reduced_evenly():
    rows = [("video", clips(0, [(2, 270, 480)]))]
    image, grid = contact_sheet(rows, frame=120), SheetGrid.of(rows, frame=120)
    assert grid.sizes == (((120, 68),),)
    frame, _, shown = next(frames_of(image, grid, rows))
    assert np.array_equal(shown, np.asarray(Image.fromarray(frame).resize((120, 68), Image.Resampling.LANCZOS)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "rows"),
        (([("truth", [])],), "rows"),
        (([("truth", [np.zeros((1, 4, 4, 3), np.float32)])],), "'truth', shot 0.*float32"),
        (([("truth", [np.zeros((4, 4, 3), np.uint8)])],), "expected uint8"),
        ((ROWS, ["one"]), "captions: expected one for each of 3 shots, got 1"),
        ((ROWS, None, {("isolated", 2)}), "given"),
        ((ROWS, None, {("nobody", 0)}), "given"),
    ],
)
def test_sheet_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(*arguments)
