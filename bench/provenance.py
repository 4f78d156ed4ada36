"""Where a record comes from: commit, command, device, versions."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def provenance() -> dict:
    """What every record of this folder states about itself."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "device": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    """The processor's name as Linux gives it, elsewhere its architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
