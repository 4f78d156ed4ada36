"""A stack of blocks of the paper's size in a training step: rows per second, MFU, peak memory by what is recomputed.

    python bench/stack.py [--blocks 8] [--shots 5] [--video 8 30 30] [--out FOLDER]

Forward, backward and AdamW over one context-causal scene, in bf16 with fp32 weights on a GPU; against the same model as
most code writes it (`usual.py`), with FlexAttention and with one exact call a shot. On a machine without a GPU it runs
small, in fp32, without FlexAttention, which has no backward there. Writes stack-DEVICE.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from baselines import flex_attention, per_shot
from harness import slug, write
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import implementations
from usual import UsualModel

from lct.estimate import kept_bytes
from lct.layout import SceneLayout, Shot
from lct.model.config import lct_3b
from lct.model.cost import peak_flops
from lct.model.mmdit import MMDiT
from lct.train.execution import RECOMPUTE
from lct.train.processes import recomputed

RESULTS = Path(__file__).parent / "results"
WARM, STEPS = 2, 5


class _Setting:
    """What `implementations` asks of a benchmark's setting."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


def measure(step: Callable[[], float], device: torch.device) -> dict[str, float | None]:
    """Median seconds of a step, its loss, and the most memory it had."""
    gpu = device.type == "cuda"
    for _ in range(WARM):
        loss = step()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = step()  # its loss is read, so that the step is over
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) if gpu else None
    return {"seconds": sorted(seconds)[STEPS // 2], "loss": loss, "peak bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--blocks", type=int, default=8 if gpu else 1)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--video", type=int, nargs=3, default=(8, 30, 30) if gpu else (1, 4, 5))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    config = replace(lct_3b(), blocks=options.blocks, text_channels=512)
    layout = SceneLayout([[Shot(77 if gpu else 8, tuple(options.video))] * options.shots])
    geometry, setting = layout.geometry(device), _Setting(device, dtype)
    given = (
        setting.normal(layout.video_rows, config.patch_channels),
        setting.normal(layout.text_rows, config.text_channels),
        torch.rand(len(layout.shots), device=device),
        geometry,
    )

    def fresh(recompute: str = "none") -> MMDiT:
        torch.manual_seed(0)
        model = MMDiT(config).to(device)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        for block in model.blocks:
            recomputed(block, recompute)
        return model

    def steps(model: MMDiT, forward: Callable[[], Tensor]) -> Callable[[], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def step() -> float:
            loss = forward().float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def ours(impl: str, recompute: str) -> Callable[[], float]:
        model = fresh(recompute)
        return steps(model, partial(model, *given, impl=impl))

    def usual(attend: Callable) -> Callable[[], float]:
        model = fresh()
        whole = UsualModel(model)
        return steps(model, lambda: whole(*given, attend)[0])

    ways: dict[str, Callable[[], Callable[[], float]]] = {
        f"lct {impl}, recompute {mode}": partial(ours, impl, mode)
        for impl in implementations(setting)  # type: ignore[arg-type]
        for mode in RECOMPUTE
    }
    ways["eager torch, one call a shot"] = lambda: usual(per_shot(layout))
    if gpu:
        ways["eager torch, FlexAttention"] = lambda: usual(flex_attention(layout, device).attend)
    flops, peak, found = MMDiT.training_flops(fresh(), layout), peak_flops(device), {}
    table = Table(title=f"{options.blocks} blocks of lct_3b, {layout.rows:,} rows", show_edge=False)
    for name in ("way", "ms a step", "rows/s", "MFU", "peak GiB"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, way in ways.items():
        try:
            result = measure(way(), device)
        except torch.OutOfMemoryError as error:
            found[name] = {"failed": str(error).splitlines()[0]}
            table.add_row(name, "out of memory", "", "", "")
            continue
        finally:
            if gpu:
                torch.cuda.empty_cache()
        seconds = result["seconds"]
        assert seconds is not None
        result |= {
            "rows per second": layout.rows / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": None if peak is None else flops / seconds / peak,
        }
        found[name] = result
        mfu, memory = result["mfu"], result["peak bytes"]
        table.add_row(
            name, f"{1e3 * seconds:.1f}", f"{layout.rows / seconds:,.0f}",
            "–" if mfu is None else f"{100 * mfu:.1f} %", "–" if memory is None else f"{memory / 2**30:.1f}",
        )  # fmt: skip
    Console().print(table)
    kept = {mode: kept_bytes(config, layout, mode, dtype) for mode in RECOMPUTE}
    record = {
        "blocks": options.blocks, "layout": str(layout.scenes), "rows": layout.rows, "flops": flops,
        "estimated bytes kept for the backward pass": kept, "ways": found, "machine": provenance(device),
    }  # fmt: skip
    print(write(record, options.out, f"stack-{slug(torch.cuda.get_device_name(device)) if gpu else 'cpu'}"))


if __name__ == "__main__":
    main()
