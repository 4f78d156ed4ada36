"""The layout against the oracle: rows, visibility, plan, positions, cache geometry; and what it refuses."""

import dataclasses
import pickle
import time
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from golden import GLOBAL_AND_TWO, GLOBAL_AND_TWO_ROWS, MASKS, POSITIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, scene_lists, shots, visibilities

from lct.layout import SceneLayout, Shot
from lct.plan import Plan, Run, read_table

thorough = settings(max_examples=500)
TEXT_SCALES = (0.0, 0.25, 1.0, 1.5)  # dyadic, so that sums in any order are exact


def build(scenes, visibility="context_causal"):
    """A layout from the oracle's tuples."""
    return SceneLayout([[Shot(*shot) for shot in scene] for scene in scenes], visibility)


def rasterise(runs, q_rows, k_rows):
    """How often each (run row, seen row) pair is covered."""
    covered = np.zeros((q_rows, k_rows), dtype=int)
    for start, end, *edges in runs:
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            covered[start:end, first:last] += 1
    return covered


def host_runs(runs):
    return [(run.start, run.end, *(edge for interval in run.sees for edge in interval)) for run in runs]


def assert_plan_covers(plan, visible):
    """Every visible pair exactly once and no other, by the host's runs and the tables kernels read, both ways round."""
    for runs in (host_runs(plan.runs), plan.table.tolist(), plan.host_table.tolist()):
        np.testing.assert_array_equal(rasterise(runs, *visible.shape), visible)
    for runs in (host_runs(plan.key_runs), plan.key_table.tolist(), plan.host_key_table.tolist()):
        np.testing.assert_array_equal(rasterise(runs, *visible.T.shape), visible.T)


def assert_runs_partition(runs, rows):
    """Runs meet end to start, as kernels write every row, and neighbours that see the same are one run."""
    assert [0, *(run.end for run in runs)] == [*(run.start for run in runs), rows]
    assert all(run.start < run.end for run in runs)
    assert all(run.sees != following.sees for run, following in pairwise(runs))


# Rows


def test_rows_golden():
    layout = build(GLOBAL_AND_TWO)
    assert layout.rows == len(GLOBAL_AND_TWO_ROWS)
    assert layout.shot_starts == (0, 3, 6)
    assert layout.shot_ends == (3, 6, 10)


@given(scene_lists())
@thorough
def test_rows_equal_the_oracle(scenes):
    layout, table = build(scenes), oracle.row_table(scenes)
    shot_of_row = [(row.scene, row.shot) for row in table]
    sizes = [shot_of_row.count((s, n)) for s, scene in enumerate(scenes) for n in range(len(scene))]
    assert layout.rows == len(table)
    assert layout.shot_ends == tuple(np.cumsum(sizes))
    assert layout.shot_starts == (0, *layout.shot_ends[:-1])


@given(scene_lists())
@thorough
def test_streams_equal_the_oracle(scenes):
    streams, table = build(scenes).streams(), oracle.row_table(scenes)
    number = {shot: k for k, shot in enumerate((s, n) for s, scene in enumerate(scenes) for n in range(len(scene)))}
    for stream, rows, shot in (
        ("text", streams.text_rows, streams.text_shot),
        ("video", streams.video_rows, streams.video_shot),
    ):
        expected = [(i, number[row.scene, row.shot]) for i, row in enumerate(table) if row.stream == stream]
        assert list(zip(rows.tolist(), shot.tolist(), strict=True)) == expected


# Visibility and plan


@pytest.mark.parametrize("name", MASKS)
def test_mask_golden(name):
    scenes, visibility, expected = MASKS[name]
    mask = build(scenes, visibility).dense_mask()
    assert mask.dtype == torch.bool
    assert ["".join("#" if seen else "." for seen in row) for row in mask.tolist()] == expected


@given(problems())
@thorough
def test_mask_equals_the_oracle(problem):
    scenes, visibility, _ = problem
    np.testing.assert_array_equal(build(scenes, visibility).dense_mask().numpy(), oracle.mask(scenes, visibility))


@given(scene_lists())
@thorough
def test_context_causal_is_shot_order_within_the_scene(scenes):
    scene, shot = np.array([row[:2] for row in oracle.row_table(scenes)], dtype=int).reshape(-1, 2).T
    expected = (scene[:, None] == scene) & (shot[:, None] >= shot)
    np.testing.assert_array_equal(build(scenes).dense_mask().numpy(), expected)


