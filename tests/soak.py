"""Kills training with SIGKILL at random moments, and looks at what is left: `make soak`, and a few kills in the suite.

Every run goes on from what the one before it left in the same folder, in one process or in two. Its phases are told in
a file, so that kills fall into all of them: a step, the writing of a checkpoint, its renaming, the removal of older
ones, a resume. After each kill the newest checkpoint must match its hashes and be no more than one interval behind the
log. Then some thousand steps are taken, in which neither memory nor the number of open files may grow.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from processes import small

from lct.train import checkpoint
from lct.train.checkpoint import checkpoints, newest_whole, read_whole
from lct.train.config import TrainConfig
from lct.train.execution import Execution
from lct.train.record import StepRecord
from lct.train.runs import tiny_lct
from lct.train.trainer import Trainer

GROUPS = ("model", "ema", "optimizer")
EVERY = 2  # steps between checkpoints
PHASES = ("step", "write", "rename", "prune", "resume")
PATIENCE = 60.0  # seconds until a phase must have come


def tells(folder: Path, phase: str, function):
    """The function, which says in a file that it runs."""

    def told(*arguments, **options):
        (folder / "phase").write_text(phase)
        return function(*arguments, **options)

    return told


def train(root: Path, rank: int, count: int, beside: bool) -> None:
    """What a process of a run does until it is killed."""
    torch.set_num_threads(1)
    if count > 1:
        store = dist.FileStore(str(root / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    if rank == 0:
        Saver = checkpoint.Saver
        Saver._write_own = tells(root, "write", Saver._write_own)
        Saver._finish = tells(root, "rename", Saver._finish)
        checkpoint.prune = tells(root, "prune", checkpoint.prune)
        Trainer.resume = tells(root, "resume", Trainer.resume)
        Trainer.train_step = tells(root, "step", Trainer.train_step)
    trainer = Trainer(
        small(steps=10**6, save_every=EVERY), root / "run", execution=Execution(keep=2, save_beside=beside)
    )
    trainer.resume()
    trainer.run()


def begin(root: Path, count: int, beside: bool) -> list[int]:
    """Process ids of a run that goes on in `root`."""
    (root / "store").unlink(missing_ok=True)
    (root / "phase").write_text("")
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            with suppress(BaseException), open(root / f"errors-{rank}.txt", "w") as errors:
                os.dup2(errors.fileno(), 2)
                try:
                    train(root, rank, count, beside)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    raise
            os._exit(1)
        children.append(child)
    return children


def killed(root: Path, count: int, phase: str, delay: float, beside: bool) -> str:
    """Kill a run a while after a phase began; the phase that it was in."""
    children = begin(root, count, beside)
    deadline = time.monotonic() + PATIENCE
    while (root / "phase").read_text() != phase:
        if time.monotonic() > deadline:
            break
        time.sleep(0.0005)
    time.sleep(delay)
    found = (root / "phase").read_text()
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            errors = "".join(file.read_text() for file in root.glob("errors-*.txt"))
            raise AssertionError(f"a run ended by itself, in phase {found or 'start'}:\n{errors[-4000:]}")
    return found


def soak(kills: int, seed: int = 0, report=lambda line: None) -> dict:
    """Kill as often, and tell what was found; AssertionError for a checkpoint that cannot be loaded or is too old."""
    random.seed(seed)
    began, phases, worst, unfinished = time.monotonic(), Counter(), [0, 0], 0
    processes: Counter = Counter()
    with TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder)
        run, before, unloadable = root / "run", -1, list[str]()
        for kill in range(kills):
            count, phase = random.choice((1, 1, 2)), PHASES[kill % len(PHASES)]
            beside, wait = random.random() < 0.5, random.choice((0.0, 0.001, 0.01, 0.05))
            found = killed(root, count, phase, wait * random.random(), beside)
            phases[found or "start"] += 1
            processes[count] += 1
            unfinished += len(list(run.glob(".step-*")))
            if not checkpoints(run):
                assert before < 0, "all checkpoints are gone"
                continue
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "error", message=".*going on with"
                )  # from an older one, for one that is damaged
                try:
                    newest, manifest = newest_whole(run)
                    assert all(x.isfinite().all() for name in GROUPS for x in read_whole(newest, name).values())
                except (UserWarning, ValueError, AssertionError) as error:
                    unloadable.append(f"kill {kill + 1}, {found}: {error}")
                    continue
            assert manifest["step"] >= before, f"step {manifest['step']} after {before}"
            before = manifest["step"]
            logged = read_steps(run)
            report(f"{kill + 1:4d}/{kills}  {count} process(es), {found:6s}  newest {newest.name}, logged {logged}")
            if found in ("", "resume"):  # the log is still that of the run before
                continue
            worst[beside] = max(worst[beside], logged - before)
            # a checkpoint that is written beside the training may be done an interval later
            assert logged - before <= EVERY * (1 + beside), f"{logged - before} steps lost"
    return {
        "kills": kills, "by phase": dict(sorted(phases.items())), "by processes": dict(sorted(processes.items())),
        "unloadable": unloadable, "most steps lost": worst[0], "most steps lost, written beside": worst[1],
        "steps between checkpoints": EVERY,
        "unfinished folders left and swept": unfinished, "last step": before,
        "seconds": round(time.monotonic() - began), "torch": torch.__version__,
    }  # fmt: skip


def steady(root: Path, steps: int, config: TrainConfig) -> dict:
    """Train so many steps, and tell how memory and open files changed between the second tenth and the last."""
    files, sizes = [], []

    def look(record: StepRecord) -> None:
        if record.step > steps // 10:
            files.append(len(os.listdir("/proc/self/fd")))
            sizes.append(record.memory)

    began = time.monotonic()
    Trainer(config, root / "steady", execution=Execution(keep=2)).run(look)
    tenth = steps // 10
    first, last = (sum(part) / len(part) for part in (sizes[:tenth], sizes[-tenth:]))
    return {
        "steps": steps, "memory grew by": round(last / first - 1, 4), "memory, MiB": round(last / 2**20),
        "open files grew by": files[-1] - files[0], "open files": files[-1],
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def read_steps(run: Path) -> int:
    """The last whole line of the log; the last one may be cut off."""
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith("}\n")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict = {"kills": soak(options.kills, report=lambda line: print(line, flush=True))}
    with TemporaryDirectory(prefix="steady-") as folder:
        config = replace(tiny_lct(), init=None, steps=options.steps, scenes=2, save_every=100)
        found["steady"] = steady(Path(folder), options.steps, config)
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
