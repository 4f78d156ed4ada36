"""What only a CUDA device can show: bf16, real sizes, streams, graphs, repeatability. Skipped elsewhere."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from processes import small
from tensors import SCENES, VISIBILITIES, Inputs, assert_attention, build, dtype_id, same_bytes, skip_unless_able
from test_attention import identity
from test_model import inputs as model_inputs
from test_model import random_model
from test_ops import compilations
from test_sample import requests, worst

from lct.kernels import (
    KVRows,
    NormRope,
    assemble_,
    attention,
    gated,
    modulate,
    norm_rope_append_,
    norm_rope_join,
    reference,
    remembered,
    select,
)
from lct.kernels.numerics import compare
from lct.layout import Geometry, SceneLayout, Shot
from lct.model.config import Memory, tiny
from lct.plan import Plan, Run
from lct.sample import Sampling, autoregressive
from lct.train.execution import Execution
from lct.train.record import LOG
from lct.train.trainer import Trainer
from lct.validate import DTYPES, validate

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FUSED = [impl for impl in select.ATTENTION if impl not in ("reference", "sdpa", "cpu")]
each_forward = pytest.mark.parametrize("impl", FUSED)
each_impl = pytest.mark.parametrize("impl", [impl for impl in FUSED if not select.ATTENTION.forward_only(impl)])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

# Rows of the shots: one, a tile less one, a tile, a tile and one, several tiles, a prime number of them.
EDGES = SceneLayout([[Shot(1, (0, 1, 1)), *(Shot(n, (1, 8, 8)) for n in (63, 64, 65, 200, 293))]])


def drawn(plan, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16):
    return Inputs.random(plan, heads, kv_heads, dim, dtype).to(CUDA)


def test_every_implementation_is_what_the_reference_is(tmp_path, monkeypatch):
    """What `lct doctor --validate` checks: every operation, implementation and dtype, forward and backward."""
    monkeypatch.setattr(remembered, "path", lambda: tmp_path / "validated.json")
    monkeypatch.setattr(remembered, "_passed", frozenset())
    verdicts = list(validate([CUDA]))
    assert {(v.operation, v.impl) for v in verdicts} >= {
        (op, "triton") for op in ("attention", "norm_rope", "modulate")
    }
    assert not [v for v in verdicts if v.failure]


# Attention


@each_forward
@each_dtype
@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
def test_forward_right_backward_wrong(impl, dtype, visibility):
    plan = build(SCENES, visibility).plan(CUDA)
    assert_attention(drawn(plan, dtype=dtype), plan, oracle.mask(SCENES, visibility), impl)


@each_forward
@each_dtype
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (3, 1)], ids="{0[0]}q{0[1]}kv".format)
@pytest.mark.parametrize("dim", [24, 32, 64, 72, 96, 128])
def test_odd_head_dim(impl, dim, heads, dtype):
    plan = build(SCENES).plan(CUDA)
    assert_attention(drawn(plan, *heads, dim, dtype), plan, oracle.mask(SCENES, "context_causal"), impl)


@each_impl
@pytest.mark.parametrize("visibility", ["context_causal", "isolated", "bidirectional"])
def test_mask_probing_through_gradients(impl, visibility):
    layout = SceneLayout(EDGES.scenes, visibility)
    zero, one = torch.zeros(layout.rows, 1, 64, device=CUDA), torch.ones(1, layout.rows, device=CUDA)
    by_query, by_key = [], []
    for probe in (x.to(CUDA) for x in identity(layout.rows)):
        by_query.append(Inputs(zero, zero, zero, probe, 0 * one).run(layout, impl=impl)[4][:, 0] != 0)
        by_key.append(Inputs(zero, probe, zero, zero, one).run(layout, impl=impl)[2][:, 0] != 0)
    mask = layout.dense_mask()
    assert torch.equal(torch.cat(by_query, dim=1)[:, : layout.rows].cpu(), mask.T)
    assert torch.equal(torch.cat(by_key, dim=1)[:, : layout.rows].cpu(), mask)


@each_forward
@pytest.mark.parametrize("visibility", ["context_causal", "isolated", "bidirectional"])
def test_mask_probing(impl, visibility):
    layout = SceneLayout(EDGES.scenes * 2, visibility)
    q, k = torch.zeros(2, layout.rows, 1, 64, dtype=torch.bfloat16, device=CUDA)
    skip_unless_able(select.ATTENTION, impl, q, k, k)
    seen = [attention(q, k, v.to(q), layout, impl=impl)[:, 0] != 0 for v in identity(layout.rows)]
    assert torch.equal(torch.cat(seen, dim=1)[:, : layout.rows].cpu(), layout.dense_mask())


@each_forward
@pytest.mark.parametrize("dim", [64, 128])
def test_neighbour_tiles_differ(impl, dim):
    """Thousands of rows, where every tile has its own number of key blocks: all results against float64."""
    shots = [Shot(77, (3, 16, 21)), Shot(100, (1, 30, 30)), Shot(13, (5, 13, 17)), Shot(500, (2, 24, 29))]
    layout = SceneLayout([shots, shots[:2]])
    inputs = drawn(layout.plan(CUDA), heads=2, kv_heads=1, dim=dim)
    wide = Inputs(*(x.double() for x in inputs))
    three = (x.run(layout, impl=i) for x, i in ((inputs, impl), (wide, "reference"), (inputs, "reference")))
    found, *judges = three
    for i, (got, true, yardstick) in enumerate(zip(found, *(x[: len(found)] for x in judges), strict=True)):
        compare(got, true, yardstick.to(got.dtype), kind="forward" if i < 2 else "gradient")


@each_forward
def test_empty_interval_tile(impl):
    plan = build([[(0, (0, 1, 1), "shot"), (0, (0, 1, 1), "shot")]]).plan(CUDA)
    given = drawn(plan)[:3]
    skip_unless_able(select.ATTENTION, impl, *given)
    assert attention(*given, plan, impl=impl).shape == (0, 4, 64)


@each_forward
@each_dtype
def test_rows_that_a_query_cannot_see_may_hold_nan(impl, dtype):
    """TMA boxes reach beyond a run's last row: what lies there must not matter."""
    layout = SceneLayout(EDGES.scenes)
    inputs = drawn(layout.plan(), dtype=dtype)
    last = layout.shot_starts[-1]
    poisoned = Inputs(*(x.clone() for x in inputs))
    for x in (poisoned.q, poisoned.k, poisoned.v, poisoned.dout):
        x[last:] = float("nan")
    before, after = (x.run(layout, impl=impl, deterministic=True) for x in (inputs, poisoned))
    for i in (0, 2) if len(after) > 2 else (0,):  # out and dq of earlier shots
        assert same_bytes(before[i][:last], after[i][:last])
    assert after[0][last:].isnan().all()