@given(shots(), st.sampled_from(("context_causal", "isolated", "bidirectional")))
@thorough
def test_one_shot_is_full_attention(shot, visibility):
    """With one video the long-context model is the single-shot model (§3.2.2)."""
    assert build([[shot]], visibility).dense_mask().all()


@given(problems())
@thorough
def test_plan_covers_the_mask_exactly_once(problem):
    scenes, visibility, _ = problem
    plan, visible = build(scenes, visibility).plan(), oracle.mask(scenes, visibility)
    assert_plan_covers(plan, visible)
    for runs, table in ((plan.runs, plan.table), (plan.key_runs, plan.key_table)):
        assert_runs_partition(runs, len(visible))
        assert table.dtype == torch.int32
        assert table.shape[0] % 16 == 0
        # Room for 1, 2, 4, … intervals: few shapes, so few compilations.
        assert ((table.shape[1] - 2) // 2).bit_count() == 1
        # Longest first, so that the last tiles to finish are short; read back in the order of their rows.
        seen = (table[:, 3::2] - table[:, 2::2]).sum(1)[: len(runs)].tolist()
        assert seen == sorted(seen, reverse=True)
        assert read_table(table) == list(runs)


def test_plan_of_separate_row_spaces():
    """Cross-attention, by hand: query rows 1 and 2 see keys 1 to 3, row 4 sees key 0; rows 0, 3 and 5 see nothing."""
    plan = Plan.build([Run(4, 5, ((0, 1),)), Run(1, 3, ((2, 4), (1, 2)))], q_rows=6, k_rows=5)
    visible = np.array([list(row) for row in (".....", ".###.", ".###.", ".....", "#....", ".....")]) == "#"
    np.testing.assert_array_equal(plan.dense_mask().numpy(), visible)
    assert_plan_covers(plan, visible)
    assert_runs_partition(plan.runs, 6)
    assert_runs_partition(plan.key_runs, 5)
    assert plan.pairs == 7


@pytest.mark.parametrize("runs", [[(0, 3), (2, 4)], [(0, 7)], [(-1, 2)]], ids=["overlap", "past the end", "negative"])
def test_plan_refuses_impossible_query_rows(runs):
    with pytest.raises(ValueError, match="runs"):
        Plan.build([Run(start, end, ((0, 1),)) for start, end in runs], q_rows=6, k_rows=5)


@pytest.mark.parametrize("interval", [(0, 6), (-1, 2)])
def test_plan_refuses_impossible_key_rows(interval):
    with pytest.raises(ValueError, match="key intervals"):
        Plan.build([Run(0, 6, (interval,))], q_rows=6, k_rows=5)


@given(scene_lists())
@thorough
def test_context_causal_is_a_staircase(scenes):
    """One interval per run both ways, at most one run per shot, in a table of one size for 1 to 16 shots."""
    plan = build(scenes).plan()
    for runs, table in ((plan.runs, plan.table), (plan.key_runs, plan.key_table)):
        assert all(len(run.sees) == 1 for run in runs)
        assert len(runs) <= sum(map(len, scenes))
        assert table.shape == (16, 4)
        assert table.dtype == torch.int32


def test_plan_is_memoised_by_value():
    scenes = MASKS["selection"][0]
    layout = build(scenes)
    assert layout.plan() is layout.plan("cpu") is layout.plan(torch.device("cpu")) is build(scenes).plan()
    assert layout.plan() is not build(scenes, "isolated").plan()


@given(problems())
@thorough
def test_flops_equal_the_oracle(problem):
    scenes, visibility, _ = problem
    expected = oracle.flops(oracle.mask(scenes, visibility), heads=3, head_dim=16)
    assert build(scenes, visibility).flops(heads=3, head_dim=16) == expected


XFORMERS_SCENES = {
    "one shot": [[(3, (2, 2, 3), "shot")]],
    "global and two shots": GLOBAL_AND_TWO,
    "two scenes": MASKS["two scenes, context-causal"][0],
    "an empty shot": [[(2, (1, 1, 1), "shot"), (0, (0, 0, 0), "shot"), (4, (1, 2, 2), "shot")]],
}


@pytest.mark.parametrize("name", XFORMERS_SCENES)
@pytest.mark.parametrize("visibility", ["context_causal", "bidirectional"])
def test_mask_equals_xformers(name, visibility):
    """Its gappy block-diagonal mask: every shot a block of queries over its own range of keys."""
    pytest.importorskip("xformers")
    from xformers.ops.fmha.attn_bias import BlockDiagonalGappyKeysMask

    scenes = XFORMERS_SCENES[name]
    layout = build(scenes, visibility)
    lengths, starts, ends, at = [], [], [], 0
    for scene in scenes:
        rows = [text + frames * height * width for text, (frames, height, width), _ in scene]
        lengths += rows
        starts += [at] * len(rows)
        ends += [at + sum(rows if visibility == "bidirectional" else rows[: n + 1]) for n in range(len(rows))]
        at += sum(rows)
    bias = BlockDiagonalGappyKeysMask.from_seqlens(
        q_seqlen=lengths, kv_seqstarts=[*starts, at], kv_seqlen=[b - a for a, b in zip(starts, ends, strict=True)]
    )
    assert torch.equal(bias.materialize((at, at)) == 0, layout.dense_mask())


# Positions


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_golden(name):
    scenes, text_scale, expected = POSITIONS[name]
    positions = build(scenes).positions(text_scale)
    assert positions.dtype == torch.float32
    assert positions.tolist() == [list(map(float, row)) for row in expected]


@given(scene_lists(), st.sampled_from(TEXT_SCALES))
@thorough
def test_positions_equal_the_oracle(scenes, text_scale):
    positions = build(scenes).positions(text_scale=text_scale)
    np.testing.assert_array_equal(positions.numpy(), oracle.positions(scenes, text_scale))


def test_positions_of_any_text_scale_are_rounded_once():
    scenes = [[(77, (21, 30, 52), "shot")] * 9]
    expected = oracle.positions(scenes, 0.37)
    np.testing.assert_allclose(build(scenes).positions(0.37).numpy(), expected, rtol=2.0**-23)


@given(scene_lists(shots().filter(lambda shot: shot[0] and min(shot[1])), max_scenes=2))
@thorough
def test_every_coordinate_of_a_shot_exceeds_all_of_the_shot_before(scenes):
    layout = build(scenes)
    blocks = [layout.positions()[a:b] for a, b in zip(layout.shot_starts, layout.shot_ends, strict=True)]
    scene_of_shot = [s for s, scene in enumerate(scenes) for _ in scene]
    for k in range(1, len(blocks)):
        if scene_of_shot[k] == scene_of_shot[k - 1]:
            assert blocks[k].min() > blocks[k - 1].max()
        else:
            assert blocks[k].min() == 0


# Growing a scene


@given(problems(scene_lists(min_shots=2)))
@thorough
def test_append_equals_building_the_longer_scene(problem):
    scenes, visibility, _ = problem
    shorter, last = [scene[:-1] for scene in scenes], [Shot(*scene[-1]) for scene in scenes]
    if isinstance(visibility, str):
        appended = build(shorter, visibility).append(last)
    else:
        shorter_visibility = [scene[:-1] for scene in visibility]
        appended = build(shorter, shorter_visibility).append(last, sees=[scene[-1] for scene in visibility])
    whole = build(scenes, visibility)
    assert appended == whole
    assert torch.equal(appended.positions(), whole.positions())
    assert torch.equal(appended.dense_mask(), whole.dense_mask())


@st.composite
def tails(draw):
    """(scenes, visibility, first shot of the tail, alternatives of the last shots or None, spare cache rows)."""
    scenes = draw(scene_lists(min_shots=2))
    visibility = draw(visibilities(scenes).filter(lambda v: v != "bidirectional"))
    first = draw(st.integers(0, min(map(len, scenes)) - 1))
    alternatives = draw(st.none() | st.tuples(*(shots() for _ in scenes)))
    return scenes, visibility, first, alternatives, draw(st.integers(0, 3))


def tail_of_version(scene, visibility, first, base, moved):
    """What the oracle says of the shots from `first` on: which rows of the scene they are, and the slots of all rows.

    The scene owns cache rows from `base` on; its last shot is kept `moved` rows further back than its place.
    """
    shot = np.array([row.shot for row in oracle.row_table([scene])], dtype=int)
    new = shot >= first
    slots = base + np.arange(shot.size) + moved * (shot == len(scene) - 1)
    return oracle.mask([scene], visibility)[new], oracle.positions([scene])[new], slots, slots[new]


def tail_of_scenes(scenes, visibility, first, alternatives, capacity):
    """(mask over cache rows, positions, slots) of all new rows."""
    masks, positions, slots = [], [], []
    for b, scene in enumerate(scenes):
        own = visibility if isinstance(visibility, str) else [visibility[b]]
        versions = [tail_of_version(scene, own, first, b * capacity, 0)]
        if alternatives:
            other, last = [*scene[:-1], alternatives[b]], len(scene) - 1
            versions.append(tail_of_version(other, own, last, b * capacity, rows_of(scene[-1])))
        for seen, where, columns, new_slots in versions:
            wide = np.zeros((len(seen), len(scenes) * capacity), dtype=bool)
            wide[:, columns] = seen
            masks.append(wide)
            positions.append(where)
            slots.append(new_slots)
    return np.concatenate(masks), np.concatenate(positions), np.concatenate(slots)


def rows_of(*shots):
    return len(oracle.row_table([shots]))


@given(tails())
@thorough
def test_tail_equals_the_oracle(drawn):
    """New rows over a cache: their rows of the whole scene's mask, with each key at the slot that keeps it."""
    scenes, visibility, first, alternatives, spare = drawn
    kept = [[*scene, alternatives[b]] if alternatives else scene for b, scene in enumerate(scenes)]
    capacity = max(rows_of(*shots) for shots in kept) + spare
    tail = build(scenes, visibility).tail(first, capacity, alternatives and [Shot(*shot) for shot in alternatives])
    mask, positions, slots = tail_of_scenes(scenes, visibility, first, alternatives, capacity)
    np.testing.assert_array_equal(tail.plan.dense_mask().numpy(), mask)
    assert_plan_covers(tail.plan, mask)
    assert_runs_partition(tail.plan.runs, len(mask))
    np.testing.assert_array_equal(tail.positions.numpy(), positions)
    np.testing.assert_array_equal(tail.slots.numpy(), slots)


def test_tail_refuses_what_a_cache_cannot_hold():
    layout = build(GLOBAL_AND_TWO)
    assert layout.tail(0, capacity=10).slots.tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"capacity.* 10 .*9"):
        layout.tail(2, capacity=9)
    with pytest.raises(ValueError, match="first"):
        layout.tail(3, capacity=20)
    with pytest.raises(ValueError, match="visibility"):
        build(GLOBAL_AND_TWO, "bidirectional").tail(2, capacity=20)


