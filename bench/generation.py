"""How much faster is a scene with the KV cache than recomputing all history, against what the FLOP count predicts?

    python bench/generation.py [--shots 9] [--out bench/results/generation-cpu.json]

Both ways run in one process, shot by shot in turns, on the same requests; their results must agree before anything is
timed. FLOPs are counted by the model over visible pairs. The last line is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from provenance import provenance

from lct.layout import SceneLayout, Shot
from lct.model.config import tiny
from lct.model.mmdit import MMDiT
from lct.sample import Sampling, SceneRequest, ShotRequest, autoregressive


@dataclass(frozen=True)
class Options:
    shots: int = 9
    video: tuple[int, int, int] = (4, 8, 8)
    """Patches of each shot."""
    steps: int = 6
    """Denoising steps a shot."""
    repeats: int = 5
    out: Path | None = None


def scene_request(options: Options) -> SceneRequest:
    prompts = ["[SHOT CUT] close-up of Character 1, top right, moving left in the meadow"] * options.shots
    shots = tuple(ShotRequest(prompt, options.video, seed) for seed, prompt in enumerate(prompts))
    return SceneRequest("Character 1: a wanderer. The scene is set at night.", shots)


def predicted_flops(model: MMDiT, request: SceneRequest, steps: int) -> tuple[int, int]:
    """(cached, recomputed) operations of a rollout: `steps` passes a shot, and one that commits it to the cache."""
    tokens = len(model.encoder.tokenize(request.shots[0].prompt))
    scene = [Shot(len(model.encoder.tokenize(request.global_prompt)), (1, 1, 1), "global")]
    capacity = scene[0].rows + sum(tokens + s.video[0] * s.video[1] * s.video[2] for s in request.shots)
    cached = model.flops(SceneLayout([scene]).tail(0, capacity))
    recomputed = 0
    for index, shot in enumerate(request.shots, 1):
        scene.append(Shot(tokens, shot.video))
        passes = steps if index == len(request.shots) else steps + 1  # the last shot needs no commit
        cached += passes * model.flops(SceneLayout([scene]).tail(index, capacity))
        recomputed += steps * model.flops(SceneLayout([scene]))
    return cached, recomputed


def main(options: Options) -> dict:
    torch.manual_seed(0)
    model = MMDiT(tiny()).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    request, sampling = scene_request(options), Sampling(steps=options.steps)

    def run(cached: bool) -> tuple[float, list[torch.Tensor]]:
        began = time.perf_counter()
        (shots,) = autoregressive(model, [request], sampling, cached=cached)
        return time.perf_counter() - began, shots

    (_, a), (_, b) = run(True), run(False)
    apart = max((x - y).square().mean().sqrt().item() for x, y in zip(a, b, strict=True))
    if apart > 1e-5:
        raise SystemExit(f"cached and recomputed scenes differ by rms {apart:.2g}; nothing is timed")
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.repeats):
        for cached in times:
            times[cached].append(run(cached)[0])
    cached_s, recomputed_s = (statistics.median(times[c]) for c in (True, False))
    flops_cached, flops_recomputed = predicted_flops(model, request, options.steps)
    predicted, measured = flops_recomputed / flops_cached, recomputed_s / cached_s
    record = {
        "question": "generation with a KV cache against recomputing all history",
        **{k: v for k, v in asdict(options).items() if k != "out"},
        "cached_s": round(cached_s, 4),
        "recomputed_s": round(recomputed_s, 4),
        "cached_gflops": round(flops_cached / cached_s / 1e9, 1),
        "recomputed_gflops": round(flops_recomputed / recomputed_s / 1e9, 1),
        "measured_ratio": round(measured, 3),
        "predicted_ratio": round(predicted, 3),
        "share_of_prediction": round(measured / predicted, 3),
        "rms_difference": apart,
        **provenance(),
    }
    print(
        f"{options.shots} shots: cached {cached_s:.2f} s, recomputed {recomputed_s:.2f} s, {measured:.2f} times faster;"
        f" the FLOP count predicts {predicted:.2f}, {100 * measured / predicted:.0f} % of it is reached"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
