"""What a run tells of itself: a JSON line a step, TensorBoard events where they are asked for."""

from __future__ import annotations

import json
import resource
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lct.data.atomic import new_file

LOG = "log.jsonl"
NOISE_LEVELS = 4  # equal parts of t in [0, 1]


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all processes; a line of `log.jsonl`.

    loss       mean over shots; None where it was not finite and the step was left out
    by_noise   the same for t in [0, ¼), …, [¾, 1]; None where no shot was there
    seconds    of the step, `wait` of them for its data
    tflops     model FLOPs of all processes per second, and `mfu`, their part of what the GPUs can do at most
    memory     bytes: most that the first process allocated on its GPU, or has in CPU memory
    imbalance  largest over mean cost of the processes
    skipped    steps left out so far
    """

    step: int
    loss: float | None
    by_noise: tuple[float | None, ...]
    grad_norm: float | None
    lr: float
    rows: int
    shots: int
    scenes: int
    seconds: float
    wait: float
    tflops: float
    mfu: float | None
    rows_per_second: float
    memory: int
    imbalance: float
    skipped: int

    def line(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


def memory(device: torch.device) -> int:
    """Bytes that this process has taken: on a GPU the most that was allocated, on the CPU what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux: the largest so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


class Log:
    """The log in a run's folder; entered by the process that writes it."""

    def __init__(self, folder: Path, tensorboard: bool = False):
        self.folder, self._board = folder, None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ModuleNotFoundError(f"tensorboard: {error}; pip install 'lct[train]'") from None
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: StepRecord) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a") as log:
                log.write(record.line() + "\n")
        except OSError as error:  # no reason to end a run
            warnings.warn(f"step {record.step} is not in the log: {error}", stacklevel=2)
        if self._board is not None:
            for name, value in asdict(record).items():
                values = (
                    {name: value} if not isinstance(value, tuple) else {f"{name}/{i}": v for i, v in enumerate(value)}
                )
                for key, number in values.items():
                    if number is not None and key != "step":
                        self._board.add_scalar(key, number, record.step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def trim_log(folder: Path, step: int) -> None:
    """Forget the steps after a checkpoint, which will be taken again, and a line that was cut off by a crash."""
    file = folder / LOG
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(f"{line}\n")
    with new_file(file) as temporary:
        temporary.write_text("".join(kept))
