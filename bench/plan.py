"""What does it take, in time and memory, to say who sees whom, and how does that grow with the rows?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from attention import fresh_plan, scene
from baselines import analytic_block_mask, block_mask, block_mask_bytes, ends_of
from harness import Case, Provider, Setting

from lct.layout import SceneLayout

DENSE_LIMIT = 4_096  # rows up to which masks are compared pair by pair; beyond it, block by block


def cases(s: Setting) -> Iterator[Case]:
    rows = (1024, 4096, 16_384) if s.quick else (1024, 4096, 16_384, 65_536, 172_032)
    for count in rows:
        layout = scene(count, 9, "ragged")
        pairs_bytes = layout.rows**2  # the eager builder makes a mask of pairs first; compiled, it does not
        affordable = pairs_bytes < (2**33 if s.gpu else 2**31)
        providers = [Provider("lct layout + plan", partial(fresh_plan, layout, s.device), ours=True)]
        makers = {
            "create_block_mask, eager": partial(block_mask, layout, s.device, False),
            "create_block_mask, compiled": partial(block_mask, layout, s.device, True),
            "BlockMask, analytic": partial(analytic_block_mask, layout, s.device),
        }
        for name, make in makers.items():
            if "eager" in name and not affordable:
                why = f"its mask of {pairs_bytes / 2**30:.1f} GiB, pair by pair, is more than is given here"
                providers.append(Provider(name, why_not=why))
            elif "compiled" in name and s.quick and not s.gpu:
                providers.append(Provider(name, why_not="compiling it takes ten seconds on a CPU: in the full set"))
            else:
                providers.append(Provider(name, make))
        scale, check = {"rows": layout.rows, "shots": 9}, partial(wrong, layout)
        yield Case("who sees whom", scale, providers, check=check, size=size, on_host=True)


def size(result) -> int:
    """Bytes on the device."""
    return result.table.nbytes + result.key_table.nbytes if hasattr(result, "runs") else block_mask_bytes(result)


def wrong(layout: SceneLayout, result) -> str | None:
    """What a mask says otherwise than the layout: pair by pair, or, where there are too many, block by block."""
    if hasattr(result, "runs"):
        seen = [(run.start, run.end, run.sees) for run in result.runs]
        spans = zip(layout.shot_starts, layout.shot_ends, strict=True)
        expected = [(a, b, ((0, b),)) for a, b in spans]
        return None if seen == expected else f"sees {seen}, expected {expected}"
    rows, block = layout.rows, result.BLOCK_SIZE[0]
    ends = ends_of(layout, torch.device("cpu"))
    first = torch.arange(-(-rows // block)) * block
    touched = (ends[(first + block - 1).clamp(max=rows - 1)] + block - 1) // block
    whole = result.full_kv_num_blocks[0, 0].cpu() if result.full_kv_num_blocks is not None else 0
    found = result.kv_num_blocks[0, 0].cpu() + whole
    if not torch.equal(found.long(), touched):
        return "touches other blocks than the layout's"
    if rows <= DENSE_LIMIT:
        row = torch.arange(rows, device=result.kv_indices.device)
        blocks = result.to_dense()[0, 0].bool().repeat_interleave(block, 0).repeat_interleave(block, 1)
        mask = blocks[:rows, :rows] & result.mask_mod(0, 0, row[:, None], row[None])
        if not torch.equal(mask.cpu(), layout.dense_mask()):
            return "sees other pairs than the layout's"
    return None


def absent(s: Setting) -> dict[str, str]:
    """Nobody is left out of the question itself."""
    return {"cuDNN's create_mask_plan": "needs a GPU and nvidia-cudnn-frontend"} if not s.gpu else {}
