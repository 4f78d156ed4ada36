"""LayerNorm + per-shot modulation and gate + residual: every implementation against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, dtype_id, home, normal, same_bytes, skip_unless_able, to

from lct.kernels import gated, modulate, select
from lct.kernels.numerics import compare

each_impl = pytest.mark.parametrize("impl", select.MODULATE)
SIZES = (5, 0, 33, 64, 1)  # rows of each shot: none, tile + 1, whole tiles, one


def starts_of(sizes):
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def problem(sizes, channels=48, dtype=torch.float32, seed=0):
    """x, branch, dout [R, C]; shift, scale, gate [N, C]: every third row of a wider tensor, as `chunk` gives them."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = [normal(sum(sizes), channels, dtype=dtype, seed=seed + i) for i in range(3)]
    return *rows, *normal(len(sizes), 3 * channels, dtype=wide, seed=seed + 3).chunk(3, dim=-1)


def exact(x, branch, dout, shift, scale, gate, sizes):
    """Both operations and their gradients by plain differentiable torch in float64, one shot at a time."""
    x, branch, shift, scale, gate = leaves = [t.double().requires_grad_() for t in (x, branch, shift, scale, gate)]
    shots = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    modulated = (x - x.mean(-1, keepdim=True)) / deviation * (1 + scale[shots]) + shift[shots]
    added = x + gate[shots] * branch
    return results(modulated, added, leaves, dout.double())


def results(modulated, added, leaves, dout):
    x, branch, shift, scale, gate = leaves
    return [
        modulated.detach(),
        added.detach(),
        *torch.autograd.grad(modulated, (x, shift, scale), dout),
        *torch.autograd.grad(added, (x, branch, gate), dout),
    ]


def computed(impl, x, branch, dout, shift, scale, gate, sizes):
    there = to(home(impl), (x, branch, shift, scale, gate, starts_of(sizes), dout))
    skip_unless_able(select.MODULATE, impl, there[0])
    x, branch, shift, scale, gate = leaves = [t.detach().requires_grad_() for t in there[:5]]
    starts, dout = there[5:]
    outputs = modulate(x, shift, scale, starts, impl), gated(x, branch, gate, starts, impl)
    return [t.cpu() for t in results(*outputs, leaves, dout)]


def plain(x, branch, dout, shift, scale, gate, sizes):
    """As most models write it, every step rounded to the dtype of x: the yardstick."""
    x, branch, shift, scale, gate = leaves = [
        t.detach().to(x.dtype).requires_grad_() for t in (x, branch, shift, scale, gate)
    ]
    shots = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    modulated = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[shots]) + shift[shots]
    return results(modulated, x + gate[shots] * branch, leaves, dout)


def assert_modulation(impl, sizes, channels, dtype, seed=0):
    given = problem(sizes, channels, dtype, seed)
    got = computed(impl, *given, sizes)
    for i, three in enumerate(zip(got, exact(*given, sizes), plain(*given, sizes), strict=True)):
        x, true, yardstick = three
        compare(x, true, yardstick.to(x.dtype), kind="forward" if i < 2 else "gradient")


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("channels", [48, 128, 200])
def test_equals_plain_torch_in_float64(impl, channels, dtype):
    assert_modulation(impl, SIZES, channels, dtype)


@each_impl
@given(sizes=st.lists(st.sampled_from([0, 1, 2, 31, 32, 33, 70]), min_size=1, max_size=20), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_random_shots(impl, sizes, seed):
    assert_modulation(impl, (*sizes, 40), 32, torch.float32, seed)


@each_impl
def test_a_sum_over_a_long_shot(impl):
    """Between short ones, and of more tiles than are added up at once."""
    sizes = 3, 2100, 40
    given = problem(sizes, channels=16)
    x, branch, dout, _, _, gate = given
    x, branch, gate, starts, dout = to(home(impl), (x, branch, gate.clone().requires_grad_(), starts_of(sizes), dout))
    skip_unless_able(select.MODULATE, impl, x)
    (got,) = torch.autograd.grad(gated(x, branch, gate, starts, impl), gate, dout)
    compare(got.cpu(), exact(*given, sizes)[-1], plain(*given, sizes)[-1], kind="gradient")


@each_impl
def test_a_shot_is_moved_by_its_own_modulation_alone(impl):
    """NaN in the modulation of one shot, or in its rows, leaves every other shot's rows and gradients as they were."""
    given = problem(SIZES)
    before = computed(impl, *given, SIZES)
    x, branch, dout, *per_shot = (t.clone() for t in given)
    for t in per_shot:
        t[2] = float("nan")
    for t in (x, branch):
        t[5:38] = float("nan")
    after = computed(impl, x, branch, dout, *per_shot, SIZES)
    rows, shots = torch.arange(sum(SIZES)), torch.arange(len(SIZES))
    others = (rows < 5) | (rows >= 38), shots != 2
    for a, b in zip(before, after, strict=True):
        kept = others[len(a) == len(SIZES)]
        assert same_bytes(a[kept], b[kept])
    assert all(t.isnan().any() for t in after[:2])


@each_impl
def test_strided_rows(impl):
    x, branch, dout, *per_shot = problem(SIZES)
    wide = [torch.stack([t, -t], dim=1).flatten(0, 1)[::2] for t in (x, branch, dout)]
    turned = [t.T.contiguous().T for t in (x, branch, dout)]
    straight = computed(impl, x, branch, dout, *per_shot, SIZES)
    for views in (wide, turned):
        for a, b in zip(straight, computed(impl, *views, *per_shot, SIZES), strict=True):
            assert same_bytes(a, b)


def test_gradcheck():
    x, branch, _, shift, scale, gate = problem((2, 0, 3), channels=5, dtype=torch.float64)
    starts = starts_of((2, 0, 3))
    leaves = [t.clone().requires_grad_() for t in (x, shift, scale)]
    assert torch.autograd.gradcheck(lambda *t: modulate(*t, starts), leaves)
    leaves = [t.clone().requires_grad_() for t in (x, branch, gate)]
    assert torch.autograd.gradcheck(lambda *t: gated(*t, starts), leaves)


REFUSED = {
    "shift": (lambda p: p | {"shift": p["shift"][:2]}, ValueError),
    "scale": (lambda p: p | {"scale": p["scale"].bfloat16()}, TypeError),
    "starts": (lambda p: p | {"starts": p["starts"].long()}, ValueError),
    "starts: expected 0": (lambda p: p | {"starts": p["starts"] - 1}, ValueError),
    "starts: expected 0, then": (lambda p: p | {"x": p["x"][1:]}, ValueError),
    "x": (lambda p: p | {"x": p["x"][0]}, ValueError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_does_not_fit(name):
    change, error = REFUSED[name]
    x, _, _, shift, scale, _ = problem(SIZES)
    with pytest.raises(error, match=name):
        modulate(**change({"x": x, "shift": shift, "scale": scale, "starts": starts_of(SIZES)}))


def test_gated_refuses_a_branch_of_another_shape():
    x, branch, _, _, _, gate = problem(SIZES)
    with pytest.raises(ValueError, match="branch"):
        gated(x, branch[1:], gate, starts_of(SIZES))