# Values


@given(problems())
@thorough
def test_equal_by_value(problem):
    scenes, visibility, _ = problem
    layout, same = build(scenes, visibility), build(scenes, visibility)
    layout.plan(), layout.positions()  # what is remembered takes no part in equality
    assert layout == same
    assert hash(layout) == hash(same)
    assert {layout: 1}[same] == 1
    assert pickle.loads(pickle.dumps(layout)) == same
    longer = build([*scenes[:-1], [*scenes[-1], (1, (1, 1, 1), "shot")]])
    assert layout != longer


def test_spelling_does_not_matter():
    """Lists, tuples, iterators, sets, NumPy integers: the same layout."""
    plain = SceneLayout([[Shot(2, (1, 1, 1)), Shot(3, (1, 2, 2)), Shot(1, (1, 1, 1))]], [[(), (0,), (0, 1)]])
    sizes = np.array([1, 2, 2])
    other = SceneLayout(
        iter([(Shot(np.int64(2), [1, 1, 1]), Shot(text=3, video=tuple(sizes)), Shot(1, (1, 1, 1), role="shot"))]),
        visibility=(([], {0}, iter([1, np.int32(0), 1])),),
    )
    assert plain == other
    assert hash(plain) == hash(other)
    assert repr(plain) == repr(other)


