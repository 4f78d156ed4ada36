"""The failure cases of norm + RoPE, of the cache, and of inputs that must be refused, each under its own name."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from tensors import (
    DTYPES,
    GLOBAL,
    SCENES,
    SHOT,
    VISIBILITIES,
    Inputs,
    Join,
    build,
    dtype_id,
    same_bytes,
    skip_unless_able,
)
from test_failure_cases import nan_pages  # noqa: F401
from test_norm_rope import truth

from lct.kernels import KVRows, NormRope, attention, norm_rope_append_, norm_rope_join, reference, select
from lct.layout import Shot
from lct.plan import Plan, Run

NAN = float("nan")
SPEC = NormRope(4, (4, 6, 6))
SCENE = [(3, (1, 1, 1), GLOBAL), (4, (2, 2, 3), SHOT), (2, (1, 3, 3), SHOT), (7, (3, 2, 1), SHOT), (1, (2, 2, 2), SHOT)]


def join(inputs, geometry, spec=SPEC, positions=None):
    return norm_rope_join(*inputs, geometry.streams, geometry.positions if positions is None else positions, spec)


def append(inputs, geometry, caches, spec=SPEC, impl="auto"):
    cache = KVRows(*caches, geometry.slots)
    return norm_rope_append_(*inputs, geometry.streams, geometry.positions, spec, cache, impl=impl)


def nan_caches(rows):
    return [torch.full((rows, 2, 16), NAN) for _ in range(2)]


def stream_rows(layout, shots):
    """Masks over the text and the video stream: the rows of some shots."""
    streams = layout.streams()
    return [torch.isin(shot, torch.tensor(list(shots))) for shot in (streams.text_shot, streams.video_shot)]


# The cache


def test_undeclared_mutation():
    """The schema names what an op writes to, each tensor under a name of its own; no op writes to anything else."""
    names = [name.removeprefix("lct::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("lct::")]
    written = {
        name: {x.name: x.alias_info.before_set for x in op._schema.arguments if x.alias_info and x.alias_info.is_write}
        for name in names
        for op in [getattr(torch.ops.lct, name).default]
    }
    assert written.pop("norm_rope_append_") == {"k_cache": {"a"}, "v_cache": {"b"}, "k_pool": {"c"}, "v_pool": {"d"}}
    assert written.pop("assemble_") == {"k_cache": {"a"}, "v_cache": {"b"}}
    assert len(written) == 8 and not any(written.values())


@pytest.mark.parametrize("impl", select.NORM_ROPE)
def test_undeclared_mutation_leaves_inputs_as_they_were(impl):
    """And autograd knows that the caches have changed, whoever wrote to them."""
    geometry = build([SCENE]).tail(0, 80)
    inputs = Join.random(geometry, SPEC)
    tensors = [*inputs[:2], *inputs.text_norm, *inputs.video_norm, geometry.positions, geometry.slots]
    before, versions = [x.clone() for x in tensors], [x._version for x in tensors]
    caches = nan_caches(80)
    skip_unless_able(select.NORM_ROPE, impl, inputs.video_qkv)
    append(inputs, geometry, caches, impl=impl)
    assert all(same_bytes(a, b) for a, b in zip(tensors, before, strict=True))
    assert [x._version for x in tensors] == versions
    assert all(cache._version > 0 for cache in caches)


@pytest.mark.parametrize("alternatives", [None, [Shot(3, (1, 2, 2))]], ids=["one version", "two versions"])
def test_append_overflow(alternatives):
    """A scene that fills the cache to its last row passes; one row less raises while the cache is still untouched."""
    layout = build([SCENE])
    needed = layout.rows + (alternatives[0].rows if alternatives else 0)
    caches = nan_caches(needed)
    geometry = layout.tail(0, needed, alternatives)
    append(Join.random(geometry, SPEC), geometry, caches)
    assert not any(cache.isnan().any() for cache in caches)
    with pytest.raises(ValueError, match=f"capacity.*{needed}.*{needed - 1}"):
        layout.tail(0, needed - 1, alternatives)


CHUNKS = {
    "all at once": (5,),
    "shot by shot": (1, 1, 1, 1, 1),
    "pairs": (1, 2, 2),
    "global first": (1, 4),
    "uneven": (3, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_chunked_append(chunks, dtype):
    """However a scene is cut into calls, the cache holds the bytes of joint keys and values, and spare rows stay."""
    whole, capacity = build([SCENE, SCENE[:4] + SCENE[1:2]]), 80
    geometry = whole.geometry()
    inputs = Join.random(geometry, SPEC, dtype=dtype)
    _, *expected = join(inputs, geometry)
    caches = [torch.full((2 * capacity, 2, 16), NAN, dtype=dtype) for _ in range(2)]
    first = 0
    for count in chunks:
        part = build([[(s.text, s.video, s.role) for s in scene[: first + count]] for scene in whole.scenes])
        shots = [b * len(SCENE) + n for b in range(2) for n in range(first, first + count)]
        tail = part.tail(first, capacity)
        append(inputs.rows(geometry, *stream_rows(whole, shots)), tail, caches)
        first += count
    used = torch.cat([torch.arange(rows) + b * capacity for b, rows in enumerate(whole.scene_rows)])
    for cache, rows in zip(caches, expected, strict=True):
        assert same_bytes(cache[used], rows)
        assert cache.isnan().sum() == (2 * capacity - len(used)) * 2 * 16


def test_position_from_length():
    """A new shot that sees few earlier ones has the coordinates of its place in the scene, and so have its keys."""
    selection = [[(), (), (0,), (), (1,)]]
    whole = build([SCENE], selection)
    tail = whole.tail(4, 80)
    seen = sum(b - a for a, b in tail.plan.runs[0].sees)
    assert seen < whole.rows
    np.testing.assert_array_equal(tail.positions, oracle.positions([SCENE])[whole.shot_starts[4] :])
    inputs = Join.random(whole.geometry(), SPEC)
    _, keys, _ = join(inputs, whole.geometry())
    caches = nan_caches(80)
    append(inputs.rows(None, *stream_rows(whole, [4])), tail, caches)
    assert same_bytes(caches[0][tail.slots], keys[whole.shot_starts[4] :])


def test_position_from_length_of_a_chosen_history():
    """Of shots read in another order than they were made, positions are those of the reading, and keys follow them."""
    reading = [SCENE[0], SCENE[3], SCENE[1], SCENE[4]]
    geometry = build([reading]).tail(0, 80)
    inputs = Join.random(geometry, SPEC)
    caches = nan_caches(80)
    append(inputs, geometry, caches)
    _, keys, _ = truth(inputs, [reading], oracle.positions([reading]), SPEC)
    torch.testing.assert_close(caches[0][: len(keys)].double(), keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 99_900.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_low_precision_rope_table(dtype, shift):
    """Autocast and `.to(bfloat16)` reach QKV, never the table of angles."""
    geometry = build([SCENE]).geometry()
    inputs, positions = Join.random(geometry, SPEC, dtype=dtype), geometry.positions + shift
    expected = join(inputs, geometry, positions=positions)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(join(inputs, geometry, positions=positions), expected, strict=True):
            assert got.dtype == dtype
            assert same_bytes(got, want)
        turns = reference.rope_turns(positions, SPEC.axes, SPEC.theta, torch.bfloat16)
    angles = positions[:, :1].double() * 10_000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    assert turns.dtype == torch.complex64
    torch.testing.assert_close(turns[:, :2].real.double(), angles.cos(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="positions.*float32.*bfloat16"):
        join(inputs, geometry, positions=positions.bfloat16())


# Norm + RoPE


@pytest.mark.parametrize("place", [0, 2, 5], ids=["first", "middle", "last"])
def test_zero_length_shot(place):
    with_empty = [*SCENE[1:]]
    with_empty.insert(place, (0, (0, 2, 2), SHOT))
    geometry, without = build([with_empty]).geometry(), build([SCENE[1:]]).geometry()
    inputs = Join.random(geometry, SPEC)
    shift = geometry.positions - without.positions
    assert shift.any() == (place < 4)  # an empty clip still moves what follows, by its longest side
    for got, want in zip(join(inputs, geometry), join(inputs, without, positions=geometry.positions), strict=True):
        assert same_bytes(got, want)


def test_zero_length_shot_and_no_other():
    geometry = build([[(0, (0, 1, 1), SHOT)] * 2]).geometry()
    assert [tuple(x.shape) for x in join(Join.random(geometry, SPEC), geometry)] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_unwritten_rows(dtype, nan_pages):  # noqa: F811
    geometry = build(SCENES).geometry()
    text, video, *norms = Join.random(geometry, SPEC, dtype=dtype)
    leaves = [x.requires_grad_() for x in (text, video, *norms[0], *norms[1])]
    joint = join((text, video, *norms), geometry)
    gradients = torch.autograd.grad([x.sum() for x in joint], leaves)
    assert not any(x.isnan().any() for x in (*joint, *gradients))


VIEWS = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels not innermost": lambda x: x.mT.contiguous().mT,
    "every second row": lambda x: torch.stack([x, torch.full_like(x, NAN)], 1).flatten(0, 1)[::2],
    "one element into its storage": lambda x: torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_non_contiguous_qkv(view):
    geometry = build(SCENES).geometry()
    inputs = Join.random(geometry, SPEC)

    def results(qkv):
        leaves = [x.detach().requires_grad_() for x in qkv]
        joint = join((*leaves, *inputs[2:]), geometry)
        return *joint, *torch.autograd.grad(sum(x.square().sum() for x in joint), leaves)

    for got, want in zip(results([view(x) for x in inputs[:2]]), results(inputs[:2]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_future_shot_leak():
    """Through norm, RoPE and attention: NaN in one shot's QKV leaves outputs of the shots before it as they were."""
    layout = build(SCENES)
    geometry = layout.geometry()
    inputs = Join.random(geometry, SPEC)
    before = attention(*join(inputs, geometry), geometry.plan)
    for shot, start in enumerate(layout.shot_starts):
        at_text, at_video = stream_rows(layout, [shot])
        text, video = inputs.text_qkv.clone(), inputs.video_qkv.clone()
        text[at_text], video[at_video] = NAN, NAN
        after = attention(*join((text, video, *inputs[2:]), geometry), geometry.plan)
        assert same_bytes(after[:start], before[:start])
        assert after[start : layout.shot_ends[shot]].isnan().all()


