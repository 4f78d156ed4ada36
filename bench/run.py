"""Ask the benchmarks' questions: `lct bench [QUESTION…] [--quick] [--check]`, or `python bench/run.py` with the same.

Every question is a module beside this file with `cases(setting)`, and `absent(setting)` for who cannot take part.
Prints a table and a sentence a question: who wins and by how much. With `--out`, also writes a record a question.
`findings` asks another kind of question, what of the paper's findings holds at small scale: see `findings/ask.py`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from harness import Setting, measure, sentence, slug, tell, write
from rich.console import Console

from lct.train.weights import available

Question = Literal["attention", "norm_rope", "modulate", "plan", "training", "generation", "findings"]
QUESTIONS: tuple[Question, ...] = ("attention", "norm_rope", "modulate", "plan", "training", "generation")


@dataclass(frozen=True)
class Options:
    questions: tyro.conf.Positional[tuple[Question, ...]] = QUESTIONS
    """What to ask; everything but `findings` where nothing is named."""
    quick: bool = False
    """Few sizes: all questions in three minutes on two cores; `findings` from shared weights in five."""
    check: bool = False
    """Exit with 1 where anybody's result is not the truth, or an expected finding does not hold."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(help_behavior_hint="(bfloat16 on a GPU, float32 on a CPU)"),
    ] = None
    """Of tensors."""
    out: Path | None = None
    """Folder for the records; `bench/results` is the repository's own."""
    runs: Path = Path("runs/findings")
    """Where `findings` trains and keeps what it has measured; an interrupted run goes on there."""
    share: bool = False
    """Also renew the weights that `findings --quick` asks."""


def main(options: Options) -> int:
    device = available(options.device)
    if options.out:  # hours may pass before it is written to
        options.out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    setting = Setting(device, dtype, options.quick, seconds=0.7 if options.quick else 3.0)
    console, sentences, wrong = Console(), [], 0
    for name in options.questions:
        if name == "findings":
            wrong += findings(options, console)
            continue
        began, module = time.monotonic(), import_module(name)
        record = measure(name, module.cases(setting), module.absent(setting), setting)
        tell(record, console)
        console.print(f"{time.monotonic() - began:.0f} s", style="dim")
        sentences.append(sentence(record))
        wrong += sum(row["match"] is False for row in record["rows"])
        if options.out:
            write(record, options.out, f"{name}-{device.type if device.type == 'cpu' else slug(record['device'])}")
    console.print(*sentences, sep="\n", style="bold", markup=False)
    return int(options.check and wrong > 0)


def findings(options: Options, console: Console) -> int:
    """Ask for the paper's findings; how many do not hold that did when they were recorded."""
    from findings.ask import ask, missed, share

    record = ask(options.quick, options.runs, options.device, console)
    if options.share:
        share(options.runs)
    if options.out:
        write(record, options.out, f"findings-{torch.device(options.device).type}")
    return len(missed(record))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="lct bench", description=__doc__)))
