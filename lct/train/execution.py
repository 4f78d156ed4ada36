"""How a run is carried out. Nothing here changes what is learnt, so it may differ when a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECOMPUTE = ("none", "attention", "all")
DAMAGED = ("stop", "skip")


@dataclass(frozen=True)
class Execution:
    """Processes are started with torchrun; their number is replicate · shard · context, of which `shard` follows."""

    replicate: int = 1
    """Groups of processes that each hold all weights between them (HSDP); 1 shards them over all processes (FSDP)."""
    context: int = 1
    """Processes that share the rows of one batch and in attention the heads, of which this must be a divisor."""
    recompute: str = "none"
    """What of a block is computed again in the backward pass: "none" of it, "all", or all but "attention"."""
    compile: bool = False
    """Compile each block with torch.compile."""
    gather_again: bool = True
    """Give gathered weights back after each block, gather them again for the backward pass, and sum gradients in every
    pass of a step. False: hold both through the step, which takes the memory of a whole model and its gradients; then
    processes wait for one another only at its end."""
    pass_rows: int = 0
    """Most rows in one pass; a step has as many passes as that takes. 0: all scenes of a process in one pass."""
    workers: int = 0
    """Processes that read scenes beside the training; 0 reads them in between."""
    damaged: str = "stop"
    """What a damaged scene does: "stop" the run, or "skip" the scene, with a warning that names the file."""
    keep: int = 0
    """Newest checkpoints that stay, at least two; 0: all."""
    save_beside: bool = False
    """Write checkpoints in a thread beside the training, from a copy in CPU memory."""
    scene: Path | None = None
    """Scene file that is sampled with the averaged weights while training, every `sample_every` steps."""
    sample_every: int = 0
    """Steps between samples of `scene`; 0: none."""
    pipeline: Path | None = None
    """Folder of the diffusers pipeline whose text encoders and VAE `scene` needs, for an open model."""
    tensorboard: bool = False
    """Also write the log as TensorBoard events; needs the extra `train`."""
    profile: int = 0
    """Steps to trace with torch's profiler, after two for warming up; 0: none."""

    def __post_init__(self):
        for name, value, known in (
            ("recompute", self.recompute, RECOMPUTE),
            ("damaged", self.damaged, DAMAGED),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name in ("replicate", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("pass_rows", "workers", "sample_every", "profile", "keep"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.keep == 1:
            raise ValueError("keep: expected 0, or at least 2: the newest may be the one that is damaged")
        if (self.scene is None) != (self.sample_every == 0):
            raise ValueError("scene, sample_every: expected both or neither")


HERE = Execution()
