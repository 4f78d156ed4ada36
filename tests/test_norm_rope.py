"""QK-norm, RoPE and the way into joint order or the cache, against the oracle."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import problems, scene_lists
from tensors import DTYPES, SCENES, VISIBILITIES, Join, build, dtype_id, home, normal, same_bytes, skip_unless_able, to

from lct.kernels import KVRows, NormRope, attention, norm_rope_append_, norm_rope_join, reference, select
from lct.kernels.numerics import compare

SPECS = {
    "per head": NormRope(4, (4, 6, 6)),
    "per row": NormRope(4, (4, 6, 6), scope="row"),
    "per row of 6 heads": NormRope(6, (4, 6, 6), scope="row"),
    "per row of 20 heads": NormRope(20, (4, 6, 6), scope="row"),
    "channels pass through": NormRope(4, (2, 4, 4)),
    "time only": NormRope(4, (8, 0, 0)),
    "no rotation": NormRope(4, (0, 0, 0), scope="row"),
    "other base and eps": NormRope(4, (4, 6, 6), theta=256.0, eps=0.1),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_impl = pytest.mark.parametrize("impl", select.NORM_ROPE)
each_scope = pytest.mark.parametrize("spec", [SPECS["per head"], SPECS["per row"]], ids=["head", "row"])


def truth(join, scenes, coordinates, spec):
    """q, k, v in joint order by the oracle; text and video rows are told apart by its own row table."""
    is_text = np.array([row.stream == "text" for row in oracle.row_table(scenes)], dtype=bool)
    kv_heads = (join.video_qkv.shape[1] - spec.heads) // 2
    joint = [np.zeros((is_text.size, n, join.video_qkv.shape[2])) for n in (spec.heads, kv_heads, kv_heads)]
    for qkv, norm, rows in ((join.text_qkv, join.text_norm, is_text), (join.video_qkv, join.video_norm, ~is_text)):
        q, k, v = np.split(qkv.double().numpy(), [spec.heads, spec.heads + kv_heads], axis=1)
        for out, x, weight in zip(joint, (q, k), norm, strict=False):
            normed = oracle.rms_norm(x, weight.double().numpy(), spec.eps, spec.scope)
            out[rows] = oracle.rope(normed, coordinates[rows], spec.axes, spec.theta)
        joint[2][rows] = v
    return [torch.from_numpy(x) for x in joint]


def plain(join, geometry, spec):
    """The same by torch, each step rounded to the dtype of QKV: the yardstick."""
    dtype, kv_heads = join.video_qkv.dtype, (join.video_qkv.shape[1] - spec.heads) // 2
    order = torch.cat([geometry.streams.text_rows, geometry.streams.video_rows]).argsort()
    turns = reference.rope_turns(geometry.positions, spec.axes, spec.theta, dtype)
    joint = []
    for part, heads in enumerate((spec.heads, kv_heads)):
        streams = []
        for qkv, norm in ((join.text_qkv, join.text_norm), (join.video_qkv, join.video_norm)):
            x = qkv.split((spec.heads, kv_heads, kv_heads), dim=1)[part]
            dims = (-1,) if spec.scope == "head" else (-2, -1)
            normed = x / (x.square().mean(dims, keepdim=True) + spec.eps).sqrt()
            streams.append(
                normed * norm[part].to(dtype).view(1, -1, x.shape[2] if spec.scope == "row" else len(norm[part]))
            )
        joint.append(reference.rotate(torch.cat(streams)[order], turns))
        assert joint[-1].shape[1] == heads
    return *joint, torch.cat([join.text_qkv, join.video_qkv])[order][:, -kv_heads:]


def joined(join, geometry, positions, spec, impl):
    """What an implementation makes of them, on the device it is for; brought back."""
    there, streams, positions = to(home(impl), (join, geometry.streams, positions))
    skip_unless_able(select.NORM_ROPE, impl, there.video_qkv)
    return [x.cpu() for x in norm_rope_join(*there, streams, positions, spec, impl)]


def assert_join(join, scenes, geometry, spec, impl, text_scale=1.0):
    got = joined(join, geometry, geometry.positions, spec, impl)
    expected = truth(join, scenes, oracle.positions(scenes, text_scale), spec)
    for three in zip(got, expected, plain(join, geometry, spec), strict=True):
        compare(*three)
    kv_heads = (join.video_qkv.shape[1] - spec.heads) // 2
    assert torch.equal(got[2][geometry.streams.video_rows], join.video_qkv[:, -kv_heads:])


@each_impl
@each_spec
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_equals_the_oracle(impl, spec, dtype):
    geometry = build(SCENES).geometry()
    assert_join(Join.random(geometry, spec, dtype=dtype), SCENES, geometry, spec, impl)


@each_impl
@each_scope
@pytest.mark.parametrize("dim", [16, 40, 64, 96, 128])
def test_head_dims(impl, spec, dim):
    geometry = build(SCENES).geometry()
    assert_join(Join.random(geometry, spec, dim=dim), SCENES, geometry, spec, impl)


@each_impl
@each_scope
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("text_scale", [0.0, 0.5, 1.0])
def test_key_heads_and_text_scale(impl, spec, kv_heads, text_scale):
    geometry = build(SCENES).geometry(text_scale=text_scale)
    assert_join(Join.random(geometry, spec, kv_heads), SCENES, geometry, spec, impl, text_scale)


@each_impl
@each_scope
@given(problem=problems(scene_lists(max_scenes=2)))
@settings(max_examples=40)
def test_random_layouts(impl, spec, problem):
    scenes, _, seed = problem
    scenes = [*scenes, *SCENES]
    geometry = build(scenes).geometry()
    assert_join(Join.random(geometry, spec, seed=seed % 1000), scenes, geometry, spec, impl)


ONE_STREAM = {"no text": [[(0, (2, 3, 4), "shot"), (0, (1, 4, 4), "shot")]], "no video": [[(9, (0, 4, 4), "shot")] * 3]}


@each_impl
@each_scope
@pytest.mark.parametrize("scenes", ONE_STREAM.values(), ids=ONE_STREAM)
def test_an_empty_stream(impl, spec, scenes):
    geometry = build(scenes).geometry()
    join = Join.random(geometry, spec)
    assert_join(join, scenes, geometry, spec, impl)
    leaves = leaves_of(join)
    sum(x.square().sum() for x in apply(leaves, geometry, spec, impl)).backward()
    for qkv, norms in ((leaves[0], leaves[2:4]), (leaves[1], leaves[4:])):
        assert qkv.grad.shape == qkv.shape
        assert all(bool(norm.grad.any()) == (len(qkv) > 0) for norm in norms)


# Angles


@pytest.mark.parametrize("position", [0.0, 1.0, 4095.0, 99_991.0, 99_991.5, 1e5])
def test_angles_are_right_to_1e_5_up_to_position_1e5(position):
    turns = reference.rope_turns(torch.tensor([[position] * 3]), (16, 24, 24), 10_000.0, torch.float32)
    angles = np.concatenate([position * 10_000.0 ** (-np.arange(0, d, 2) / d) for d in (16, 24, 24)])
    assert turns.dtype == torch.complex64
    np.testing.assert_allclose(
        torch.view_as_real(turns)[0].numpy(), np.stack([np.cos(angles), np.sin(angles)], 1), atol=1e-5
    )


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rotation_is_right_at_position_1e5(impl, dtype):
    geometry, spec = build(SCENES).geometry(), SPECS["per head"]
    far = geometry.positions + 99_900
    join = Join.random(geometry, spec, dtype=dtype)
    got = joined(join, geometry, far, spec, impl)
    expected = truth(join, SCENES, oracle.positions(SCENES) + 99_900, spec)
    # At the origin plain torch rotates as exactly as it can, so its error there is the yardstick.
    near, near_truth = plain(join, geometry, spec), truth(join, SCENES, oracle.positions(SCENES), spec)
    for x, true, at_origin, true_at_origin in zip(got, expected, near, near_truth, strict=True):
        compare(x, true, (true + (at_origin.double() - true_at_origin)).to(dtype))


@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
def test_rope_shift(visibility):
    """Adding a constant to all positions leaves attention as it was: only differences of positions count."""
    geometry, spec = build(SCENES, visibility).geometry(), SPECS["per head"]
    join = Join.random(geometry, spec, dtype=torch.float64)

    def out(positions):
        return attention(*norm_rope_join(*join, geometry.streams, positions, spec), geometry.plan)

    here, moved = out(geometry.positions), out(geometry.positions + 1000)
    torch.testing.assert_close(moved, here, rtol=0, atol=1e-10)
    stretched = out(geometry.positions * 2)
    assert (stretched - here).abs().max() > 1e-3


# Gradients


def leaves_of(join):
    tensors = (join.text_qkv, join.video_qkv, *join.text_norm, *join.video_norm)
    return [x.detach().clone().requires_grad_() for x in tensors]


def apply(leaves, geometry, spec, impl="auto"):
    device = home(impl) if impl != "auto" else leaves[0].device
    (text_qkv, video_qkv, *norms), streams, positions = to(
        device, (tuple(leaves), geometry.streams, geometry.positions)
    )
    skip_unless_able(select.NORM_ROPE, impl, video_qkv)
    results = norm_rope_join(text_qkv, video_qkv, tuple(norms[:2]), tuple(norms[2:]), streams, positions, spec, impl)
    return [x.cpu() for x in results]


@pytest.mark.parametrize("scope", ["head", "row"])
@pytest.mark.parametrize("axes", [(2, 2, 2), (2, 0, 2)], ids=["all channels", "channels pass through"])
def test_gradcheck(scope, axes):
    """Finite differences for QKV of both streams and all four norm weights."""
    geometry = build([[(1, (1, 1, 1), "global"), (2, (1, 1, 2), "shot")]]).geometry()
    spec = NormRope(2, axes, eps=0.01, scope=scope)
    leaves = leaves_of(Join.random(geometry, spec, kv_heads=1, dim=6, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: apply(x, geometry, spec), leaves)


@each_impl
@each_spec
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
def test_gradients_in_low_precision(impl, spec, dtype):
    geometry = build(SCENES).geometry()
    join = Join.random(geometry, spec, dtype=dtype)
    dout = [normal(*x.shape, dtype=dtype, seed=9 + i) for i, x in enumerate(apply(leaves_of(join), geometry, spec))]

    def gradients(leaves, run):
        return torch.autograd.grad(run(leaves), leaves, [x.to(leaves[0].dtype) for x in dout])

    wide = [x.detach().double().requires_grad_() for x in leaves_of(join)]
    exact = gradients(wide, lambda leaves: apply(leaves, geometry, spec))
    yardstick = gradients(
        leaves_of(join), lambda x: plain(Join(x[0], x[1], tuple(x[2:4]), tuple(x[4:])), geometry, spec)
    )
    got = gradients(leaves_of(join), lambda leaves: apply(leaves, geometry, spec, impl))
    for x, true, allowed in zip(got, exact, yardstick, strict=True):
        # Weight gradients are fp32, but of products that were rounded to the dtype of QKV.
        compare(x.to(dtype), true, allowed.to(dtype), kind="gradient")


# Into the cache


def poisoned_caches(rows, kv_heads=2, dim=16, dtype=torch.float32):
    return [torch.full((rows, kv_heads, dim), float("nan"), dtype=dtype) for _ in range(2)]


@each_impl
@each_scope
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_append_writes_the_bytes_of_join_and_nothing_else(impl, spec, dtype):
    """Two scenes, the second version of their last shots too, in a cache with rows to spare."""
    layout = build([scene[:1] + scene[-1:] for scene in SCENES])
    capacity = 80
    geometry = layout.tail(1, capacity, alternatives=[scene[-1] for scene in layout.scenes])
    join = Join.random(geometry, spec, dtype=dtype)
    q, k, v = joined(join, geometry, geometry.positions, spec, impl)
    cache = KVRows(*poisoned_caches(2 * capacity, dtype=dtype), geometry.slots)
    there, streams, positions, cache = to(home(impl), (join, geometry.streams, geometry.positions, cache))
    got = norm_rope_append_(*there, streams, positions, spec, cache, impl=impl)
    assert same_bytes(got.cpu(), q)
    untouched = torch.ones(2 * capacity, dtype=torch.bool).index_fill(0, geometry.slots, False)
    for stored, rows in zip(to("cpu", cache[:2]), (k, v), strict=True):
        assert same_bytes(stored[geometry.slots], rows)
        assert same_bytes(stored[untouched], torch.full_like(stored[untouched], float("nan")))


REFUSED = {
    "heads": ({"heads": 8}, "text_qkv"),
    "more channels than there are": ({"axes": (8, 8, 8)}, "axes"),
    "weights of the other scope": ({"scope": "row"}, "text_norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_a_spec_that_does_not_fit(name):
    options, culprit = REFUSED[name]
    geometry, spec = build(SCENES).geometry(), SPECS["per head"]
    join = Join.random(geometry, spec)
    wrong = NormRope(**{"heads": 4, "axes": (4, 6, 6), **options})
    with pytest.raises(ValueError, match=culprit):
        norm_rope_join(*join, geometry.streams, geometry.positions, wrong)


@pytest.mark.parametrize(
    "options", [{"axes": (3, 2, 2)}, {"axes": (4, 4)}, {"axes": (4, 6, 6), "scope": "layer"}], ids=str
)
def test_spec_refuses_what_means_nothing(options):
    with pytest.raises(ValueError, match="axes|scope"):
        NormRope(4, **options)
