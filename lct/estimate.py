"""What a layout costs a model: rows, operations, keys and values; and what training with it takes of each process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lct.kernels.reference import statistics_dtype
from lct.kernels.select import Choice
from lct.layout import SceneLayout
from lct.model.config import ModelConfig, preset
from lct.model.cost import PEAKS
from lct.model.families import build
from lct.model.lora import add_lora
from lct.train.execution import Execution
from lct.train.lengths import imbalances
from lct.train.processes import check_heads, recomputed

CARDS = {"1 × H200, 141 GB": (1, 141e9), "8 × H800, 80 GB": (8, 80e9)}
PEAK = PEAKS["H800"] * 1e12  # FLOP/s of such a card
SPARE = 0.9  # of a card, for what is not counted here
STATE = 20  # bytes of a weight that is trained: itself, its gradient, two moments, its average, in fp32


@dataclass(frozen=True)
class Mesh:
    """Processes and what each does; fields as in `Execution`."""

    processes: int = 1
    replicate: int = 1
    context: int = 1
    recompute: str = "all"
    gather_again: bool = True

    def __post_init__(self):
        Execution(replicate=self.replicate, context=self.context, recompute=self.recompute)  # says what is wrong
        if self.processes < 1 or self.processes % (self.replicate * self.context):
            raise ValueError(
                f"processes: expected a multiple of {self.replicate * self.context}, got {self.processes}; "
                "it is replicate · shard · context"
            )

    @property
    def shards(self) -> int:
        return self.processes // self.replicate


def estimate(name: str, layout: SceneLayout, lora: int = 0) -> dict[str, float]:
    """Counts for a preset and a layout: operations in FLOPs, memory in bytes.

    lora  rank of low-rank changes that alone are trained; 0: all weights
    """
    with torch.device("meta"):
        model = build(preset(name))
    c = model.config
    layout = _as_read(layout, c.cross)
    rows = layout.video_rows if c.cross else layout.rows
    attended = layout.videos if c.cross else layout
    parameters = model.parameter_count()
    products = sum(model.get_parameter(name).numel() for name in model.stream_weights())
    forward, training = model.flops(layout), model.training_flops(layout)
    if not 0 <= lora <= c.width:
        raise ValueError(f"lora: expected a rank of 0 to {c.width}, the model's width, got {lora}")
    if lora:
        add_lora(model, lora)
    changed = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "parameters": parameters,
        "trained": changed,
        "shots": sum(shot.role == "shot" for shot in layout.shots),
        "rows": layout.rows,
        "text rows": layout.text_rows,
        "video rows": layout.video_rows,
        "visible pairs": attended.pairs,
        "visible part": attended.pairs / max(1, sum(n * n for n in attended.scene_rows)),
        "attention": c.blocks * attended.flops(c.heads, c.head_dim),
        "forward": forward,
        "training": training,
        "keys and values": model.kv_bytes(rows),
        "in 8 bits": model.kv_bytes(rows, torch.float8_e4m3fn) + 8 * c.blocks * rows * c.kv_heads,
        "two blocks": model.kv_bytes(rows) * 2 / c.blocks,
        "weights": 4 * parameters,
        "half weights": 4 * parameters - 2 * products,
        "training state": STATE * changed + (2 * parameters if lora else 0),
    }


@lru_cache
def kept_bytes(
    config: ModelConfig, layout: SceneLayout, recompute: str, dtype: torch.dtype = torch.bfloat16, lora: int = 0
) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart.

    Of the blocks what autograd saves when it is asked on the meta device, and the attention that is kept where all else
    is computed again; beside them noisy latents, errors, the last stream with and without modulation, text features.
    """
    with torch.device("meta"):
        model = build(config)
        if lora:
            add_lora(model, lora)
    model = model.to(dtype)
    for block in model.blocks:
        recomputed(block, recompute)
    layout = _as_read(layout, config.cross)
    geometry = layout.geometry("meta", cross=config.cross)

    def stream(rows: int, of: torch.dtype) -> Tensor:
        return torch.zeros(rows, config.width, dtype=of, requires_grad=True, device="meta")

    text, video = (stream(rows, dtype) for rows in (layout.text_rows, layout.video_rows))
    shots = stream(len(layout.shots), statistics_dtype(dtype))
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        nothing = ((None, None) for _ in model.blocks)
        model.run_blocks(text, video, shots, geometry, nothing, Choice.of("reference"))
    total = sum(storage.nbytes() for storage in kept.values())
    total += layout.video_rows * (config.patch_channels * (dtype.itemsize + 4) + 2 * config.width * dtype.itemsize)
    total += layout.text_rows * config.text_row_channels * dtype.itemsize
    if recompute == "attention":  # kept by the checkpoints, not by autograd
        rows = geometry.plan.q_rows
        out = config.head_dim * dtype.itemsize + statistics_dtype(dtype).itemsize
        total += config.blocks * rows * config.heads * out
        if config.cross:
            total += config.blocks * rows * config.heads * out
    return total


