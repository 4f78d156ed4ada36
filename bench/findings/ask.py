"""Ask for the paper's findings: train what they need, measure, say of each whether it holds here (`make findings`).

Everything can be interrupted: training goes on from its checkpoints, studies that were finished are not asked again.
`--quick` trains nothing: it asks the weights that lie beside this file, over fewer scenes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rich.console import Console

from findings import finding, history, long, metrics, quality, rivals, ways
from findings.finding import Finding, World
from findings.ways import Weights
from lct.data.atomic import new_file
from lct.train.checkpoint import PREFIX, checkpoints, load_config
from lct.train.config import TrainConfig
from lct.train.runs import micro_causal, micro_lct, micro_pretrain, micro_text_rope
from lct.train.weights import digest_of, load_model, load_weights, save_weights
from lct.tune import complete

SHARED = Path(__file__).parent / "weights"
RECORD = Path(__file__).parents[1] / "results" / "findings-cpu.json"
SCENES, QUICK_SCENES = 64, 16
ABLATION_STEPS = 1_500
NAMES = {"before": "micro_text_rope", "lct": "micro_lct", "causal": "micro_causal"}


def stages(folder: Path) -> Iterator[TrainConfig]:
    """Every training that the findings need, in order, each from the weights of the one before it."""
    for run in (micro_pretrain, micro_text_rope, micro_lct, micro_causal):
        config = run()
        yield replace(config, init=config.init and str(folder / Path(config.init).name))
    yield from ablations(folder)


def ablations(folder: Path) -> Iterator[TrainConfig]:
    """Long context tuning with one part left out, and with everything, at the same number of steps."""
    base = replace(
        micro_lct(), init=str(folder / "micro_text_rope"), steps=ABLATION_STEPS, save_every=ABLATION_STEPS, ema=0.99
    )
    mixture = base.data
    changed = {
        "everything": base,
        "one_place": replace(base, one_place=True),
        "video_rope": replace(base, text_scale=0.0, init=str(folder / "micro_pretrain")),
        "shared_time": replace(base, shared_time=True),
        "no_images": replace(base, data=replace(mixture, image_probability=0.0)),
        "no_single": replace(base, data=replace(mixture, single=0.0)),
    }
    for name, config in changed.items():
        yield replace(config, name=f"ablation_{name}")
    # as many single shots as half of micro_lct's draws, and no scenes: what further training alone would have given
    alone = replace(mixture, single=1.0, cut=0.0, no_cut=0.0)
    yield replace(base, name="control_single", data=alone, steps=micro_lct().steps // 2, ema=micro_lct().ema)


def train(folder: Path, device: str) -> None:
    """Train every stage that is not finished; a stage that was interrupted goes on."""
    for config in stages(folder):
        if _is_finished(config, folder / config.name):
            continue
        complete(config, folder / config.name, device)


def _is_finished(config: TrainConfig, folder: Path) -> bool:
    """Whether a folder holds this stage to its end, wherever its first weights lay and however often it was saved."""
    found = checkpoints(folder)
    if not found or found[-1].name != f"{PREFIX}{config.steps:07d}":
        return False
    return replace(load_config(found[-1]), init=config.init, save_every=config.save_every) == config


@dataclass(frozen=True)
class Models:
    """The weights that studies ask for: from a folder of trainings, or the shared ones where that is None."""

    folder: Path | None
    device: str

    def _weights(self, name: str) -> Weights:
        path = SHARED / f"{name}.safetensors" if self.folder is None else self.folder / NAMES.get(name, name)
        return Weights(*load_model(path, self.device))

    @cached_property
    def before(self) -> Weights:
        return self._weights("before")

    @cached_property
    def lct(self) -> Weights:
        return self._weights("lct")

    @cached_property
    def causal(self) -> Weights:
        return self._weights("causal")

    @property
    def control(self) -> Weights | None:
        """Tuned on single shots alone; not shared."""
        return None if self.folder is None else self._weights("control_single")

    def causal_steps(self) -> dict[int, Weights]:
        """Checkpoints of the causal stage: the early ones, a ninth of the steps, half, all. Not shared."""
        assert self.folder is not None
        found = {int(path.name.split("-")[1]): path for path in checkpoints(self.folder / "micro_causal")}
        full = max(found)
        wanted = [step for step in found if step <= full / 3 or step in (full // 2, full)]
        return {step: Weights(*load_model(found[step], self.device)) for step in wanted}

    def ablated(self) -> tuple[Weights, dict[str, Weights]]:
        parts = {name: self._weights(f"ablation_{name}") for name in quality.ABLATIONS}
        return self._weights("ablation_everything"), parts


Answer = tuple[list[Finding], dict[str, Any]]  # findings, and rows for the paper's tables by table and way


def _one(found: Finding) -> Answer:
    return [found], {}


def _single_shots(models: Models, world: World) -> Answer:
    found, table = quality.single_shots(models.before, models.lct, models.control, world)
    return [found], {"table 2": table}


def _modes(models: Models, world: World) -> Answer:
    findings, table = quality.modes(models.lct, models.causal, world)
    return findings, {"table 2": table}


def _comparison(models: Models, world: World) -> Answer:
    findings, table = rivals.comparison(models.lct, models.causal, world)
    return findings, {"table 1": table}


STUDIES: dict[str, Callable[[Models, World], Answer]] = {
    "single_shots": _single_shots,
    "modes": _modes,
    "comparison": _comparison,
    "causal_adaptation": lambda m, w: _one(quality.causal_adaptation(m.lct, m.causal_steps(), w)),
    "on_noisy_media": lambda m, w: _one(history.on_noisy_media(m.causal, w)),
    "accumulation": lambda m, w: _one(history.accumulation(m.causal, w)),
    "positions": lambda m, w: _one(long.positions(m.causal, w)),
    "twenty_shots": lambda m, w: _one(long.twenty_shots(m.causal, w)),
    "cuts": lambda m, w: _one(long.cuts(m.causal, w)),
    "without_a_cut": lambda m, w: _one(long.without_a_cut(m.causal, w)),
    "kept_keys": lambda m, w: _one(history.kept_keys(m.causal, w)),
    "pooled_keys": lambda m, w: _one(history.pooled_keys(m.causal, w)),
    "fidelity": lambda m, w: _one(history.fidelity(m.lct, m.causal, w)),
    "selection": lambda m, w: _one(history.selection(m.causal, w)),
    "composition": lambda m, w: _one(rivals.composition(m.lct, m.causal, w)),
    "ablations": lambda m, w: _one(quality.ablations(*m.ablated(), w)),
}
TRAINED = ("causal_adaptation", "ablations")
"""Studies of weights that are not shared."""
MEASURING = (finding, metrics, ways, quality, history, long, rivals)


def ask(quick: bool, folder: Path, device: str, console: Console) -> dict[str, Any]:
    """Every study's findings as a record; finished ones are read from `folder`."""
    if not quick:
        train(folder, device)
    models, world = Models(None if quick else folder, device), World(QUICK_SCENES if quick else SCENES)
    inputs = None if quick else _digest(folder, world)
    record: dict[str, Any] = provenance() | {"scenes": world.scenes, "quick": quick, "findings": []}
    for name, study in STUDIES.items():
        if quick and name in TRAINED:
            continue
        answer = _answer(study, models, world, folder / "studies" / f"{name}.json", inputs)
        for found in answer["findings"]:
            mark = "[green]holds  [/]" if found["holds"] else "[yellow]differs[/]"
            console.print(f"{mark} [bold]{found['name']}[/]  {found['paper']}  [dim]{answer['seconds']:.0f} s[/]")
            console.print(f"        {found['outcome']}", markup=False)
        record["findings"] += answer["findings"]
        for table, rows in answer["tables"].items():
            record.setdefault(table, {}).update(rows)
    held = sum(found["holds"] for found in record["findings"])
    console.print(f"{held} of {len(record['findings'])} findings of the paper hold at this scale", style="bold")
    return record


