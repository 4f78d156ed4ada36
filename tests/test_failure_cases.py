"""Cases that have bitten trusted attention libraries, each under its name; those of the cache have their own file."""

import math

import numpy as np
import oracle
import pytest
import torch
from tensors import (
    DTYPES,
    GLOBAL,
    IMPLS,
    SCENES,
    SHOT,
    VISIBILITIES,
    Inputs,
    assert_attention,
    build,
    dtype_id,
    normal,
    same_bytes,
    skip_unless_able,
)

from lct.kernels import attention, select
from lct.layout import Shot
from lct.plan import Plan, Run

NAN = float("nan")
CAUSAL = "context_causal"

pytestmark = pytest.mark.parametrize("impl", IMPLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def one_run(*intervals, q_rows, k_rows):
    """Every query sees the same keys."""
    return Plan.build([Run(0, q_rows, intervals)], q_rows, k_rows)


# Rows 0, 5, 6 and 9 see nothing, and nobody sees keys 0 and 8.
HOLES = Plan.build([Run(1, 5, ((1, 3), (4, 7))), Run(5, 7, ()), Run(7, 9, ((3, 8),))], q_rows=10, k_rows=9)


@each_dtype
def test_fully_masked_row(impl, dtype):
    inputs = Inputs.random(HOLES, heads=2, kv_heads=1, dim=16, dtype=dtype)
    visible = HOLES.dense_mask()
    blind, unseen = ~visible.any(1), ~visible.any(0)
    assert blind.sum() == 4
    out, lse, dq, dk, dv = inputs.run(HOLES, impl=impl)
    assert not out[blind].any()
    assert (lse[:, blind] == -math.inf).all()
    assert not dq[blind].any()
    assert not dk[unseen].any()
    assert not dv[unseen].any()
    assert torch.stack([x.isfinite().all() for x in (out, dq, dk, dv)]).all()
    # What blind rows hold, and what comes back to them, does not matter.
    poisoned = inputs._replace(**{name: x.clone() for name, x in inputs._asdict().items()})
    poisoned.q[blind], poisoned.dout[blind], poisoned.dlse[:, blind] = NAN, NAN, NAN
    for got, expected in zip(poisoned.run(HOLES, impl=impl), (out, lse, dq, dk, dv), strict=True):
        assert same_bytes(got, expected)


def test_fully_masked_row_in_a_merge_by_lse(impl):
    """Attention over two halves of the keys merges into attention over all; a half that sees nothing changes no bit."""
    visible = np.zeros((90, 60), dtype=bool)
    visible[:30, :60], visible[30:60, :20], visible[60:, 20:] = True, True, True  # both halves, the first, the second
    halves = [
        Plan.build([Run(0, 60, ((0, 20),))], 90, 60),
        Plan.build([Run(0, 30, ((20, 60),)), Run(60, 90, ((20, 60),))], 90, 60),
    ]
    dtype, near = (torch.float32, (1e-4, 1e-5)) if impl in ("triton", "cpu") else (torch.float64, (1e-10, 1e-12))
    inputs = Inputs.random(halves[0], dim=16, dtype=dtype)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    parts = [attention(*leaves, half, return_lse=True, impl=impl) for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (part_lse - lse).exp().T[..., None] for part, part_lse in parts)
    assert same_bytes(out[30:60], parts[0][0][30:60])
    assert same_bytes(out[60:], parts[1][0][60:])
    got = out, lse, *torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    for x, truth in zip(got, inputs.truth(visible, 0.25), strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=near[0], atol=near[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("logit", [-1e4, -1e9, -1e30, -3e38], ids=str)
def test_finite_sentinel(impl, dtype, logit):
    """Keys whose logits lie below any finite stand-in for −inf still win over keys that are not visible."""
    plan = one_run((0, 7), q_rows=3, k_rows=40)
    q, k, v = torch.zeros(3, 1, 16, dtype=dtype), torch.zeros(40, 1, 16, dtype=dtype), normal(40, 1, 16, dtype=dtype)
    skip_unless_able(select.ATTENTION, impl, q, k, v)
    q[..., 0], k[..., 0] = 1, logit
    k[7:] = 0
    out, lse = attention(q, k, v, plan, scale=1.0, return_lse=True, impl=impl)
    mean = v[:7].double().mean(0)
    assert (out.double() - mean).abs().max() <= 4 * torch.finfo(dtype).eps * v.abs().max()
    exact = k[0, 0, 0].double() + math.log(7)
    assert (lse.double() - exact).abs().max() <= 2 * torch.finfo(lse.dtype).eps * abs(exact)


@pytest.mark.parametrize("q_rows, k_rows", [(5, 0), (5, 7), (0, 7), (0, 0)])
def test_empty_interval_tile(impl, q_rows, k_rows):
    plan = Plan.build([Run(0, q_rows, ())], q_rows, k_rows)
    inputs = Inputs.random(plan, heads=2, kv_heads=1, dim=8)
    out, lse, *gradients = inputs.run(plan, impl=impl)
    assert same_bytes(out, torch.zeros_like(inputs.q))
    assert same_bytes(lse, torch.full((2, q_rows), -math.inf))
    for gradient, x in zip(gradients, inputs, strict=False):
        assert same_bytes(gradient, torch.zeros_like(x))


EMPTY = (0, (0, 2, 3), SHOT)
ZERO_LENGTH = {"first": (0,), "middle": (2,), "last": (4,), "first, middle and last": (0, 2, 5)}


@pytest.mark.parametrize("visibility", [CAUSAL, "isolated", "bidirectional"])
@pytest.mark.parametrize("places", ZERO_LENGTH.values(), ids=ZERO_LENGTH)
def test_zero_length_shot(impl, places, visibility):
    """A shot without rows is as if it were not there."""
    shots = [(3, (1, 2, 2), SHOT), (5, (2, 2, 3), SHOT), (1, (1, 1, 1), SHOT)]
    with_empty = list(shots)
    for place in places:
        with_empty.insert(place, EMPTY)
    assert len(with_empty) == len(shots) + len(places)
    without, layout = build([shots], visibility), build([with_empty], visibility)
    inputs = Inputs.random(without.plan(), dim=16)
    for got, expected in zip(inputs.run(layout, impl=impl), inputs.run(without, impl=impl), strict=True):
        assert same_bytes(got, expected)


@pytest.mark.parametrize("visibility", [CAUSAL, "isolated", "bidirectional"])
def test_zero_length_shot_and_no_other(impl, visibility):
    layout = build([[EMPTY] * 3], visibility)
    inputs = Inputs.random(layout.plan(), dim=16)
    out, lse, *gradients = inputs.run(layout, impl=impl)
    assert (out.shape, lse.shape) == (inputs.q.shape, (4, 0))
    assert [x.shape for x in gradients] == [x.shape for x in inputs[:3]]


@pytest.fixture
def nan_pages():
    """New memory holds NaN, as an allocator may return it."""
    was, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(5).isnan().all()
    assert torch.ones(5).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@each_dtype
def test_unwritten_rows(impl, dtype, nan_pages):
    plans = {"holes": HOLES, **{name: build(SCENES, visibility).plan() for name, visibility in VISIBILITIES.items()}}
    for name, plan in plans.items():
        out, lse, *gradients = Inputs.random(plan, dim=16, dtype=dtype).run(plan, impl=impl)
        assert not any(x.isnan().any() for x in (out, lse, *gradients)), name


def test_neighbour_tiles_differ(impl):
    """Neighbouring runs of queries, most of them shorter than a tile, see very different numbers of keys."""
    scenes = [[(n, (1, 1, 1), SHOT) for n in (70, 3, 40, 1, 64, 5, 33)]]
    visibility = [[(), (), (0, 1), (), (0, 1, 2, 3), (3,), (0, 2, 4)]]
    plan = build(scenes, visibility).plan()
    keys = [sum(b - a for a, b in run.sees) for run in plan.runs]
    assert max(keys) > 40 * min(keys)
    assert_attention(Inputs.random(plan, heads=2, kv_heads=1, dim=16), plan, oracle.mask(scenes, visibility), impl)


@pytest.mark.parametrize("rows", [2, 15, 16, 17, 31, 33, 63, 65, 127, 129, 251, 513])
def test_ragged_tail(impl, rows):
    scenes = [[(rows, (0, 0, 0), SHOT), (13, (1, 7, 7), SHOT)]]
    plan = build(scenes).plan()
    assert_attention(Inputs.random(plan, heads=1, kv_heads=1, dim=16), plan, oracle.mask(scenes, CAUSAL), impl)


def test_ragged_tail_of_one_row(impl):
    """One row that sees itself: out is v, and dq = dk = 0 but for the gradient of lse."""
    plan = build([[(1, (0, 0, 0), SHOT)]]).plan()
    q, k, v, dout, dlse = inputs = Inputs.random(plan, heads=1, kv_heads=1, dim=16)
    out, lse, dq, dk, dv = inputs.run(plan, impl=impl)
    assert torch.equal(out, v)
    assert torch.equal(dv, dout)
    expected = 0.25 * (q * k).sum(), 0.25 * dlse[0] * k, 0.25 * dlse[0] * q
    for got, want in zip((lse[0, 0], dq, dk), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
def test_forward_right_backward_wrong(impl, dtype, dim, visibility):
    plan = build(SCENES, visibility).plan()
    inputs = Inputs.random(plan, heads=2, kv_heads=1, dim=dim, dtype=dtype)
    assert_attention(inputs, plan, oracle.mask(SCENES, visibility), impl)


@pytest.mark.parametrize("dim", [1, 3, 24, 33, 40, 72, 80, 256])
def test_odd_head_dim(impl, dim):
    plan = build(SCENES).plan()
    assert_attention(Inputs.random(plan, heads=2, dim=dim), plan, oracle.mask(SCENES, CAUSAL), impl)


def fused_split(inputs):
    q, k, v = torch.cat(inputs[:3], dim=1).split([x.shape[1] for x in inputs[:3]], dim=1)
    return inputs._replace(q=q, k=k, v=v)


def every_tensor(view):
    return lambda inputs: Inputs(*(view(x) for x in inputs))


NON_CONTIGUOUS = {
    "fused QKV": fused_split,
    "heads first": every_tensor(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "channels not innermost": every_tensor(lambda x: x.mT.contiguous().mT),
    "every second row": every_tensor(lambda x: torch.stack([x, torch.full_like(x, NAN)], 1).flatten(0, 1)[::2]),
    "every second channel": every_tensor(lambda x: torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[..., ::2]),
    "reversed rows of a larger tensor": every_tensor(lambda x: torch.cat([x, x])[: len(x)]),
}


@pytest.mark.parametrize("view", NON_CONTIGUOUS.values(), ids=NON_CONTIGUOUS)
def test_non_contiguous_qkv(impl, view):
    plan = build(SCENES, VISIBILITIES["selection"]).plan()
    contiguous = Inputs.random(plan)
    inputs = view(contiguous)
    assert all(torch.equal(a, b) for a, b in zip(inputs, contiguous, strict=True))
    assert_attention(inputs, plan, oracle.mask(SCENES, VISIBILITIES["selection"]), impl)


def test_non_contiguous_qkv_with_one_key_head_expanded(impl):
    plan = build(SCENES).plan()
    inputs = Inputs.random(plan, kv_heads=1)
    wide = inputs._replace(k=inputs.k.expand(-1, 4, -1), v=inputs.v.expand(-1, 4, -1))
    assert wide.k.stride(1) == 0
    assert_attention(wide, plan, oracle.mask(SCENES, CAUSAL), impl)


@pytest.mark.parametrize("loss", ["out", "lse", "both"])
def test_expanded_dout(impl, loss):
    """The gradient of a sum is one number seen everywhere, stride 0."""
    plan = build(SCENES).plan()
    inputs = Inputs.random(plan)
    weight = {"out": (1.0, 0.0), "lse": (0.0, 1.0), "both": (1.0, 1.0)}[loss]
    dout, dlse = (torch.tensor(w).expand(x.shape) for w, x in zip(weight, inputs[3:], strict=True))
    assert_attention(inputs._replace(dout=dout, dlse=dlse), plan, oracle.mask(SCENES, CAUSAL), impl)


@each_dtype
def test_misaligned_pointer(impl, dtype):
    """Tensors that start one element into their storage."""
    plan = build(SCENES).plan()
    aligned = Inputs.random(plan, dtype=dtype)
    inputs = Inputs(*(torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(x.shape) for x in aligned))
    assert all(x.storage_offset() == 1 for x in inputs)
    assert_attention(inputs, plan, oracle.mask(SCENES, CAUSAL), impl)


def test_nondeterministic_backward(impl):
    plan = build(SCENES, VISIBILITIES["selection"]).plan()
    inputs = Inputs.random(plan)
    first = inputs.run(plan, impl=impl, deterministic=True)
    for _ in range(3 if impl == "triton" else 49):  # interpreted, three say as much as fifty
        for got, expected in zip(inputs.run(plan, impl=impl, deterministic=True), first, strict=True):
            assert same_bytes(got, expected)


# Who reads what

LEAKS = {"NaN": lambda x: torch.full_like(x, NAN), "other values": lambda x: 3 * x + 1}


@pytest.mark.parametrize("change", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize(
    "visibility", [CAUSAL, "isolated", VISIBILITIES["selection"]], ids=[CAUSAL, "isolated", "selection"]
)
def test_future_shot_leak(impl, visibility, change):
    """Whatever a shot holds, shots before it have the same outputs and dQ, bit for bit."""
    layout = build(SCENES, visibility)
    inputs = Inputs.random(layout.plan())
    out, lse, dq, _, _ = inputs.run(layout, impl=impl)
    for start in layout.shot_starts[1:]:
        changed = Inputs(*(x.clone() for x in inputs))
        for x in (changed.q, changed.k, changed.v, changed.dout, changed.dlse.T):
            x[start:] = change(x[start:])
        other_out, other_lse, other_dq, _, _ = changed.run(layout, impl=impl)
        assert same_bytes(other_out[:start], out[:start])
        assert same_bytes(other_lse[:, :start], lse[:, :start])
        assert same_bytes(other_dq[:start], dq[:start])
        assert not same_bytes(other_out[start:], out[start:])


@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
def test_rows_that_a_query_cannot_see_may_hold_nan(impl, visibility):
    """Shot by shot: NaN in all keys and values outside its intervals changes nothing, future or not."""
    layout = build(SCENES, visibility)
    inputs = Inputs.random(layout.plan())
    out, lse, dq, _, _ = inputs.run(layout, impl=impl)
    mask = layout.dense_mask()
    for start, end in zip(layout.shot_starts, layout.shot_ends, strict=True):
        hidden = ~mask[start]
        k, v = (x.masked_fill(hidden[:, None, None], NAN) for x in (inputs.k, inputs.v))
        other_out, other_lse, other_dq, _, _ = inputs._replace(k=k, v=v).run(layout, impl=impl)
        assert same_bytes(other_out[start:end], out[start:end])
        assert same_bytes(other_lse[:, start:end], lse[:, start:end])
        assert same_bytes(other_dq[start:end], dq[start:end])


@pytest.mark.parametrize(
    "alternatives", [None, [(5, (1, 3, 3), SHOT), (2, (2, 2, 2), SHOT)]], ids=["one", "two versions"]
)
def test_unread_tail(impl, alternatives):
    """Rows of the cache behind each scene are NaN, and are not read."""
    layout = build([[(2, (1, 1, 1), GLOBAL), (3, (2, 2, 2), SHOT), (4, (1, 3, 3), SHOT)], [(2, (1, 1, 1), SHOT)] * 3])
    capacity = max(layout.scene_rows) + 50
    tail = layout.tail(2, capacity, alternatives and [Shot(*shot) for shot in alternatives])
    inputs = Inputs.random(tail.plan, dim=16)
    unread = torch.ones(2 * capacity, dtype=torch.bool)
    for b, rows in enumerate(layout.scene_rows):
        unread[b * capacity : b * capacity + rows] = False
    unread[tail.slots] = False
    assert unread.sum() > 50
    k, v = (x.masked_fill(unread[:, None, None], NAN) for x in (inputs.k, inputs.v))
    expected = inputs.run(tail.plan, impl=impl)
    for got, want in zip(inputs._replace(k=k, v=v).run(tail.plan, impl=impl), expected, strict=True):
        assert same_bytes(got, want)
    assert not any(x.isnan().any() for x in expected)
    assert not any(gradient[unread].any() for gradient in expected[3:])


@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
def test_packed_equals_separate(impl, visibility):
    """Scenes in one call are the scenes in calls of their own, bit for bit."""
    layout = build(SCENES, visibility)
    inputs = Inputs.random(layout.plan())
    packed = inputs.run(layout, impl=impl)
    edges = np.cumsum([0, *layout.scene_rows])
    for b, scene in enumerate(SCENES):
        rows = slice(edges[b], edges[b + 1])
        alone = build([scene], visibility if isinstance(visibility, str) else [visibility[b]])
        separate = Inputs(*(x[rows] for x in inputs[:4]), inputs.dlse[:, rows]).run(alone, impl=impl)
        for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), packed, separate, strict=True):
            assert same_bytes(got[:, rows] if name == "lse" else got[rows], want), name


def far_apart(x, strides):
    """The same values in memory of which only these few pages are ever touched; skips where it cannot be had."""
    reach = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    assert reach > 2**31
    try:
        memory = torch.empty(reach, dtype=x.dtype)
    except (RuntimeError, MemoryError):
        pytest.skip(f"no address space for {reach * x.element_size() / 2**30:.0f} GiB")
    return memory.as_strided(x.shape, strides).copy_(x)


FAR = {"heads": (32, 2**30 + 16, 1), "rows": (2**25, 32, 1)}  # element strides of [80, 3, 32]


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
@pytest.mark.parametrize("names", [("q",), ("k", "v")], ids=str)
def test_int32_offset_overflow(impl, names, strides):
    """Rows or heads more than 2³¹ elements away are read from where they are."""
    plan = one_run((0, 30), (35, 80), q_rows=80, k_rows=80)
    inputs = Inputs.random(plan, heads=3, kv_heads=3, dtype=torch.float16)
    far = inputs._replace(**{name: far_apart(getattr(inputs, name), strides) for name in names})
    for a, b in zip(far.run(plan, impl=impl), inputs.run(plan, impl=impl), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_strided_dout_overflow(impl, strides):
    plan = one_run((0, 30), (35, 80), q_rows=80, k_rows=80)
    inputs = Inputs.random(plan, heads=3, kv_heads=3, dtype=torch.float16)
    far = inputs._replace(dout=far_apart(inputs.dout, strides))
    for a, b in zip(far.run(plan, impl=impl), inputs.run(plan, impl=impl), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_interpreter_bf16(impl):
    """Triton's interpreter is silently wrong in bf16, so it is refused; other implementations are right."""
    plan = HOLES
    q, k, v = Inputs.random(plan, heads=2, kv_heads=1, dim=16, dtype=torch.bfloat16)[:3]
    if impl == "triton" and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="interpreter is silently wrong in bfloat16; use float32 or float16"):
            attention(q, k, v, plan, impl=impl)
    else:
        skip_unless_able(select.ATTENTION, impl, q, k, v)
        exact = attention(*(x.double() for x in (q, k, v)), plan, impl="reference")
        torch.testing.assert_close(attention(q, k, v, plan, impl=impl).double(), exact, rtol=2e-2, atol=2e-2)
