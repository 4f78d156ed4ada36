"""The oracle against hand-worked data, and its formulas against finite differences and torch."""

import numpy as np
import oracle
import pytest
import torch
from golden import GLOBAL_AND_TWO, GLOBAL_AND_TWO_ROWS, MASKS, POSITIONS
from hypothesis import given, settings
from strategies import problems, scene_lists


def drawing(visible):
    """A mask as rows of "#" and "."."""
    return ["".join("#" if seen else "." for seen in row) for row in visible]


def test_rows_golden():
    assert oracle.row_table(GLOBAL_AND_TWO) == GLOBAL_AND_TWO_ROWS


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_golden(name):
    scenes, text_scale, expected = POSITIONS[name]
    assert oracle.positions(scenes, text_scale).tolist() == [list(map(float, row)) for row in expected]


@pytest.mark.parametrize("name", MASKS)
def test_mask_golden(name):
    scenes, visibility, expected = MASKS[name]
    assert drawing(oracle.mask(scenes, visibility)) == expected


def test_golden_data_fit_their_scenes():
    for scenes, *_, expected in (*POSITIONS.values(), *MASKS.values()):
        assert len(expected) == len(oracle.row_table(scenes))


@given(problems())
@settings(max_examples=100)
def test_every_row_sees_its_shot_and_no_other_scene(problem):
    scenes, visibility, _ = problem
    table, visible = oracle.row_table(scenes), oracle.mask(scenes, visibility)
    scene, shot = np.array([row[:2] for row in table], dtype=int).reshape(-1, 2).T
    same_scene = scene[:, None] == scene
    assert visible[same_scene & (shot[:, None] == shot)].all()
    assert not visible[~same_scene].any()


@given(scene_lists())
@settings(max_examples=100)
def test_selecting_everything_is_context_causal_and_nothing_is_isolated(scenes):
    everything = [[tuple(range(shot)) for shot in range(len(scene))] for scene in scenes]
    nothing = [[() for _ in scene] for scene in scenes]
    assert np.array_equal(oracle.mask(scenes, everything), oracle.mask(scenes, "context_causal"))
    assert np.array_equal(oracle.mask(scenes, nothing), oracle.mask(scenes, "isolated"))


def test_attention_of_three_keys_by_hand():
    """Scores ln 1, ln 2, ln 5 give weights 1/8, 2/8, 5/8 and lse ln 8; without the last key 1/3, 2/3 and ln 3."""
    q = np.ones((3, 1, 1))
    k = np.log([1.0, 2.0, 5.0]).reshape(3, 1, 1)
    v = np.array([8.0, 24.0, 80.0]).reshape(3, 1, 1)
    visible = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=bool)
    out, lse = oracle.attention(q, k, v, visible, scale=1.0)
    np.testing.assert_allclose(out[:, 0, 0], [1 + 6 + 50, (8 + 48) / 3, 0], rtol=1e-14)
    np.testing.assert_allclose(lse[0], [np.log(8), np.log(3), -np.inf], rtol=1e-14)


def attention_problem(seed, scenes, visibility, heads=4, kv_heads=2, head_dim=6):
    rng = np.random.default_rng(seed)
    visible = oracle.mask(scenes, visibility)
    rows = len(visible)
    q, dout = rng.standard_normal((2, rows, heads, head_dim))
    k, v = rng.standard_normal((2, rows, kv_heads, head_dim))
    return q, k, v, visible, dout


@given(problems(scene_lists(max_scenes=2, max_shots=2)))
@settings(max_examples=25)
def test_attention_and_gradients_equal_torch(problem):
    scenes, visibility, seed = problem
    q, k, v, visible, dout = attention_problem(seed, scenes, visibility)
    out, lse = oracle.attention(q, k, v, visible, scale=0.3)
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    tq, tk, tv = (x.transpose(0, 1) for x in tensors)
    scores = 0.3 * tq @ tk.repeat_interleave(2, 0).transpose(1, 2)
    scores = scores.masked_fill(~torch.from_numpy(visible), -torch.inf)
    expected = (scores.softmax(-1) @ tv.repeat_interleave(2, 0)).transpose(0, 1)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-13)
    np.testing.assert_allclose(lse, scores.logsumexp(-1).detach().numpy(), atol=1e-13)
    gradients = torch.autograd.grad(expected, tensors, torch.from_numpy(dout))
    for ours, theirs in zip(oracle.attention_gradients(q, k, v, visible, 0.3, dout), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)