def _digest(folder: Path, world: World) -> str:
    """Of all that answers follow from: weights, scenes, and the code that measures."""
    weights = [digest_of(folder / config.name) for config in stages(folder)]
    code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in MEASURING]
    return hashlib.sha256(json.dumps([weights, world.scenes, code]).encode()).hexdigest()


def _answer(study: Callable, models: Models, world: World, file: Path, inputs: str | None) -> dict[str, Any]:
    """What a study says, from `file` where that was written from the same inputs; None is not kept."""
    if inputs is not None and file.is_file():
        answer = json.loads(file.read_text(encoding="utf-8"))
        if answer["inputs"] == inputs:
            return answer
    began = time.monotonic()
    findings, tables = study(models, world)
    answer = {
        "inputs": inputs,
        "findings": [f.to_dict() for f in findings],
        "tables": tables,
        "seconds": time.monotonic() - began,
    }
    if inputs is not None:
        with new_file(file) as temporary:
            temporary.write_text(json.dumps(answer, indent=1, ensure_ascii=False), encoding="utf-8")
    return answer


def missed(record: dict[str, Any]) -> list[str]:
    """Findings that hold in the repository's record and not in this one. A quick one is not judged: over a few scenes
    intervals are wide, and some findings differ by chance."""
    if record["quick"] or not RECORD.is_file():
        return []
    before = {f["name"]: f["holds"] for f in json.loads(RECORD.read_text(encoding="utf-8"))["findings"]}
    now = {f["name"]: f["holds"] for f in record["findings"]}
    return [name for name, held in before.items() if held and not now.get(name)]


def share(folder: Path) -> None:
    """Write the weights that `--quick` asks: an 8-bit file each."""
    for name, run in NAMES.items():
        save_weights(SHARED / f"{name}.safetensors", *load_weights(folder / run), dtype=torch.int8)