@each_forward
@each_dtype
def test_misaligned_pointer(impl, dtype):
    plan = build(SCENES).plan(CUDA)
    aligned = drawn(plan, dtype=dtype)
    shifted = Inputs(*(torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in aligned))
    assert_attention(shifted, plan, oracle.mask(SCENES, "context_causal"), impl)


@each_impl
@pytest.mark.parametrize("strides", [(192, 64, 1), (2**25, 64, 1)], ids=["fused", "far apart"])
def test_strided_dout_overflow(impl, strides):
    plan = SceneLayout([[Shot(70, (1, 3, 3))]]).plan(CUDA)
    inputs = drawn(plan, heads=3, kv_heads=3, dtype=torch.float16)
    reach = 1 + sum((n - 1) * s for n, s in zip(inputs.dout.shape, strides, strict=True))
    far = torch.empty(reach, dtype=torch.float16, device=CUDA).as_strided(inputs.dout.shape, strides).copy_(inputs.dout)
    for a, b in zip(inputs._replace(dout=far).run(plan, impl=impl), inputs.run(plan, impl=impl), strict=True):
        assert same_bytes(a, b)


@each_impl
@pytest.mark.xdist_group("half of the memory")
def test_int32_offset_overflow(impl):
    """Tensors of more than 2³¹ elements: the last shot equals the same shot alone."""
    torch.cuda.empty_cache()
    shots = [Shot(0, (1, 62, 64))] * 34
    layout, alone = SceneLayout([shots], "isolated"), SceneLayout([shots[:1]])
    shape = (layout.rows, 128, 128)
    if torch.cuda.mem_get_info()[0] < 10 * 2 * layout.rows * 128 * 128:
        pytest.skip(f"needs {10 * 2 * layout.rows * 128 * 128 / 2**30:.0f} GiB of free GPU memory")
    assert layout.rows * 128 * 128 > 2**31
    q, k, v, dout = (torch.randn(shape, dtype=torch.float16, device=CUDA) for _ in range(4))
    last = layout.shot_starts[-1]

    def results(layout, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = attention(*leaves, layout, impl=impl, deterministic=True)
        return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

    small = [x[last:].clone() for x in (q, k, v, dout)]
    for whole, part in zip(results(layout, q, k, v, dout), results(alone, *small), strict=True):
        assert same_bytes(whole[last:], part)


@each_forward
@each_dtype
def test_nondeterministic_backward(impl, dtype):
    inputs = drawn(EDGES.plan(CUDA), dtype=dtype)
    first = inputs.run(EDGES, impl=impl, deterministic=True)
    for _ in range(50):
        again = inputs.run(EDGES, impl=impl, deterministic=True)
        assert all(same_bytes(a, b) for a, b in zip(first, again, strict=True))


@each_forward
def test_equals_per_shot_flash_attention(impl):
    flash = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    layout = SceneLayout([EDGES.scenes[0]])
    q, k, v = drawn(layout.plan(CUDA), kv_heads=4)[:3]
    skip_unless_able(select.ATTENTION, impl, q, k, v)
    parts = [
        flash.flash_attn_func(q[None, a:b], k[None, :b], v[None, :b])[0]
        for a, b in zip(layout.shot_starts, layout.shot_ends, strict=True)
    ]
    torch.testing.assert_close(attention(q, k, v, layout, impl=impl), torch.cat(parts), rtol=2e-2, atol=2e-2)


@each_forward
def test_equals_xformers(impl):
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    layout = SceneLayout([EDGES.scenes[0]])
    q, k, v = drawn(layout.plan(CUDA), kv_heads=4)[:3]
    skip_unless_able(select.ATTENTION, impl, q, k, v)
    sizes = [b - a for a, b in zip(layout.shot_starts, layout.shot_ends, strict=True)]
    mask = ops.fmha.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
        q_seqlen=sizes, kv_seqstarts=[0] * len(sizes) + [layout.rows], kv_seqlen=list(layout.shot_ends)
    )
    theirs = ops.memory_efficient_attention_forward(q[None], k[None], v[None], mask.to(CUDA))[0]
    torch.testing.assert_close(attention(q, k, v, layout, impl=impl), theirs, rtol=2e-2, atol=2e-2)


