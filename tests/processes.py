"""Functions of this file in several processes, with gloo, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from lct.model.config import tiny
from lct.train.config import TrainConfig
from lct.train.runs import tiny_lct

SLOW = 0.5  # seconds that `slow` stays in a phase


def small(**changes) -> TrainConfig:
    """Ragged scenes of a small model, a few of them in each step."""
    model = replace(tiny(), blocks=2, width=32, heads=2, kv_heads=2, head_dim=16, rope_axes=(4, 6, 6), mlp_width=64)
    config = replace(tiny_lct(), model=model, init=None, steps=20, scenes=2, save_every=10, warmup=2, ema=0.9, lr=3e-3)
    return replace(config, **changes)


def start(
    count: int, function: str, *arguments, timeout: float = 300, check: bool = True
) -> subprocess.CompletedProcess:
    """Run a function of this file in `count` processes; arguments are strings."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, __file__, function, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done


def config_of(changes: str) -> TrainConfig:
    """`small` with changes; those of its model and data have their names before them."""
    fields = json.loads(changes)
    config = small(**{key: value for key, value in fields.items() if "." not in key})
    for part in ("model", "data"):
        inner = {key.split(".")[1]: value for key, value in fields.items() if key.startswith(f"{part}.")}
        config = replace(config, **{part: replace(getattr(config, part), **inner)})
    return config


def train(out: str, execution: str = "{}", changes: str = "{}", until: str = "", steps: str = "") -> None:
    """Train `small`, or go on with it; with "until" up to a step, where it saves."""
    from lct.train.execution import Execution
    from lct.train.interrupts import Stopped
    from lct.train.trainer import Trainer

    config = config_of(changes)
    trainer = Trainer(config, out, execution=Execution(**json.loads(execution)))
    trainer.resume()

    def progress(record) -> None:
        if until and record.step >= int(steps):
            trainer.interrupts.number = signal.SIGTERM

    try:
        trainer.run(progress)
    except Stopped:
        assert until


def samples(out: str, execution: str) -> None:
    """Train eight steps, and generate with the averaged weights after every second of them."""
    from lct.sample import Sampling, SceneRequest, ShotRequest, joint
    from lct.train.execution import Execution
    from lct.train.trainer import Trainer

    def sampler(model, step: int) -> None:
        joint(model, [SceneRequest(None, (ShotRequest("a cat", (2, 2, 2), 0),))], Sampling(steps=2))

    options = json.loads(execution)
    more = {"scene": Path(out), "sample_every": 2} if options.pop("sample") else {}
    Trainer(small(steps=8), out, execution=Execution(**options, **more), sampler=sampler).run()


def families(out: str, execution: str) -> None:
    """Gradients of one batch of every kind of model, whole, in a file a kind."""
    from open_models import TINY, drawn
    from open_models import ours as open_model
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    from lct.data.batch import Batch
    from lct.layout import SceneLayout, Shot
    from lct.train.execution import Execution
    from lct.train.processes import Processes
    from lct.train.trainer import shot_errors

    processes = Processes(Execution(**json.loads(execution)))
    for name in TINY:
        model = open_model(name).requires_grad_()
        c = model.config
        shots = [Shot(5, (2, 2, 3)), Shot(3, (1, 3, 2)), Shot(4, (2, 2, 2))]
        layout = SceneLayout([shots if c.cross else [Shot(2, (1, 1, 1), "global"), *shots], shots[:2]])
        text = drawn(f"{name} text", layout.text_rows, c.text_row_channels)
        if name == "hunyuan15":
            text[:, 0] = torch.arange(len(text)) % 2
        video, rows = drawn(f"{name} video", layout.video_rows, c.patch_channels), layout.text_rows
        noise, none = drawn(f"{name} noise", layout.video_rows, c.patch_channels), torch.zeros(rows, dtype=torch.int64)
        batch = Batch(
            layout, video, text, none, torch.zeros(len(layout.shots)), noise, torch.ones(len(layout.shots)) > 0
        )
        model.text_encoder = lambda tokens, places: tokens
        processes.spread(model, torch.float64)
        times = torch.linspace(0.1, 0.9, len(layout.shots), dtype=torch.float64)
        losses = shot_errors(model, batch, times, 0.0, torch.float64, "auto", processes.together)
        scale = processes.count / processes.datas  # FSDP takes the mean, and each batch is computed `datas` times
        (losses.total * scale).backward()
        found = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
        found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
        if processes.first:
            Path(out).mkdir(parents=True, exist_ok=True)
            save_file({n: g.contiguous() for n, g in found.items()}, Path(out) / f"{name}.safetensors")


