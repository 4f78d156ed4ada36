"""Low-rank changes of a model's products (LoRA): added, trained alone, merged into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lct.model.layers import Linear

TARGETS = ("qkv", "out", "cross_q", "text_kv", "cross_out")
"""Last names of the products of attention."""


def add_lora(model: nn.Module, rank: int, targets: Sequence[str] = TARGETS, seed: int = 0) -> list[str]:
    """Freeze a model, and give products of its blocks a change of this rank to be trained: W + up · down.

    targets  last names of the products, such as "qkv"

    `up` is zero, so that nothing changes yet; `down` is drawn from `seed`. Both are fp32 beside half-precision weights.
    Returns the names of the products. ValueError where there is none, and for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    found = [(name, layer) for name, layer in _products(model) if name.split(".")[-1] in targets]
    if not found:
        raise ValueError(f"targets: expected names of products such as {TARGETS}, got {tuple(targets)}")
    model.requires_grad_(False)
    for index, (_, layer) in enumerate(found):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + index)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        down = torch.randn(rank, layer.in_features, generator=draw) / layer.in_features**0.5
        layer.down = nn.Parameter(down.to(layer.weight.device, dtype))
        layer.up = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=dtype, device=layer.weight.device))
    return [name for name, _ in found]


def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make every low-rank change a part of its weight, in this dtype, the weight's own by default."""
    with torch.no_grad():
        for _, layer in _products(model):
            if layer.down is not None and layer.up is not None:
                wide = layer.weight.to(layer.up.dtype) + layer.up @ layer.down
                layer.weight.data = wide.to(dtype or layer.weight.dtype)
                layer.down = layer.up = None


def _products(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The products of a model's blocks."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith("blocks."):
            yield name, module
