"""What each process reads for a step: scenes drawn by all, shared out by cost, read by the one that computes them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Steppable

from lct.data.batch import Batch, Dataset, Drawn, draw_scene, pack_drawn, scene_shots
from lct.data.scenes import SceneSample, ShotSample, shot_prompt
from lct.data.stored import Damaged
from lct.layout import SceneLayout, Shot
from lct.model.mmdit import MMDiT
from lct.train.balance import plan_step
from lct.train.config import TrainConfig


class StepData(NamedTuple):
    """The passes of a process in a step; a batch of a pass that only keeps step with others has no weight.

    damaged    by slot, what could not be read of the scenes of this process
    without    slots that were left out from the start
    imbalance  largest over mean cost of the processes
    """

    passes: list[tuple[Batch, bool]]
    damaged: dict[int, str]
    without: frozenset[int]
    imbalance: float


class Steps(Steppable):
    """Step number -> StepData of one of `datas` batches; pure, so that any number of workers may ask."""

    def __init__(
        self,
        config: TrainConfig,
        scenes: Dataset,
        model: MMDiT,
        data: int = 0,
        datas: int = 1,
        pass_rows: int = 0,
        together: bool = True,
    ):
        """together: processes wait for one another in every pass, as the imbalance then counts it."""
        self.config, self.scenes, self.encoder = config, scenes, model.encoder
        self.cost = model.cost()
        self.data, self.datas, self.pass_rows, self.together = data, datas, pass_rows, together

    def draw(self, step: int) -> tuple[list[Drawn], list[list[Shot]]]:
        """All scenes of a step, and their shots; their latents stay where they are."""
        c, drawn, shots, rows = self.config, [], [], 0
        while rows < c.batch_rows if c.batch_rows else len(drawn) < c.scenes:
            scene = draw_scene(
                self.scenes, c.data.mixture, c.data.image_probability, c.data.drop_probability, c.seed, step, len(drawn)
            )
            counted = scene_shots(scene.sample, self._length, c.model.patch, c.model.cross)
            rows += sum(shot.rows for shot in counted)
            drawn.append(scene)
            shots.append(counted)
        return drawn, shots

    def __getitem__(self, step: int) -> StepData:
        return self.read(step)

    def read(self, step: int, without: frozenset[int] = frozenset()) -> StepData:
        """The data of a step; `without` slots that cannot be read."""
        drawn, shots = self.draw(step)
        if self.datas == 1 and not self.pass_rows:
            share, imbalance = [list(range(len(drawn)))], 1.0
        else:
            costs = [self.cost.training(SceneLayout([scene], self.config.visibility)) for scene in shots]
            sizes = [sum(shot.rows for shot in scene) for scene in shots]
            plan = plan_step(costs, sizes, self.datas, self.pass_rows)
            share, imbalance = plan.passes[self.data], plan.imbalance(costs, self.together)
        passes, damaged = [], {}
        for part in share:
            scenes = []
            for slot in part:
                try:
                    if slot not in without:
                        scenes.append(self._read(drawn[slot]))
                except Damaged as error:
                    damaged[slot] = str(error)
            passes.append((self._packed(scenes or [self._nothing(drawn[0])]), bool(scenes)))
        return StepData(passes, damaged, without, imbalance)

    def _length(self, prompt: str) -> int:
        return self.encoder.length(prompt)

    def _packed(self, scenes: list[Drawn]) -> Batch:
        c = self.config
        return pack_drawn(
            scenes, self.encoder.tokenize, c.model.patch, c.visibility, c.shared_time, c.one_place, c.model.cross,
            c.unshifted,
        )  # fmt: skip

    def _read(self, drawn: Drawn) -> Drawn:
        """The scene with its latents in memory; `Damaged` where they, or its text, cannot be read."""
        sample = drawn.sample
        for prompt in (sample.global_prompt or "", *(shot_prompt(shot.prompt, shot.cut) for shot in sample.shots)):
            self.encoder.tokenize(prompt)
        shots = tuple(
            ShotSample(np.asarray(shot.latents), shot.prompt, shot.cut, shot.images[:0]) for shot in sample.shots
        )
        return Drawn(SceneSample(sample.global_prompt, shots), drawn.rng)

    def _nothing(self, like: Drawn) -> Drawn:
        """One patch of zeros, for a pass of a process that has no scene left."""
        channels = like.sample.shots[0].latents.shape[-1]
        zeros = np.zeros((*self.config.model.patch, channels), np.float32)
        return Drawn(SceneSample(None, (ShotSample(zeros, "", False, zeros[:0]),)), np.random.default_rng(0))


def reading(steps: Steps, first: int, end: int, workers: int) -> Iterator[StepData]:
    """The data of steps `first` to `end`, read ahead by so many processes."""
    return iter(
        DataLoader(
            steps,
            batch_size=None,
            sampler=range(first, end),
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            worker_init_fn=_deaf,
            multiprocessing_context="fork" if workers else None,
            pin_memory=False,
        )
    )


def _as_it_is(data: StepData) -> StepData:
    return data


def _deaf(_: int) -> None:
    """Workers leave signals to the process that they read for, and use one thread each."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
