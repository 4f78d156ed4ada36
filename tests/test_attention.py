"""Attention against the oracle: forward, lse and gradients of every implementation; and what the function promises."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, scene_lists
from tensors import (
    DTYPES,
    GLOBAL,
    IMPLS,
    SCENES,
    SELECTION,
    SHOT,
    VISIBILITIES,
    Inputs,
    assert_attention,
    build,
    dtype_id,
    same_bytes,
    skip_unless_able,
)
from test_layout import rows_of, tail_of_scenes, tails

from lct.kernels import attention, reference, select
from lct.kernels.numerics import compare
from lct.layout import Shot
from lct.plan import Plan, Run

fast = settings(max_examples=60)
small = scene_lists(max_scenes=2, max_shots=3)

# Stands beside drawn scenes, so that there are rows enough to measure the yardstick on; more shots than any of them.
COMPANION = [
    (2, (1, 1, 1), GLOBAL),
    (3, (1, 2, 3), SHOT),
    (0, (2, 2, 2), SHOT),
    (4, (1, 3, 3), SHOT),
    (9, (3, 4, 5), SHOT),
]


def beside_the_companion(scenes, visibility):
    if not isinstance(visibility, str):
        visibility = [*visibility, [(), (), (1,), (), (1, 3)]]
    return [*scenes, COMPANION], visibility


PROBES = 64


def identity(rows):
    """Identity matrices' columns, PROBES at a time, as rows of one head: [rows, 1, PROBES] each."""
    columns = torch.eye(rows, max(1, -(-rows // PROBES)) * PROBES)
    return [part[:, None].contiguous() for part in columns.split(PROBES, dim=1)]


each_impl = pytest.mark.parametrize("impl", IMPLS)
each_visibility = pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)


@each_impl
@each_visibility
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_equals_the_oracle(impl, visibility, dtype):
    plan = build(SCENES, visibility).plan()
    assert_attention(Inputs.random(plan, dtype=dtype), plan, oracle.mask(SCENES, visibility), impl)


@each_impl
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1)], ids="{0[0]}q{0[1]}kv".format)
@pytest.mark.parametrize("dim", [24, 32, 64, 96, 128])
def test_heads_and_head_dims(impl, heads, dim):
    plan = build(SCENES).plan()
    assert_attention(Inputs.random(plan, *heads, dim), plan, oracle.mask(SCENES, "context_causal"), impl)


@each_impl
@given(problem=problems(small), dtype=st.sampled_from(DTYPES[:2]))
@fast
def test_random_layouts(impl, problem, dtype):
    scenes, visibility, seed = problem
    scenes, visibility = beside_the_companion(scenes, visibility)
    plan = build(scenes, visibility).plan()
    inputs = Inputs.random(plan, heads=2, kv_heads=1, dim=16, dtype=dtype, seed=seed)
    assert_attention(inputs, plan, oracle.mask(scenes, visibility), impl)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "triton"])
@given(drawn=tails(), seed=st.integers(0, 1000))
@fast
def test_cached_tails(impl, drawn, seed):
    """New rows, also in two versions, over a cache with rows to spare."""
    assert_tail(impl, drawn, seed)


