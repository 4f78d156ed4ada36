"""The training loop of every stage: batch, per-shot times, velocity, per-shot loss, AdamW, EMA, a JSON line a step."""

from __future__ import annotations

import copy
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lct.data.batch import Batch, Dataset
from lct.data.folder import SceneFolder, StoredScenes
from lct.data.shards import SceneShards, is_packed
from lct.data.stored import Damaged
from lct.data.toy import ToyScenes
from lct.kernels.select import Choice
from lct.layout import Geometry
from lct.model.cost import peak_flops
from lct.model.families import build
from lct.model.flow import logit_normal, noised, shift_time, shot_losses, shot_shift
from lct.model.mmdit import MMDiT
from lct.model.text import Finished
from lct.pretrained.features import FeatureTable, prompts_of
from lct.train.checkpoint import (
    Saver,
    checkpoints,
    latest,
    load_config,
    newest_whole,
    read_into,
    set_aside,
    stored,
    sweep,
)
from lct.train.config import TrainConfig
from lct.train.execution import HERE, Execution
from lct.train.interrupts import Interrupts, Stopped, abandoned_when
from lct.train.processes import Processes, is_lost, own
from lct.train.record import NOISE_LEVELS, Log, StepRecord, memory, trim_log
from lct.train.steps import StepData, Steps, reading
from lct.train.weights import Shape, assign_weights, empty_model, settled, starting_model, trained

MOST_SKIPPED = 5  # steps in a row that are not finite before a run gives up

Sampler = Callable[[MMDiT, int], None]


class Losses(NamedTuple):
    """Of one pass, in fp32: `total`, to be differentiated, is the sum of `each` over shots.

    each  [N] of every shot, its mean squared velocity error; of rows elsewhere nothing is known here
    """

    total: Tensor
    each: Tensor


def dataset(config: TrainConfig, skip: bool = False) -> Dataset:
    """Toy scenes, or those on disk. ValueError, before any training, where a kind of scene is missing that the mixture
    asks for, or the model's patch does not divide some latents; `skip` leaves out scenes that cannot be read."""
    data = config.data
    if data.source == "toy":
        return ToyScenes(data.toy, max_shots=max(2, data.shots))
    kind = SceneShards if is_packed(data.source) else SceneFolder
    scenes = kind(data.source, max_shots=max(2, data.shots), skip=skip)
    scenes.check(
        [kind for kind, share in data.mixture.items() if share > 0], config.model.patch, config.model.latent_channels
    )
    return scenes


def shot_errors(
    model: MMDiT,
    batch: Batch,
    times: Tensor,
    text_scale: float,
    dtype: torch.dtype,
    impl: str,
    together: Callable[[Geometry], Geometry] = lambda geometry: geometry,
) -> Losses:
    """Each shot's mean squared velocity error (Eq. 1, § 3.4), of the rows that this process computes.

    times     fp32 [N], t of every shot; global prompts are noiseless, have t = 0 and no loss
    together  the rows of this process, of all rows; see `Processes.together`
    """
    device = model.video_in.weight.device
    whole = batch.layout.geometry(device, text_scale, model.config.cross)
    is_shot = batch.is_shot.to(device)
    times = torch.where(is_shot, times.to(device), 0.0)
    counts = torch.tensor([shot.video_rows for shot in batch.layout.shots], device=device)
    geometry = together(whole)
    rows = slice(None) if geometry.shared is None else slice(*geometry.shared.video)
    shot = geometry.streams.video_shot
    flow = noised(batch.latents[rows].to(device), batch.noise[rows].to(device), times[shot])
    velocity = model(flow.z_t.to(dtype), (batch.tokens.to(device), batch.places.to(device)), times, geometry, impl=impl)
    each = torch.where(is_shot, shot_losses(velocity, flow.target, shot, len(times), counts), 0.0)
    return Losses(each.sum(), each.detach())


