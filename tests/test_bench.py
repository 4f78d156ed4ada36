"""The benchmarks: what they measure agrees with the truth, what is wrong gets no number, and they run small here."""

import json
import os
import subprocess
import sys
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind tests/, which has a film.py too

import gpu  # noqa: E402
from attention import checks, exact, scene  # noqa: E402
from baselines import attention_peers  # noqa: E402
from harness import Case, Provider, Setting, case_key, gradients, growth, measure, sentence, table, winners  # noqa: E402
from packages import PACKAGES, left_out, made_at_first_launch  # noqa: E402
from rich.console import Console  # noqa: E402

from lct.kernels import attention  # noqa: E402

CPU = Setting(torch.device("cpu"), torch.float32, quick=True, seconds=0.01)


def asked(*providers, name="sum", scale=None, **options):
    case = Case(name, scale or {"rows": 8}, providers, check=lambda x: None if x == 3 else f"got {x}", **options)
    return measure("question", [case], {"somebody": "why not"}, CPU)


# The harness


def test_what_is_wrong_gets_no_number_and_says_why():
    record = asked(Provider("right", lambda: 3, ours=True), Provider("wrong", lambda: 4))
    right, wrong = record["rows"]
    assert right["match"] is True and right["ms"] > 0 and right["ms_p20"] <= right["ms"] <= right["ms_p80"]
    assert wrong["match"] is False and wrong["why_not"] == "got 4" and "ms" not in wrong


def test_who_cannot_run_is_told_with_the_reason():
    def fails():
        raise RuntimeError("no such kernel\nand more")

    record = asked(
        Provider("fails", fails), Provider("absent", why_not="not installed"), Provider("us", lambda: 3, True)
    )
    assert [r["why_not"] for r in record["rows"]] == ["RuntimeError: no such kernel", "not installed", None]
    assert record["left_out"] == {"somebody": "why not"}


def test_an_upper_bound_is_timed_but_never_compared_nor_a_winner():
    record = asked(Provider("us", lambda: 3, ours=True), Provider("bound", lambda: 5, flops=1))
    assert record["rows"][1]["match"] is None and "ms" in record["rows"][1]
    assert winners(record["rows"])[0]["peer"] is None
    assert "no peer" in sentence(record)


def test_rates_are_of_what_the_case_counts_and_an_upper_bound_s_of_its_own():
    bound = Provider("bound", lambda: 5, flops=2 * 10**9)
    row, other = (record := asked(Provider("us", lambda: 3, ours=True), bound, flops=10**9))["rows"]
    assert row["tflops"] == pytest.approx(1 / row["ms"]) and other["tflops"] == pytest.approx(2 / other["ms"])
    assert row["of_matmul"] == pytest.approx(row["tflops"] / record["matmul_tflops"])


def row(provider, ms, rows=100, shots=5, ours=False, **more):
    base = {"case": "c", "rows": rows, "shots": shots, "provider": provider, "ours": ours, "exact": True, "match": True}
    return base | {"ms": ms, "why_not": None} | more


def test_growth_is_fitted_where_one_size_alone_varies():
    rows = [row("us", n**1.5 / 7, rows=n, ours=True, tflops=n / n**1.5) for n in (10, 100, 1000)]
    rows += [row("us", 99.0, rows=555, shots=9, ours=True)]  # another number of shots: another series
    (found,) = growth(rows)
    assert (found["against"], found["shots"]) == ("rows", 5)
    assert found["exponent"] == pytest.approx(1.5)
    assert found["predicted"] == pytest.approx(1.0)


def test_the_sentence_says_who_wins_and_where_a_peer_does():
    rows = [row("us", 1.0, ours=True), row("a", 2.0), row("b", 3.0)]
    rows += [row("us", 4.0, rows=200, ours=True), row("a", 1.0, rows=200)]
    text = sentence({"question": "q", "rows": rows})
    assert "ahead of the best peer in 1 of 2 cases" in text
    assert "at best 2.00 times a in c (100 rows, 5 shots)" in text
    assert "at worst 0.25 times a in c (200 rows, 5 shots)" in text