@given(drawn=tails(), seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_cached_tails_interpreted(drawn, seed):
    assert_tail("triton", drawn, seed)


def assert_tail(impl, drawn, seed):
    scenes, visibility, first, alternatives, spare = drawn
    scenes, visibility = beside_the_companion(scenes, visibility)
    alternatives = alternatives and (*alternatives, (5, (3, 4, 5), SHOT))
    kept = [[*scene, alternatives[b]] if alternatives else scene for b, scene in enumerate(scenes)]
    capacity = max(rows_of(*shots) for shots in kept) + spare
    tail = build(scenes, visibility).tail(first, capacity, alternatives and [Shot(*shot) for shot in alternatives])
    visible, _, _ = tail_of_scenes(scenes, visibility, first, alternatives, capacity)
    inputs = Inputs.random(tail.plan, heads=2, kv_heads=1, dim=16, seed=seed)
    assert_attention(inputs, tail.plan, visible, impl)


@each_impl
@given(problem=problems(small))
@fast
def test_mask_probing(impl, problem):
    """With q = 0 every visible key weighs the same, and V = identity shows which keys those are."""
    scenes, visibility, _ = problem
    layout = build(scenes, visibility)
    q, k = torch.zeros(2, layout.rows, 1, PROBES)
    seen = [attention(q, k, probe, layout, impl=impl)[:, 0] != 0 for probe in identity(layout.rows)]
    assert torch.equal(torch.cat(seen, dim=1)[:, : layout.rows], layout.dense_mask())


@each_impl
@given(problem=problems(small))
@settings(max_examples=20)
def test_mask_probing_through_gradients(impl, problem):
    """With q = 0, P is 1/n on the visible keys. dout = identity: dv = Pᵀ; dlse = 1 and k = identity: dq = scale · P."""
    scenes, visibility, _ = problem
    layout = build(scenes, visibility)
    zero, one = torch.zeros(layout.rows, 1, PROBES), torch.ones(1, layout.rows)
    by_query, by_key = [zero[:, 0, :0] != 0], [zero[:, 0, :0] != 0]
    for probe in identity(layout.rows):
        by_query.append(Inputs(zero, zero, zero, probe, 0 * one).run(layout.plan(), impl=impl)[4][:, 0] != 0)
        by_key.append(Inputs(zero, probe, zero, zero, one).run(layout.plan(), impl=impl)[2][:, 0] != 0)
    assert torch.equal(torch.cat(by_query, dim=1)[:, : layout.rows], layout.dense_mask().T)
    assert torch.equal(torch.cat(by_key, dim=1)[:, : layout.rows], layout.dense_mask())


@each_impl
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=dtype_id)
def test_key_gradients_of_many_runs_are_summed_in_fp32(impl, dtype):
    scenes = [[(2, (0, 0, 0), SHOT)] * 80]
    plan = build(scenes).plan()
    inputs = Inputs.random(plan, heads=1, kv_heads=1, dim=16, dtype=dtype)
    assert_attention(inputs, plan, oracle.mask(scenes, "context_causal"), impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("dim", [32, 40, 64])
def test_loads_through_tensor_descriptors(monkeypatch, dtype, dim):
    """As on Hopper: blocks come through TMA boxes that also cover rows of the next run."""
    triton_attention = pytest.importorskip("lct.kernels.triton_attention")
    plan = build(SCENES, SELECTION).plan()
    inputs = Inputs.random(plan, dim=dim, dtype=dtype)
    plainly = inputs.run(plan, impl="triton")
    boxes = []
    monkeypatch.setattr(triton_attention, "_box", lambda *a, box=triton_attention._box: boxes.append(a) or box(*a))
    monkeypatch.setattr(triton_attention, "_hopper", lambda device: True)
    assert_attention(inputs, plan, oracle.mask(SCENES, SELECTION), "triton")
    assert len(boxes) == 6  # k and v for out and for dq, q and dout for dk and dv
    if dtype == torch.float32:  # the same tile sizes, so not a bit may differ
        assert all(same_bytes(a, b) for a, b in zip(plainly, inputs.run(plan, impl="triton"), strict=True))


def cut(plan, change):
    """The plan with every interval (a, b) of a run replaced."""
    runs = [Run(r.start, r.end, tuple(change(a, b) for a, b in r.sees)) for r in plan.runs]
    return Plan.build(runs, plan.q_rows, plan.k_rows)


FAULTS = {
    "shifted by one": lambda plan: cut(plan, lambda a, b: (a + 1, b + 1) if b < plan.k_rows else (a + 1, b)),
    "last block dropped": lambda plan: cut(plan, lambda a, b: (a, b - (b - a) % 32)),
    "one key too few": lambda plan: cut(plan, lambda a, b: (a, b - 1)),
    "everything visible": lambda plan: Plan.build([Run(0, plan.q_rows, ((0, plan.k_rows),))], plan.q_rows, plan.k_rows),
}


@each_impl
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_wrong_mask_fails_the_comparison(impl, fault):
    plan, visible = build(SCENES).plan(), oracle.mask(SCENES, "context_causal")
    inputs = Inputs.random(plan, heads=2, kv_heads=1)
    truth, yardstick = inputs.truth(visible, 32**-0.5), inputs.run(plan, impl="reference")
    for got, true, allowed in zip(inputs.run(fault(plan), impl=impl), truth, yardstick, strict=True):
        with pytest.raises(AssertionError):
            compare(got, true, allowed)


@each_impl
@pytest.mark.parametrize("scale", [0.01, 1.0, -0.5])
def test_scale(impl, scale):
    plan = build(SCENES).plan()
    assert_attention(Inputs.random(plan), plan, oracle.mask(SCENES, "context_causal"), impl, scale=scale)


# Gradients


def tiny_inputs(plan, impl):
    inputs = Inputs.random(plan, heads=2, kv_heads=1, dim=3, dtype=torch.float64)
    skip_unless_able(select.ATTENTION, impl, *inputs[:3])
    return [x.requires_grad_() for x in inputs[:3]]


@each_impl
@each_visibility
def test_gradcheck(impl, visibility):
    """Finite differences, through out and lse."""
    scene = [(1, (1, 1, 1), "global"), (2, (1, 1, 1), "shot"), (1, (1, 1, 2), "shot"), (0, (1, 1, 2), "shot")]
    plan = build([scene, [(1, (1, 1, 1), "shot")]], visibility).plan()
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, plan, return_lse=True, impl=impl), tiny_inputs(plan, impl)
    )


