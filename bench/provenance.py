"""Where a record comes from: commit, command, device, versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def provenance(device: str = "cpu") -> dict:
    """What every record of this folder states about itself; `device` is where its figures were measured."""
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "command": " ".join(["python", *(_relative(argument) for argument in sys.argv)]),
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "device": _cpu() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _git(*arguments: str) -> str:
    """What git says; nothing where there is no git."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _relative(argument: str) -> str:
    """Paths as seen from the repository; of others, the name alone."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _cpu() -> str:
    """The processor's name as Linux gives it, elsewhere its architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