def test_attention_gradients_equal_finite_differences():
    q, k, v, visible, dout = attention_problem(0, *MASKS["selection"][:2])
    visible[4] = False  # a row that sees nothing has gradient 0
    rng = np.random.default_rng(1)
    steps = [1e-5 * rng.standard_normal(x.shape) for x in (q, k, v)]

    def loss(sign):
        moved = (x + sign * step for x, step in zip((q, k, v), steps, strict=True))
        return np.sum(oracle.attention(*moved, visible, 0.4)[0] * dout)

    gradients = oracle.attention_gradients(q, k, v, visible, 0.4, dout)
    predicted = sum(np.sum(g * step) for g, step in zip(gradients, steps, strict=True))
    np.testing.assert_allclose((loss(1) - loss(-1)) / 2, predicted, rtol=1e-7)
    assert not gradients[0][4].any()


def test_unseen_keys_may_be_nan():
    q, k, v, visible, dout = attention_problem(0, *MASKS["two scenes, isolated"][:2])
    visible[:, 3] = False
    clean = (*oracle.attention(q, k, v, visible, 0.4), *oracle.attention_gradients(q, k, v, visible, 0.4, dout))
    k[3] = v[3] = np.nan
    dirty = (*oracle.attention(q, k, v, visible, 0.4), *oracle.attention_gradients(q, k, v, visible, 0.4, dout))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_flops_by_hand():
    """Context-causal, sizes 3, 3, 4: 3·3 + 3·6 + 4·10 = 67 pairs."""
    visible = oracle.mask(*MASKS["context-causal"][:2])
    assert oracle.flops(visible, heads=2, head_dim=8) == 4 * 67 * 2 * 8


def test_rms_norm_by_hand():
    """Mean squares: 12.5 and 50 of the heads, 31.25 of the row; eps makes them 13, 50.5 and 36."""
    x = np.array([[[3.0, 4.0], [0.0, 10.0]]])
    per_head = oracle.rms_norm(x, [1.0, 2.0], eps=0.5, scope="head")
    np.testing.assert_allclose(per_head, [[[3 / 13**0.5, 8 / 13**0.5], [0, 20 / 50.5**0.5]]], rtol=1e-15)
    per_row = oracle.rms_norm(x, [1.0, 2.0, 3.0, 4.0], eps=4.75, scope="row")
    np.testing.assert_allclose(per_row, [[[0.5, 8 / 6], [0, 40 / 6]]], rtol=1e-15)


def test_rope_by_hand():
    """The t pair turns by π/2, the y pairs by π and π · 4^(−2/4) = π/2, the x pair by 0; two channels stay."""
    x = np.arange(1.0, 11.0).reshape(1, 1, 10)
    turned = oracle.rope(x, [[np.pi / 2, np.pi, 0.0]], axes=(2, 4, 2), theta=4.0)
    np.testing.assert_allclose(turned[0, 0], [-2, 1, -3, -4, -6, 5, 7, 8, 9, 10], atol=1e-14)


def test_rope_depends_on_differences_only():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 2, 16))
    where = rng.integers(0, 50, (2, 5, 3)).astype(float)
    shift = np.array([3.0, 1000.0, 17.5])

    def products(offset):
        turned = [oracle.rope(x, at + offset, (4, 6, 6), 1e4) for x, at in zip((q, k), where, strict=True)]
        return np.sum(turned[0] * turned[1], axis=-1)

    np.testing.assert_allclose(products(0), products(shift), atol=1e-11)
    turned = oracle.rope(q, where[0], (4, 6, 6), 1e4)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1))
