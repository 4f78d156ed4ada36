"""The raw ops as torch sees them: schemas, fakes with the right strides, and compilation that layouts do not repeat."""

import pytest
import torch
from tensors import IMPLS, Inputs, Join, build, dtype_id, normal, skip_unless_able, to
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from lct.kernels import NormRope, attention, norm_rope_join, select

ops = torch.ops.lct
LAYOUT = build([[(3, (1, 1, 1), "global"), (4, (2, 2, 2), "shot"), (2, (1, 3, 3), "shot")]])
SPEC = NormRope(4, (2, 4, 4))
OPTIONS = (SPEC.heads, list(SPEC.axes), SPEC.theta, SPEC.eps, SPEC.scope, "reference")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

strided = {  # the same values under strides that a fake must not copy by accident
    "contiguous": lambda x: x.contiguous(),
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other row": lambda x: torch.stack([x, -x], dim=1).flatten(0, 1)[::2],
}
each_stride = pytest.mark.parametrize("stride", strided.values(), ids=strided)
each_check = pytest.mark.parametrize("check", CHECKS)


def join_arguments(stride):
    geometry = LAYOUT.geometry()
    join = Join.random(geometry, SPEC)
    streams = geometry.streams
    qkv = (stride(join.text_qkv), stride(join.video_qkv))
    return *qkv, *join.text_norm, *join.video_norm, streams.text_rows, streams.video_rows, geometry.positions


@each_check
@each_stride
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_attention_forward(impl, stride, check):
    plan = LAYOUT.plan()
    q, k, v = (stride(x) for x in Inputs.random(plan, dim=8)[:3])
    opcheck(ops.attention_forward.default, (q, k, v, plan.table, plan.host_table, 0.3, impl), test_utils=check)


@each_check
@each_stride
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_attention_backward(impl, stride, check):
    plan = LAYOUT.plan()
    q, k, v, dout = (stride(x) for x in Inputs.random(plan, dim=8)[:4])
    out, lse = ops.attention_forward(q, k, v, plan.table, plan.host_table, 0.3, impl)
    tables = plan.table, plan.key_table, plan.host_table, plan.host_key_table
    arguments = (dout, normal(*lse.shape), q, k, v, out, lse, *tables, 0.3, False, impl)
    opcheck(ops.attention_backward.default, arguments, test_utils=check)


@each_check
@each_stride
def test_opcheck_norm_rope_join(stride, check):
    opcheck(ops.norm_rope_join.default, (*join_arguments(stride), *OPTIONS), test_utils=check)


@each_check
@each_stride
def test_opcheck_norm_rope_join_backward(stride, check):
    arguments = join_arguments(stride)
    upstream = [stride(normal(*x.shape, seed=i)) for i, x in enumerate(ops.norm_rope_join(*arguments, *OPTIONS))]
    opcheck(ops.norm_rope_join_backward.default, (*upstream, *arguments, *OPTIONS), test_utils=check)


@each_check
@each_stride
def test_opcheck_norm_rope_append(stride, check):
    cache, pool = (stored(stride) for _ in range(2))
    opcheck(ops.norm_rope_append_.default, (*join_arguments(stride), *cache, *pool, *OPTIONS), test_utils=check)
    nowhere = None, None, None
    opcheck(ops.norm_rope_append_.default, (*join_arguments(stride), *cache, *nowhere, *OPTIONS), test_utils=check)


def stored(stride):
    return *(stride(torch.zeros(LAYOUT.rows + 5, 2, 16)) for _ in range(2)), torch.arange(LAYOUT.rows).flip(0)


@each_check
@each_stride
def test_opcheck_assemble(stride, check):
    cache, pool, positions = stored(stride), stored(stride), LAYOUT.positions()
    options = OPTIONS[1], OPTIONS[2], OPTIONS[-1]
    opcheck(ops.assemble_.default, (*pool, *cache, positions, *options), test_utils=check)


