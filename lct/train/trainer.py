"""The training loop of every stage: batch, per-shot times, velocity, per-shot loss, AdamW, EMA, a JSON line a step."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lct.data.atomic import new_file
from lct.data.batch import Batch, Dataset, draw_batch
from lct.data.folder import SceneFolder
from lct.data.toy import ToyScenes
from lct.model.flow import logit_normal, noised, shift_time, shot_losses, shot_shift
from lct.model.mmdit import MMDiT
from lct.model.text import Finished
from lct.pretrained.features import FeatureTable, prompts_of
from lct.train.checkpoint import checkpoints, latest, load_config, save_checkpoint, verify
from lct.train.config import TrainConfig
from lct.train.weights import assign_weights, available, settled, starting_model, trained


@dataclass(frozen=True)
class StepRecord:
    """What one step did; a line of `log.jsonl`."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    rows: int
    shots: int
    seconds: float
    tflops: float

    def line(self) -> str:
        return json.dumps(vars(self))


def dataset(config: TrainConfig) -> Dataset:
    """Toy scenes, or a folder of ingested ones. ValueError, before any training, where the folder lacks a kind of scene
    that the mixture asks for, or the model's patch does not divide its latents."""
    data = config.data
    if data.source == "toy":
        return ToyScenes(data.toy, max_shots=max(2, data.shots))
    scenes = SceneFolder(data.source, max_shots=max(2, data.shots))
    scenes.check([kind for kind, share in data.mixture.items() if share > 0], config.model.patch)
    return scenes


def batch_loss(model: MMDiT, batch: Batch, times: Tensor, text_scale: float, dtype: torch.dtype, impl: str) -> Tensor:
    """Mean over shots of each shot's mean squared velocity error (Eq. 1, § 3.4).

    times  fp32 [N], t of every shot; global prompts are noiseless, have t = 0 and no loss.
    """
    device = model.video_in.weight.device
    geometry = batch.layout.geometry(device, text_scale, model.config.cross)
    is_shot = batch.is_shot.to(device)
    times = torch.where(is_shot, times.to(device), 0.0)
    shot = geometry.streams.video_shot
    flow = noised(batch.latents.to(device), batch.noise.to(device), times[shot])
    text = model.encoder(batch.tokens.to(device), batch.places.to(device))
    velocity = model(flow.z_t.to(dtype), text, times, geometry, impl=impl)
    losses = shot_losses(velocity, flow.target, shot, len(times))
    has_loss = is_shot & (torch.bincount(shot, minlength=len(times)) > 0)
    return losses[has_loss].mean()