@each_impl
def test_gradcheck_with_rows_that_see_nothing(impl):
    plan = Plan.build([Run(1, 3, ((0, 2), (3, 4))), Run(4, 6, ((1, 5),))], q_rows=7, k_rows=6)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, plan, impl=impl), tiny_inputs(plan, impl))


@each_visibility
def test_reference_backward_is_autograd_of_its_forward(visibility):
    plan = build(SCENES, visibility).plan()
    q, k, v, dout, dlse = Inputs.random(plan, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention_forward(*leaves, plan.runs, 0.2)
    expected = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    with torch.no_grad():
        gradients = reference.attention_backward(dout, dlse, q, k, v, out, lse, plan.runs, 0.2)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@each_impl
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["q", "k", "v", "q and v"])
def test_gradients_of_some_inputs_only(impl, wanted):
    layout = build(SCENES)
    inputs = Inputs.random(layout.plan())
    every = inputs._replace(dlse=torch.zeros_like(inputs.dlse)).run(layout, impl=impl)[2:]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs[:3])]
    attention(*leaves, layout, impl=impl).backward(inputs.dout)
    for i, leaf in enumerate(leaves):
        assert same_bytes(leaf.grad, every[i]) if i in wanted else leaf.grad is None


# The public function


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_shapes_and_dtypes(impl, dtype):
    plan = build(SCENES).plan()
    out, lse, dq, dk, dv = Inputs.random(plan, heads=6, kv_heads=2, dim=8, dtype=dtype).run(plan, impl=impl)
    assert (out.shape, out.dtype) == (dq.shape, dq.dtype) == ((plan.q_rows, 6, 8), dtype)
    assert (dk.shape, dk.dtype) == (dv.shape, dv.dtype) == ((plan.k_rows, 2, 8), dtype)
    assert (lse.shape, lse.dtype) == ((6, plan.q_rows), torch.float64 if dtype == torch.float64 else torch.float32)


@each_impl
def test_a_layout_stands_for_its_plan(impl):
    layout = build(SCENES, "isolated")
    inputs = Inputs.random(layout.plan())
    for a, b in zip(inputs.run(layout, impl=impl), inputs.run(layout.plan(), impl=impl), strict=True):
        assert same_bytes(a, b)


def test_auto_takes_the_fastest_and_says_what_it_returns():
    layout = build(SCENES)
    q, k, v = Inputs.random(layout.plan())[:3]
    out = attention(q, k, v, layout)
    with_lse, lse = attention(q, k, v, layout, return_lse=True)
    assert same_bytes(out, attention(q, k, v, layout, impl=select.choose(select.ATTENTION, "auto", q, k, v)))
    assert same_bytes(out, with_lse)
    assert lse.shape == (q.shape[1], q.shape[0])


@each_impl
def test_inputs_are_not_changed(impl):
    plan = build(SCENES).plan()
    inputs = Inputs.random(plan)
    before = [x.clone() for x in inputs]
    inputs.run(plan, impl=impl)
    assert all(same_bytes(a, b) for a, b in zip(inputs, before, strict=True))


def test_refuses_an_unknown_implementation_and_names_the_known():
    layout = build(SCENES)
    with pytest.raises(ValueError, match="impl.*sdpa.*reference.*'flash'"):
        attention(*Inputs.random(layout.plan())[:3], layout, impl="flash")


def test_an_implementation_that_cannot_run_raises_with_its_reasons():
    layout = build(SCENES)
    q, k, v = (x.to("meta") for x in Inputs.random(layout.plan())[:3])
    with pytest.raises(ValueError, match="impl='sdpa' cannot run.*CPU"):
        attention(q, k, v, layout, impl="sdpa")


def test_autotune_changes_numerics():
    """Nothing is tuned at run time: tile sizes follow from head dim, element size and GPU generation, and are these."""
    triton_attention = pytest.importorskip("lct.kernels.triton_attention")
    pinned = {
        ("forward", 128, 2, True): (128, 128, 8, 3),
        ("dq", 128, 2, True): (128, 64, 8, 3),
        ("dkv", 128, 2, True): (64, 128, 8, 2),
        ("dkv", 64, 2, True): (64, 128, 8, 2),
        ("forward", 64, 2, True): (128, 128, 8, 3),
        ("forward", 128, 2, False): (128, 64, 8, 3),
        ("forward", 64, 2, False): (128, 64, 4, 3),
        ("dq", 128, 2, False): (128, 32, 8, 2),
        ("dkv", 128, 2, False): (16, 128, 8, 2),
    }
    for case, sizes in pinned.items():
        assert triton_attention.tiles(*case) == triton_attention.Tiles(*sizes)
    assert not [name for name, value in vars(triton_attention).items() if hasattr(value, "configs")]
