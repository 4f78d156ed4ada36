"""How fast is a training step, of one block of the paper's size and of the tiny model, against the usual way?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from baselines import per_shot, sdpa
from harness import Case, Provider, Setting, near
from usual import UsualModel

from lct.kernels import select
from lct.layout import SceneLayout, Shot
from lct.model.config import ModelConfig, lct_3b, tiny
from lct.model.mmdit import MMDiT


def models(s: Setting) -> dict[str, tuple[ModelConfig, SceneLayout]]:
    """The model and the scenes of a step."""
    small = [Shot(12, (1, 1, 1), "global"), *[Shot(14, (3, 4, 4))] * 4]
    rows = (4, 30, 30) if s.gpu else (1, 4, 6) if s.quick else (1, 8, 10)
    large = [Shot(77 if s.gpu else 8, rows)] * 5
    return {
        "tiny": (tiny(), SceneLayout([small] * 12)),
        "one block of lct_3b": (replace(lct_3b(), blocks=1, text_channels=512), SceneLayout([large])),
    }


def cases(s: Setting) -> Iterator[Case]:
    for name, (config, layout) in models(s).items():
        torch.manual_seed(0)
        model = MMDiT(config).to(s.device)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        geometry = layout.geometry(s.device)
        video, text = (
            s.normal(layout.video_rows, config.patch_channels),
            s.normal(layout.text_rows, config.text_channels),
        )
        times = torch.rand(len(layout.shots), device=s.device)
        mask = layout.dense_mask().to(s.device)
        usual = UsualModel(model)

        def step(forward, model=model):
            """Loss and gradients; returns the loss and the norm of all gradients."""

            def run():
                model.zero_grad(set_to_none=True)
                loss = forward().square().mean()
                loss.backward()
                norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
                return torch.stack([loss.detach().float(), torch.stack(norms).norm()])

            return run

        given = video, text, times, geometry
        providers = [
            Provider(f"lct {impl}", step(partial(model, *given, impl=impl)), ours=True) for impl in implementations(s)
        ]
        scenes = {"dense mask": partial(sdpa, attn_mask=mask), "SDPA per shot": per_shot(layout)}
        usual_steps = {
            name: step(lambda given=given, usual=usual, attend=attend: usual(*given, attend)[0])
            for name, attend in scenes.items()
        }
        providers += [Provider(f"eager torch, {name}", usual_steps[name]) for name in usual_steps]
        truth = usual_steps["SDPA per shot"]()
        about = {"tokens": layout.rows}
        check = near(truth, 1e-4 if s.dtype == torch.float32 else 3e-2)
        yield Case(f"step of {name}", {"rows": layout.rows}, providers, model.training_flops(layout), 0, check, about)


def implementations(s: Setting) -> list[str]:
    """What a model is given as `impl`: auto, and what has to be asked for by name until it is validated."""
    named = [i for i in ("triton", "cuda", "cpu") if not select.NORM_ROPE[i].reasons(s.normal(1, 3, 64))]
    return ["auto", *named]


def absent(s: Setting) -> dict[str, str]:
    """The usual way with FlexAttention is left out on a CPU."""
    return {} if s.gpu else {"eager torch, FlexAttention": "it has no backward on a CPU"}
