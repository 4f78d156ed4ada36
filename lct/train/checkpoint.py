"""A checkpoint is a folder with a manifest of hashes that appears whole or not at all.

Weights, moving average and optimiser are safetensors files; `manifest.json` names every file with its size and SHA-256,
because no tensor format notices a flipped bit by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lct.data.atomic import new_folder, sha256_of
from lct.train.config import TrainConfig

MANIFEST = "manifest.json"
PREFIX = "step-"


def save_checkpoint(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], config: TrainConfig) -> Path:
    """Write `root/step-NNNNNNN` with one safetensors file for each entry of `tensors`, the configuration and manifest.

    Files reach the disk before the folder gets its name. A complete folder of that step is left as it is.
    """
    folder = root / f"{PREFIX}{step:07d}"
    if folder.exists():
        return folder
    with new_folder(folder) as temporary:
        for name, group in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, temporary / f"{name}.safetensors")
        (temporary / "config.json").write_text(json.dumps(asdict(config), indent=1))
        files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(temporary.iterdir())}
        manifest = {"step": step, "torch": torch.__version__, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1))
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
    _sync(root)
    return folder


def verify(folder: Path) -> dict:
    """The manifest of a checkpoint whose files all match it; ValueError names the first that does not."""
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        raise ValueError(f"{folder}: not a checkpoint, {MANIFEST} is missing; name a folder called {PREFIX}…")
    try:
        manifest = json.loads(manifest_file.read_text())
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = manifest["sha256"] == _digest(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest_file}: damaged ({error}); use another checkpoint") from None
    if not whole:
        raise ValueError(f"{manifest_file}: damaged, it does not match its own hash; use another checkpoint")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing from the checkpoint of step {manifest['step']}; use another checkpoint")
        if file.stat().st_size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            raise ValueError(f"{file}: damaged, it does not match its hash in {MANIFEST}; use another checkpoint")
    return manifest


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under `root`, oldest first."""
    return sorted(folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir())


def latest(root: Path) -> Path:
    """The newest checkpoint under `root`, or `root` where it is one itself; FileNotFoundError where there is none."""
    if (root / MANIFEST).is_file():
        return root
    found = checkpoints(root)
    if not found:
        raise FileNotFoundError(f"{root}: no checkpoint there; train one with `lct train` or name another folder")
    return found[-1]


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a verified checkpoint."""
    return TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))


def _digest(body: dict) -> str:
    """Hash of a manifest's content, which guards it as it guards the files."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
