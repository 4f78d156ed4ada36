"""What this machine has, and who computes attention on it."""

from __future__ import annotations

import platform
from importlib import metadata, util

import torch
from rich.console import Console
from rich.table import Table

from lct import __version__
from lct.kernels import select

OPTIONAL = {
    "av": "video files: pip install -e '.[video]'",
    "scenedetect": "finding cuts: pip install -e '.[video]'",
    "cv2": "finding cuts: pip install -e '.[video]'",
}


def print_report() -> None:
    console = Console()
    console.print(
        f"lct {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    )
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    console.print(f"threads {torch.get_num_threads()}, GPUs {len(devices) - 1}")
    for device in devices:
        dtypes = [torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float32]
        for dtype in dtypes:
            table = Table(
                "attention", "state", title=f"{device}, {str(dtype).removeprefix('torch.')}", title_justify="left"
            )
            report = select.against_auto(device, dtype)
            chosen = next(name for name, reasons in report.items() if not reasons)
            for name, reasons in report.items():
                state = (
                    "[bold green]auto takes it[/]"
                    if name == chosen
                    else "; ".join(reasons) or "can run, auto has a faster one"
                )
                table.add_row(name, state)
            console.print(table)
    for module, use in OPTIONAL.items():
        found = util.find_spec(module) is not None
        console.print(f"{module}: {_version(module) if found else 'not installed, ' + use}", markup=False)


def _version(module: str) -> str:
    names = metadata.packages_distributions().get(module, [])
    return metadata.version(names[0]) if names else "installed"
