"""What the Triton kernels share: rows of heads as an argument, launching, what stands against Triton at all."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton's annotations say constexpr where its language takes a plain value, and know nothing of launches.

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret  # decided for good when a kernel's module is imported


class Rows(NamedTuple):
    """A tensor [rows, heads, D] as a kernel's argument: its data and strides; channels are contiguous."""

    data: Tensor
    row: int
    head: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        assert x.stride(2) == 1
        return cls(x, x.stride(0), x.stride(1))


@triton.jit
def at(x, rows, head, channels):
    """Addresses [rows, channels] of one head. Offsets are int64 before the first product."""
    return x.data + (rows.to(tl.int64) * x.row + tl.cast(head, tl.int64) * x.head)[:, None] + channels[None, :]


def reachable(x: Tensor) -> Tensor:
    """The same values with contiguous channels, and rows so near each other that offsets within a tile fit 32 bits; a
    copy only where they were not."""
    return x if x.stride(-1) == 1 and abs(x.stride(0)) < 2**31 // 256 else x.contiguous()


def launch(kernel, device: torch.device, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Run a kernel on the tensors' own GPU, whichever is current. Products and sums become one operation, as everywhere
    else; whether that is Triton's default depends on its version."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def reasons(x: Tensor) -> list[str]:
    """What stands against running a Triton kernel on a tensor like this one."""
    against = []
    if x.device.type == "cpu" and not INTERPRETED:
        against.append(
            "needs a GPU, got a tensor on cpu (TRITON_INTERPRET=1, set before the first import, interprets it)"
        )
    if x.device.type not in ("cpu", "cuda"):
        against.append(f"needs a CUDA device, got {x.device}")
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(x.device)
        against.append(f"needs compute capability 8.0, {x.device} has {major}.{minor}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        against.append(f"takes float16, bfloat16 and float32, got {x.dtype}")
    if INTERPRETED and x.dtype == torch.bfloat16:
        against.append("Triton's interpreter is silently wrong in bfloat16; use float32 or float16")
    return against