# The Hopper kernel's own


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)


def hopper_forward(inputs, plan):
    return select.ATTENTION["cuda"].forward(*inputs[:3], plan.table, plan.host_table, inputs.q.shape[2] ** -0.5)


@hopper
@each_half
@pytest.mark.parametrize("dim", [64, 128])
def test_pairs_of_blocks_compute_what_single_blocks_do(monkeypatch, dtype, dim):
    """Runs of odd and even numbers of tiles, on both sides of a row of blocks: bit for bit."""
    plan = EDGES.plan(CUDA)
    inputs = drawn(plan, dim=dim, dtype=dtype)
    skip_unless_able(select.ATTENTION, "cuda", *inputs[:3])
    found = []
    for paired in (False, True):
        monkeypatch.setattr(select.ATTENTION["cuda"], "_paired", lambda table, paired=paired: paired)
        found.append(hopper_forward(inputs, plan))
    assert all(same_bytes(a, b) for a, b in zip(*found, strict=True))


@hopper
@each_half
@pytest.mark.parametrize("heads", [(3, 3), (8, 2)], ids="{0[0]}q{0[1]}kv".format)
@pytest.mark.parametrize("dim", [64, 128])
def test_thirty_thousand_rows(dim, heads, dtype):
    """In float64 for some rows: the edges of every run, of tiles within, and others between."""
    sizes = [5417, 7003, 3968, 9111, 6850]
    plan = SceneLayout([[Shot(0, (1, 1, n)) for n in sizes]]).plan(CUDA)
    inputs = drawn(plan, *heads, dim, dtype)
    skip_unless_able(select.ATTENTION, "cuda", *inputs[:3])
    out, lse = hopper_forward(inputs, plan)
    wide = [x.double() for x in inputs[:3]]
    for run in plan.runs:
        last = (run.end - run.start - 1) // 128 * 128
        within = {0, 1, 63, 64, 127, 128, 255, 256, last - 1, last, run.end - run.start - 1, *range(300, 3900, 97)}
        rows = torch.tensor(sorted(run.start + r for r in within), device=CUDA)
        part = Plan.build([Run(0, len(rows), run.sees)], len(rows), plan.k_rows, CUDA)
        truth, yardstick = (
            reference.forward(q[rows], k, v, part.table, part.host_table, dim**-0.5) for q, k, v in (wide, inputs[:3])
        )
        compare(out[rows], truth[0], yardstick[0])
        torch.testing.assert_close(lse[:, rows].double(), truth[1], rtol=1e-5, atol=1e-5)