class Trainer:
    """One stage: its model, moving average and optimiser, and the folder it writes to; in one process or many.

    Data, noise and times depend on (seed, step, slot) alone: the same run on other processes learns the same, and a
    resumed one goes on as if it had not stopped, on the same processes bit for bit (on the CPU).

    sampler    called with the averaged weights every `execution.sample_every` steps, on every process
    processes  those of the run, and their device, where they are known already; see `Processes`
    """

    def __init__(
        self,
        config: TrainConfig,
        out: str | Path,
        device: str = "cpu",
        impl: str = "auto",
        execution: Execution = HERE,
        sampler: Sampler | None = None,
        processes: Processes | None = None,
    ):
        Choice.of(impl)  # says what is wrong with it
        self.processes = processes or Processes(execution, device)
        config = self.processes.once(lambda: settled(config))
        self.config, self.out, self.impl, self.execution, self.sampler = config, Path(out), impl, execution, sampler
        self.device = self.processes.device
        self.dataset = dataset(config, execution.damaged == "skip")
        encoder = None if config.model.vocabulary else _features(config, self.dataset)
        self._unresumed = self.processes.once(lambda: bool(checkpoints(self.out)))
        filled = self._unresumed and not config.lora  # low-rank changes need the weights that they were trained beside
        self.model, weights = _first_model(config, self.processes, filled)
        if encoder is not None:
            self.model.text_encoder = encoder
        self.dtype = getattr(torch, config.compute_dtype)
        self.steps = Steps(
            config, self.dataset, self.model, self.processes.data, self.processes.datas,
            execution.pass_rows, execution.gather_again,
        )  # fmt: skip
        self.processes.spread(self.model, self.dtype)
        self.processes.fill(self.model, weights)
        self.trained = trained(self.model)
        self.named = nn.ParameterDict(
            {_attribute(name): nn.Parameter(own(weight.detach()), False) for name, weight in self.trained.items()}
        )
        self.ema = AveragedModel(self.named, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.averages: dict[str, Tensor] = {
            name: _like(weight, self.ema.module.get_parameter(_attribute(name)).data)
            for name, weight in self.trained.items()
        }
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.saver = Saver(self.out, execution.keep, execution.save_beside, self.processes.cpu_mesh)
        self.interrupts = Interrupts()
        self.step = self.skipped = self._in_a_row = 0
        self.saved: int | None = None  # step of the newest checkpoint that this trainer wrote or went on from

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to `lr_end` of the peak."""
        c = self.config
        rise = min(1.0, (step + 1) / max(1, c.warmup))
        fall = max(0.0, step - c.warmup) / max(1, c.steps - c.warmup)
        return c.lr * rise * (1 + (c.lr_end - 1) * fall)

    def times(self, batch: Batch) -> Tensor:
        """t of every shot of a batch, fp32 [N] (§ 3.2.3, § 3.4)."""
        c = self.config
        shifts = [shot_shift(c.shift, shot.video_rows, c.shift_rows) for shot in batch.layout.shots]
        shift = torch.where(batch.shifted, torch.tensor(shifts), 1.0)
        return shift_time(logit_normal(batch.normal, c.time_mean, c.time_std), shift)

    def train_step(self, data: Iterator[StepData] | None = None) -> StepRecord:
        """One step; where loss or gradient is not finite, nothing but the count of steps changes.

        data  where the step's data come from; None: read here
        """
        self._check_resumed()
        began = time.perf_counter()
        read = self._agreed(self.steps[self.step] if data is None else next(data))
        waited = time.perf_counter() - began
        per_batch = 1 / self.execution.context  # as many processes count the same batch
        batches = [batch for batch, counts in read.passes if counts]
        counted = [(b.losses, b.layout.rows, len(b.layout.scenes), self.steps.cost.training(b.layout)) for b in batches]
        totals = [sum(column) for column in zip(*counted, strict=True)] or [0] * 4
        shots, rows, scenes, flops = self.processes.sum([per_batch * n for n in totals])
        levels = self._backward(read.passes, max(1.0, shots))
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        loss = sum(levels[0])
        finite = math.isfinite(loss) and math.isfinite(norm) and shots > 0
        rate = self.learning_rate(self.step)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.ema.update_parameters(self.named)
        self.optimizer.zero_grad(set_to_none=True)
        self._in_a_row = 0 if finite else self._in_a_row + 1
        self.skipped += not finite
        self.step += 1
        seconds, peak = time.perf_counter() - began, peak_flops(self.device)
        return StepRecord(
            step=self.step,
            loss=loss / max(1.0, shots) if finite else None,
            by_noise=tuple(s / n if n and math.isfinite(s) else None for s, n in zip(*levels, strict=True)),
            grad_norm=norm if finite else None,
            lr=rate,
            rows=round(rows),
            shots=round(shots),
            scenes=round(scenes),
            seconds=seconds,
            wait=waited,
            tflops=flops / seconds / 1e12,
            mfu=None if peak is None else flops / seconds / peak / self.processes.count,
            rows_per_second=rows / seconds,
            memory=memory(self.device),
            imbalance=read.imbalance,
            skipped=self.skipped,
        )

    def _agreed(self, read: StepData) -> StepData:
        """The step without the scenes that some process could not read; `Damaged`, on all, where they stop the run."""
        while self.processes.any(bool(read.damaged))[0]:
            damaged = {slot: line for part in self.processes.gathered(read.damaged) for slot, line in part.items()}
            if self.execution.damaged == "stop":
                raise Damaged(next(iter(damaged.values())))
            if self.processes.first:
                for line in damaged.values():
                    warnings.warn(f"a scene was left out: {line}", stacklevel=2)
            read = self.steps.read(self.step, read.without | damaged.keys())
        return read

    def _backward(self, passes: list[tuple[Batch, bool]], shots: float) -> tuple[list[float], list[float]]:
        """Gradients of the mean loss over all shots of all processes; per noise level, the sum of losses and the number
        of shots, over all processes."""
        scale = self.config.text_scale_at(self.step)
        sums, counts = torch.zeros(NOISE_LEVELS), torch.zeros(NOISE_LEVELS)
        for i, (batch, weighs) in enumerate(passes):
            times = self.times(batch)
            self.processes.begin_pass(self.model, last=i == len(passes) - 1)
            losses = shot_errors(self.model, batch, times, scale, self.dtype, self.impl, self.processes.together)
            # FSDP takes the mean over processes, what is wanted is the sum
            (losses.total * (self.processes.count / shots if weighs else 0.0)).backward()
            if weighs:
                level = (times * NOISE_LEVELS).long().clamp(0, NOISE_LEVELS - 1)
                sums.index_add_(0, level, losses.each.cpu())
                counts.index_add_(0, level, batch.has_loss.float() / self.execution.context)
        total = self.processes.sum([*sums.tolist(), *counts.tolist()])
        return total[:NOISE_LEVELS], total[NOISE_LEVELS:]

    def run(self, progress: Callable[[StepRecord], None] | None = None) -> Path:
        """Train to the end, logging each step and saving as configured; returns the last checkpoint.

        Told to stop by SIGTERM or SIGINT, it saves within a step and raises `Stopped`. ValueError where the folder
        holds another run's checkpoints: those are resumed or left alone. FloatingPointError after several steps in a
        row that are not finite, none of which changed the weights. OSError where a checkpoint cannot be written, or
        another process ended.
        """
        if self.saved is None and self.processes.once(lambda: bool(checkpoints(self.out))):
            self._unresumed = True
        self._check_resumed()
        self.processes.once(self._check_writable)
        log = Log(self.out, self.execution.tensorboard) if self.processes.first else None
        data = reading(self.steps, self.step, self.config.steps, self.execution.workers)
        try:
            with self.interrupts, self._profiled() as profile:
                while not self._ended():
                    record = self.train_step(data)
                    if log is not None:
                        log.write(record)
                    if progress is not None:
                        progress(record)
                    if profile is not None:
                        profile.step()
                    self._check_streak()
                    if self.execution.sample_every and self.step % self.execution.sample_every == 0:
                        self._save_if_due()
                        self._sample()
            self.saver.wait()
        except (Damaged, FloatingPointError) as error:  # all processes know, and what was learnt is kept
            error.add_note(self._kept())
            raise
        except RuntimeError as error:
            if self.processes.count == 1 or not is_lost(error):
                raise
            stands = [folder.name for folder in checkpoints(self.out)][-1:]
            raise ConnectionError(
                f"process {self.processes.rank} of {self.processes.count}: another one ended after step {self.step}; "
                f"start the run again, it goes on from {stands[0] if stands else 'its beginning'}"
            ) from error
        finally:
            failure, error = self.saver.end(), sys.exc_info()[1]
            if failure is not None and error is not None:
                error.add_note(f"and the last checkpoint could not be written: {failure}")
            if log is not None:
                log.close()
        return latest(self.out)

    def _ended(self) -> bool:
        """Between two steps: save where it is time to, and say whether all are taken. `Stopped` where some process was
        told to stop, OSError where one could not write its part of a checkpoint."""
        stop, failed = self.processes.any(self.interrupts.wanted, self.saver.failed)
        if failed:
            self.saver.wait()
            raise OSError(f"{self.out}: another process could not write its part of a checkpoint")
        end = self.step >= self.config.steps
        self._save_if_due(stop)
        if stop and not end:
            self.saver.wait()
            began = self.interrupts.at or time.monotonic()  # another process may have been told
            raise Stopped(self.interrupts.number or signal.SIGTERM, self.step, time.monotonic() - began)
        return end

    def _check_writable(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=self.out).close()

    def _save_if_due(self, now: bool = False) -> None:
        step = self.step
        due = now or step >= self.config.steps or (step > 0 and step % self.config.save_every == 0)
        if due and step != self.saved:
            self.save()

    def _check_streak(self) -> None:
        if self._in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"{self._in_a_row} steps up to {self.step} had a loss or gradient that was not finite, or no scene "
                "that can be read, and changed nothing; lower lr, or look into the data"
            )

    def _kept(self) -> str:
        """Save before a run is given up; what stands then."""
        try:
            if self.step != self.saved:
                self.save()
            self.saver.wait()
        except (FloatingPointError, OSError) as error:
            return f"no further checkpoint was written: {error}"
        return f"step {self.step} was saved"

    def _sample(self) -> None:
        if self.sampler is None:
            return
        wanted = lambda: self.processes.any(self.interrupts.wanted)[0]  # noqa: E731
        try:
            with self.averaged_weights(), abandoned_when(self.model, wanted):
                self.model.eval()
                self.sampler(self.model, self.step)
        except Exception as error:
            if self.processes.count == 1:  # among many the others may not know
                error.add_note(self._kept())
            raise
        self.model.train()

    @contextmanager
    def averaged_weights(self):
        """The model with the moving average of its weights, in place."""
        self._check_resumed()
        with torch.no_grad():
            kept = {name: own(weight).clone() for name, weight in self.trained.items()}
            for name, weight in self.trained.items():
                own(weight).copy_(own(self.averages[name]))
            try:
                yield
            finally:
                for name, weight in self.trained.items():
                    own(weight).copy_(kept[name])
                self.processes.give_back(self.model)

    def averaged(self) -> MMDiT:
        """A copy of the model with the moving average of its weights; of one that is not sharded."""
        self._check_resumed()
        model = copy.deepcopy(self.model)
        assign_weights(trained(model), self.averages, self.out)
        return model.eval().requires_grad_(False)

    def _profiled(self):
        """torch's profiler over some steps, on the first process, where the execution asks for it."""
        active = self.execution.profile
        if not active or not self.processes.first:
            return nullcontext()
        self.out.mkdir(parents=True, exist_ok=True)
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=active, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self.out / "trace.json")),
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint; FloatingPointError, and nothing is written, where weights are not finite."""
        self._check_resumed()
        broken = [n for n, w in self.trained.items() if not own(w).isfinite().all()]
        if self.processes.any(bool(broken))[0]:
            raise FloatingPointError(f"step {self.step}: weights are not finite ({broken[:1]}); nothing was saved")
        names = {id(p): name for name, p in self.trained.items()}
        state = {
            f"{names[id(p)]}.{key}": value
            for p, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        counts = {"n_averaged": self.ema.n_averaged, "skipped": torch.tensor(self.skipped)}
        groups = {"model": self.trained, "ema": self.averages, "optimizer": state | counts}
        folder = self.saver.save(self.step, groups, self.config)
        self.saved = self.step
        return folder

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint in the run's folder; False where there is none."""
        found = self.processes.once(self._found)
        if found is None:
            return False
        folder, step = found
        for name, tensors in (("model", self.trained), ("ema", self.averages)):
            _check_names(folder, stored(folder, name), tensors)
            read_into(folder, name, tensors)
        there, counts = stored(folder, "optimizer"), {"skipped": torch.tensor(0), "n_averaged": self.ema.n_averaged}
        state: dict[str, Tensor] = dict(counts)
        for name, parameter in self.trained.items():
            if f"{name}.exp_avg" in there:
                values = {"step": torch.zeros((), device=own(parameter).device)}
                values |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = values
                state |= {f"{name}.{key}": value for key, value in values.items()}
        read_into(folder, "optimizer", state)
        self.step, self.saved, self.skipped = step, step, int(counts["skipped"])
        self._unresumed = False
        return True

    def _check_resumed(self) -> None:
        """Weights that a checkpoint is there for have no values before."""
        if self._unresumed:
            raise ValueError(f"{self.out}: holds checkpoints; resume() goes on from them, or choose another folder")

    def _found(self) -> tuple[Path, int] | None:
        """The checkpoint to go on from, and its step, after what an interrupted run left behind is removed."""
        sweep(self.out)
        if not checkpoints(self.out):
            trim_log(self.out, 0)
            return None
        folder, manifest = newest_whole(self.out)
        _check_same(load_config(folder), self.config, folder)
        for newer in checkpoints(self.out):
            if newer > folder:  # damaged, and their steps will be saved again
                set_aside(newer)
        trim_log(self.out, manifest["step"])
        return folder, manifest["step"]


