"""Whether a kernel's result is as exact as its dtype allows: the acceptance rule of DESIGN § 6.

The rule has no absolute tolerance and knows nothing of the operation: what is allowed is measured on a plain
implementation in the same dtype, so a kernel has to be about as good as torch, at every scale of the data.
"""

import torch

MAX_ERROR_FACTOR = {"forward": 2.0, "gradient": 3.0}
RMS_BUDGET = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def compare(actual, truth64, same_dtype_reference, kind="forward"):
    """Raise AssertionError unless `actual` is as close to the truth as its dtype allows.

    actual                 what is tested, any floating dtype
    truth64                the same in float64, from the same (quantised) inputs promoted to float64
    same_dtype_reference   a plain implementation run in the dtype of `actual`; its error is the yardstick
    kind                   "forward" allows 2 times the reference's largest error, "gradient" 3 times, each plus
                           eps · max|truth|; the rms error over the rms truth has a fixed budget per dtype

    Where the truth is infinite (lse of a row that sees nothing) `actual` must be the same infinity, elsewhere finite.
    """
    factor = MAX_ERROR_FACTOR[kind]
    _check_arguments(actual, truth64, same_dtype_reference)
    got, truth, reference = (x.detach().cpu().double() for x in (actual, truth64, same_dtype_reference))
    finite = torch.isfinite(truth)
    _check_special_values(got, truth, finite)
    if not finite.any():
        return
    # Zero error where both sides are the same infinity: ∞ − ∞ is NaN.
    error, reference_error = (torch.where(finite, (x - truth).abs(), 0.0) for x in (got, reference))
    if not torch.isfinite(reference_error).all():
        raise ValueError("same_dtype_reference: NaN or Inf where the truth is finite, so it allows no budget")
    magnitude = torch.where(finite, truth.abs(), 0.0)
    budget = factor * reference_error.max() + torch.finfo(actual.dtype).eps * magnitude.max()
    rms_error, rms_truth = (x.square().sum().div(finite.sum()).sqrt() for x in (error, magnitude))
    rms_budget = RMS_BUDGET[actual.dtype] * rms_truth
    if error.max() <= budget and rms_error <= rms_budget:
        return
    worst = _index(error.argmax(), error.shape)
    raise AssertionError(
        f"{kind} {actual.dtype} {tuple(actual.shape)}: worst at {worst}: "
        f"got {got[worst]:.9g}, truth {truth[worst]:.9g}; "
        f"max error {error.max():.3g}, budget {budget:.3g} (reference {reference_error.max():.3g}); "
        f"rms error {rms_error:.3g}, budget {rms_budget:.3g} (rms truth {rms_truth:.3g}); "
        f"{int((error > budget).sum())} of {error.numel()} elements beyond the budget"
    )


def _check_arguments(actual, truth64, same_dtype_reference):
    """A comparison that broadcasts, or measures with the wrong yardstick, would pass what it should not."""
    if truth64.dtype != torch.float64:
        raise TypeError(f"truth64: expected torch.float64, got {truth64.dtype}")
    if same_dtype_reference.dtype != actual.dtype:
        raise TypeError(f"same_dtype_reference: expected {actual.dtype}, got {same_dtype_reference.dtype}")
    if torch.isnan(truth64).any():
        raise ValueError("truth64: expected no NaN")
    if not actual.shape == truth64.shape == same_dtype_reference.shape:
        shapes = [tuple(x.shape) for x in (actual, truth64, same_dtype_reference)]
        raise AssertionError(f"shapes differ: actual, truth64, same_dtype_reference are {shapes}")


def _check_special_values(got, truth, finite):
    """Infinities where the truth has them and nowhere else, NaN nowhere."""
    wrong = torch.where(finite, ~torch.isfinite(got), got != truth)
    if wrong.any():
        first = _index(wrong.flatten().to(torch.uint8).argmax(), wrong.shape)
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are NaN, or infinite where the truth is not, or the other "
            f"way round; first at {first}: got {got[first]:.9g}, truth {truth[first]:.9g}"
        )


def _index(flat, shape):
    return tuple(int(i) for i in torch.unravel_index(flat, shape))