@hopper
@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0])
def test_strides_scales_tails_and_rows_that_see_nothing(scale):
    """A tail of three heads in fused, far-apart rows over a cache, one run of which sees nothing."""
    runs = [Run(0, 130, ((0, 200), (300, 431))), Run(130, 150, ()), Run(150, 400, ((40, 41),))]
    plan = Plan.build(runs, 400, 450, CUDA)
    inputs = drawn(plan, 6, 3, 128, torch.float16)
    wide = [torch.full((len(x), 40, 128), torch.nan, dtype=x.dtype, device=CUDA) for x in inputs[:3]]
    q, k, v = (w[:, 3 : 3 + 2 * x.shape[1] : 2].copy_(x) for w, x in zip(wide, inputs[:3], strict=True))
    skip_unless_able(select.ATTENTION, "cuda", q, k, v)
    out, lse = attention(q, k, v, plan, scale=scale, return_lse=True, impl="cuda")
    truth = reference.forward(*(x.double() for x in (q, k, v)), plan.table, plan.host_table, scale)
    plain = reference.forward(q, k, v, plan.table, plan.host_table, scale)
    compare(out, truth[0], plain[0])
    seeing = torch.isfinite(truth[1])
    torch.testing.assert_close(lse[seeing].double(), truth[1][seeing], rtol=1e-5, atol=1e-5)
    assert (lse[~seeing] == -torch.inf).all() and not seeing[:, 130:150].any()


@hopper
def test_a_captured_launch_serves_another_plan():
    """The grid follows from shapes: a graph replayed over another table computes that table's attention."""
    sizes = [1, 63, 64, 65, 200, 293]
    one, other = (SceneLayout([[Shot(n, (1, 8, 8)) for n in order]]).plan(CUDA) for order in (sizes, sizes[::-1]))
    one = replace(one, table=one.table.clone())  # plans are remembered, and this table is written over
    inputs = drawn(one, dim=128)
    expected = hopper_forward(inputs, other)
    hopper_forward(inputs, one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = hopper_forward(inputs, one)
    one.table.copy_(other.table)
    graph.replay()
    assert all(same_bytes(a, b) for a, b in zip(results, expected, strict=True))


# Streams, graphs, devices


FUSED_ROPE = [impl for impl in select.NORM_ROPE if impl not in ("reference", "cpu")]
each_rope = pytest.mark.parametrize("rope", FUSED_ROPE)
SPEC = NormRope(4, (16, 24, 24))


class Work(NamedTuple):
    """What one step over all operations reads and writes, on one device."""

    text: torch.Tensor
    video: torch.Tensor
    norm: torch.Tensor
    per_shot: torch.Tensor
    cache: KVRows
    pool: KVRows
    geometry: Geometry

    @classmethod
    def random(cls, seed=0, device=CUDA):
        geometry, g = EDGES.geometry(device), torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=torch.bfloat16):
            return torch.randn(shape, generator=g).to(dtype).to(device)

        text, video = (normal(len(x), 8, 64) for x in (geometry.streams.text_rows, geometry.streams.video_rows))
        slots = torch.arange(EDGES.rows, device=device)
        cache, pool = (KVRows(normal(EDGES.rows, 2, 64), normal(EDGES.rows, 2, 64), slots) for _ in range(2))
        norm, per_shot = normal(64, dtype=torch.float32), normal(len(EDGES.shots), 256, dtype=torch.float32)
        return cls(text, video, norm, per_shot, cache, pool, geometry)

    def data(self):
        """The tensors that a step reads."""
        return [self.text, self.video, self.norm, self.per_shot]

    def step(self, rope):
        """Every operation once, with gradients: rows joined, attended, modulated and gated; then the cache and pool."""
        streams, positions, plan = self.geometry.streams, self.geometry.positions, self.geometry.plan
        norm = (self.norm, self.norm)
        leaves = [x.detach().requires_grad_() for x in (self.text, self.video)]
        q, k, v = norm_rope_join(*leaves, norm, norm, streams, positions, SPEC, rope)
        x = attention(q, k, v, plan, impl="triton").flatten(1).index_select(0, streams.video_rows)
        y = modulate(x, self.per_shot, self.per_shot, streams.video_starts, "triton")
        y = gated(y, x, self.per_shot, streams.video_starts, "triton")
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        with torch.no_grad():
            joined = self.text, self.video, norm, norm, streams, positions, SPEC
            q = norm_rope_append_(*joined, self.cache, self.pool, rope)
            assemble_(self.pool, self.cache, positions + 1, SPEC, rope)
        return [y.detach(), *gradients, q, *self.cache[:2], *self.pool[:2]]


