"""Tests of the comparison itself: wrong attention must fail it, an honest kernel must pass."""

import numpy as np
import oracle
import pytest
import torch

from lct.kernels.numerics import compare

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCENES = [[(5, (1, 1, 1), "global"), (7, (2, 3, 4), "shot"), (3, (3, 3, 3), "shot"), (9, (1, 4, 4), "shot")]]
HEADS, HEAD_DIM = 3, 32
SCALE = HEAD_DIM**-0.5
TILE = 16  # keys in the smallest tile of any kernel


class Problem:
    """Random q, k, v and dout in one dtype, the truth in float64, and a plain implementation in the same dtype."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)
        self.visible = torch.from_numpy(oracle.mask(SCENES, "context_causal"))
        shape = (len(self.visible), HEADS, HEAD_DIM)
        self.q, self.k, self.v, self.dout = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        q, k, v, dout = (x.double().numpy() for x in (self.q, self.k, self.v, self.dout))
        visible = self.visible.numpy()
        gradients = oracle.attention_gradients(q, k, v, visible, SCALE, dout)
        self.truth = [torch.from_numpy(x) for x in (oracle.attention(q, k, v, visible, SCALE)[0], *gradients)]
        self.reference = plain(self.q, self.k, self.v, self.visible, self.dout)

    def compare(self, results):
        """One verdict per result (out, dq, dk, dv): None, or the complaint."""
        return [
            complaint(got, truth, reference, "gradient" if index else "forward")
            for index, (got, truth, reference) in enumerate(zip(results, self.truth, self.reference, strict=True))
        ]


def complaint(*arguments):
    try:
        compare(*arguments)
    except AssertionError as error:
        return str(error)
    return None


def plain(q, k, v, visible, dout):
    """(out, dq, dk, dv) by autograd through softmax, every step rounded to the dtype of q."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("sad,tad->ast", q, k) * SCALE
    out = torch.einsum("ast,tad->sad", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def fused(q, k, v, visible, dout):
    """(out, dq, dk, dv) as a fused kernel computes them: statistics in fp32, operands of products in the dtype of q."""
    dtype = q.dtype
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    scores = (torch.einsum("sad,tad->ast", q, k) * SCALE).masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("ast,tad->sad", weights.to(dtype).float(), v) / total.permute(1, 0, 2)
    probability = weights / total
    delta = (out.to(dtype).float() * dout).sum(-1).T[..., None]
    dscores = (probability * (torch.einsum("sad,tad->ast", dout, v) - delta)).to(dtype).float()
    dq = SCALE * torch.einsum("ast,tad->sad", dscores, k)
    dk = SCALE * torch.einsum("ast,sad->tad", dscores, q)
    dv = torch.einsum("ast,sad->tad", probability.to(dtype).float(), dout)
    return [x.to(dtype) for x in (out, dq, dk, dv)]


def shifted_keys(visible):
    """Every interval of keys one row late."""
    late = visible.roll(1, dims=1)
    late[:, 0] = False
    return late


def shifted_queries(visible):
    """Every shot begins one row late, so its first row still sees what the shot before it saw."""
    return torch.cat([visible[:1], visible[:-1]])


def without_last_tile(visible):
    """The last tile of keys left out."""
    dropped = visible.clone()
    dropped[:, -TILE:] = False
    return dropped


WRONG_MASKS = {"shifted keys": shifted_keys, "shifted queries": shifted_queries, "last tile": without_last_tile}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def problem(request):
    return Problem(request.param)


def test_honest_kernel_passes(problem):
    assert problem.compare(fused(problem.q, problem.k, problem.v, problem.visible, problem.dout)) == [None] * 4
    assert problem.compare(problem.reference) == [None] * 4


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_wrong_mask_fails(problem, wrong):
    visible = WRONG_MASKS[wrong](problem.visible)
    assert all(problem.compare(fused(problem.q, problem.k, problem.v, visible, problem.dout)))


def test_zeros_fail(problem):
    assert all(problem.compare([torch.zeros_like(x) for x in problem.reference]))


def test_mean_of_values_fails(problem):
    """What attention gives when the scores are lost: over all keys, and over the visible ones."""
    visible = problem.visible.double()
    for weights in (torch.ones_like(visible), visible):
        weights = weights / weights.sum(-1, keepdim=True)
        mean = torch.einsum("st,tad->sad", weights, problem.v.double()).to(problem.v.dtype)
        assert complaint(mean, problem.truth[0], problem.reference[0])


def test_one_wrong_element_fails(problem):
    """The rms of a large tensor hides one element; the largest error does not."""
    for index in range(4):
        results = [x.clone() for x in problem.reference]
        largest = np.unravel_index(int(results[index].abs().argmax()), results[index].shape)
        results[index][largest] *= 1.1
        assert str(tuple(map(int, largest))) in problem.compare(results)[index]


def test_small_error_everywhere_fails(problem):
    """A scale that is 2 % off stays within the largest error of a coarse dtype; the rms shows it."""
    assert all(problem.compare([x * 1.02 for x in problem.reference]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_values_fail(problem, value):
    for index in range(4):
        results = [x.clone() for x in problem.reference]
        results[index][3, 1, 5] = value
        assert "(3, 1, 5)" in problem.compare(results)[index]


def test_fully_masked_rows_must_be_minus_infinity():
    truth = torch.tensor([[-torch.inf, 1.5], [-torch.inf, 2.0]], dtype=torch.float64)
    compare(truth.float(), truth, truth.float())
    for wrong in (torch.inf, -1e30, 0.0, torch.nan):
        got = truth.float()
        got[1, 0] = wrong
        assert "(1, 0)" in complaint(got, truth, truth.float())
    nothing = torch.full((3,), -torch.inf, dtype=torch.float64)
    compare(nothing.float(), nothing, nothing.float())


def test_empty_tensors_pass():
    compare(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.float64), torch.empty(0, 4))


def test_budget_follows_the_reference_and_the_kind():
    """A reference error of 2⁻²⁰ allows 2 or 3 times as much, plus eps · max|truth|."""
    truth = torch.full((100,), 1.0, dtype=torch.float64)
    reference, got = torch.ones(100), torch.ones(100)
    reference[7] += 2.0**-20
    got[9] += 2.5 * 2.0**-20
    assert "(9,)" in complaint(got, truth, reference, "forward")
    compare(got, truth, reference, "gradient")
    got[9] = 1 + 2 * 2.0**-20 + 2.0**-23
    compare(got, truth, reference, "forward")


def test_unusable_arguments_are_refused():
    x, truth = torch.ones(3), torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match="truth64"):
        compare(x, x, x)
    with pytest.raises(TypeError, match="same_dtype_reference"):
        compare(x, truth, truth)
    with pytest.raises(ValueError, match="truth64"):
        compare(x, truth * torch.nan, x)
    with pytest.raises(ValueError, match="same_dtype_reference"):
        compare(x, truth, x * torch.inf)
    with pytest.raises(AssertionError, match="shapes"):
        compare(x, truth, torch.ones(1))
    with pytest.raises(KeyError):
        compare(x, truth, x, "backward")