def test_packed_equals_separate():
    layout = build(SCENES)
    geometry = layout.geometry()
    inputs = Join.random(geometry, SPEC)
    packed = join(inputs, geometry)
    edges, first = np.cumsum([0, *layout.scene_rows]), 0
    for b, scene in enumerate(SCENES):
        alone = inputs.rows(geometry, *stream_rows(layout, range(first, first + len(scene))))
        first += len(scene)
        for whole, part in zip(packed, join(alone, build([scene]).geometry()), strict=True):
            assert same_bytes(whole[edges[b] : edges[b + 1]], part)


# What is refused


LAYOUT = build([SCENE])
PLAN, GEOMETRY = LAYOUT.plan(), LAYOUT.geometry()
Q, K, V = Inputs.random(PLAN)[:3]
QKV = Join.random(GEOMETRY, SPEC)


def streams_with(**changes):
    return dataclasses.replace(GEOMETRY, streams=dataclasses.replace(GEOMETRY.streams, **changes))


WRONG_DTYPE = {
    "k of another dtype": (lambda: attention(Q, K.half(), V, PLAN), "k: .*float32.*float16.*cast"),
    "v of another dtype": (lambda: attention(Q.half(), K.half(), V, PLAN), "v: .*float16.*float32.*cast"),
    "integers": (lambda: attention(Q.int(), K.int(), V.int(), PLAN), "q: .*floating.*int32"),
    "complex": (lambda: attention(*(x.to(torch.complex64) for x in (Q, K, V)), PLAN), "q: .*floating.*complex64"),
    "text of another dtype": (lambda: join(QKV._replace(text_qkv=QKV.text_qkv.half()), GEOMETRY), "text_qkv.*float16"),
    "integer QKV": (lambda: join((QKV[0].int(), QKV[1].int(), *QKV[2:]), GEOMETRY), "qkv.*floating.*int32"),
    "cache of another dtype": (
        lambda: append(QKV, LAYOUT.tail(0, 80), [torch.zeros(80, 2, 16).half()] * 2),
        "cache keys.*float16",
    ),
}