def copies(tensors):
    torch.cuda.synchronize()
    return [x.cpu() for x in tensors]


@each_rope
def test_wrong_stream(rope):
    """Launched on the current stream: it waits for what that stream has yet to write."""
    work, late = Work.random(), Work.random(seed=1)
    expected = copies(work.step(rope))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for x, value in zip(late.data(), work.data(), strict=True):
            x.copy_(value)
        got = late.step(rope)
    assert all(same_bytes(a, b) for a, b in zip(copies(got), expected, strict=True))


@each_rope
def test_cuda_graph_capture(rope):
    """No synchronisation and no late compilation inside; replayed on other data it gives that data's results."""
    work, other = Work.random(), Work.random(seed=7)
    with torch.cuda.stream(torch.cuda.Stream()):
        work.step(rope)  # compiles, and copies the frequencies of RoPE to the GPU
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work.step(rope)
    for x, value in zip(work.data(), other.data(), strict=True):
        x.copy_(value)
    graph.replay()
    assert all(same_bytes(a, b) for a, b in zip(copies(results), copies(other.step(rope)), strict=True))


@each_rope
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_wrong_device_of_every_operation(rope):
    here, there = Work.random(), Work.random(device="cuda:1")
    assert all(same_bytes(a, b) for a, b in zip(copies(here.step(rope)), copies(there.step(rope)), strict=True))


@each_rope
def test_recompile_storm(rope):
    """One compilation for the first layout, one with symbolic sizes, and none for any other; nor by Triton itself."""
    assert compilations("inductor", "triton", rope, CUDA) <= 2


@each_forward
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_wrong_device(impl):
    """On cuda:1 while cuda:0 is current."""
    inputs, plan = Inputs.random(EDGES.plan(), dtype=torch.bfloat16), EDGES.plan("cuda:1")
    here = inputs.to("cuda:0").run(EDGES, impl=impl)
    there = inputs.to("cuda:1").run(plan, impl=impl)
    assert all(same_bytes(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))


# Pool and model


@pytest.mark.parametrize("impl", [impl for impl in select.NORM_ROPE if impl != "cpu"])
@each_dtype
def test_a_pool_in_pinned_memory(impl, dtype):
    """Written and read by the kernels where it lies; the same bytes as a pool on the GPU."""
    spec, layout = NormRope(4, (16, 24, 24)), build(SCENES)
    geometry = layout.geometry(CUDA)
    sizes = (len(geometry.streams.text_rows), len(geometry.streams.video_rows))
    text, video = (torch.randn(n, 8, 64, device=CUDA).to(dtype) for n in sizes)
    skip_unless_able(select.NORM_ROPE, impl, video)
    norm = (torch.ones(64, device=CUDA), torch.ones(64, device=CUDA))
    slots = torch.arange(layout.rows, device=CUDA).flip(0)

    def zeros(**options):
        return KVRows(*(torch.zeros(layout.rows, 2, 64, dtype=dtype, **options) for _ in range(2)), slots)

    found = []
    for where in ({"device": CUDA}, {"pin_memory": True}):
        cache, pool, again = zeros(device=CUDA), zeros(**where), zeros(device=CUDA)
        joined = text, video, norm, norm, geometry.streams, geometry.positions, spec
        norm_rope_append_(*joined, cache, pool, impl)
        assemble_(pool, again, geometry.positions, spec, impl)
        torch.cuda.synchronize()
        found.append([x.cpu() for x in (*cache[:2], *pool[:2], *again[:2])])
    assert all(same_bytes(a, b) for a, b in zip(*found, strict=True))
    assert all(x.any() for x in found[0])


def test_pageable_memory_is_refused():
    pool = KVRows(*torch.zeros(2, 4, 2, 64), torch.arange(4, device=CUDA))
    cache = KVRows(*torch.zeros(2, 4, 2, 64, device=CUDA), torch.arange(4, device=CUDA))
    with pytest.raises(ValueError, match="pinned"):
        assemble_(pool, cache, torch.zeros(4, 3, device=CUDA), NormRope(4, (16, 24, 24)), "triton")


