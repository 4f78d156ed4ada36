"""Compile the Triton kernels, exactly as they would be launched, for GPUs that are not there, and read what came out.

    python tests/ahead_of_time.py CAPABILITY CASE…        one JSON line per kernel variant

Run as a process of its own: the tests interpret Triton, which is decided at its first import. The operations' own host
code runs on CPU tensors; only the launch is replaced, by a compilation, so that argument types, specialisation and
constants are those of a real call.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lct.kernels import triton_attention, triton_modulate, triton_norm_rope
from lct.layout import SceneLayout, Shot

MODULES = triton_attention, triton_modulate, triton_norm_rope
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OPCODES = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "STL", "LDL")


class AbsentGPU:
    """What Triton asks of a driver up to the launch."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Recorded:
    """A kernel whose launch compiles, and is found anew only where it has to be compiled anew."""

    def __init__(self, kernel, found: dict):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            self.found[compiled.hash] = self.kernel.__name__, compiled

        return launch


def figures(compiled) -> dict:
    """Registers, spills, shared memory and the opcodes of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([BINARIES / "nvdisasm", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in OPCODES}
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared, **counts}


GLOBAL = Shot(5, (1, 1, 1), "global")
LAYOUTS = (  # one compilation must do for all: from one shot to nine, sizes odd, even and multiples of 16, one row
    SceneLayout([[GLOBAL, Shot(16, (2, 4, 4)), Shot(7, (3, 4, 4))]]),
    SceneLayout([[Shot(16, (1, 4, 4))]]),
    SceneLayout([[Shot(1, (0, 4, 4))]]),
    SceneLayout([[GLOBAL, *(Shot(3 + i, (1 + i % 3, 8, 8 + i % 2)) for i in range(9))], [GLOBAL]]),
)


SELECTION = [[(), (0,), (0, 1), (1, 0), *[(0, 2)] * 6], [()]]  # of the last layout: runs that see two intervals


def attention(layout: SceneLayout, dtype: torch.dtype, dim: int, kv_heads: int) -> None:
    plan = layout.plan()
    q, dout, out = torch.zeros(3, plan.q_rows, 4, dim, dtype=dtype)
    k, v = torch.zeros(2, plan.k_rows, kv_heads, dim, dtype=dtype)
    lse = torch.zeros(4, plan.q_rows)
    triton_attention.forward(q, k, v, plan.table, plan.host_table, 0.1)
    tables = plan.table, plan.key_table, plan.host_table, plan.host_key_table
    triton_attention.backward(dout, lse, q, k, v, out, lse, *tables, 0.1, False)


def norm_rope(layout: SceneLayout, dtype: torch.dtype, dim: int, scope: str, heads: str = "4") -> None:
    geometry = layout.geometry()
    count, kv_count = int(heads), int(heads) // 2
    sizes = (dim, dim) if scope == "head" else (count * dim, kv_count * dim)
    streams = [
        (torch.zeros(len(rows), count + 2 * kv_count, dim, dtype=dtype), tuple(torch.ones(n) for n in sizes), rows)
        for rows in (geometry.streams.text_rows, geometry.streams.video_rows)
    ]
    rope = geometry.positions, count, (dim // 4, dim // 2, dim // 4), 1e4, 1e-6, scope
    q, k, v = triton_norm_rope.norm_rope_join(streams, *rope)
    cache = k, v, torch.arange(len(k))
    triton_norm_rope.norm_rope_append_(streams, rope[0], cache, None, *rope[1:])
    triton_norm_rope.norm_rope_append_(streams, rope[0], cache, cache, *rope[1:])
    triton_norm_rope.assemble_(cache, cache, *rope[:1], *rope[2:4])
    triton_norm_rope.norm_rope_join_backward(q, k, v, streams, *rope)


def modulate(layout: SceneLayout, dtype: torch.dtype, channels: int) -> None:
    starts = layout.streams().text_starts
    x, dout = torch.zeros(2, int(starts[-1]), channels, dtype=dtype)
    shift, scale = torch.zeros(len(starts) - 1, 6 * channels).chunk(6, dim=-1)[:2]
    triton_modulate.modulate(x, shift, scale, starts, 1e-6)
    triton_modulate.modulate_backward(dout, x, scale, starts, 1e-6)
    triton_modulate.gated(x, dout, scale, starts)
    triton_modulate.gated_backward(dout, x, scale, starts)


def run(case: str) -> None:
    """ "attention-DTYPE-DIM[-gqa][-selection][-pointers]", "norm_rope-DTYPE-DIM-SCOPE[-HEADS]" or
    "modulate-DTYPE-CHANNELS".

    pointers: no TMA, as for tensors on Hopper that it cannot describe.
    """
    operation, dtype, size, *options = case.split("-")
    describable = triton_attention.describable
    triton_attention.describable = (lambda x: False) if "pointers" in options else describable
    layouts = [SceneLayout(LAYOUTS[-1].scenes, SELECTION)] if "selection" in options else LAYOUTS
    for layout in layouts:
        if operation == "attention":
            attention(layout, DTYPES[dtype], int(size), 2 if "gqa" in options else 4)
        elif operation == "norm_rope":
            norm_rope(layout, DTYPES[dtype], int(size), *options)
        else:
            modulate(layout, DTYPES[dtype], int(size))
    triton_attention.describable = describable


def main(capability: int, cases: list[str]) -> None:
    driver.set_active(AbsentGPU(capability))
    triton_attention._hopper = lambda device: capability == 90
    kernels = [(m, name, getattr(m, name)) for m in MODULES for name in vars(m) if name.endswith("_kernel")]
    for case in cases:
        found: dict = {}
        for module, name, kernel in kernels:
            setattr(module, name, Recorded(kernel, found))
        run(case)
        for name, compiled in found.values():
            about = {"capability": capability, "case": case, "kernel": name}
            print(json.dumps(about | figures(compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
