"""Whether each implementation computes, on the device at hand, what the reference says: `lct doctor --validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lct.kernels import (
    KVRows,
    NormRope,
    assemble_,
    attention,
    gated,
    modulate,
    norm_rope_append_,
    norm_rope_join,
    remembered,
    select,
)
from lct.kernels.numerics import compare
from lct.layout import SceneLayout, Shot

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 72, 128)

# Sizes that end inside tiles, a shot that sees two intervals, an empty one, and a second scene.
SHOTS = (Shot(11, (1, 1, 1), "global"), Shot(37, (3, 9, 7)), Shot(5, (0, 4, 4)), Shot(20, (2, 12, 11)))
LAYOUTS = tuple(
    SceneLayout([SHOTS, SHOTS[1:2]], visibility)
    for visibility in ("context_causal", "bidirectional", "isolated", [[(), (), (), (1,)], [()]])
)

Results = list[tuple[str, str, Tensor]]  # (what it is, "forward" or "gradient", its value)


class Verdict(NamedTuple):
    """What was found of one implementation, on one device, in one dtype: `failure` is None where it passed."""

    operation: str
    impl: str
    device: torch.device
    dtype: torch.dtype
    failure: str | None


def validate(devices: list[torch.device]) -> Iterator[Verdict]:
    """Compare every implementation that can run with the reference in float64, and remember who passed.

    The rule is that of the tests (`lct.kernels.numerics`): as exact as the reference in the same dtype, forward and
    backward. What cannot run at all, or by name only, is left out; what Triton does on a CPU is interpreted, told but
    not remembered.
    """
    failed: set[tuple] = set()
    for device in devices:
        for operation in select.OPERATIONS:
            for impl in operation:
                for dtype in DTYPES:
                    probe = PROBLEMS[operation.name].probe(device, dtype)
                    if impl == "reference" or operation.by_name_only(impl) or operation[impl].reasons(*probe):
                        continue
                    failure = failure_of(operation.name, impl, device, dtype)
                    yield Verdict(operation.name, impl, device, dtype, failure)
                    if (impl, device.type) != ("triton", "cpu"):
                        # One GPU of a kind that fails speaks for all of the kind.
                        key = (operation.name, impl, remembered.kind(device), dtype)
                        failed |= {key} if failure else set()
                        remembered.remember(operation.name, impl, device, dtype, key not in failed)


def failure_of(operation: str, impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What an implementation gets wrong, in a sentence; None where it passes."""
    run = PROBLEMS[operation].run
    try:
        truth = run("reference", device, dtype, torch.float64)
        plain, got = (run(name, device, dtype, dtype) for name in ("reference", impl))
        for (what, kind, x), (_, _, true), (_, _, yardstick) in zip(got, truth, plain, strict=True):
            try:
                compare(x, true, yardstick.to(x.dtype), kind)
            except AssertionError as error:
                return f"{what}: {error}"
    except Exception as error:  # whatever a kernel or its compiler raises is what is to be told
        return f"{type(error).__name__}: {error}"
    return None


