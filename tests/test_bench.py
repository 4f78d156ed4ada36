"""The benchmarks run small, here: every question, every provider that can, and a refusal where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def bench(script, *arguments):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)})


def test_kernels():
    small = ["--device", "cpu", "--dtype", "float32", "--rows", "600", "--heads", "2", "--dim", "64", "--repeats", "2"]
    done = bench("kernels.py", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    asked = {r["question"] for r in record["records"]}
    kinds = ("attention", "norm_rope_join", "modulate", "gated")
    assert asked == {f"{k} {way}" for k in kinds for way in ("forward", "backward")} | {
        "norm_rope_append_ + pool",
        "assemble_",
    }
    assert all(r["ms_p20"] <= r["ms"] <= r["ms_p80"] and r["ms"] > 0 for r in record["records"])
    assert record["matmul_tflops"] > 0 and record["copy_gb_s"] > 0
    assert any(line.startswith("attention forward: ") for line in done.stdout.splitlines())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_refuses_a_machine_without_one():
    done = bench("gpu.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs a CUDA device" in done.stderr