class Trainer:
    """One stage: its model, moving average and optimiser, and the folder it writes to.

    Resuming continues bitwise on the CPU: data, noise and times depend on (seed, step, slot) alone.
    """

    def __init__(self, config: TrainConfig, out: str | Path, device: str = "cpu", impl: str = "auto"):
        config = settled(config)
        self.config, self.out, self.device, self.impl = config, Path(out), available(device), impl
        self.dataset = dataset(config)
        encoder = None if config.model.vocabulary else _features(config, self.dataset)
        resumed = checkpoints(self.out) and not config.lora  # which need the weights that they were trained beside
        self.model = starting_model(replace(config, init=None) if resumed else config, device)
        if encoder is not None:
            self.model.text_encoder = encoder
        self.trained = trained(self.model)
        self.named = nn.ParameterDict({_attribute(name): weight for name, weight in self.trained.items()})
        self.ema = AveragedModel(self.named, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.averages: dict[str, Tensor] = {
            name: self.ema.module.get_parameter(_attribute(name)) for name in self.trained
        }
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to `lr_end` of the peak."""
        c = self.config
        rise = min(1.0, (step + 1) / max(1, c.warmup))
        fall = max(0.0, step - c.warmup) / max(1, c.steps - c.warmup)
        return c.lr * rise * (1 + (c.lr_end - 1) * fall)

    def batch(self, step: int) -> Batch:
        c = self.config
        return draw_batch(
            self.dataset, self.model.encoder.tokenize, c.model.patch, c.visibility, c.data.mixture,
            c.data.image_probability, c.data.drop_probability, c.scenes, c.seed, step, c.shared_time, c.one_place,
            c.model.cross,
        )  # fmt: skip

    def train_step(self) -> StepRecord:
        c, began = self.config, time.perf_counter()
        batch = self.batch(self.step)
        shifts = [shot_shift(c.shift, shot.video_rows, c.shift_rows) for shot in batch.layout.shots]
        times = shift_time(logit_normal(batch.normal, c.time_mean, c.time_std), torch.tensor(shifts))
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scale = c.text_scale_at(self.step)
        loss = batch_loss(self.model, batch, times, scale, getattr(torch, c.compute_dtype), self.impl)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), c.clip)
        if not math.isfinite(norm.item()):
            raise FloatingPointError(f"step {self.step}: gradient norm {norm.item()}; nothing was updated or saved")
        self.optimizer.step()
        self.ema.update_parameters(self.named)
        self.step += 1
        seconds = time.perf_counter() - began
        flops = self.model.training_flops(batch.layout)
        shots = int(batch.is_shot.sum())
        return StepRecord(
            self.step, loss.item(), norm.item(), rate, batch.layout.rows, shots, seconds, flops / seconds / 1e12
        )

    def run(self, progress=None) -> Path:
        """Train to the end, logging each step and saving as configured; returns the last checkpoint.

        Raises ValueError where the folder holds another run's checkpoints: those are resumed or left alone.
        """
        if self.step == 0 and checkpoints(self.out):
            raise ValueError(f"{self.out}: holds checkpoints; resume() goes on from them, or choose another folder")
        while self.step < self.config.steps:
            record = self.train_step()
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "log.jsonl").open("a") as log:
                log.write(record.line() + "\n")
            if progress is not None:
                progress(record)
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self.save()
        return latest(self.out)

    def averaged(self) -> MMDiT:
        """A copy of the model with the moving average of its weights."""
        model = copy.deepcopy(self.model)
        assign_weights(trained(model), self.averages, self.out)
        return model.eval().requires_grad_(False)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> Path:
        names = {id(p): name for name, p in self.trained.items()}
        state = {
            f"{names[id(p)]}.{key}": value
            for p, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        ema = {"n_averaged": self.ema.n_averaged}
        tensors = {"model": self.trained, "ema": self.averages, "optimizer": state | ema}
        return save_checkpoint(self.out, self.step, tensors, self.config)

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the run's folder; False where there is none."""
        log = self.out / "log.jsonl"
        if not checkpoints(self.out):
            _trim_log(log, 0)
            return False
        folder = latest(self.out)
        manifest = verify(folder)
        _check_same(load_config(folder), self.config, folder)
        assign_weights(self.trained, load_file(folder / "model.safetensors"), folder)
        assign_weights(self.averages, load_file(folder / "ema.safetensors"), folder)
        state = load_file(folder / "optimizer.safetensors")
        self.ema.n_averaged.copy_(state.pop("n_averaged"))
        for name, parameter in self.trained.items():
            self.optimizer.state[parameter] = {
                key: state[f"{name}.{key}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{key}" in state
            }
        self.step = manifest["step"]
        _trim_log(log, self.step)
        return True


def _features(config: TrainConfig, scenes: Dataset) -> Finished:
    """What was encoded of a folder's prompts; ValueError where a prompt is missing, or another model's."""
    if not isinstance(scenes, SceneFolder):
        raise ValueError(f"run {config.name}: its text features come from outside; name a folder of lct encode as data")
    table = FeatureTable(config.data.source)
    table.check(["", *(prompt for scene in scenes.scenes for prompt in prompts_of(scene))])
    width = table.tokenize("").shape[1]
    if width != config.model.text_row_channels:
        raise ValueError(
            f"{config.data.source}: expected text features of {config.model.text_row_channels} channels, got {width}; "
            "encode it with this model's pipeline"
        )
    return Finished(table.tokenize)


def _attribute(name: str) -> str:
    """A weight's name without the dots that torch keeps for modules."""
    return name.replace(".", "/")


def _check_same(saved: TrainConfig, current: TrainConfig, folder: Path) -> None:
    """A resumed run takes the same steps as one that never stopped, so its configuration must be the same."""
    now = asdict(current)
    for key, value in asdict(saved).items():
        if key == "init_digest" and value is not None and value != now[key]:
            raise ValueError(f"{folder}: the weights in {current.init} are no longer those that it was trained beside")
        if key != "init_digest" and value != now[key]:
            raise ValueError(
                f"{folder}: was written with {key}={value}, now {key}={now[key]}; "
                "resume with the same configuration or train into another folder"
            )


def _trim_log(file: Path, step: int) -> None:
    """Forget the steps after the checkpoint, which will be taken again, and a line that was cut off by a crash."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(f"{line}\n")
    with new_file(file) as temporary:
        temporary.write_text("".join(kept))