def _first_model(config: TrainConfig, processes: Processes, filled: bool) -> tuple[MMDiT, dict[str, Tensor]]:
    """The model that a run begins with. Among many processes the first alone makes it, in CPU memory: its weights come
    beside a model without values, to be filled once it is spread. What a checkpoint will fill is not made at all."""
    if filled:
        with torch.device("meta"):
            return build(config.model), {}
    if processes.count == 1:
        return starting_model(config, processes.device, checked=True), {}
    weights: dict[str, Tensor] = {}  # stay here: what `once` returns goes to all

    def make() -> Shape:
        model = starting_model(config, checked=True)
        weights.update(model.state_dict())
        return Shape.of(model, config.lora)

    return empty_model(processes.once(make)), weights


def _like(weight: Tensor, local: Tensor) -> Tensor:
    """What a process holds as a part of a tensor that is sharded like `weight`."""
    if not isinstance(weight, DTensor):
        return local
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride(), run_check=False
    )


def _check_names(folder: Path, there: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    for name in there.keys() ^ tensors.keys():
        raise ValueError(f"{folder}: weight {name} is of another model configuration")
    for name, weight in tensors.items():
        if there[name] != tuple(weight.shape):
            raise ValueError(f"{folder}: weight {name}: expected shape {tuple(weight.shape)}, got {there[name]}")


def _features(config: TrainConfig, scenes: Dataset) -> Finished:
    """What was encoded of a folder's prompts; ValueError where a prompt is missing, or another model's."""
    if not isinstance(scenes, StoredScenes):
        raise ValueError(f"run {config.name}: its text features come from outside; name a folder of lct encode as data")
    table = FeatureTable(config.data.source)
    table.check(["", *(prompt for scene in scenes.scenes for prompt in prompts_of(scene))])
    width = table.tokenize("").shape[1]
    if width != config.model.text_row_channels:
        raise ValueError(
            f"{config.data.source}: expected text features of {config.model.text_row_channels} channels, got {width}; "
            "encode it with this model's pipeline"
        )
    return Finished(table.tokenize, table.length)


def _attribute(name: str) -> str:
    """A weight's name without the dots that torch keeps for modules."""
    return name.replace(".", "/")


def _check_same(saved: TrainConfig, current: TrainConfig, folder: Path) -> None:
    """A resumed run takes the same steps as one that never stopped, so its configuration must be the same."""
    now = asdict(current)
    for key, value in asdict(saved).items():
        if key == "init_digest" and value is not None and value != now[key]:
            raise ValueError(f"{folder}: the weights in {current.init} are no longer those that it was trained beside")
        if key not in ("init_digest", "save_every") and value != now[key]:
            raise ValueError(
                f"{folder}: was written with {key}={value}, now {key}={now[key]}; "
                "resume with the same configuration or train into another folder"
            )