def gradients(out: str, execution: str = "{}", changes: str = "{}") -> None:
    """Gradients of the first step, whole, in a file."""
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    from lct.train.execution import Execution
    from lct.train.trainer import Trainer

    trainer = Trainer(config_of(changes), out, execution=Execution(**json.loads(execution)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zero gates, so that every weight has a gradient
        for weight in trainer.trained.values():
            noise = 0.1 * torch.randn(weight.shape, generator=generator)
            if isinstance(weight, DTensor):
                from torch.distributed.tensor import distribute_tensor

                noise = distribute_tensor(noise, weight.device_mesh, weight.placements)
            weight.add_(noise)
    data = trainer.steps[0]
    shots = trainer.processes.sum([sum(b.losses for b, counts in data.passes if counts) / trainer.execution.context])[0]
    levels = trainer._backward(data.passes, shots)
    found = {
        name: (w.grad.full_tensor() if isinstance(w.grad, DTensor) else w.grad)
        for name, w in trainer.trained.items()
        if w.grad is not None
    }
    if trainer.processes.first:
        Path(out).mkdir(parents=True, exist_ok=True)
        found["loss"] = torch.tensor(sum(levels[0]) / shots, dtype=torch.float64)
        save_file({k: v.contiguous() for k, v in found.items()}, Path(out) / "gradients.safetensors")


def begins(execution: str, changes: str) -> None:
    """The first process alone makes the model, whose weights then lie on all, bit for bit, a part on each; where a
    checkpoint will fill them nobody makes any."""
    from lct.train import trainer
    from lct.train.execution import Execution
    from lct.train.processes import Processes, own
    from lct.train.weights import Shape, settled, starting_model

    made = []
    trainer.starting_model = lambda *arguments, **options: made.append(1) or starting_model(*arguments, **options)
    config = settled(config_of(changes))
    processes = Processes(Execution(**json.loads(execution)))
    expected = starting_model(config, checked=True)
    model, weights = trainer._first_model(config, processes, filled=False)
    assert len(made) == processes.first and Shape.of(model) == Shape.of(expected)
    processes.spread(model, torch.float32)
    processes.fill(model, weights)
    spread = model.state_dict()
    assert not weights and spread.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(spread[name].full_tensor(), weight), name
    parts = sum(own(weight).numel() for weight in spread.values())
    assert parts <= 1.1 * expected.parameter_count() * processes.execution.replicate / processes.count
    if not config.lora:
        again, weights = trainer._first_model(config, processes, filled=True)
        assert not weights and len(made) == processes.first and Shape.of(again) == Shape.of(expected)


def cannot_begin(out: str, changes: str) -> None:
    """What the first process finds wrong with the weights is raised on all, and nobody else looked."""
    from lct.train import trainer

    looked, start = [], trainer.starting_model
    trainer.starting_model = lambda *arguments, **options: looked.append(1) or start(*arguments, **options)
    if json.loads(changes).get("init") is None:

        def breaks(*arguments, **options):
            raise KeyError("something unforeseen")

        trainer.starting_model = breaks
    try:
        trainer.Trainer(config_of(changes), out)
    except (OSError, KeyError, RuntimeError) as error:
        first = torch.distributed.get_rank() == 0
        assert "gone.safetensors: no such file" in str(error) or "something unforeseen" in str(error), error
        assert isinstance(error, OSError) or isinstance(error, KeyError) == first
        assert len(looked) == (first and isinstance(error, OSError))
        return
    raise AssertionError("expected an error")


def slow(out: str, phase: str) -> None:
    """Train, tell in a file when a phase has begun, and stay in it for a while; the status of the end is told too."""
    from lct.train import checkpoint
    from lct.train.execution import Execution
    from lct.train.interrupts import Stopped
    from lct.train.steps import Steps
    from lct.train.trainer import Trainer

    root = Path(out)

    def tells(name: str, function, when=lambda: True):
        def told(*arguments, **options):
            if name == phase and when():
                (root / "phase").write_text(name)
                time.sleep(SLOW)
            return function(*arguments, **options)

        return told

    def sampler(model, step: int) -> None:
        from lct.sample import Sampling, SceneRequest, ShotRequest, joint

        request = SceneRequest(None, (ShotRequest("a cat", (2, 2, 2), 0),))
        joint(model, [request], tells("sample", Sampling)(steps=4000))

    root.mkdir(parents=True, exist_ok=True)
    config, execution = small(steps=10**6, save_every=4), Execution(scene=root, sample_every=6)
    trainer = Trainer(config, out, execution=execution, sampler=sampler)
    step = trainer.train_step
    Steps.__getitem__ = tells("reading", Steps.__getitem__, lambda: trainer.step == 3)
    trainer.train_step = tells("first step", tells("step", step, lambda: trainer.step == 2), lambda: trainer.step == 0)
    checkpoint.Saver._write_own = tells("write", checkpoint.Saver._write_own)
    try:
        trainer.run()
    except Stopped as end:
        with (root / "left").open("a") as left:
            left.write(f"{end.code} {end.seconds}\n")
        trainer.processes.leave()
        raise


def partly_blind(out: str, scenes: str) -> None:
    """Two that share rows; the second cannot read one of the scenes."""
    from lct.data.stored import Damaged, Stored
    from lct.train.execution import Execution
    from lct.train.trainer import Trainer

    config = small(steps=4, scenes=4)
    data = replace(config.data, source=scenes, single=0.3, cut=0.7, no_cut=0.0, shots=3)
    trainer = Trainer(replace(config, data=data), out, execution=Execution(context=2, damaged="skip"))
    read = Stored.read

    def blind(self: Stored):
        if "scene-1" in str(self.file) and not trainer.processes.first:
            raise Damaged(f"{self.file}: missing")
        return read(self)

    Stored.read = blind
    trainer.run()


def fails_while_saving(out: str) -> None:
    """The run ends with an error while a checkpoint is written slowly, beside it."""
    from lct.train import checkpoint
    from lct.train.execution import Execution
    from lct.train.trainer import Trainer

    write = checkpoint.Saver._write_own

    def slowly(*arguments):
        time.sleep(1.0)
        return write(*arguments)

    checkpoint.Saver._write_own = slowly
    trainer = Trainer(small(steps=10**6, save_every=2), out, execution=Execution(save_beside=True))

    def progress(record) -> None:
        if record.step == 3:
            raise ValueError("something else")

    try:
        trainer.run(progress)
    except ValueError:
        trainer.processes.leave()


def dies(out: str) -> None:
    """The second process ends in the middle of the fourth step."""
    from lct.train.trainer import Trainer

    trainer = Trainer(small(steps=10**6, save_every=2), out)

    def progress(record) -> None:
        if record.step == 3 and not trainer.processes.first:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        trainer.run(progress)
    except OSError as error:
        print("told:", error, flush=True)
        os._exit(2)


def fails_alone(out: str) -> None:
    """The command, with an error of the second process in its third step, while the first waits for its gradients."""
    from lct import cli
    from lct.train import processes
    from lct.train.trainer import Trainer

    processes.FAREWELL = 2.0
    step = Trainer.train_step

    def train_step(self, data=None):
        if self.step == 2 and not self.processes.first:
            raise RuntimeError("of this one alone")
        return step(self, data)

    Trainer.train_step = train_step
    options = ["--steps=1000", "--scenes=2", "--init=None", "--model.blocks=1", f"--out={out}"]
    try:
        cli.main(["train", "tiny_lct", *options])
    finally:
        print("told: a process that has not ended", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
