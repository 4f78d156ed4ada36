"""A checkpoint is a folder with a manifest of hashes that appears whole or not at all.

Weights, moving average and optimiser are safetensors files; `manifest.json` names every file with its size and SHA-256,
because no tensor format notices a flipped bit by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lct.data.atomic import new_file, new_folder
from lct.model.families import build
from lct.model.lora import add_lora, merge_lora
from lct.model.mmdit import MMDiT
from lct.pretrained.files import is_diffusers, load
from lct.pretrained.files import load_config as diffusers_config
from lct.train.config import TrainConfig

MANIFEST = "manifest.json"
PREFIX = "step-"
SCALE = ".scale"  # ends the names of the scales of 8-bit matrices
ASSET, ASSETS = "asset:", Path(__file__).parents[1] / "assets"


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
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(temporary.iterdir())}
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
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
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


def save_weights(
    file: Path, weights: dict[str, Tensor], config: TrainConfig, dtype: torch.dtype = torch.float16
) -> None:
    """Weights to share, in one safetensors file that carries the configuration they were trained with.

    dtype  int8 stores matrices in 8 bits with a scale for each row, for weights that must be small
    """
    with new_file(file) as temporary:
        shared = {}
        for name, weight in weights.items():
            weight = weight.detach().cpu()
            if dtype == torch.int8 and weight.ndim > 1:
                scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
                shared[f"{name}{SCALE}"] = scale
                weight = (weight.float() / scale).round()
            small = torch.float16 if dtype == torch.int8 and weight.ndim < 2 else dtype
            shared[name] = weight.to(small).contiguous()
        save_file(shared, temporary, metadata={"config": json.dumps(asdict(config))})
        temporary.chmod(0o644)  # safetensors writes files for their owner alone


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], TrainConfig]:
    """Weights and their configuration, from a file of `save_weights`, an "asset:NAME" of this package, or the moving
    average from a checkpoint or a folder of checkpoints, whose hashes are checked first."""
    path = _resolved(path)
    if path.suffix != ".safetensors":
        folder = latest(path)
        step, config = verify(folder)["step"], load_config(folder)
        # weights on the way to the paper's positions are used at the positions that they have come to
        config = replace(config, text_scale=config.text_scale_at(step), text_scale_start=None, text_scale_steps=0)
        return load_file(folder / "ema.safetensors"), config
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a .safetensors file or a checkpoint folder")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            scales = {name.removesuffix(SCALE): stored.pop(name) for name in list(stored) if name.endswith(SCALE)}
            weights = {name: w.float() * scales[name] if name in scales else w for name, w in stored.items()}
            return weights, TrainConfig.from_dict(config)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a weights file of this project, or a damaged one ({error!r})") from None


def _resolved(path: str | Path) -> Path:
    """The file of an "asset:NAME", other paths as they are."""
    if str(path).startswith(ASSET):
        return ASSETS / f"{str(path).removeprefix(ASSET)}.safetensors"
    return Path(path)


def digest_of(path: str | Path) -> str:
    """A hash that tells these weights from others: of the file, or of the newest checkpoint's manifest."""
    path = _resolved(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; name a .safetensors file or a checkpoint folder")
        return _sha256(path)
    return verify(latest(path))["sha256"]


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a verified checkpoint."""
    return TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))


def available(device: str | torch.device) -> torch.device:
    """The device, or a ValueError that says what there is."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device: expected one of {there}, got {device!r} ({str(error).splitlines()[0]})") from None
    return torch.device(device)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[MMDiT, TrainConfig]:
    """A model ready to sample from, and the configuration it was trained with; see `load_weights`. Low-rank changes are
    merged into the weights that they were trained beside."""
    device = available(device)
    weights, config = load_weights(path)
    if config.lora:
        model = starting_model(config, device)
        assign_weights(trained(model), weights, path)
        merge_lora(model)
    else:
        model = build(config.model)
        assign_weights(trained(model), weights, path)
    return model.to(device).eval().requires_grad_(False), config


def starting_model(config: TrainConfig, device: str | torch.device = "cpu") -> MMDiT:
    """The model as the first step of a run finds it: new, or with the weights of `init`, and low-rank changes where it
    trains those. Weights that are trained are fp32."""
    init = config.init
    if init is not None and is_diffusers(init):
        model = load(init, device, None if config.lora else torch.float32).train().requires_grad_(True)
    elif init is not None and (config.lora or _init_config(init).lora):
        model = load_model(init, device)[0].train()
        model = model if config.lora else model.float().requires_grad_(True)
    else:
        torch.manual_seed(config.seed)
        model = build(config.model).to(device)
        if init is not None:
            assign_weights(trained(model), load_weights(init)[0], init)
    if config.lora:
        add_lora(model, config.lora, seed=config.seed)
    return model


def with_model_of_init(config: TrainConfig) -> TrainConfig:
    """A run on an open model with the model of the weights that it starts from, which say more than a preset."""
    if config.init is None:
        return config
    if is_diffusers(config.init):
        return replace(config, model=diffusers_config(config.init))
    return config if config.model.family == "mmdit" else replace(config, model=_init_config(config.init).model)


def _init_config(init: str | Path) -> TrainConfig:
    """The configuration beside weights, without the weights of a checkpoint."""
    path = _resolved(init)
    return load_weights(path)[1] if path.suffix == ".safetensors" else load_config(latest(path))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def assign_weights(own: dict[str, Tensor], weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy weights into those of a model of the same shape; ValueError names what does not fit."""
    for name in own.keys() ^ weights.keys():
        what = "is not in the model" if name in weights else "is missing"
        raise ValueError(f"{source}: weight {name} {what}; the file belongs to another model configuration")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            expected, got = tuple(own[name].shape), tuple(weight.shape)
            raise ValueError(f"{source}: weight {name}: expected shape {expected}, got {got}; another configuration")
    for name, weight in weights.items():
        own[name].copy_(weight)


def _digest(body: dict) -> str:
    """Hash of a manifest's content, which guards it as it guards the files."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
