"""What `lct doctor --validate` has found on this machine, kept between runs in the user's cache folder.

A verdict holds for the sources, torch and Triton that it was given for; after any change it is forgotten.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

import torch


def kind(device: torch.device) -> str:
    """The kind of device a verdict is for: "cpu", or a GPU's compute capability."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def passed(operation: str, impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an implementation passed on this kind of device when it was last validated."""
    return _key(operation, impl, device, dtype) in _passed


def path() -> Path:
    """Where it is kept."""
    return Path.home() / ".cache" / "lct" / "validated.json"


def remember(operation: str, impl: str, device: torch.device, dtype: torch.dtype, good: bool) -> None:
    """Keep a verdict at once, over what was known of the same: what comes after may not come back."""
    global _passed
    key = _key(operation, impl, device, dtype)
    known = _passed | {key} if good else _passed - {key}
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"of": _fingerprint(), "passed": sorted(known)}, indent=1) + "\n")
    partial.replace(file)
    _passed = known


def _key(operation: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    return f"{operation} {impl} {kind(device)} {str(dtype).removeprefix('torch.')}"


def _load() -> frozenset[str]:
    """What passed, as far as it is about these sources and versions; nothing where the file cannot be read."""
    try:
        record = json.loads(path().read_text())
        return frozenset(record["passed"]) if record["of"] == _fingerprint() else frozenset()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: there is no home
        return frozenset()


def _fingerprint() -> str:
    lct = Path(__file__).parents[1]
    versions = [f"{d.name} {d.version}" for d in metadata.distributions(name="triton")]
    digest = hashlib.sha256(f"torch {torch.__version__} {versions}".encode())
    for path in sorted(
        [*lct.glob("kernels/*.py"), *lct.glob("_native.*"), lct / "plan.py", lct / "layout.py", lct / "validate.py"]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_passed = _load()  # at import: a compiled region must not look into files
