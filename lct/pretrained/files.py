"""diffusers' folders of weights in and out: config.json and safetensors, in shards or whole.

Nothing is unpickled. A folder is loaded tensor by tensor, so that no more than one weight is in memory twice.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lct.data.atomic import new_folder
from lct.model.config import HunyuanConfig, ModelConfig
from lct.model.families import build
from lct.model.mmdit import MMDiT
from lct.pretrained.configs import CLASS, of_diffusers, to_diffusers
from lct.pretrained.keys import Key, keys

CONFIG, SUBFOLDER = "config.json", "transformer"
WEIGHTS, SUFFIX = "diffusion_pytorch_model", ".safetensors"
INDEX = f"{WEIGHTS}{SUFFIX}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SCHEDULER = "scheduler/scheduler_config.json"
SHARD = 5_000_000_000  # bytes


def is_diffusers(folder: str | Path) -> bool:
    """Whether a folder is a transformer of diffusers, or a pipeline that holds one."""
    config = _of_transformer(Path(folder)) / CONFIG
    if not config.is_file():
        return False
    content = _json(config)
    return isinstance(content, dict) and CLASS in content


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a folder; ValueError for a model that there is none of here."""
    folder = _of_transformer(Path(folder))
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; name a folder with {CONFIG} and {WEIGHTS}*{SUFFIX}")
    content = _json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(content).__name__}")
    try:
        return of_diffusers(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def digest_of(folder: str | Path) -> str:
    """A hash of a transformer's weights, in whatever files and with whatever remarks they lie."""
    folder = _of_transformer(Path(folder))
    digest, shards = hashlib.sha256(), _shards(folder)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file in set(shards.values())}
        for name, file in sorted(shards.items()):
            weight = opened[file].get_tensor(name)
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
            digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def shift_of(folder: str | Path) -> float:
    """The time shift that a pipeline's scheduler names. Where there is none, what its makers use: 7 for HunyuanVideo, 5
    for HunyuanVideo-1.5 and Wan."""
    config = load_config(folder)
    for home in (Path(folder), Path(folder).parent):
        if (home / SCHEDULER).is_file():
            content = _json(home / SCHEDULER)
            shift = content.get("flow_shift") or content.get("shift")
            if shift:
                return float(shift)
    return 7.0 if isinstance(config, HunyuanConfig) and not config.of_kinds else 5.0


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    half: torch.dtype | None = None,
) -> MMDiT:
    """A model with the weights of a transformer of diffusers, or of a pipeline's `transformer/`.

    dtype  of the weights; None: as they lie in the file
    half   of those of products for rows (`MMDiT.stream_weights`); None: as the others

    ValueError, naming file and weight, for unknown or missing weights, wrong shapes, damaged files and pickles.
    """
    folder = _of_transformer(Path(folder))
    config = load_config(folder)
    shards = _shards(folder)
    with torch.device("meta"):
        model = build(config)
    own, table = model.state_dict(), keys(config)
    products = model.stream_weights() if half else ()
    _check_names(folder, shards, table)
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file in sorted(set(shards.values()))}
        for key in table:
            weight = _read(key, [(shards[name], opened[shards[name]].get_tensor(name)) for name in key.theirs])
            if weight.shape != own[key.ours].shape:
                wanted = [list(part.shape) for part in key.write(own[key.ours]).values()]
                raise ValueError(f"{shards[key.theirs[0]]}: {', '.join(key.theirs)}: expected shapes {wanted}")
            kept = half if key.ours in products else dtype
            weights[key.ours] = weight.to(device=device, dtype=kept or weight.dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def save(model: MMDiT, folder: str | Path, shard: int = SHARD) -> Path:
    """Write weights as diffusers reads them: the new folder `folder`, whole or not at all.

    shard  most bytes of a file; one that holds a single weight may be larger
    """
    own = model.state_dict()
    table = keys(model.config)
    extra = own.keys() - {key.ours for key in table}
    if extra:
        raise ValueError(f"model: expected the weights of its family, got {', '.join(sorted(extra))}; merge LoRA first")
    groups: list[list[Key]] = [[]]
    size = 0
    for key in table:
        weight = own[key.ours]
        bytes_ = weight.numel() * weight.element_size()
        if groups[-1] and size + bytes_ > shard:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += bytes_
    with new_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(to_diffusers(model.config), indent=2, sort_keys=True))
        where: dict[str, str] = {}
        for i, group in enumerate(groups, 1):
            part = f"-{i:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            name = f"{WEIGHTS}{part}{SUFFIX}"
            tensors = {theirs: x.detach().cpu() for key in group for theirs, x in key.write(own[key.ours]).items()}
            save_file(tensors, temporary / name, metadata={"format": "pt"})
            (temporary / name).chmod(0o644)  # safetensors writes files for their owner alone
            where |= dict.fromkeys(tensors, name)
        if len(groups) > 1:
            total = sum(x.numel() * x.element_size() for x in own.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (temporary / INDEX).write_text(json.dumps(index, indent=2))
    return Path(folder)


def _of_transformer(folder: Path) -> Path:
    if (folder / f"{SUBFOLDER}_2").is_dir():
        raise ValueError(f"{folder}: expected one transformer, got two (Wan 2.2 A14B), of which half would be used")
    return folder / SUBFOLDER if (folder / SUBFOLDER / CONFIG).is_file() else folder


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: damaged, it is no JSON ({error})") from None


def _shards(folder: Path) -> dict[str, Path]:
    """The file of every weight of theirs."""
    index, single = folder / INDEX, folder / f"{WEIGHTS}{SUFFIX}"
    if index.is_file():
        content = _json(index)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{index}: expected a weight_map of weights to files")
        for name in set(files.values()):
            if Path(name).name != name or not name.endswith(SUFFIX):
                raise ValueError(f"{index}: expected names of {SUFFIX} files beside it, got {name!r}")
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: no such file, though {INDEX} names it; get it again")
        shards = {weight: folder / name for weight, name in files.items()}
        for file in set(shards.values()):
            with _open(file) as content:
                there = set(content.keys())
            told = {weight for weight, at in shards.items() if at == file}
            if there != told:
                raise ValueError(f"{file}: {_some(there ^ told)}: {INDEX} says otherwise; get both again")
        return shards
    if single.is_file():
        with _open(single) as content:
            return dict.fromkeys(content.keys(), single)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: a pickle, which can run a stranger's code; convert it to {WEIGHTS}{SUFFIX}"
        )
    raise FileNotFoundError(f"{folder}: no {WEIGHTS}{SUFFIX} and no {INDEX}; is it the transformer's folder?")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or cut off, no safetensors file ({error}); get it again") from None


def _check_names(folder: Path, shards: dict[str, Path], table: list[Key]) -> None:
    known = {name for key in table for name in key.theirs}
    missing, unknown = known - shards.keys(), shards.keys() - known
    if missing:
        raise ValueError(f"{folder}: {_some(missing)}: missing; {CONFIG} describes a model that has it")
    if unknown:
        raise ValueError(f"{folder}: {_some(unknown)}: unknown; {CONFIG} describes a model without it")


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _read(key: Key, parts: list[tuple[Path, Tensor]]) -> Tensor:
    try:
        return key.read([tensor for _, tensor in parts])
    except RuntimeError:
        shapes = [list(tensor.shape) for _, tensor in parts]
        raise ValueError(
            f"{parts[0][0]}: {', '.join(key.theirs)}: shapes {shapes} are not those of the model"
        ) from None
