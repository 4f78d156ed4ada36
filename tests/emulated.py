"""The Hopper kernels on a CPU: their own source, compiled with g++ against tests/emulator/sm90_emulated.h.

`forward` has an implementation's face, so that the tests of attention take it as one more.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "emulator" / "attention_sm90.cpp"
KERNEL = ROOT / "csrc" / "attention_sm90_fwd.h"
BUILD = ROOT / "build" / "emulated"
FORWARD_ONLY = True
BLOCKS, CLUSTER = 2, 1


def build(kernel: str) -> ctypes.CDLL:
    """The library with this text of the forward kernel; built once for each."""
    sources = [
        SOURCE,
        *sorted(SOURCE.parent.glob("*.h")),
        *sorted((ROOT / "csrc").glob("*.h")),
        ROOT / "csrc/common.cuh",
    ]
    digest = hashlib.sha256("\0".join([kernel, *(file.read_text() for file in sources)]).encode()).hexdigest()[:16]
    folder = BUILD / digest
    library = folder / "emulated.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KERNEL.name).write_text(kernel)
        made = folder / f"{os.getpid()}.so"
        command = [
            "g++",
            "-O2",
            "-std=c++17",
            "-Wall",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
        ]
        command += [f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}", str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.forward_emulated.restype = ctypes.c_char_p
    loaded.swizzled_offset.restype = ctypes.c_int64
    return loaded


@cache
def library() -> ctypes.CDLL:
    return build(KERNEL.read_text())


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


def integers(*values):
    return [ctypes.c_int64(value) for value in values]


def reasons(q, k, v):
    if not shutil.which("g++"):
        return ["no g++ is found"]
    against = [] if q.dtype in (torch.bfloat16, torch.float16) else [f"takes float16 and bfloat16, got {q.dtype}"]
    return against + ([] if q.shape[2] in (64, 128) else [f"takes head dims 64 and 128, got {q.shape[2]}"])


def forward(q, k, v, table, host_table, scale, seed=0, blocks=None, cluster=None, using=None):
    """See `lct.kernels.reference.forward`. RuntimeError with what the emulated GPU found wrong."""
    q, k, v = (x.detach().contiguous() for x in (q, k, v))
    out = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"))
    numbers = integers(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], *host_table.shape)
    options = integers(q.dtype == torch.bfloat16, blocks or BLOCKS, cluster or CLUSTER, seed)
    tensors = map(pointer, (q, k, v, host_table, out, lse))
    error = (using or library()).forward_emulated(*tensors, *numbers, ctypes.c_double(scale), *options)
    if error:
        raise RuntimeError(error.decode())
    return out, lse