def test_visibility_distinguishes():
    visibilities = ("context_causal", "isolated", "bidirectional", [[(), (), ()]], [[(), (), (1,)]])
    assert len({build(GLOBAL_AND_TWO, visibility) for visibility in visibilities}) == 5


def test_immutable():
    scenes = [[Shot(2, (1, 1, 1)), Shot(3, (1, 2, 2))]]
    selection = [[[], [0]]]
    layout = SceneLayout(scenes, selection)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.visibility = "isolated"
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.scenes[0][0].text = 5
    with pytest.raises(TypeError):
        layout.scenes[0][0] = Shot(1, (1, 1, 1))
    scenes[0].append(Shot(1, (1, 1, 1)))
    selection[0][1].clear()
    assert layout == SceneLayout([[Shot(2, (1, 1, 1)), Shot(3, (1, 2, 2))]], [[[], [0]]])


# What is refused

A, B = Shot(2, (1, 1, 1)), Shot(3, (1, 2, 2))
G = Shot(2, (1, 1, 1), role="global")
REFUSED = {
    "negative text": (lambda: Shot(-1, (1, 1, 1)), "text"),
    "negative frames": (lambda: Shot(1, (-1, 1, 1)), "video"),
    "negative width": (lambda: Shot(1, (1, 1, -4)), "video"),
    "fractional text": (lambda: Shot(1.5, (1, 1, 1)), "text"),
    "whole but float text": (lambda: Shot(2.0, (1, 1, 1)), "text"),
    "fractional height": (lambda: Shot(1, (1, 2.5, 1)), "video"),
    "bool text": (lambda: Shot(True, (1, 1, 1)), "text"),
    "NumPy bool text": (lambda: Shot(np.bool_(True), (1, 1, 1)), "text"),
    "bool frames": (lambda: Shot(1, (True, 1, 1)), "video"),
    "text as text": (lambda: Shot("2", (1, 1, 1)), "text"),
    "no text size": (lambda: Shot(None, (1, 1, 1)), "text"),
    "two video sizes": (lambda: Shot(1, (8, 8)), "video"),
    "four video sizes": (lambda: Shot(1, (1, 1, 8, 8)), "video"),
    "one video size": (lambda: Shot(1, 8), "video"),
    "wrong role": (lambda: Shot(1, (1, 1, 1), role="prompt"), "role"),
    "no role": (lambda: Shot(1, (1, 1, 1), role=None), "role"),
    "empty layout": (lambda: SceneLayout([]), "scene"),
    "empty scene": (lambda: SceneLayout([[A], []]), "scene 1"),
    "no scenes": (lambda: SceneLayout(None), "scenes"),
    "a scene instead of scenes": (lambda: SceneLayout([A, B]), "scene"),
    "a tuple instead of a shot": (lambda: SceneLayout([[A, (3, (1, 2, 2))]]), "shot 1"),
    "global not first": (lambda: SceneLayout([[A, G]]), "global"),
    "two globals": (lambda: SceneLayout([[G, G, A]]), "global"),
    "global appended": (lambda: SceneLayout([[A]]).append([G]), "global"),
    "unknown visibility": (lambda: SceneLayout([[A]], "causal"), "visibility"),
    "no visibility": (lambda: SceneLayout([[A]], None), "visibility"),
    "selects itself": (lambda: SceneLayout([[A, B]], [[(), (1,)]]), "visibility.*shot 1"),
    "selects a later shot": (lambda: SceneLayout([[A, B]], [[(1,), ()]]), "visibility.*shot 0"),
    "selects an unknown shot": (lambda: SceneLayout([[A, B]], [[(), (7,)]]), "visibility.*shot 1"),
    "selects from the end": (lambda: SceneLayout([[A, B]], [[(), (-1,)]]), "visibility.*shot 1"),
    "selects a fraction": (lambda: SceneLayout([[A, B]], [[(), (0.0,)]]), "visibility.*shot 1"),
    "selects by name": (lambda: SceneLayout([[A, B]], [[(), ("0",)]]), "visibility.*shot 1"),
    "selects by a bool": (lambda: SceneLayout([[A, B]], [[(), (False,)]]), "visibility.*shot 1"),
    "selects by mixed kinds": (lambda: SceneLayout([[A, B]], [[(), (0, "0")]]), "visibility.*shot 1"),
    "selection not nested": (lambda: SceneLayout([[A, B]], [[(), 0]]), "visibility"),
    "selection for a scene too few": (lambda: SceneLayout([[A], [B]], [[()]]), "visibility"),
    "selection for a shot too many": (lambda: SceneLayout([[A, B]], [[(), (), ()]]), "visibility.*scene 0"),
    "append to some scenes": (lambda: SceneLayout([[A], [A]]).append([B]), "shots"),
    "append without its selection": (lambda: SceneLayout([[A]], [[()]]).append([B]), "sees"),
    "append with a needless selection": (lambda: SceneLayout([[A]]).append([B], sees=[(0,)]), "sees"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_that_names_the_culprit(name):
    wrong, culprit = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=culprit) as caught:
        wrong()
    assert "\n" not in str(caught.value)


# Speed


def test_layout_and_plan_of_a_long_scene_take_milliseconds():
    """Nine shots and a global prompt, 170,000 rows; every layout differs, so that nothing is remembered."""

    def seconds(i):
        start = time.perf_counter()
        scene = [Shot(100 + i, (1, 1, 1), role="global"), *(Shot(140 + i, (13, 30, 48)) for _ in range(9))]
        layout = SceneLayout([scene])
        layout.plan()
        elapsed = time.perf_counter() - start
        assert 169_000 < layout.rows < 171_000
        return elapsed

    assert min(seconds(i) for i in range(20)) < 5e-3
