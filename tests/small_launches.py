"""One small launch of every GPU kernel, for compute-sanitizer: every operation, forward and backward.

    compute-sanitizer --tool memcheck python tests/small_launches.py

Sizes end inside tiles, so that every mask is at work; attention also over enough keys that every ring of copies goes
round, on Hopper by blocks alone and in pairs. Exits with 1 where Triton or the CUDA library could not be launched.
"""

import sys

import torch
from tensors import SCENES, SELECTION, Inputs, Join, build

from lct.kernels import (
    KVRows,
    NormRope,
    assemble_,
    cuda_attention,
    gated,
    modulate,
    norm_rope_append_,
    norm_rope_join,
    select,
)

CUDA = torch.device("cuda")
LONG = [[(3, (1, 14, 14), "shot"), (9, (2, 15, 17), "shot")]]


def attention_once(impl, dtype, dim):
    for layout, tiles in ((build(SCENES, SELECTION), 8), (build(LONG), 8), (build(LONG), 0)):
        cuda_attention.PAIRED_TILES = tiles  # of cuda alone; 0: always in pairs
        for deterministic in (False, True):
            Inputs.random(layout.plan(), 4, 2, dim, dtype).to(CUDA).run(layout, impl=impl, deterministic=deterministic)


def norm_rope_once(impl, dtype, dim):
    layout = build(SCENES)
    geometry = layout.geometry(CUDA)
    for scope in ("head", "row"):
        spec = NormRope(4, (dim // 4, dim // 4, dim // 2), scope=scope)
        text, video, *norms = Join.random(geometry, spec, dim=dim, dtype=dtype)
        text, video = (x.to(CUDA).requires_grad_() for x in (text, video))
        norms = [tuple(w.to(CUDA) for w in pair) for pair in norms]
        joined = text, video, *norms, geometry.streams, geometry.positions, spec
        sum(x.float().sum() for x in norm_rope_join(*joined, impl=impl)).backward()
        slots = torch.arange(layout.rows, device=CUDA)
        zeros = [torch.zeros(layout.rows, 2, dim, dtype=dtype, device=CUDA) for _ in range(4)]
        cache, pool = KVRows(*zeros[:2], slots), KVRows(*zeros[2:], slots.flip(0))
        with torch.no_grad():
            norm_rope_append_(*joined, cache=cache, pool=pool, impl=impl)
            assemble_(pool, cache, geometry.positions, spec, impl)


def modulate_once(impl, dtype, dim):
    starts = build(SCENES).streams(CUDA).video_starts
    x, branch = (torch.randn(int(starts[-1]), 3 * dim, device=CUDA).to(dtype).requires_grad_() for _ in range(2))
    shift, scale = torch.randn(len(starts) - 1, 6 * dim, device=CUDA).requires_grad_().chunk(2, dim=1)
    out = modulate(x, shift, scale, starts, impl)
    gated(out, branch, scale, starts, impl).float().sum().backward()


ONCE = {"attention": attention_once, "norm_rope": norm_rope_once, "modulate": modulate_once}


def main():
    launched = []
    for operation in select.OPERATIONS:
        for impl in operation:
            for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 32)):
                probe = torch.zeros(1, 8, dim, dtype=dtype, device=CUDA)
                probe = {"attention": (probe,) * 3, "modulate": (probe[0],)}.get(operation.name, (probe,))
                if impl in ("reference", "sdpa") or operation[impl].reasons(*probe):
                    continue
                ONCE[operation.name](impl, dtype, dim)
                torch.cuda.synchronize()
                launched.append(f"{operation.name} {impl}")
                print(f"{launched[-1]}, {dtype}, {dim} channels: launched", flush=True)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    wanted = {f"{operation.name} {impl}" for operation in select.OPERATIONS for impl in operation if impl == "triton"}
    wanted |= {"norm_rope cuda", *(["attention cuda"] if hopper else [])}
    absent = sorted(wanted - set(launched))
    print(f"not launched: {', '.join(absent)}" if absent else "every implementation for a GPU was launched")
    return int(bool(absent))


if __name__ == "__main__":
    sys.exit(main())
