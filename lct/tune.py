"""What `lct train` does: one run by all its processes, a scene sampled from it meanwhile, its weights shared."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lct.train.config import TrainConfig
from lct.train.execution import HERE, Execution


@dataclass(frozen=True)
class TrainCommand:
    """Train a run, or resume it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    execution: Annotated[Execution, tyro.conf.arg(name="")] = HERE
    out: Path | None = None
    """Folder of log and checkpoints; runs/NAME by default. An unfinished run there is resumed."""
    share: Path | None = None
    """Also write the averaged weights as one fp16 .safetensors file."""
    impl: str = "auto"
    """Attention implementation."""
    device: str = "cpu"

    def run(self) -> None:
        from lct.progress import training
        from lct.train.interrupts import Stopped
        from lct.train.processes import Processes
        from lct.train.trainer import Trainer
        from lct.train.weights import load_weights, save_weights

        if self.share is not None:
            self._check_share(self.share)
        config, out = self.config, self.out or Path("runs") / self.config.name
        processes = Processes(self.execution, self.device)
        # its text encoders come and go before the model, so that they need not fit beside it
        sampler = None if self.execution.scene is None else self._sampler(self.execution.scene, out, processes)
        trainer = Trainer(config, out, impl=self.impl, execution=self.execution, sampler=sampler, processes=processes)
        first = processes.first
        if first:
            advise(self.impl, trainer.device, trainer.dtype)
        if trainer.resume() and first:
            print(f"resuming {out} at step {trainer.step}")
        try:
            with training(config.name, config.steps, trainer.step, quiet=not first) as progress:
                folder = trainer.run(progress)
        except Stopped as stop:
            if first:
                print(stop)
            raise
        finally:
            processes.leave()
        if first:
            print(folder)
        if self.share is not None and first:
            save_weights(self.share, *load_weights(folder))
            print(self.share)

    def _check_share(self, file: Path) -> None:
        from lct.train.weights import config_of

        if file.suffix != ".safetensors":
            raise ValueError(f"share: expected a name that ends in .safetensors, got {file}")
        folder = next(path for path in file.absolute().parents if path.exists())
        if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"share: expected a file that can be written, got {file}; name another")
        if self.config.lora and config_of(str(self.config.init)).lora:
            raise ValueError("share: the changes of two stages do not fit one file; share the folders of both runs")

    def _sampler(self, scene: Path, out: Path, processes: Any):
        """Generates a scene into OUT/samples, on the first process, and on the others with it."""
        from tempfile import TemporaryDirectory

        from lct.pretrained.pipeline import pipeline_of
        from lct.sample.files import asked, sample_scene
        from lct.sample.request import Sampling
        from lct.train.weights import with_model

        c = processes.once(lambda: with_model(self.config))
        parts = pipeline_of(self.execution.pipeline, str(processes.device), c.compute_dtype)
        if parts is None and not c.model.vocabulary:
            raise ValueError("pipeline: expected the folder of the one that the run tunes, to read and decode `scene`")

        def found() -> dict[str, Any]:  # what could fail at the first sample fails before the first step
            request = asked(c.model, scene, c.data.shots, pipeline=parts).request
            return {} if parts is None else parts.prepare(request.prompts)

        rows = processes.once(found)
        if parts is not None:
            parts.found = rows
            parts.let_go()

        def sample(model, step: int) -> None:
            sampling = Sampling.of(c, text_scale=c.text_scale_at(step), dtype=c.compute_dtype)
            with TemporaryDirectory() as elsewhere:
                folder = out / "samples" / f"step-{step:07d}" if processes.first else Path(elsewhere) / "scene"
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off behind its checkpoint
                options = {"impl": self.impl, "context": c.data.shots, "pipeline": parts}
                sample_scene(model, scene, folder, sampling, c.visibility, **options)
                if parts is not None:
                    parts.let_go()

        return sample


def complete(config: TrainConfig, out: Path, device: str = "cpu") -> Path:
    """Train a run to its end, going on where it stopped; returns its folder."""
    from lct.progress import training
    from lct.train.trainer import Trainer

    trainer = Trainer(config, out, device)
    trainer.resume()
    with training(config.name, config.steps, trainer.step) as progress:
        trainer.run(progress)
    return out


def advise(impl: str, device: Any, dtype: Any) -> None:
    """Say on a GPU, before it begins to be slow, what is not validated there."""
    from lct.kernels.select import unvalidated

    if advice := unvalidated(impl, device, dtype):
        print(f"lct: {advice}", file=sys.stderr)