@pytest.mark.parametrize("case", WRONG_DTYPE)
def test_wrong_dtype(case):
    call, message = WRONG_DTYPE[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


META = Q.to("meta"), K.to("meta"), V.to("meta")
NORM = QKV.text_norm
WRONG_DEVICE = {
    "q": (lambda: attention(META[0], K, V, LAYOUT), "meta.*cpu"),
    "k": (lambda: attention(Q, META[1], V, PLAN), "k: .*cpu.*meta"),
    "v": (lambda: attention(Q, K, META[2], PLAN), "v: .*cpu.*meta"),
    "plan": (lambda: attention(*META, PLAN), "plan: .*meta.*cpu.*layout.plan"),
    "text_qkv": (lambda: join(QKV._replace(text_qkv=QKV.text_qkv.to("meta")), GEOMETRY), "text_qkv.*cpu.*meta"),
    "norm weight": (
        lambda: join(QKV._replace(text_norm=(NORM[0].to("meta"), NORM[1])), GEOMETRY),
        "text_norm.*cpu.*meta",
    ),
    "positions": (lambda: join(QKV, GEOMETRY, positions=GEOMETRY.positions.to("meta")), "positions.*cpu.*meta"),
    "streams": (
        lambda: join(QKV, streams_with(text_rows=GEOMETRY.streams.text_rows.to("meta"))),
        "text_rows.*cpu.*meta",
    ),
}


@pytest.mark.parametrize("case", WRONG_DEVICE)
def test_wrong_device(case):
    call, message = WRONG_DEVICE[case]
    with pytest.raises(ValueError, match=message):
        call()


BAD_LAYOUT = {
    "negative sizes": (lambda: Shot(4, (1, -2, 2)), "video"),
    "runs beyond the queries": (lambda: Plan.build([Run(0, 9, ((0, 4),))], 8, 4), "runs.* 8 "),
    "runs that overlap": (lambda: Plan.build([Run(0, 5, ((0, 4),)), Run(4, 8, ((0, 4),))], 8, 4), "runs.*disjoint"),
    "intervals beyond the keys": (lambda: Plan.build([Run(0, 8, ((0, 5),))], 8, 4), "runs.* 4 rows"),
    "intervals before the keys": (lambda: Plan.build([Run(0, 8, ((-1, 3),))], 8, 4), "runs.* 4 rows"),
    "too few query rows": (lambda: attention(Q[1:], K, V, PLAN), f"q: .*{len(Q)} query rows.*{len(Q) - 1}"),
    "too few key rows": (lambda: attention(Q, K[1:], V[1:], PLAN), f"k: .*{len(Q)} key rows.*{len(Q) - 1}"),
    "k and v differ": (lambda: attention(Q, K, V[:, :1], PLAN), "v: .*shape of k"),
    "heads that do not divide": (lambda: attention(Q[:, :3], K, V, PLAN), "k: .*divide.* 3"),
    "another head_dim": (lambda: attention(Q, K[..., :8], V[..., :8], PLAN), "k: .*head_dim 32"),
    "two dimensions": (lambda: attention(Q[0], K, V, PLAN), "q: .*heads.*head_dim"),
    "too few text rows": (lambda: join(QKV._replace(text_qkv=QKV.text_qkv[1:]), GEOMETRY), "text_qkv.*17.*16"),
    "too many positions": (
        lambda: join(QKV, GEOMETRY, positions=GEOMETRY.positions.repeat(2, 1)),
        "positions.*53.*106",
    ),
    "positions in float64": (
        lambda: join(QKV, GEOMETRY, positions=GEOMETRY.positions.double()),
        "positions.*float32.*float64",
    ),
    "too few slots": (
        lambda: append(QKV, dataclasses.replace(GEOMETRY, slots=torch.arange(9)), nan_caches(80)),
        "slots.*9",
    ),
    "slots in int32": (
        lambda: append(QKV, dataclasses.replace(GEOMETRY, slots=torch.arange(LAYOUT.rows).int()), nan_caches(80)),
        "slots.*int64.*int32",
    ),
    "cache of other heads": (
        lambda: append(QKV, LAYOUT.tail(0, 80), [torch.zeros(80, 4, 16)] * 2),
        "cache keys.*2, 16.*4, 16",
    ),
}


@pytest.mark.parametrize("case", BAD_LAYOUT)
def test_bad_layout(case):
    call, message = BAD_LAYOUT[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_layout_is_refused_before_anything_is_computed():
    caches = nan_caches(80)
    with pytest.raises(ValueError, match="cache values"):
        append(QKV, LAYOUT.tail(0, 80), [caches[0], torch.zeros(80, 2, 8)])
    assert caches[0].isnan().all()


@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
def test_packed_equals_separate_in_what_is_seen(visibility):
    """No row sees a row of another scene, whatever the visibility."""
    layout = build(SCENES, visibility)
    edge = layout.scene_rows[0]
    mask = layout.dense_mask()
    assert not mask[:edge, edge:].any()
    assert not mask[edge:, :edge].any()
