"""What a layout costs a model: rows, operations, keys and values, memory."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from lct.layout import SceneLayout
from lct.model.config import preset
from lct.model.mmdit import MMDiT


def estimate(name: str, layout: SceneLayout) -> dict[str, float]:
    """Counts for a preset and a layout: operations in FLOPs, memory in bytes."""
    with torch.device("meta"):
        model = MMDiT(preset(name))
    parameters = model.parameter_count()
    return {
        "parameters": parameters,
        "shots": sum(shot.role == "shot" for shot in layout.shots),
        "rows": layout.rows,
        "text rows": layout.text_rows,
        "video rows": layout.video_rows,
        "visible pairs": layout.pairs,
        "visible part": layout.pairs / max(1, sum(rows * rows for rows in layout.scene_rows)),
        "attention": model.config.blocks * layout.flops(model.config.heads, model.config.head_dim),
        "forward": model.flops(layout),
        "training": model.training_flops(layout),
        "keys and values": model.kv_bytes(layout.rows),
        "weights": 4 * parameters,
        "training state": 20 * parameters,
    }


def print_estimate(name: str, layout: SceneLayout, tflops: float) -> None:
    if not tflops > 0:
        raise ValueError(f"tflops: expected a rate above 0, got {tflops}")
    e = estimate(name, layout)
    rate = tflops * 1e12
    table = Table(title=f"{name}, {layout.visibility}", show_header=False)
    for key, value in (
        ("parameters", f"{e['parameters'] / 1e9:.3f} B"),
        ("shots", f"{e['shots']:.0f} in {len(layout.scenes)} scene(s)"),
        ("rows", f"{e['rows']:,.0f} ({e['text rows']:,.0f} text, {e['video rows']:,.0f} video)"),
        ("visible pairs", f"{e['visible pairs']:,.0f} ({100 * e['visible part']:.1f} % of all pairs in a scene)"),
        ("forward", f"{_flops(e['forward'])}, {100 * e['attention'] / e['forward']:.0f} % of it attention"),
        ("training step", _flops(e["training"])),
        (f"at {tflops:g} TFLOP/s", f"forward {e['forward'] / rate:.3g} s, training {e['training'] / rate:.3g} s"),
        ("keys and values", f"{_bytes(e['keys and values'])} in bf16, all blocks"),
        ("weights", f"{_bytes(e['weights'])} in fp32"),
        (
            "training state",
            f"{_bytes(e['training state'])}: fp32 weights, gradients, two moments, EMA; no activations",
        ),
    ):
        table.add_row(key, value)
    Console().print(table)


def _flops(value: float) -> str:
    return f"{value / 1e15:.3g} PFLOP" if value >= 1e15 else f"{value / 1e12:.3g} TFLOP"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"