CONFIG = replace(tiny(), blocks=2, head_dim=64, rope_axes=(16, 24, 24), width=256)


def test_the_model_trains_alike():
    layout = SceneLayout([[Shot(5, (1, 1, 1), "global"), Shot(30, (3, 8, 8)), Shot(9, (1, 9, 7))]])
    model = random_model(CONFIG, dtype=torch.float32).requires_grad_()
    arguments = model_inputs(layout, model)
    model.to(CUDA)
    losses, gradients = [], []
    for impl in ("reference", "triton"):
        model.zero_grad()
        loss = F.mse_loss(v := model(*(x.to(CUDA) for x in arguments), layout, impl=impl), torch.zeros_like(v))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()


@pytest.mark.parametrize("chosen", [None, [[], [0], [1, 0]]], ids=["cache", "pool"])
def test_the_sampler_generates_alike(chosen):
    model = random_model(CONFIG, dtype=torch.float32).to(CUDA)
    options = {"chosen": chosen} | ({} if chosen is None else {"memory": Memory(device="cpu")})
    results = [
        autoregressive(model, requests(), Sampling(steps=2, guidance=2.0), impl=impl, **options)
        for impl in ("reference", "triton")
    ]
    scale = max(x.abs().max().item() for scene in results[0] for x in scene)
    assert worst(*results) <= 1e-3 * scale


@pytest.mark.parametrize("chosen", [None, [[], [0], [1, 0]]], ids=["all shots", "chosen shots"])
@pytest.mark.parametrize("fp8", [False, True], ids=["as computed", "8 bits"])
def test_where_history_is_kept_changes_nothing(fp8, chosen):
    """Pinned CPU memory and copies beside the computation, block by block: the same bytes as everything on the GPU."""
    model = random_model(CONFIG, dtype=torch.float32).to(CUDA)
    options = {"chosen": chosen, "impl": "triton"}
    made = [
        autoregressive(model, requests(), Sampling(steps=2), memory=memory, **options)
        for memory in (Memory(fp8=fp8), Memory("cpu", fp8=fp8), Memory("cpu", layered=True, fp8=fp8))
    ]
    for other in made[1:]:
        assert all(same_bytes(a, b) for s, t in zip(made[0], other, strict=True) for a, b in zip(s, t, strict=True))


def test_one_varlen_call_over_overlapping_prefixes_has_no_right_gradient():
    """Why FA2's single call is a forward-only peer: what it computes is right, and autograd through it refuses, or,
    worse, returns gradients that are not those of the mask."""
    sys.path.append(str(Path(__file__).parents[1] / "bench"))
    from baselines import per_shot, seqused

    layout = SceneLayout([[Shot(0, (2, 8, 8)), Shot(0, (3, 8, 8)), Shot(0, (1, 8, 8))]])
    given = [torch.randn(layout.rows, 4, 64, device=CUDA, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    upstream = torch.randn_like(given[0])
    theirs, right = seqused(layout, CUDA)(*given), per_shot(layout)(*given)
    assert (theirs - right).norm() < 2e-3 * right.norm()
    truth = torch.autograd.grad(right, given, upstream)
    try:
        found = torch.autograd.grad(theirs, given, upstream)
    except (RuntimeError, NotImplementedError):
        return
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]
    assert not max(errors) < 0.1, f"relative errors {errors} of dq, dk, dv"


@pytest.mark.parametrize("options", [{}, {"recompute": "attention"}, {"save_beside": True}], ids=str)
def test_a_run_goes_on(options, tmp_path):
    """Saved and resumed on the GPU: the losses of one that was not stopped, and those of the CPU."""
    config, execution = small(steps=6, save_every=3), Execution(**options)
    Trainer(config, tmp_path / "cpu").run()
    Trainer(config, tmp_path / "whole", "cuda", execution=execution).run()
    first = Trainer(config, tmp_path / "parts", "cuda", execution=execution)
    for _ in range(3):
        first.train_step()
    first.save()
    first.saver.wait()
    second = Trainer(config, tmp_path / "parts", "cuda", execution=execution)
    assert second.resume() and second.step == 3
    losses = [second.train_step().loss for _ in range(3)]
    logs = ((tmp_path / name / LOG).read_text().splitlines() for name in ("whole", "cpu"))
    whole, cpu = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert losses == pytest.approx(whole[3:], rel=1e-4) and whole == pytest.approx(cpu, rel=1e-3)
