"""Everything a GPU machine is asked for, in one go: build, validate, test, sanitize, measure. No network.

    make gpu            or: python bench/gpu.py [--out DIR] [--minutes 9] [--full] [--only STEP …]

Runs with the Python it is called with, which needs this package's dependencies and pytest, installed or on PYTHONPATH;
what is missing is named at once. Each step has its share of the time and its own log; what fails does not keep the next
from running. Prints a short table last; writes `gpu.json` (every step and every figure) and the logs to $OUT or, where
that is not set, to build/gpu/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = (
    "torch",
    "triton",
    "tvm_ffi",
    "tyro",
    "rich",
    "numpy",
    "safetensors",
    "tomli_w",
    "PIL",
    "pytest",
    "hypothesis",
)


@dataclass(frozen=True)
class Step:
    """One command; `seconds` is the most it may take, `figure` finds what the table shows in its output."""

    name: str
    command: list[str]
    seconds: int
    figure: str
    needs: str | None = None
    """A program without which the step is left out."""
    environment: dict[str, str] = field(default_factory=dict)


def steps(out: Path, full: bool = False) -> list[Step]:
    """What is done, in order; measuring comes last and takes all the time that is left. `full`: every size."""
    python = sys.executable
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--launch-timeout", "60", "--tool"]
    doctor = "import sys; from lct.cli import main; sys.exit(main(['doctor', '--validate']))"
    tests = [f"tests/test_{name}.py" for name in ("gpu", "native", "norm_rope", "cache", "modulate")]
    impatient = ["-o", "timeout=90", "-o", "timeout_method=thread"]  # the one method that ends a wait for a kernel
    workers = ["-n", "8", "--dist", "loadgroup"] if util.find_spec("xdist") else []
    measure = [python, "bench/run.py", *([] if full else ["--quick"]), "--out", str(out)]
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an overrun into the next tensor would be within bounds
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 60, r"^lct: (built for cuda .+)$"),
        Step("validate", [python, "-c", doctor], 100, r"^(\d+ of \d+ passed)"),
        Step("launch", [python, "tests/small_launches.py"], 60, r"^(every implementation .+)$"),
        Step("test", [python, "-m", "pytest", "-vv", *impatient, *workers, *tests], 200, r"(\d+ (?:passed|failed).*)"),
        *(
            Step(tool, [*sanitizer, tool, python, "tests/small_launches.py"], 80, summary, sanitizer[0], apart)
            for tool, summary in (("memcheck", r"(ERROR SUMMARY: .+)"), ("racecheck", r"(RACECHECK SUMMARY: .+)"))
        ),
        Step("stack", [python, "bench/stack.py", "--out", str(out)], 120, r"^ (lct triton, recompute none.+)$"),
        Step("measure", measure, 3600, r"^attention: (.+)$"),
    ]


def run(step: Step, out: Path, left: float) -> dict:
    """Run a step into its log. Its state is "passed", "failed", "timed out" or why it was left out."""
    began, log = time.monotonic(), out / f"{step.name}.log"
    if step.needs and not shutil.which(step.needs):
        return {"step": step.name, "state": f"left out: no {step.needs}", "seconds": 0.0, "figure": ""}
    if left < 10:
        return {"step": step.name, "state": "left out: no time", "seconds": 0.0, "figure": ""}
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "LCT_CUDA": "1"}
    environment |= step.environment
    environment.pop("TRITON_INTERPRET", None)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(min(step.seconds, left))
            state = "passed" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:  # pytest's workers too: a kernel that hangs in one would share the GPU with every later step
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = re.findall(step.figure, log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    figure = " ".join(found[-1].split()) if found else ""
    if state == "passed" and not figure:
        state = "failed: it did not say what was looked for, see the log"
    return {"step": step.name, "state": state, "seconds": time.monotonic() - began, "figure": figure}


def main(out: Path, minutes: float, full: bool = False, only: Sequence[str] = ()) -> int:
    until, results = time.monotonic() + 60 * minutes, []
    missing = [name for name in NEEDED if not util.find_spec(name)]
    if missing:
        print(
            f"make gpu: {', '.join(missing)} cannot be imported; install them or put them on PYTHONPATH",
            file=sys.stderr,
        )
        return 2
    import torch

    if not torch.cuda.is_available():
        print("make gpu: needs a CUDA device, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    from provenance import provenance

    record = provenance("cuda")
    out.mkdir(parents=True, exist_ok=True)
    for step in (step for step in steps(out, full) if not only or step.name in only):
        results.append(run(step, out, until - time.monotonic()))
        print(f"{step.name}: {results[-1]['state']} after {results[-1]['seconds']:.0f} s", flush=True)
    record |= {"steps": results}
    if not only:
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(record["device"])
    for r in results:
        print(f"{r['step']:<9} {r['seconds']:4.0f} s  {r['state']:<10} {r['figure']}")
    return int(any(r["state"] != "passed" for r in results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "gpu")))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--full", action="store_true", help="measure every size, not the few of --quick")
    parser.add_argument("--only", nargs="+", default=(), choices=[step.name for step in steps(Path())])
    given = parser.parse_args()
    sys.exit(main(given.out.resolve(), given.minutes, given.full, given.only))