def per_process(name: str, layout: SceneLayout, mesh: Mesh, lora: int = 0) -> dict[str, float]:
    """What one process of a mesh holds and sends in a step of one pass over the layout, in bytes; streams and gathered
    weights in half precision, the rest in fp32.

    "gathered" are weights beside its own share: of two blocks, one that is used and the next, or of all; "gradients",
    those of a block, or all, before they are summed; "kept" what the backward pass needs of the blocks, and "block"
    what it makes again of one. Volumes are what it sends, all-gathers and reductions as rings do them.
    """
    config = preset(name)
    e = estimate(name, layout, lora)
    frozen = 2 * e["parameters"] if lora else 0.0
    at_once = min(2 / config.blocks, 1.0) if mesh.gather_again else 1.0
    gathered = 2 * e["parameters"] * at_once if mesh.shards > 1 else 0.0
    every = kept_bytes(config, layout, "none", lora=lora)
    kept = every if mesh.recompute == "none" else kept_bytes(config, layout, mesh.recompute, lora=lora)
    others = (mesh.shards - 1) / mesh.shards
    read = (2 if mesh.gather_again else 1) * 2 * e["parameters"] * others
    reduced = 4 * e["trained"] * others
    mirrored = 2 * 4 * e["trained"] / mesh.shards * (mesh.replicate - 1) / mesh.replicate
    rows = _as_read(layout, config.cross).video_rows if config.cross else layout.rows
    heads = 2 * config.heads + 2 * config.kv_heads  # q, k, v there and the result back
    passes = 2 if mesh.recompute == "none" else 3
    exchanged = passes * config.blocks * rows / mesh.context * heads * config.head_dim * 2
    return {
        "state": (STATE * e["trained"] + frozen) / mesh.shards,
        "gathered": gathered,
        "gradients": 4 * e["trained"] * (1 / config.blocks if mesh.gather_again else 1.0) if mesh.shards > 1 else 0.0,
        "kept": kept / mesh.context,
        "block": 0.0 if mesh.recompute == "none" else every / config.blocks / mesh.context,
        "gathering": read,
        "reducing": reduced + mirrored,
        "exchanging": exchanged * (mesh.context - 1) / mesh.context,
    }


HELD = ("state", "gathered", "gradients", "kept", "block")
SENT = ("gathering", "reducing", "exchanging")


def _as_read(layout: SceneLayout, cross: bool) -> SceneLayout:
    return _without_global(layout) if cross else layout


def _without_global(layout: SceneLayout) -> SceneLayout:
    """The same scenes for a model with cross-attention: each shot reads the global prompt before its own text."""
    scenes = []
    for scene in layout.scenes:
        shared = scene[0].text if scene[0].role == "global" else 0
        scenes.append([replace(shot, text=shared + shot.text) for shot in scene if shot.role == "shot"])
    return SceneLayout(scenes, layout.visibility)


