"""Everything a GPU machine is asked for, in one go: build, validate, test, sanitize, measure. No network, 9 minutes.

    make gpu            or: python bench/gpu.py [--out DIR] [--minutes 9]

Runs with the Python it is called with, which needs torch, Triton and pytest. Each step has its share of the time and
its own log; what fails does not keep the next from running. Prints a short table last; writes `gpu.json` (every step
and every figure) and the logs to $OUT or, where that is not set, to bench/results/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from provenance import ROOT, provenance
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Options:
    out: Path = Path(os.environ.get("OUT", ROOT / "bench" / "results"))
    minutes: float = 9.0


@dataclass(frozen=True)
class Step:
    """One command; `seconds` is the most it may take, `figure` finds what the table shows in its output."""

    name: str
    command: list[str]
    seconds: int
    figure: str
    needs: str | None = None
    """A program without which the step is left out."""


def steps(out: Path) -> list[Step]:
    python = sys.executable
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--launch-timeout", "60"]
    doctor = "import sys; from lct.cli import main; sys.exit(main(['doctor', '--validate']))"
    tests = ["tests/test_gpu.py", "tests/test_native.py", "tests/test_norm_rope.py", "tests/test_cache.py"]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    measure = [python, "bench/kernels.py", "--out", str(out / "kernels.json")]
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 180, r"^(lct: .+)$"),
        Step("validate", [python, "-c", doctor], 120, r"^(\d+ of \d+ passed)"),
        Step("test", pytest, 240, r"(\d+ (?:passed|failed).*)"),
        Step("memcheck", [*sanitizer, python, "tests/small_launches.py"], 150, r"(ERROR SUMMARY: .+)", sanitizer[0]),
        Step("measure", measure, 180, r"^attention forward: (.+)$"),
    ]


def run(step: Step, out: Path, left: float) -> dict:
    """Run a step into its log. Its state is "passed", "failed", "timed out" or why it was left out."""
    began, log = time.monotonic(), out / f"{step.name}.log"
    if step.needs and not shutil.which(step.needs):
        return {"step": step.name, "state": f"left out: no {step.needs}", "seconds": 0.0, "figure": ""}
    if left < 10:
        return {"step": step.name, "state": "left out: no time", "seconds": 0.0, "figure": ""}
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "LCT_CUDA": "1"}
    environment.pop("TRITON_INTERPRET", None)
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=min(step.seconds, left),
            )  # fmt: skip
            state = "passed" if done.returncode == 0 else f"failed, exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            state = "timed out"
    found = re.findall(step.figure, log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    figure = " ".join(found[-1].split()) if found else ""
    return {"step": step.name, "state": state, "seconds": time.monotonic() - began, "figure": figure}


def main(options: Options) -> int:
    if not torch.cuda.is_available():
        print("make gpu: needs a CUDA device, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    until, results = time.monotonic() + 60 * options.minutes, []
    for step in steps(options.out):
        results.append(run(step, options.out, until - time.monotonic()))
        print(f"{step.name}: {results[-1]['state']} after {results[-1]['seconds']:.0f} s", flush=True)
    measured = options.out / "kernels.json"
    record = provenance("cuda") | {"steps": results}
    record["kernels"] = json.loads(measured.read_text()) if measured.exists() else None
    (options.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("step", "state", "s", "figure", title=record["device"], title_justify="left")
    for r in results:
        table.add_row(r["step"], r["state"], f"{r['seconds']:.0f}", r["figure"])
    Console().print(table)
    return int(any(r["state"] != "passed" for r in results))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
