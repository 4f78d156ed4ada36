"""What is seldom asked for: it is given, or refused in words. Derivatives, modes, odd sizes, memory that is shared."""

from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from lct import MMDiT, SceneLayout, Shot, attention
from lct.kernels import KVRows, NormRope, norm_rope_append_, norm_rope_join
from lct.kernels.modulate import gated, modulate
from lct.model.config import tiny
from lct.sample.joint import joint
from lct.sample.request import Sampling, SceneRequest, ShotRequest

LAYOUT = SceneLayout([[Shot(3, (1, 1, 1), "global"), Shot(2, (1, 2, 2)), Shot(2, (1, 2, 2))]])
IMPLS = ("reference", "sdpa", "cpu")


def qkv(dtype=torch.float32, layout=LAYOUT):
    return torch.randn(3, layout.rows, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()


def operations():
    x, shift = torch.randn(6, 8), torch.randn(2, 8)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    text, video = torch.randn(LAYOUT.text_rows, 3, 8), torch.randn(LAYOUT.video_rows, 3, 8)
    norms, spec = [(torch.ones(8), torch.ones(8))] * 2, NormRope(1, (2, 2, 4))
    return {
        "attention": (lambda q, impl: attention(q, q, q, LAYOUT, impl=impl), qkv()[0]),
        "modulate": (lambda x, impl: modulate(x, shift, shift, starts, impl=impl), x),
        "gated": (lambda x, impl: gated(x, x, shift, starts, impl=impl), x),
        "norm_rope_join": (
            lambda v, impl: norm_rope_join(text, v, *norms, LAYOUT.streams(), LAYOUT.positions(), spec, impl)[0],
            video,
        ),
    }


@pytest.mark.parametrize("name", operations())
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_second_derivative_is_refused_and_not_wrong(name, impl):
    """Also beside terms that have one: it was zero there, with a warning."""
    operation, x = operations()[name]
    x = x.requires_grad_()
    (first,) = torch.autograd.grad((operation(x, impl).square().sum() + x.square().sum()), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative: this operation is differentiable once"):
        torch.autograd.grad(first.square().sum(), x)


@pytest.mark.parametrize("name", operations())
def test_forward_derivatives_are_refused_and_not_left_out(name):
    operation, x = operations()[name]
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward"):
        operation(forward_ad.make_dual(x, torch.randn_like(x)), "auto")
    with pytest.raises(RuntimeError, match="setup_context|jvp"):
        torch.func.jvp(lambda x: operation(x, "auto"), (x,), (torch.randn_like(x),))


def test_training_after_inference_mode():
    """Plans, rows and positions of a layout are kept, and must not be inference tensors."""
    layout = SceneLayout([[Shot(5, (1, 3, 5)), Shot(4, (1, 3, 5))]])  # of this test alone
    model, draw = MMDiT(replace(tiny(), blocks=1)), torch.Generator().manual_seed(0)
    video = torch.randn(layout.video_rows, model.config.patch_channels, generator=draw)
    text = torch.randint(0, 9, (layout.text_rows,), generator=draw), torch.zeros(layout.text_rows, dtype=torch.int64)
    times = torch.tensor([0.5, 0.5])

    def loss():
        same = SceneLayout(layout.scenes)
        return model(video, text, times, same.geometry("cpu", 1.0, model.config.cross)).square().sum()

    with torch.inference_mode():
        before = loss()
    after = loss()
    after.backward()
    assert torch.equal(before, after)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_queries_without_heads_are_refused(impl):
    """They ended the process."""
    q, k, v = qkv()
    with pytest.raises(ValueError, match="heads"):
        attention(q[:, :0], k, v, LAYOUT, impl=impl)


@pytest.mark.parametrize("impl", IMPLS[:2])
@pytest.mark.parametrize("scale", [None, -0.125, 0.3])
def test_products_beyond_fp16(impl, scale):
    layout = SceneLayout([[Shot(2, (1, 1, 2))]])
    q = torch.full((4, 2, 64), 40.0).half().requires_grad_()
    v = torch.randn(4, 2, 64).half()
    out = attention(q, q, v, layout, impl=impl, scale=scale)
    out.float().sum().backward()
    assert torch.allclose(out[0], v.float().mean(0).half(), atol=1e-2) and q.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_reach_into_attention(impl):
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, LAYOUT, impl=impl)
    assert torch.equal(out, attention(q, k, v, LAYOUT, impl=impl))


@pytest.mark.parametrize("at", [0, 5, 10])
def test_keys_and_values_that_share_memory_are_refused(at):
    rows = LAYOUT.rows
    assert at < rows
    text, video = torch.randn(LAYOUT.text_rows, 3, 8), torch.randn(LAYOUT.video_rows, 3, 8)
    norms, buffer = [(torch.ones(8), torch.ones(8))] * 2, torch.zeros(3 * rows, 1, 8)
    given = text, video, *norms, LAYOUT.streams(), LAYOUT.positions(), NormRope(1, (2, 2, 4))
    with pytest.raises(ValueError, match="values: expected another tensor"):
        norm_rope_append_(*given, KVRows(buffer[:rows], buffer[at : at + rows], torch.arange(rows)))
    norm_rope_append_(*given, KVRows(buffer[:rows], buffer[rows : 2 * rows], torch.arange(rows)))


def test_a_shot_of_no_rows_spoils_no_other():
    model = MMDiT(replace(tiny(), blocks=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    request = SceneRequest(None, (ShotRequest("a", (0, 2, 2), 0), ShotRequest("b", (1, 2, 2), 1)))
    (latents,) = joint(model, [request], Sampling(steps=2, shift=2.0, shift_rows=4))
    assert [len(x) for x in latents] == [0, 4] and latents[1].isfinite().all()


def test_requests_that_cannot_be():
    model = MMDiT(replace(tiny(), blocks=1))
    request = SceneRequest(None, (ShotRequest("b", (1, 2, 2), 1),))
    with pytest.raises(ValueError, match="dtype: expected float64 with weights in float64 alone"):
        joint(model, [request], Sampling(steps=1, dtype="float64"))
    with pytest.raises(ValueError, match="shots: expected at least one"):
        SceneRequest("a scene", ())
    with pytest.raises(IndexError, match="shot: expected 0 to 2, got 3"):
        LAYOUT.visible_shots(0, 3)
