"""How fast is a scene of 1 to 9 shots, shot by shot: with the KV cache, recomputing history, and the usual way?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, Provider, Setting, near
from torch import Tensor
from training import implementations
from usual import UsualModel

from lct.layout import SceneLayout, Shot
from lct.model.config import tiny
from lct.model.mmdit import MMDiT
from lct.sample import Sampling, SceneRequest, ShotRequest, autoregressive
from lct.sample.request import START, Prompted, as_history, features, shot_noise, state

PROMPT = "[SHOT CUT] close-up of Character 1, top right, moving left in the meadow"
STEPS = 6


def scene_request(shots: int, video: tuple[int, int, int]) -> SceneRequest:
    requests = tuple(ShotRequest(PROMPT, video, seed) for seed in range(shots))
    return SceneRequest("Character 1: a wanderer. The scene is set at night.", requests)


def predicted_flops(model: MMDiT, request: SceneRequest) -> tuple[int, int]:
    """(cached, recomputed) operations of a rollout: STEPS passes a shot, and one that commits it to the cache."""
    tokens = len(model.encoder.tokenize(PROMPT))
    scene = [Shot(len(model.encoder.tokenize(request.global_prompt)), (1, 1, 1), "global")]
    capacity = scene[0].rows + sum(Shot(tokens, shot.video).rows for shot in request.shots)
    cached = model.flops(SceneLayout([scene]).tail(0, capacity))
    recomputed = 0
    for index, shot in enumerate(request.shots, 1):
        scene.append(Shot(tokens, shot.video))
        passes = STEPS if index == len(request.shots) else STEPS + 1  # the last shot needs no commit
        cached += passes * model.flops(SceneLayout([scene]).tail(index, capacity))
        recomputed += STEPS * model.flops(SceneLayout([scene]))
    return cached, recomputed


def usual_rollout(model: MMDiT, request: SceneRequest, sampling: Sampling) -> list[Tensor]:
    """The same scene by a cache that grows by concatenation."""
    usual, like, device = UsualModel(model), state(model), model.video_out.weight.device
    seen = [Prompted.global_prompt(model, request.global_prompt)]

    def run(prompted: list[Prompted], video: Tensor, time: float, cache):
        """One pass of the last shot of `prompted` over a cache of the others."""
        layout = SceneLayout([[p.shot for p in prompted]])
        own = layout.tail(len(prompted) - 1, layout.rows, device=device)
        times = torch.full((1,), time, device=device)
        return usual(video.to(like.dtype), features(model, prompted[-1:], device), times, own, cache=cache)

    _, cache = run(seen, like.new_zeros(1, like.shape[1]), 0.0, None)
    finished = []
    for shot in request.shots:
        seen.append(Prompted.of(model, shot))
        z = shot_noise(shot, START, like)
        for now, then in sampling.times([seen[-1].shot]):
            v, _ = run(seen, z, float(now[0]), cache)
            z = z + (then[0] - now[0]).to(z) * v.to(z)
        finished.append(z)
        if len(finished) < len(request.shots):
            _, cache = run(seen, as_history(z, shot, sampling.history_time), sampling.history_time, cache)
    return finished


@torch.no_grad()
def cases(s: Setting) -> Iterator[Case]:
    torch.manual_seed(0)
    model = MMDiT(tiny()).eval().requires_grad_(False).to(s.device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    video, sampling = (4, 8, 8), Sampling(steps=STEPS)
    for shots in (1, 5, 9) if s.quick else (1, 3, 5, 7, 9):
        request = scene_request(shots, video)
        cached, recomputed = predicted_flops(model, request)

        def ours(cached: bool, impl: str = "auto", request=request):
            return lambda: autoregressive(model, [request], sampling, cached=cached, impl=impl)[0]

        def usual(request=request):
            return torch.no_grad()(usual_rollout)(model, request, sampling)

        providers = [
            *(Provider(f"lct {impl}, KV cache", ours(True, impl), ours=True) for impl in implementations(s)),
            Provider("torch.cat cache, dense attention", usual),
            Provider("all history recomputed", ours(False)),
        ]
        about = {"gflop_cached": cached / 1e9, "gflop_recomputed": recomputed / 1e9}
        yield Case(
            "a scene shot by shot", {"shots": shots}, providers, 0, 0, near(ours(True)(), 1e-4), about, on_host=True
        )


def absent(s: Setting) -> dict[str, str]:
    """Nobody is left out."""
    return {}