def print_estimate(
    name: str,
    layout: SceneLayout,
    tflops: float,
    lora: int = 0,
    mesh: Mesh | None = None,
    balance: int = 0,
    pass_rows: int = 0,
) -> None:
    """Tables of all that; `balance` steps, in passes of `pass_rows`, are simulated for the last."""
    if not 0 < tflops < float("inf"):
        raise ValueError(f"tflops: expected a rate above 0, got {tflops}")
    if balance < 0 or pass_rows < 0:
        raise ValueError(f"balance, pass_rows: expected 0 or more, got {balance} and {pass_rows}")
    mesh = mesh or Mesh()
    check_heads(preset(name), mesh.context)
    e, rate, console = estimate(name, layout, lora), tflops * 1e12, Console()
    what = f"rank {lora}, {e['trained'] / 1e6:.1f} M parameters" if lora else "all weights"
    state = (
        "bf16 weights; fp32 changes, gradients, two moments, EMA"
        if lora
        else "fp32 weights, gradients, two moments, EMA"
    )
    fits = {}
    for card, (count, memory) in CARDS.items():
        held = per_process(name, layout, Mesh(count), lora)
        fits[card] = sum(held[key] for key in HELD) <= SPARE * memory
    console.print(
        _table(
            f"{name}, {layout.visibility}",
            ("parameters", f"{e['parameters'] / 1e9:.3f} B"),
            ("shots", f"{e['shots']:.0f} in {len(layout.scenes)} scene(s)"),
            ("rows", f"{e['rows']:,.0f} ({e['text rows']:,.0f} text, {e['video rows']:,.0f} video)"),
            ("visible pairs", f"{e['visible pairs']:,.0f} ({100 * e['visible part']:.1f} % of all pairs in a scene)"),
            ("forward", f"{_flops(e['forward'])}, {100 * e['attention'] / e['forward']:.0f} % of it attention"),
            ("training step", _flops(e["training"])),
            (f"at {tflops:g} TFLOP/s", f"forward {e['forward'] / rate:.3g} s, training {e['training'] / rate:.3g} s"),
            (
                "keys and values",
                f"{_bytes(e['keys and values'])} in bf16, all blocks; {_bytes(e['in 8 bits'])} in 8 bits",
            ),
            ("context by block", f"{_bytes(e['two blocks'])} on the GPU, of two blocks; the pool in CPU memory"),
            ("weights", f"{_bytes(e['weights'])} in fp32, {_bytes(e['half weights'])} with --dtype bfloat16"),
            ("trained", what),
            ("training state", f"{_bytes(e['training state'])}: {state}"),
            ("fits", ", ".join(f"{card}: {'yes' if fit else 'no'}" for card, fit in fits.items()) + "; recomputed"),
        )
    )
    p = per_process(name, layout, mesh, lora)
    step = e["training"] / mesh.context
    told, first = "1 process", []
    if mesh.processes > 1:
        told = f"{mesh.processes} processes"
        whole = f"{_bytes(e['weights'] / 2)} in bf16" if lora else f"{_bytes(e['weights'])} in fp32"
        first = [("at the start", f"{whole} in CPU memory of the first process, which makes or reads them for all")]
    told += f", replicate {mesh.replicate}, context {mesh.context}, recompute {mesh.recompute}"
    console.print(
        _table(
            f"One of {told}: one pass over this layout",
            ("memory", f"{_bytes(sum(p[key] for key in HELD))}"),
            ("of it", ", ".join(f"{key} {_bytes(p[key])}" for key in HELD)),
            ("sent in a step", ", ".join(f"{key} {_bytes(p[key])}" for key in SENT)),
            *first,
            (
                "step",
                f"{step / rate:.3g} s at {tflops:g} TFLOP/s, {100 * rate / PEAK:.0f} % of what an H800 can do at most",
            ),
        )
    )
    if balance:
        rows = []
        for count in (8, 64, 128):
            with torch.device("meta"):
                cost = build(preset(name)).cost()
            of_step, of_passes = imbalances(cost, count, balance, pass_rows)
            rows.append((f"{count} processes", _uneven(of_step)))
            if pass_rows:
                rows.append(("waiting in every pass", _uneven(of_passes)))
        passes = f", passes of {pass_rows:,} rows" if pass_rows else ", one pass each"
        console.print(_table(f"Largest over mean cost of a process: {balance} steps of 7 scenes each{passes}", *rows))


def _uneven(found: list[float]) -> str:
    worst = sorted(found)[-max(1, len(found) // 100) :]
    return f"{np.mean(found):.4f} on average, {worst[0]:.4f} to {worst[-1]:.4f} in the worst 1 % of steps"


def _table(title: str, *rows: tuple[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _flops(value: float) -> str:
    return f"{value / 1e15:.3g} PFLOP" if value >= 1e15 else f"{value / 1e12:.3g} TFLOP"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"