def _normal(seed: int, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Normal values that `dtype` can hold, on the device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def _differentiate(outputs: Results, leaves: dict[str, Tensor], upstream: list[Tensor]) -> Results:
    results = [x for _, _, x in outputs]
    upstream = [u.to(x) for u, x in zip(upstream, results, strict=True)]
    gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
    found = [(f"gradient of {name}", "gradient", x) for name, x in zip(leaves, gradients, strict=True)]
    return [*((what, kind, x.detach()) for what, kind, x in outputs), *found]


def _attention(impl: str, device: torch.device, drawn: torch.dtype, dtype: torch.dtype) -> Results:
    """All visibilities, head dims, grouped key heads; `drawn` is the dtype whose values everything starts from."""
    found = []
    for seed, layout in enumerate(LAYOUTS):
        for dim in HEAD_DIMS:
            shapes = {"q": 4, "k": 2, "v": 2}
            leaves = {
                name: _normal(seed + i, drawn, device, layout.rows, heads, dim).to(dtype).requires_grad_()
                for i, (name, heads) in enumerate(shapes.items())
            }
            results = attention(*leaves.values(), plan=layout, return_lse=True, impl=impl)
            outputs = [(f"{name}, D = {dim}", "forward", x) for name, x in zip(("out", "lse"), results, strict=True)]
            upstream = [_normal(9 + i, drawn, device, *x.shape) for i, x in enumerate(results)]
            found += _differentiate(outputs, leaves, upstream)
    return found


def _norm_rope(impl: str, device: torch.device, drawn: torch.dtype, dtype: torch.dtype) -> Results:
    """Both scopes, forward and backward; then into a cache and a pool, and from the pool into a cache again."""
    found: Results = []
    layout = LAYOUTS[0]
    geometry = layout.geometry(device)
    far = geometry.positions + 99_000
    for dim in HEAD_DIMS:
        for scope in ("head", "row"):
            axes = (16, 24, dim - 40 if dim != 72 else 24)  # D = 72: the last 8 channels are not turned
            spec = NormRope(4, axes, scope=scope)
            sizes = (dim, dim) if scope == "head" else (4 * dim, 2 * dim)
            wide = torch.promote_types(dtype, torch.float32)
            streams = geometry.streams
            leaves = {
                "text_qkv": _normal(0, drawn, device, len(streams.text_rows), 8, dim).to(dtype),
                "video_qkv": _normal(1, drawn, device, len(streams.video_rows), 8, dim).to(dtype),
                **{f"norm {i}": 1 + 0.3 * _normal(2 + i, drawn, device, n).to(wide) for i, n in enumerate(2 * sizes)},
            }
            for leaf in leaves.values():
                leaf.requires_grad_()
            text, video, *norms = leaves.values()
            joined: Any = text, video, tuple(norms[:2]), tuple(norms[2:]), streams, far, spec
            parts = norm_rope_join(*joined, impl=impl)
            outputs = [(f"{name}, D = {dim}", "forward", x) for name, x in zip("qkv", parts, strict=True)]
            found += _differentiate(outputs, leaves, [_normal(9, drawn, device, *x.shape) for x in parts])
            if scope == "head":
                with torch.no_grad():
                    found += _cached(joined, spec, layout.rows, impl)
    return found


def _cached(joined: Any, spec: NormRope, rows: int, impl: str) -> Results:
    video, positions = joined[1], joined[5]
    slots = torch.arange(rows, device=video.device).flip(0)

    def zeros(pinned: bool = False) -> KVRows:
        device = "cpu" if pinned else video.device
        keys, values = (
            torch.zeros(rows, 2, video.shape[2], dtype=video.dtype, device=device, pin_memory=pinned) for _ in range(2)
        )
        return KVRows(keys, values, slots)

    on_gpu = video.device.type == "cuda"
    cache, pool, again = zeros(), zeros(pinned=on_gpu), zeros()
    q = norm_rope_append_(*joined, cache=cache, pool=pool, impl=impl)
    assemble_(pool, again, positions, spec, impl)
    if on_gpu:
        torch.cuda.synchronize(video.device)  # before the CPU looks into the pool
    named = {"q": q, "cached keys": cache.keys, "pooled keys": pool.keys, "assembled keys": again.keys}
    return [(name, "forward", x) for name, x in (named | {"values": again.values}).items()]


def _modulate(impl: str, device: torch.device, drawn: torch.dtype, dtype: torch.dtype) -> Results:
    layout = LAYOUTS[0]
    starts, shots = layout.streams(device).video_starts, len(layout.shots)
    rows, found = sum(shot.video_rows for shot in layout.shots), []
    wide = torch.promote_types(dtype, torch.float32)
    for channels in (96, 2048):
        x, branch, upstream = (_normal(i, drawn, device, rows, channels).to(dtype) for i in range(3))
        shift, scale, gate = (_normal(3 + i, drawn, device, shots, channels).to(wide) for i in range(3))
        for what, function, leaves in (
            ("modulate", modulate, {"x": x, "shift": shift, "scale": scale}),
            ("gated", gated, {"x": x, "branch": branch, "gate": gate}),
        ):
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
            out = function(*leaves.values(), starts=starts, impl=impl)
            found += _differentiate([(f"{what}, C = {channels}", "forward", out)], leaves, [upstream])
    return found


class Problem(NamedTuple):
    """How to run an operation, and tensors to ask an implementation's reasons with."""

    run: Callable[[str, torch.device, torch.dtype, torch.dtype], Results]
    probe: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]


PROBLEMS = {
    "attention": Problem(_attention, lambda device, dtype: (torch.zeros(1, 2, 64, dtype=dtype, device=device),) * 3),
    "norm_rope": Problem(_norm_rope, lambda device, dtype: (torch.zeros(1, 8, 64, dtype=dtype, device=device),)),
    "modulate": Problem(_modulate, lambda device, dtype: (torch.zeros(1, 64, dtype=dtype, device=device),)),
}
