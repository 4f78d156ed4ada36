"""The library that setup.py builds from csrc/: where it is, what it holds, and in sentences why it cannot be used."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1]
AGAIN = "run pip install -e . again"


@cache
def built() -> dict[str, Any]:
    """The build record: {tvm_ffi: its version, built: {part: compiler}, architectures: [sm_…], left_out: {part: why}}.

    Parts are "cpu" and "cuda". Empty where setup.py has not run.
    """
    record = FOLDER / "_native.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


@cache
def library() -> Any:
    """The loaded library; only where `reasons` has nothing against it."""
    import tvm_ffi

    return tvm_ffi.load_module(str(FOLDER / "_native.so"))


def reasons(part: str, device: torch.device) -> list[str]:
    """Why the library's "cpu" or "cuda" part cannot be used on a device; empty where it can."""
    against = _unusable(part)
    if against is None and device.type == "cuda":
        against = _other_gpu(torch.cuda.get_device_capability(device))
    return [against] if against else []


@cache
def _unusable(part: str) -> str | None:
    record = built()
    if not record:
        return "the native library is not built; pip install -e . builds it"
    if part not in record["built"]:
        return f"the native library was built without {part}: {record['left_out'].get(part, 'no reason is given')}"
    try:
        installed = metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError:
        return f"apache-tvm-ffi is not installed; pip install apache-tvm-ffi=={record['tvm_ffi']}"
    if installed != record["tvm_ffi"]:
        return f"built with apache-tvm-ffi {record['tvm_ffi']}, installed is {installed}; {AGAIN}"
    try:
        library()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return f"the native library does not load ({error}); {AGAIN}"
    return None


def _other_gpu(capability: tuple[int, int]) -> str | None:
    """Machine code runs on GPUs of its own major version from its own minor version on; sm_90a on 9.0 alone."""
    architectures = built()["architectures"]
    for name in architectures:
        major, minor, exact = re.fullmatch(r"sm_(\d+)(\d)(a?)", name).groups()  # type: ignore[union-attr]
        found = (int(major), int(minor))
        if capability == found or (not exact and capability[0] == found[0] and capability > found):
            return None
    return f"built for {', '.join(architectures)}; this GPU is sm_{capability[0]}{capability[1]}"
