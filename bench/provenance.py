"""Where a record comes from: commit, command, device, versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def provenance(device: str | torch.device = "cpu") -> dict:
    """What every record of this folder states about itself; `device` is where its figures were measured."""
    device, changed = torch.device(device), _git("status", "--porcelain", "--", ".", ":!bench/results")
    packages = ("triton", "apache-tvm-ffi")
    return {
        "command": " ".join(["python", *(_relative(argument) for argument in sys.argv)]),
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "device": _cpu() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{d.name: d.version for name in packages for d in metadata.distributions(name=name)},
    }


class Telemetry:
    """Clocks, power, temperature and throttling of a GPU, looked at between measurements; nothing of a CPU."""

    def __init__(self, device: torch.device):
        self.samples: list[dict] = []
        self.handle = None
        if device.type == "cuda" and util.find_spec("pynvml"):
            import pynvml

            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)

    def look(self) -> None:
        if self.handle is None:
            return
        import pynvml as nvml

        self.samples.append(
            {
                "sm_mhz": nvml.nvmlDeviceGetClockInfo(self.handle, nvml.NVML_CLOCK_SM),
                "memory_mhz": nvml.nvmlDeviceGetClockInfo(self.handle, nvml.NVML_CLOCK_MEM),
                "watts": nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000,
                "celsius": nvml.nvmlDeviceGetTemperature(self.handle, nvml.NVML_TEMPERATURE_GPU),
                "throttle_reasons": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle),
            }
        )

    def summary(self) -> dict:
        """Least and most of each, and every reason to throttle that was seen, as NVML's bit mask."""
        if not self.samples:
            return {}
        found = {
            name: [min(x[name] for x in self.samples), max(x[name] for x in self.samples)]
            for name in ("sm_mhz", "memory_mhz", "watts", "celsius")
        }
        reasons = 0
        for x in self.samples:
            reasons |= x["throttle_reasons"]
        return {"telemetry": found | {"throttle_reasons": hex(reasons)}}


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
