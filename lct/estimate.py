"""What a layout costs a model: rows, operations, keys and values, memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from lct.layout import SceneLayout
from lct.model.config import preset
from lct.model.families import build
from lct.model.lora import add_lora

CARDS = {"1 × H200, 141 GB": (1, 141e9), "8 × H800, 80 GB": (8, 80e9)}
SPARE = 0.9  # of a card, for what is not counted here


def estimate(name: str, layout: SceneLayout, lora: int = 0) -> dict[str, float]:
    """Counts for a preset and a layout: operations in FLOPs, memory in bytes.

    lora  rank of low-rank changes that alone are trained; 0: all weights
    """
    with torch.device("meta"):
        model = build(preset(name))
    c = model.config
    if c.cross:
        layout = _without_global(layout)
    rows = layout.video_rows if c.cross else layout.rows
    attended = layout.videos if c.cross else layout
    parameters = model.parameter_count()
    forward, training = model.flops(layout), model.training_flops(layout)
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
        "training state": 20 * changed + (2 * parameters if lora else 0),
        # what enters each block, and all that is made within one, in half precision
        "activations": 2 * rows * c.width * c.blocks
        + 2 * rows * (4 * c.heads * c.head_dim + 2 * c.mlp_width + 6 * c.width),
    }


def _without_global(layout: SceneLayout) -> SceneLayout:
    """The same scenes for a model with cross-attention: each shot reads the global prompt before its own text."""
    scenes = []
    for scene in layout.scenes:
        shared = scene[0].text if scene[0].role == "global" else 0
        scenes.append([replace(shot, text=shared + shot.text) for shot in scene if shot.role == "shot"])
    return SceneLayout(scenes, layout.visibility)


def print_estimate(name: str, layout: SceneLayout, tflops: float, lora: int = 0) -> None:
    if not tflops > 0:
        raise ValueError(f"tflops: expected a rate above 0, got {tflops}")
    e = estimate(name, layout, lora)
    rate = tflops * 1e12
    table = Table(title=f"{name}, {layout.visibility}", show_header=False)
    what = f"rank {lora}, {e['trained'] / 1e6:.1f} M parameters" if lora else "all weights"
    state = (
        "bf16 weights; fp32 changes, gradients, two moments, EMA"
        if lora
        else "fp32 weights, gradients, two moments, EMA"
    )
    fits = {
        card: e["training state"] / count + e["activations"] <= SPARE * memory
        for card, (count, memory) in CARDS.items()
    }
    for key, value in (
        ("parameters", f"{e['parameters'] / 1e9:.3f} B"),
        ("shots", f"{e['shots']:.0f} in {len(layout.scenes)} scene(s)"),
        ("rows", f"{e['rows']:,.0f} ({e['text rows']:,.0f} text, {e['video rows']:,.0f} video)"),
        ("visible pairs", f"{e['visible pairs']:,.0f} ({100 * e['visible part']:.1f} % of all pairs in a scene)"),
        ("forward", f"{_flops(e['forward'])}, {100 * e['attention'] / e['forward']:.0f} % of it attention"),
        ("training step", _flops(e["training"])),
        (f"at {tflops:g} TFLOP/s", f"forward {e['forward'] / rate:.3g} s, training {e['training'] / rate:.3g} s"),
        ("keys and values", f"{_bytes(e['keys and values'])} in bf16, all blocks; {_bytes(e['in 8 bits'])} in 8 bits"),
        ("context by block", f"{_bytes(e['two blocks'])} on the GPU, of two blocks; the pool in CPU memory"),
        ("weights", f"{_bytes(e['weights'])} in fp32"),
        ("trained", what),
        ("training state", f"{_bytes(e['training state'])}: {state}"),
        ("activations", f"{_bytes(e['activations'])} in bf16, where blocks are recomputed one at a time"),
        (
            "fits",
            ", ".join(f"{card}: {'yes' if fit else 'no'}" for card, fit in fits.items())
            + "; sharded and recomputed, which the trainer does not do yet",
        ),
    ):
        table.add_row(key, value)
    Console().print(table)


def _flops(value: float) -> str:
    return f"{value / 1e15:.3g} PFLOP" if value >= 1e15 else f"{value / 1e12:.3g} TFLOP"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"
