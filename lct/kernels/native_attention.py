"""Attention over a plan's runs on the CPU, fp32, forward and backward, by csrc/attention_tile.cpp.

The instruction set (AVX-512, AVX2 or what any compiler builds) is chosen where it runs. Results depend neither on the
number of threads nor on which thread does what.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lct.kernels import native

MAX_HEAD_DIM = 256
WIDE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
ISA = ""  # the fastest that the processor has; the tests name each


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why this implementation cannot take these tensors; empty where it can."""
    if q.device.type != "cpu":
        return [f"runs on the CPU only, q is on {q.device}"]
    against = native.reasons("cpu", q.device)
    if q.dtype != torch.float32:
        against.append(f"takes float32, got {q.dtype}")
    if q.shape[2] > MAX_HEAD_DIM:
        against.append(f"takes head dims up to {MAX_HEAD_DIM}, got {q.shape[2]}")
    return against


def validated(device: torch.device, dtype: torch.dtype) -> bool:
    """With AVX2 or AVX-512, where it has passed every test; with less, torch's SDPA is faster."""
    return device.type == "cpu" and native.X86 and WIDE


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, host_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.forward`."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])
    given = _readable(q), _readable(k), _readable(v), host_table
    native.library().attention_forward(*given, out, lse, scale, ISA, torch.get_num_threads())
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    key_table: Tensor,
    host_table: Tensor,
    host_key_table: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.backward`. Always deterministic: every sum has one order."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    given = _readable(dout), dlse.contiguous(), *map(_readable, (q, k, v, out)), lse.contiguous()
    tables = host_table, host_key_table
    native.library().attention_backward(*given, *tables, dq, dk, dv, scale, ISA, torch.get_num_threads())
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    """The same values with contiguous channels, all that the kernel asks for."""
    return x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
