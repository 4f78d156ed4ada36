"""The Hopper kernels on a CPU: their own source, compiled with g++ against tests/emulator.

It has an implementation's face, so that the tests of attention take it as one more.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "emulator" / "attention_sm90.cpp"
CSRC = ROOT / "csrc"
FORWARD_ONLY = True
BUILD = ROOT / "build" / "emulated"
OPTIONS = ["-O2", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-fvisibility=hidden"]
if " fma " in Path("/proc/cpuinfo").read_text():  # products and sums in one operation, as nvcc makes them
    OPTIONS += ["-mfma", "-ffp-contract=fast"]
BLOCKS, CLUSTER = 2, 1


def build(**changed: str) -> ctypes.CDLL:
    """The library with other texts of some headers, by name ("attention_sm90_fwd"); built once for each."""
    kernels = {file.name: changed.get(file.stem, file.read_text()) for file in sorted(CSRC.iterdir())}
    texts = [*kernels.values(), *(file.read_text() for file in sorted(SOURCE.parent.iterdir())), *OPTIONS]
    folder = BUILD / hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    library = folder / "emulated.so"
    if not library.exists():  # several processes may come here at once
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            for name, text in kernels.items():
                (Path(own) / name).write_text(text)
            made = Path(own) / library.name
            places = [f"-I{own}", f"-I{SOURCE.parent}"]
            subprocess.run(["g++", *OPTIONS, *places, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
            made.replace(library)
    loaded = ctypes.CDLL(str(library))
    for name in ("swizzled_offset", "most_tiles_of", "key_tiles", "row_of_element", "column_of_element"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.forward_emulated.restype = ctypes.c_char_p
    return loaded


@cache
def library() -> ctypes.CDLL:
    return build()


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
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"))
    numbers = integers(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], *host_table.shape)
    options = integers(q.dtype == torch.bfloat16, blocks or BLOCKS, cluster or CLUSTER, seed)
    strides = (ctypes.c_int64 * 8)(*(stride for x in (q, k, v, out) for stride in x.stride()[:2]))
    tensors = map(pointer, (q, k, v, host_table, out, lse))
    error = (using or library()).forward_emulated(*tensors, *numbers, strides, ctypes.c_double(scale), *options)
    if error:
        raise RuntimeError(error.decode())
    return out, lse


class Library:
    """What `lct.kernels.cuda_attention` calls of the native library, on the emulated GPU."""

    @staticmethod
    def attention_forward_on_gpu(q, k, v, table, host_table, out, lse, scale, pairs):
        assert scale > 0 and all(x.stride(2) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
        assert all(
            n == 1 or (s % 8 == 0 and s > 0) for x in (q, k, v) for n, s in zip(x.shape[:2], x.stride(), strict=False)
        )
        found = forward(q, k, v, table, host_table, scale, cluster=2 if pairs else 1)
        out.copy_(found[0])
        lse.copy_(found[1])
