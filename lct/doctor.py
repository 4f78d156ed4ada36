"""What this machine has, and who computes what on it."""

from __future__ import annotations

import platform
from importlib import metadata, util

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lct import __version__
from lct.kernels import native, remembered, select
from lct.validate import PROBLEMS, validate

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
    console.print(f"threads {torch.get_num_threads()}, GPUs {len(devices()) - 1}")
    for device in devices():
        for dtype in [torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float32]:
            console.print(_table(device, dtype))
    for line in _native():
        console.print(line, markup=False)
    for module, use in OPTIONAL.items():
        found = util.find_spec(module) is not None
        console.print(f"{module}: {_version(module) if found else 'not installed, ' + use}", markup=False)


def print_validation() -> int:
    """Check every implementation on every device, say what was found, remember it; 1 where any failed, else 0."""
    console, verdicts = Console(), []
    for verdict in validate(devices()):
        verdicts.append(verdict)
        state = "[bold green]passed[/]" if verdict.failure is None else f"[bold red]failed[/] {escape(verdict.failure)}"
        console.print(f"{verdict.operation:<10} {verdict.impl:<10} {verdict.device} {_name(verdict.dtype):<9} {state}")
    good = sum(verdict.failure is None for verdict in verdicts)
    console.print(
        f"{good} of {len(verdicts)} passed; remembered, but for what was interpreted, in {remembered.path()}",
        markup=False,
    )
    return int(good < len(verdicts))


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _table(device: torch.device, dtype: torch.dtype) -> Table:
    table = Table("operation", "computed by", "state", title=f"{device}, {_name(dtype)}", title_justify="left")
    for operation in select.OPERATIONS:
        probe = PROBLEMS[operation.name].probe(device, dtype)
        chosen = operation.auto(*probe)
        for impl in operation:
            state = "; ".join(operation.against_auto(impl, *probe)) or "can run, auto has a faster one"
            table.add_row(operation.name, impl, "[bold green]auto takes it[/]" if impl == chosen else escape(state))
        table.add_section()
    return table


def _native() -> list[str]:
    """What the native library holds, and what it was built without."""
    record = native.built()
    if not record:
        return ["native: not built; pip install -e . builds it"]
    targets = {"cpu": "", "cuda": f" for {', '.join(record['architectures'])}"}
    held = [f"native {part}: built with {compiler}{targets[part]}" for part, compiler in record["built"].items()]
    return [*held, *(f"native {part}: not built, {why}" for part, why in record["left_out"].items())]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(module: str) -> str:
    names = metadata.packages_distributions().get(module, [])
    return metadata.version(names[0]) if names else "installed"
