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

from lct.kernels import triton_attention, triton_norm_rope
from lct.layout import SceneLayout, Shot

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
    """A kernel whose launch compiles."""

    def __init__(self, kernel, capability: int, case: str, found: list):
        self.kernel, self.about, self.found = kernel, {"capability": capability, "case": case}, found

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            self.found.append(self.about | {"kernel": self.kernel.__name__} | figures(compiled))

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


def layout() -> SceneLayout:
    return SceneLayout([[Shot(5, (1, 1, 1), "global"), Shot(16, (2, 4, 4)), Shot(7, (3, 4, 4))]])


def run(case: str) -> None:
    """ "attention-DTYPE-DIM[-gqa]" or "norm_rope-DTYPE-DIM-SCOPE"."""
    operation, dtype, dim, *options = case.split("-")
    plan, dim = layout().plan(), int(dim)
    if operation == "attention":
        q, dout, out = torch.zeros(3, plan.q_rows, 4, dim, dtype=DTYPES[dtype])
        k, v = torch.zeros(2, plan.k_rows, 2 if "gqa" in options else 4, dim, dtype=DTYPES[dtype])
        lse = torch.zeros(4, plan.q_rows)
        triton_attention.forward(q, k, v, plan.table, plan.host_table, 0.1)
        tables = plan.table, plan.key_table, plan.host_table, plan.host_key_table
        triton_attention.backward(dout, lse, q, k, v, out, lse, *tables, 0.1, False)
        return
    geometry, (scope,) = layout().geometry(), options
    sizes = (dim, dim) if scope == "head" else (4 * dim, 2 * dim)
    streams = [
        (torch.zeros(len(rows), 8, dim, dtype=DTYPES[dtype]), tuple(torch.ones(n) for n in sizes), rows)
        for rows in (geometry.streams.text_rows, geometry.streams.video_rows)
    ]
    rope = geometry.positions, 4, (dim // 4, dim // 2, dim // 4), 1e4, 1e-6, scope
    q, k, v = triton_norm_rope.norm_rope_join(streams, *rope)
    triton_norm_rope.norm_rope_append_(streams, rope[0], torch.arange(len(k)), k, v, *rope[1:])
    triton_norm_rope.norm_rope_join_backward(q, k, v, streams, *rope)


def main(capability: int, cases: list[str]) -> None:
    driver.set_active(AbsentGPU(capability))
    triton_attention._hopper = lambda device: capability == 90
    for case in cases:
        found: list[dict] = []
        for module in (triton_attention, triton_norm_rope):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                kernel = getattr(module, name)
                kernel = kernel.kernel if isinstance(kernel, Recorded) else kernel
                setattr(module, name, Recorded(kernel, capability, case, found))
        run(case)
        for line in found:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
