"""Weights in and out: files to share, checkpoints, transformers of diffusers; and models made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lct.data.atomic import new_file, sha256_of
from lct.model.config import ModelConfig
from lct.model.families import build
from lct.model.lora import add_lora, merge_lora
from lct.model.mmdit import MMDiT
from lct.pretrained.files import digest_of as diffusers_digest
from lct.pretrained.files import is_diffusers, load, shift_of
from lct.pretrained.files import load_config as diffusers_config
from lct.train.checkpoint import load_config, newest_whole, read_whole
from lct.train.config import TrainConfig
from lct.train.runs import wan5b_lct

SCALE = ".scale"  # ends the names of the scales of 8-bit matrices
ASSET, ASSETS = "asset:", Path(__file__).parents[1] / "assets"


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
            if not shared[name].isfinite().all() and weight.isfinite().all():
                raise ValueError(f"{file}: weight {name} has values beyond what {small} holds; nothing was written")
        try:
            save_file(shared, temporary, metadata={"config": json.dumps(asdict(config))})
        except SafetensorError as error:
            raise OSError(f"{file}: could not be written ({error})") from None
        temporary.chmod(0o644)  # safetensors writes files for their owner alone


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], TrainConfig]:
    """Weights and their configuration, from a file of `save_weights`, an "asset:NAME" of this package, or the moving
    average from a checkpoint or a folder of checkpoints, whose hashes are checked first."""
    path = _resolved(path)
    if path.suffix != ".safetensors":
        folder, manifest = newest_whole(path, "ema")
        step, config = manifest["step"], load_config(folder)
        # weights on the way to the paper's positions are used at the positions that they have come to
        config = replace(config, text_scale=config.text_scale_at(step), text_scale_start=None, text_scale_steps=0)
        return read_whole(folder, "ema"), config
    with _shared(path) as (file, config):
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scales = {name.removesuffix(SCALE): stored.pop(name) for name in list(stored) if name.endswith(SCALE)}
        weights = {name: w.float() * scales[name] if name in scales else w for name, w in stored.items()}
        return weights, config


@contextmanager
def _shared(path: Path) -> Iterator[tuple[Any, TrainConfig]]:
    """An open file of `save_weights`, and the configuration in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a .safetensors file or a checkpoint folder")
    try:
        with safe_open(path, "pt") as file:
            yield file, TrainConfig.from_dict(json.loads((file.metadata() or {})["config"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a weights file of this project, or a damaged one ({error!r})") from None


def _resolved(path: str | Path) -> Path:
    """The file of an "asset:NAME", other paths as they are."""
    if str(path).startswith(ASSET):
        return ASSETS / f"{str(path).removeprefix(ASSET)}.safetensors"
    return Path(path)


def digest_of(path: str | Path) -> str:
    """A hash that tells these weights from others: of the file, of the newest checkpoint's manifest, or of all
    weights of a transformer of diffusers."""
    path = _resolved(path)
    if is_diffusers(path):
        return diffusers_digest(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; name a .safetensors file or a checkpoint folder")
        return sha256_of(path)
    return newest_whole(path, "ema")[1]["sha256"]


def available(device: str | torch.device, option: str = "device") -> torch.device:
    """The device, or a ValueError that says what there is, for this option."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"{option}: expected one of {there}, got {device!r} ({str(error).splitlines()[0]})") from None
    return torch.device(device)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    base: str | Path | None = None,
    dtype: str | None = None,
) -> tuple[MMDiT, TrainConfig]:
    """A model ready to sample from, and the configuration it was trained with; see `load_weights`. A transformer of
    diffusers is a model that knows single shots: its configuration is `untuned`.

    base   where the weights lie that low-rank changes were trained beside and are merged into, of the first stage where
           there were several; None: where they lay then
    dtype  in which streams will be computed, such as "bfloat16": where it is a half precision, weights that products
           would cast to it anyway are kept in it. All others are fp32, those of diffusers as they lie, where low-rank
           changes are merged into them too, which rounds small ones, unless the dtype is "float32"

    ValueError where `base` has other weights than the changes were trained beside.
    """
    device = available(device)
    half = getattr(torch, dtype) if dtype in ("bfloat16", "float16") else None
    if is_diffusers(path):
        return load(path, device, half=half), config_of(path)
    weights, config = load_weights(path)
    if config.lora:
        model = starting_model(config, device, base)
        assign_weights(trained(model), weights, path)
        merge_lora(model, torch.float32 if dtype == "float32" else None)
        for name in model.stream_weights() if half else ():  # now, because they were merged in their own precision
            weight = model.get_parameter(name)
            weight.data = weight.data.to(half)
    else:
        model = _with_weights(config.model, weights, path, device, half)
    return model.to(device).eval().requires_grad_(False), config


def starting_model(
    config: TrainConfig, device: str | torch.device = "cpu", base: str | Path | None = None, checked: bool = False
) -> MMDiT:
    """The model as the first step of a run finds it: new, or with the weights of `init`, and low-rank changes where it
    trains those. Weights that are trained are fp32. `base` as in `load_model`; `checked`: the hash of `init` is known
    to be right."""
    init = config.init if checked else _base_of(config, base)
    if init is not None and is_diffusers(init):
        model = load(init, device, None if config.lora else torch.float32).train().requires_grad_(True)
    elif init is not None and (config.lora or config_of(init).lora):
        # changes beside changes: what those stand on keeps its precision, 4 bytes a weight would be too many
        model = load_model(init, device, base, None if config.lora else "float32")[0].train()
        model = model if config.lora else model.float().requires_grad_(True)
    elif init is not None:
        model = _with_weights(config.model, load_weights(init)[0], init, device)
    else:
        torch.manual_seed(config.seed)
        model = build(config.model).to(device)
    for field in fields(config.model):
        own, asked = (getattr(c, field.name, None) for c in (model.config, config.model))
        if own != asked:
            raise ValueError(f"model.{field.name}: expected {own}, what the weights of {init} have, got {asked}")
    if config.lora:
        add_lora(model, config.lora, seed=config.seed)
    return model


class Shape(NamedTuple):
    """Of a model, all but its values: configuration, rank of low-rank changes, and (dtype, trained) of every weight."""

    config: ModelConfig
    lora: int
    weights: dict[str, tuple[torch.dtype, bool]]

    @classmethod
    def of(cls, model: MMDiT, lora: int = 0) -> Shape:
        return cls(model.config, lora, {n: (w.dtype, w.requires_grad) for n, w in model.named_parameters()})


def empty_model(shape: Shape) -> MMDiT:
    """A model of this shape without values, on the meta device."""
    with torch.device("meta"):
        model = build(shape.config)
        if shape.lora:
            add_lora(model, shape.lora)
    for name, (dtype, is_trained) in shape.weights.items():
        place, _, leaf = name.rpartition(".")
        empty = torch.empty_like(model.get_parameter(name), dtype=dtype)
        setattr(model.get_submodule(place), leaf, nn.Parameter(empty, is_trained))
    return model


def _base_of(config: TrainConfig, base: str | Path | None) -> str | Path | None:
    """Where the weights lie that a run starts from: `init`, or `base` where it is what low-rank changes stand on.
    ValueError where neither holds what they were trained beside."""
    if not config.lora or config.init_digest is None:
        return config.init if base is None or not config.lora or not is_diffusers(str(config.init)) else base
    if base is not None and digest_of(base) == config.init_digest:
        return base
    if base is not None and is_diffusers(str(config.init)):
        raise ValueError(f"{base}: the low-rank changes were trained beside other weights than it holds")
    if digest_of(str(config.init)) != config.init_digest:
        raise ValueError(f"{config.init}: no longer holds the weights that low-rank changes were trained beside")
    return config.init


def untuned(model: ModelConfig, shift: float) -> TrainConfig:
    """What sampling has to know of an open model as it was released: single shots, text without positions."""
    run = wan5b_lct()
    data = replace(run.data, shots=1, single=1.0, cut=0.0, no_cut=0.0)
    changes = {"init": None, "lora": 0, "visibility": "isolated", "text_scale": 0.0, "shift": shift}
    return replace(run, name="untuned", model=model, data=data, **changes)


def with_model(config: TrainConfig) -> TrainConfig:
    """A run with the model of the weights that it starts from, of an open one, which they know better than a preset."""
    if config.init is None or (config.model.family == "mmdit" and not is_diffusers(config.init)):
        return config
    return replace(config, model=config_of(config.init).model)


def settled(config: TrainConfig) -> TrainConfig:
    """A run with what the weights say that it starts from: their model, and their hash where low-rank changes are
    trained beside them."""
    digest = {"init_digest": digest_of(str(config.init))} if config.init is not None and config.lora else {}
    return replace(with_model(config), **digest)


def config_of(path: str | Path) -> TrainConfig:
    """The configuration beside weights, which are not read."""
    if is_diffusers(path):
        return untuned(diffusers_config(path), shift_of(path))
    path = _resolved(path)
    if path.suffix != ".safetensors":
        return load_config(newest_whole(path, "none")[0])
    with _shared(path) as (_, config):
        return config


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _with_weights(
    config: ModelConfig,
    weights: dict[str, Tensor],
    source: str | Path,
    device: str | torch.device,
    half: torch.dtype | None = None,
) -> MMDiT:
    """A model that has these weights, those of products for rows in `half`, the rest in fp32; they are let go of one
    by one. ValueError as in `assign_weights`."""
    with torch.device("meta"):
        model = build(config)
    _check_fit(trained(model), weights, source)
    dtypes = dict.fromkeys(weights, torch.float32) | dict.fromkeys(model.stream_weights(), half or torch.float32)
    own = {name: weights.pop(name).to(device, dtypes[name], copy=True) for name in list(weights)}
    model.load_state_dict(own, assign=True)
    return model


@torch.no_grad()
def assign_weights(own: dict[str, Tensor], weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy weights into those of a model of the same shape; ValueError names what does not fit."""
    _check_fit(own, weights, source)
    for name, weight in weights.items():
        own[name].copy_(weight)


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], source: str | Path) -> None:
    for name in own.keys() ^ weights.keys():
        what = "is not in the model" if name in weights else "is missing"
        raise ValueError(f"{source}: weight {name} {what}; the file belongs to another model configuration")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            expected, got = tuple(own[name].shape), tuple(weight.shape)
            raise ValueError(f"{source}: weight {name}: expected shape {expected}, got {got}; another configuration")