def test_the_table_shows_match_and_ratio():
    record = asked(Provider("us", lambda: 3, ours=True), Provider("peer", lambda: 3), Provider("wrong", lambda: 4))
    console = Console(width=160, record=True, file=StringIO())
    console.print(table(record))
    text = console.export_text()
    assert case_key(record["rows"][0]) in text
    assert [word in text for word in ("Match", "yes", "no", "speed")] == [True] * 4


# Attention's peers


@pytest.mark.parametrize("rows", [200, 1100])
def test_peers_are_exact_and_a_wrong_one_is_caught(rows):
    """Both rules: every row of short scenes, chosen rows of long ones."""
    layout = scene(rows, 4, "ragged")
    q, dout = (torch.randn(layout.rows, 4, 32) for _ in range(2))
    k, v = (torch.randn(layout.rows, 2, 32) for _ in range(2))
    peers = attention_peers(layout, CPU.device, flex=False)
    forward, backward = checks(q, k, v, dout, layout, peers["SDPA per shot"].attend)
    right = {name: peer for name, peer in peers.items() if peer.pairs is None}
    assert set(right) == {"SDPA per shot", "SDPA, dense mask"}
    for peer in right.values():
        assert forward(peer.attend(q, k, v)) is None
        assert backward(gradients(peer.attend, (q, k, v), dout)()) is None
    unmasked = peers["dense without a mask"].attend
    assert forward(unmasked(q, k, v)) and backward(gradients(unmasked, (q, k, v), dout)())


def test_the_truth_is_that_of_the_reference():
    layout = scene(300, 3, "ragged")
    q, dout = (torch.randn(layout.rows, 4, 16, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(layout.rows, 2, 16, dtype=torch.float64) for _ in range(2))
    out, gradient = exact(q, k, v, dout, layout)
    reference = partial(attention, plan=layout, impl="reference")
    torch.testing.assert_close(out, reference(q, k, v))
    for got, expected in zip(gradient, gradients(reference, (q, k, v), dout)(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rows", [1100])
def test_one_bad_row_of_a_long_scene_is_caught(rows):
    layout = scene(rows, 4, "ragged")
    q, k, v, dout = (torch.randn(layout.rows, 2, 32) for _ in range(4))
    attend = attention_peers(layout, CPU.device, flex=False)["SDPA per shot"].attend
    forward, _ = checks(q, k, v, dout, layout, attend)
    out = attend(q, k, v)
    assert forward(out) is None
    out[rows // 3] *= 1.01
    assert "row" in forward(out) or "relative error" in forward(out)


def test_every_package_has_a_row_or_a_reason():
    assert {p.name for p in PACKAGES} <= set(left_out(CPU.device))
    assert all(left_out(CPU.device).values())


def test_a_package_whose_interface_moved_is_a_row_that_says_so():
    def moved(layout, q, k, v):
        raise ImportError("no name 'create_mask_plan' in cudnn")

    attend = made_at_first_launch(moved, scene(64, 2, "equal"))
    record = asked(Provider("peer", lambda: attend(*[torch.randn(64, 1, 8)] * 3)), Provider("us", lambda: 3, True))
    assert record["rows"][0]["why_not"] == "ImportError: no name 'create_mask_plan' in cudnn"
    assert "ms" in record["rows"][1]


# As commands


def bench(script, *arguments):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)})


def test_a_question_as_a_command(tmp_path):
    done = bench("run.py", "modulate", "--quick", "--check", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "modulate-cpu.json").read_text())
    assert all(r["match"] for r in record["rows"]) and len(record["rows"]) >= 16
    assert done.stdout.splitlines()[-1].strip() and "modulate: " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_refuses_a_machine_without_one():
    done = bench("gpu.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs a CUDA device" in done.stderr


def test_a_step_out_of_time_takes_its_workers_along(tmp_path):
    """A kernel that hangs in a test's worker would otherwise run beside everything that is measured later."""
    child = tmp_path / "child"
    command = f"sleep 600 & echo $! > {child}; echo 3 passed; wait"
    result = gpu.run(gpu.Step("test", ["bash", "-c", command], 2, r"(\d+ passed)"), tmp_path, left=60.0)
    assert result["state"] == "timed out" and result["figure"] == "3 passed"
    state = Path("/proc", child.read_text().strip(), "stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"
