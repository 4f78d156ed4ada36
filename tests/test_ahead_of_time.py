"""Every Triton kernel compiles for the GPUs it is for, spills no more than is known, fits and uses their units."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
SHARED = {80: 99 * 1024, 90: 227 * 1024}  # what is built for sm_80 runs on sm_86, 89 and 120 too, which have 99 KiB
CASES = {
    "attention": [
        "attention-bf16-128",
        "attention-bf16-128-selection",
        "attention-bf16-128-pointers",
        "attention-bf16-64-gqa",
        "attention-fp16-96",
        "attention-bf16-72",
        "attention-bf16-40",
        "attention-fp16-112",
        "attention-fp16-32",
        "attention-fp32-64",
        "attention-fp32-128",
    ],
    "norm_rope": [
        "norm_rope-bf16-128-head",
        "norm_rope-fp16-64-row",
        "norm_rope-bf16-128-row-40",
        "norm_rope-fp32-256-head",
        "norm_rope-bf16-72-head",
    ],
    "modulate": ["modulate-bf16-2048", "modulate-bf16-5120", "modulate-fp32-128"],
}
KERNELS = {
    "attention": ["forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel"],
    "norm_rope": ["join_kernel"] * 3 + ["assemble_kernel", "backward_kernel"],  # to joint rows, a cache, cache and pool
    "modulate": [
        "modulate_kernel",
        "modulate_backward_kernel",
        "add_up_kernel",
        "gated_kernel",
        "gated_backward_kernel",
    ],
}


def compiled(capability, cases):
    """One line of figures per kernel; compiling takes one core, so two of these share a machine with two."""
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(capability), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=without)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels():
    cases = sum(CASES.values(), [])
    with ThreadPoolExecutor(2) as pool:
        found = sum(pool.map(lambda capability: compiled(capability, cases), SHARED), [])
    for k in found:
        print(" ".join(f"{name}={value}" for name, value in k.items()))
    return found


def named(kernel):
    return f"sm_{kernel['capability']} {kernel['case']} {kernel['kernel']}: {kernel}"


@pytest.mark.timeout(900)
def test_every_variant_compiles_once_whatever_the_shots(kernels):
    """Layouts of one to nine shots of all kinds of sizes: recompile-storm, for Triton's own compiler."""
    for capability in SHARED:
        for case in sum(CASES.values(), []):
            got = [k["kernel"] for k in kernels if (k["capability"], k["case"]) == (capability, case)]
            assert sorted(got) == sorted(KERNELS[case.split("-")[0]]), case


# Stores to the stack that are known, at most, on Triton 3.6 and 3.9: exact fp32 products run on FMAs, every operand
# in a register; head dims that are no multiple of 32 mask their channels; several intervals a run take a few registers
# more; and a tile that is half as large costs more than what these few do.
SPILLS = {
    (80, "attention-fp32"): 100,
    (90, "attention-fp32"): 180,
    (80, "attention-bf16-72"): 60,
    (80, "attention-bf16-64-gqa forward"): 5,
    (80, "attention-bf16-128 forward"): 5,
    (80, "attention-fp16-96 forward"): 8,
    (80, "attention-bf16-128 dq"): 2,
    (80, "attention-fp16-96 dq"): 2,
    (80, "attention-bf16-128-selection"): 3,
    (90, "attention-bf16-128-selection forward"): 2,
    (90, "attention-bf16-128 dkv"): 23,
    (90, "attention-fp16-96 dkv"): 14,
    (80, "norm_rope-bf16-72"): 1,
    (90, "norm_rope-bf16-72"): 1,
}


def test_spills_are_few_and_known(kernels):
    for k in kernels:
        known = [
            most
            for (capability, words), most in SPILLS.items()
            if k["capability"] == capability and all(word in f"{k['case']} {k['kernel']}" for word in words.split())
        ]
        assert k["STL"] <= max(known, default=0), named(k)


def test_out_of_shared_memory(kernels):
    assert not [named(k) for k in kernels if k["shared"] > SHARED[k["capability"]]]


def test_attention_in_half_precision_uses_tensor_cores(kernels):
    """wgmma on Hopper, fed by TMA where it can describe the tensors; before it mma, fed by cp.async where channels fill
    their blocks."""
    for k in kernels:
        if k["case"].startswith("attention") and "fp32" not in k["case"] and k["kernel"] != "delta_kernel":
            product, feed = ("HGMMA", "UTMALDG") if k["capability"] == 90 else ("HMMA", "LDGSTS")
            assert k[product], named(k)
            masked = k["capability"] < 90 and int(k["case"].split("-")[2]) % 32 != 0
            assert k[feed] or "pointers" in k["case"] or masked, named(k)
