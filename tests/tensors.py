"""Random tensors, oracle truths and verdicts that the kernel tests share; scenes are the oracle's plain tuples."""

from dataclasses import fields, is_dataclass, replace
from typing import NamedTuple

import oracle
import pytest
import torch
from torch import Tensor

from lct.kernels import NormRope, attention, select
from lct.kernels.numerics import compare
from lct.layout import SceneLayout, Shot

IMPLS = tuple(impl for impl in select.ATTENTION if not select.ATTENTION.forward_only(impl))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RESULTS = ("out", "lse", "dq", "dk", "dv")

GLOBAL, SHOT = "global", "shot"
# About a hundred rows: the largest error of a plain implementation over much fewer is a matter of luck, no yardstick.
SCENES = [
    [(3, (1, 1, 1), GLOBAL), (4, (2, 3, 3), SHOT), (2, (2, 4, 3), SHOT), (13, (3, 2, 2), SHOT)],
    [(5, (2, 3, 3), SHOT)],
]
SELECTION = [[(), (), (), (1,)], [()]]  # the last shot of the first scene skips one: two intervals
VISIBILITIES = {
    "context_causal": "context_causal",
    "isolated": "isolated",
    "bidirectional": "bidirectional",
    "selection": SELECTION,
}


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def build(scenes, visibility="context_causal"):
    """A layout from the oracle's tuples."""
    return SceneLayout([[Shot(*shot) for shot in scene] for scene in scenes], visibility)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def home(impl):
    """The device on which an implementation is tested: a GPU where there is one, unless it is for the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and impl not in ("cpu", "sdpa") else "cpu")


def to(device, x):
    """Tensors of any nest of tuples and dataclasses, on a device; strides kept where torch keeps them."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        return type(x)(*(to(device, y) for y in x)) if hasattr(x, "_fields") else tuple(to(device, y) for y in x)
    if is_dataclass(x):
        return replace(x, **{f.name: to(device, getattr(x, f.name)) for f in fields(x)})
    return x


def skip_unless_able(operation, impl, *tensors):
    """Skip a test of an implementation that says why it does not take such tensors."""
    if impl in operation and (against := operation[impl].reasons(*tensors)):
        pytest.skip(f"{impl}: {'; '.join(against)}")


def same_bytes(a, b):
    """Equal bit for bit, NaN included."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Inputs(NamedTuple):
    """What attention reads, and the gradients that come back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor

    @classmethod
    def random(cls, plan, heads=4, kv_heads=2, dim=32, dtype=torch.float32, seed=0):
        q, dout = (normal(plan.q_rows, heads, dim, dtype=dtype, seed=seed + i) for i in range(2))
        q = q / 2  # scores of ordinary size: where one P is near 1, its last bits decide every largest error
        k, v = (normal(plan.k_rows, kv_heads, dim, dtype=dtype, seed=seed + i) for i in (2, 3))
        dlse = normal(heads, plan.q_rows, dtype=torch.promote_types(dtype, torch.float32), seed=seed + 4)
        return cls(q, k, v, dout, dlse)

    def to(self, device):
        return Inputs(*(x.to(device) for x in self))

    def run(self, plan, **options):
        """(out, lse, dq, dk, dv) of the public function, with gradients through both results; (out, lse) alone of an
        implementation that computes no more."""
        skip_unless_able(select.ATTENTION, impl := options.get("impl"), *self[:3])
        if impl in select.ATTENTION and select.ATTENTION.forward_only(impl):
            return attention(*self[:3], plan, return_lse=True, **options)
        q, k, v = (x.detach().requires_grad_() for x in self[:3])
        out, lse = attention(q, k, v, plan, return_lse=True, **options)
        return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), (self.dout, self.dlse))

    def truth(self, visible, scale):
        """The same from the oracle, in float64.

        The oracle knows the gradient of out. That of lse follows from P = d lse / d scores: dq = scale · dlse · P k is
        attention over k in v's place, dk = scale · Pᵀ (dlse · q) is a dv whose upstream gradient is dlse · q.
        """
        q, k, v, dout, dlse = (x.detach().double().cpu().numpy() for x in self)
        out, lse = oracle.attention(q, k, v, visible, scale)
        dq, dk, dv = oracle.attention_gradients(q, k, v, visible, scale, dout)
        upstream = dlse.T[:, :, None]
        dq = dq + scale * upstream * oracle.attention(q, k, k, visible, scale)[0]
        dk = dk + scale * oracle.attention_gradients(q, k, v, visible, scale, upstream * q)[2]
        return [torch.from_numpy(x) for x in (out, lse, dq, dk, dv)]


def assert_attention(inputs, plan, visible, impl, scale=None):
    """Forward and gradients of an implementation against the oracle; the same-dtype reference is the yardstick."""
    truth = inputs.truth(visible, inputs.q.shape[-1] ** -0.5 if scale is None else scale)
    got = inputs.run(plan, impl=impl, scale=scale)
    yardstick = inputs.run(plan, impl="reference", scale=scale)
    for name, *three in zip(RESULTS[: len(got)], got, truth[: len(got)], yardstick[: len(got)], strict=True):
        if (
            name == "lse" and impl == "reference"
        ):  # plain torch rounds scores to the dtype of q, a fused kernel does not
            three = [three[0].to(inputs.q.dtype), three[1], three[2].to(inputs.q.dtype)]
        try:
            compare(*three, kind="forward" if name in ("out", "lse") else "gradient")
        except AssertionError as error:
            error.add_note(f"{name} of impl={impl!r}")
            raise


class Join(NamedTuple):
    """Inputs of norm_rope_join for one geometry."""

    text_qkv: Tensor
    video_qkv: Tensor
    text_norm: tuple[Tensor, Tensor]
    video_norm: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, geometry, spec: NormRope, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
        heads = spec.heads + 2 * kv_heads
        text, video = (len(rows) for rows in (geometry.streams.text_rows, geometry.streams.video_rows))
        sizes = (dim, dim) if spec.scope == "head" else (spec.heads * dim, kv_heads * dim)
        wide = torch.promote_types(dtype, torch.float32)
        weights = [1 + 0.3 * normal(size, dtype=wide, seed=seed + 2 + i) for i, size in enumerate(2 * sizes)]
        qkv = normal(text, heads, dim, dtype=dtype, seed=seed), normal(video, heads, dim, dtype=dtype, seed=seed + 1)
        return cls(*qkv, tuple(weights[:2]), tuple(weights[2:]))

    def rows(self, geometry, text, video):
        """The same for some rows only: `text` and `video` index the streams of the whole."""
        return self._replace(text_qkv=self.text_qkv[text], video_qkv=self.video_qkv[video])
