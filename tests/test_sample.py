"""Samplers: given media untouched, cached equal to recomputed, seeds of their own, guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_model import random_model

from lct.data.toy import ToyScenes
from lct.model.config import tiny
from lct.model.mmdit import MMDiT
from lct.sample import Sampling, SceneRequest, autoregressive, joint
from lct.sample.request import HISTORY, as_history, shot_noise, usual_dtype
from lct.train.runs import run

PATCH = tiny().patch


def requests(count=2, shots=3, given=(), preset="three_characters", seed=0):
    toy = ToyScenes(preset)
    return [SceneRequest.like(toy.evaluation_scene(i, 0, shots), PATCH, seed + 50 * i, given) for i in range(count)]


def worst(a, b):
    return max((x - y).abs().max().item() for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("given", [(), (0,), (0, 1)], ids=str)
def test_cached_rollout_equals_recomputing_all_history(guidance, given):
    model, scenes = random_model(), requests(given=given)
    sampling = Sampling(steps=4, guidance=guidance, history_time=0.3)
    cached, recomputed = (autoregressive(model, scenes, sampling, cached=c) for c in (True, False))
    assert worst(cached, recomputed) <= 1e-10
    assert worst(cached, [[torch.zeros_like(x) for x in s] for s in cached]) > 1


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 1.0), (1.0, 1.5), (2.5, 1.5)], ids=str)
def test_a_shot_over_its_history_is_joint_denoising_with_that_history_given(weights):
    """The last shot, with those before it given as they became, at t_c."""
    model, scenes = random_model(), requests()
    sampling = Sampling(3, *weights, history_time=0.3)
    became = autoregressive(model, scenes, sampling)
    for last in (0, 2):
        given = [
            replace(scene, shots=tuple(
                replace(shot, given=x, history_time=0.3) if i < last else shot
                for i, (shot, x) in enumerate(zip(scene.shots[: last + 1], latents, strict=False))
            ))
            for scene, latents in zip(scenes, became, strict=True)
        ]  # fmt: skip
        together = joint(model, given, sampling, "context_causal")
        assert worst([[s[last]] for s in together], [[s[last]] for s in became]) <= 1e-10


def test_cached_forward_equals_recomputed_forward_in_fp32():
    model, scenes = random_model(dtype=torch.float32), requests()
    sampling = Sampling(steps=1)
    cached, recomputed = (autoregressive(model, scenes, sampling, cached=c) for c in (True, False))
    for a, b in zip(sum(cached, []), sum(recomputed, []), strict=True):
        assert (a - b).square().mean().sqrt() <= 1e-5 * b.square().mean().sqrt()


@pytest.mark.parametrize("sampler", [joint, autoregressive])
def test_given_latents_come_back_bitwise_and_matter(sampler):
    model, given = random_model(dtype=torch.float32), requests(given=(0,))
    result = sampler(model, given, Sampling(steps=3))
    other = sampler(model, requests(given=(0,), preset="one_character"), Sampling(steps=3))
    for scene, request in zip(result, given, strict=True):
        assert torch.equal(scene[0], request.shots[0].given)
    assert not torch.equal(result[0][1], other[0][1])


def test_each_shot_has_its_own_seed():
    """Re-rolling one shot leaves the noise of the others, and the shots before it, as they were."""
    model, (scene,) = random_model(dtype=torch.float32), requests(count=1)
    rerolled = replace(scene, shots=(*scene.shots[:2], replace(scene.shots[2], seed=999)))
    before, after = (autoregressive(model, [s], Sampling(steps=2))[0] for s in (scene, rerolled))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_history_noise_depends_on_the_shot_alone():
    (scene,) = requests(count=1)
    shot, clean = scene.shots[0], torch.randn(scene.shots[0].video[0] * 16, 48)
    shot = replace(shot, video=(scene.shots[0].video[0], 4, 4))
    noise = shot_noise(shot, HISTORY, clean)
    assert torch.allclose(as_history(clean, shot, 0.25), 0.75 * clean + 0.25 * noise, atol=1e-6)
    assert torch.equal(as_history(clean, shot, 0.0), clean)


def test_scenes_in_one_batch_equal_scenes_apart():
    model, scenes = random_model(), requests(count=3)
    together = joint(model, scenes, Sampling(steps=3))
    apart = [joint(model, [scene], Sampling(steps=3))[0] for scene in scenes]
    assert worst(together, apart) <= 1e-10


def test_euler_is_exact_on_a_straight_path():
    """A model whose velocity is ε − z_0 for a known z_0 lands on it, whatever the number of steps."""

    class Straight(MMDiT):
        def forward(self, video, text, times, geometry, cache=None, impl="auto"):
            t = times[geometry.streams.video_shot][:, None].to(video.dtype)
            return (video - 0.5) / t.clamp(min=1e-9)

    model = Straight(replace(tiny(), blocks=1)).double()
    for steps in (1, 5):
        for scene in joint(model, requests(), Sampling(steps=steps)):
            assert all(torch.allclose(x, torch.full_like(x, 0.5)) for x in scene)


def test_guidance_one_is_the_prompted_velocity_and_null_is_its_other_end():
    model, scenes = random_model(), requests(count=1, shots=1)
    at = lambda w: joint(model, scenes, Sampling(steps=1, guidance=w))[0][0]  # noqa: E731
    assert torch.allclose(at(3.0) - at(0.0), 3 * (at(1.0) - at(0.0)), atol=1e-9)
    assert not torch.allclose(at(1.0), at(0.0))


def test_bidirectional_autoregression_needs_no_cache_and_refuses_one():
    model, scenes = random_model(), requests(count=1)
    assert len(autoregressive(model, scenes, Sampling(steps=2), "bidirectional", cached=False)[0]) == 3
    with pytest.raises(ValueError, match="bidirectional"):
        autoregressive(model, scenes, Sampling(steps=2), "bidirectional")


def test_scenes_of_different_length_are_refused():
    with pytest.raises(ValueError, match="as many shots in each"):
        autoregressive(random_model(), [*requests(1, 2), *requests(1, 3)], Sampling(steps=1))


def test_images_and_videos_mix_in_one_scene():
    model, (scene,) = random_model(), requests(count=1)
    image = replace(scene.shots[1], video=(1, *scene.shots[1].video[1:]))
    result = autoregressive(model, [replace(scene, shots=(scene.shots[0], image, scene.shots[2]))], Sampling(steps=2))
    assert [len(x) for x in result[0]] == [int(np.prod(s.video)) for s in (scene.shots[0], image, scene.shots[2])]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"history_time": 1.0}, {"history_time": -0.1}], ids=str)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_given_shot_of_the_wrong_size_is_refused_by_name():
    (scene,) = requests(count=1, given=(0,))
    with pytest.raises(ValueError, match=r"given: expected \[\d+, channels\]"):
        replace(scene.shots[0], given=scene.shots[0].given[:-1])
    narrow = replace(scene.shots[0], given=scene.shots[0].given[:, :40])
    with pytest.raises(ValueError, match="given: expected 48 channels, got 40"):
        joint(random_model(), [replace(scene, shots=(narrow, *scene.shots[1:]))], Sampling(steps=1))
    with pytest.raises(ValueError, match="seed"):
        replace(scene.shots[1], seed=-1)


@pytest.mark.parametrize(
    ("device", "trained", "asked"),
    [("cuda:1", "bfloat16", "bfloat16"), ("cuda", "float32", None), ("cpu", "bfloat16", None)],
)
def test_what_was_trained_in_half_precision_is_sampled_in_it_on_a_gpu(device, trained, asked):
    assert usual_dtype(replace(run("tiny_lct"), compute_dtype=trained), device) == asked


@pytest.mark.parametrize("sampler", [joint, autoregressive])
def test_half_precision_streams_keep_latents_and_times_in_fp32(sampler):
    model, scenes = random_model(dtype=torch.float32), requests(given=(0,))
    full, half = (sampler(model, scenes, Sampling(steps=3, dtype=d)) for d in (None, "bfloat16"))
    for a, b, request in zip(full, half, scenes, strict=True):
        assert torch.equal(b[0], request.shots[0].given)
        assert b[1].dtype == torch.float32 and not torch.equal(a[1], b[1])
        assert (a[1] - b[1]).norm() < 0.1 * a[1].norm()
