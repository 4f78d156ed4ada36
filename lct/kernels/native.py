"""The library that setup.py builds from csrc/: where it is, what it holds, and in sentences why it cannot be used."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1]
AGAIN = "run pip install -e . again"
X86 = platform.machine() in ("x86_64", "AMD64")  # where the CPU part has been tested


def _read(folder: Path) -> dict[str, Any]:
    record = folder / "_native.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def _installed() -> str | None:
    try:
        return metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError:
        return None


def _changed(record: dict[str, Any], csrc: Path) -> bool:
    """Whether a checkout's sources are others than those that were built."""
    files = sorted(csrc.iterdir()) if csrc.is_dir() else []
    now = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
    return bool(record and files) and record["sources"] != now


# At import: a compiled region, which asks for reasons while it is traced, must not look into files.
RECORD, INSTALLED = _read(FOLDER), _installed()
CHANGED = _changed(RECORD, FOLDER.parent / "csrc")


def built() -> dict[str, Any]:
    """The build record: {tvm_ffi: its version, built: {part: compiler}, architectures: [sm_…], left_out: {part: why}}.

    Parts are "cpu" and "cuda". Empty where setup.py has not run.
    """
    return RECORD


@cache
def library() -> Any:
    """The library, loaded at the first call, where `reasons` has nothing against it. OSError if it does not load."""
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(FOLDER / "_native.so"))
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"the native library does not load ({error}); {AGAIN}") from error


def reasons(part: str, device: torch.device) -> list[str]:
    """Why the library's "cpu" or "cuda" part cannot be used on a device; empty where it can."""
    if not RECORD:
        return ["the native library is not built; pip install -e . builds it"]
    if part not in RECORD["built"]:
        return [f"the native library was built without {part}: {RECORD['left_out'][part]}"]
    if CHANGED:
        return [f"csrc/ has changed since the native library was built; {AGAIN}"]
    if INSTALLED is None:
        return [f"apache-tvm-ffi is not installed; pip install apache-tvm-ffi=={RECORD['tvm_ffi']}"]
    if RECORD["tvm_ffi"] != INSTALLED:
        return [f"built with apache-tvm-ffi {RECORD['tvm_ffi']}, installed is {INSTALLED}; {AGAIN}"]
    if device.type == "cuda" and not any(_runs(name, device) for name in RECORD["architectures"]):
        major, minor = torch.cuda.get_device_capability(device)
        return [f"built for {', '.join(RECORD['architectures'])}; this GPU is sm_{major}{minor}"]
    return []


def _runs(architecture: str, device: torch.device) -> bool:
    """Machine code runs on GPUs of its own major version from its own minor version on; sm_90a on 9.0 alone."""
    number, exact = architecture.removeprefix("sm_").rstrip("a"), architecture.endswith("a")
    made_for, found = divmod(int(number), 10), torch.cuda.get_device_capability(device)
    return found == made_for or (not exact and found[0] == made_for[0] and found > made_for)