MODULATION = {
    "modulate": lambda x, y, per_shot, starts: (x, *per_shot, starts, 1e-6),
    "modulate_backward": lambda x, y, per_shot, starts: (y, x, per_shot[1], starts, 1e-6),
    "gated": lambda x, y, per_shot, starts: (x, y, per_shot[0], starts),
    "gated_backward": lambda x, y, per_shot, starts: (x, y, per_shot[0], starts),
}
each_2d_stride = pytest.mark.parametrize(
    "stride", [lambda x: x, lambda x: x.T.contiguous().T, strided["every other row"]], ids=["rows", "columns", "skips"]
)


@each_check
@each_2d_stride
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", MODULATION)
def test_opcheck_modulation(name, impl, stride, check):
    starts = LAYOUT.streams().video_starts
    x, y = (stride(normal(int(starts[-1]), 8, seed=i)) for i in range(2))
    skip_unless_able(select.MODULATE, impl, x)
    per_shot = normal(len(starts) - 1, 24).chunk(3, dim=1)[:2]
    opcheck(getattr(ops, name).default, (*MODULATION[name](x, y, per_shot, starts), impl), test_utils=check)


# What opcheck samples once, said of every implementation and dtype: real results look like the fakes.


@each_stride
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("impl", IMPLS)
def test_fake_stride_mismatch(impl, dtype, stride):
    plan = LAYOUT.plan()
    q, k, v, dout, dlse = (stride(x) if x.ndim == 3 else x for x in Inputs.random(plan, dim=16, dtype=dtype))
    skip_unless_able(select.ATTENTION, impl, q, k, v)
    tables = plan.table, plan.key_table, plan.host_table, plan.host_key_table

    def results(device):
        out, lse = ops.attention_forward(*(x.to(device) for x in (q, k, v)), plan.table, plan.host_table, 0.3, impl)
        rest = (x.to(device) for x in (dout, dlse, q, k, v, out, lse))
        return [out, lse, *ops.attention_backward(*rest, *tables, 0.3, False, impl)]

    for real, fake in zip(results("cpu"), results("meta"), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


# Compilation


def scene(shots, side=8):
    """Text, video and joint rows are never equal by accident, and every sum has more than 4096 terms: inductor reduces
    shorter ones in another way, and guards on it."""
    return [(5, (1, 1, 1), "global"), *((3 + i, (1 + i % 3, side, side + i % 2), "shot") for i in range(shots))]


SHOTS = (1, 3, 9, 5, 2)


def step(join, geometry, impl, rope):
    """One block's attention, as a training step calls it: everything about the layout was built outside."""
    q, k, v = norm_rope_join(*join, geometry.streams, geometry.positions, SPEC, rope)
    return attention(q, k, v, geometry.plan, impl=impl).square().sum()


def gradients(function, join, *arguments):
    leaves = [x.detach().requires_grad_() for x in (*join[:2], *join.text_norm, *join.video_norm)]
    loss = function(Join(leaves[0], leaves[1], tuple(leaves[2:4]), tuple(leaves[4:])), *arguments)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def compilations(backend, impl, rope="auto", device="cpu", side=8):
    """How often dynamo compiled `step` over all layouts; every result is checked against the eager one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed, shots in enumerate(SHOTS):
        geometry = build([scene(shots, side)]).geometry(device)
        join = to(device, Join.random(geometry, SPEC, seed=seed))
        arguments = join, geometry, impl, rope
        for got, expected in zip(gradients(compiled, *arguments), gradients(step, *arguments), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    return counter.frame_count


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_recompile_storm(impl):
    """One compilation for the first layout, one with symbolic sizes, and none for any other."""
    interpreted = impl == "triton"  # whose time is that of Python
    assert compilations("aot_eager", impl, impl if interpreted else "auto", side=2 if interpreted else 8) <= 2


def test_inductor_compiles_it_too():
    assert compilations("inductor", "auto") <= 2
