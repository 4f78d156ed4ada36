"""Where history is kept changes nothing: cache, pool, CPU memory, block by block; 8 bits change little, and say so."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_models import TINY, drawn
from open_models import ours as open_model
from test_model import random_model

from lct import SceneLayout, Shot
from lct.data.toy import ToyScenes
from lct.model.cache import KVCache
from lct.model.config import Memory, tiny
from lct.model.pool import HistoryPool, LayeredContext
from lct.model.text import Finished
from lct.sample import Sampling, SceneRequest, ShotRequest, autoregressive, joint
from lct.train.weights import load_model, save_weights

WEIGHTS = Path(__file__).parents[1] / "bench" / "findings" / "weights" / "causal.safetensors"
NAMES = ("mmdit", *TINY)
SIZES = ((2, 2, 3), (1, 3, 2), (2, 2, 2))


def model_of(name):
    """A tiny random model, prompts of one that others trained as rows of features drawn from their words."""
    if name == "mmdit":
        return random_model(replace(tiny(), blocks=2))
    model = open_model(name)

    def features(prompt):
        rows = drawn(f"{name} {prompt}", 1 + len(prompt.split()), model.config.text_row_channels)
        if name == "hunyuan15":
            rows[:, 0] = torch.arange(len(rows)) % 3  # of words, of words to be shown, of an image
        return rows

    model.text_encoder = Finished(features)
    return model


def scenes(model, shared="the sea"):
    channels = model.config.patch_channels
    made = []
    for b in range(2):
        given = drawn(f"given {b}", 12, channels)
        shots = [ShotRequest("a boat", SIZES[0], 10 * b, given)]
        shots += [ShotRequest(f"a gull {i}", size, 10 * b + i) for i, size in enumerate(SIZES[1:], 1)]
        made.append(SceneRequest(shared, tuple(shots)))
    return made


def latents(made):
    return torch.cat([x for scene in made for x in scene])


def same(a, b):
    return all(torch.equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "history_guidance": 1.5}], ids=["plain", "guided"])
@pytest.mark.parametrize("shared", ["the sea", None], ids=["global prompt", "no global prompt"])
@pytest.mark.parametrize("name", NAMES)
def test_cached_is_recomputed_is_pooled_is_layered(name, shared, options):
    model = model_of(name)
    asked, sampling = scenes(model, shared), Sampling(steps=2, **options)
    recomputed = autoregressive(model, asked, sampling, cached=False)
    cached = autoregressive(model, asked, sampling)
    pooled = autoregressive(model, asked, sampling, memory=Memory())
    layered = autoregressive(model, asked, sampling, memory=Memory(device="cpu", layered=True))
    for other in (cached, pooled):
        assert torch.allclose(latents(other), latents(recomputed), rtol=1e-9, atol=1e-9)
    assert same(pooled, layered)
    assert not torch.allclose(latents(joint(model, asked, sampling)), latents(recomputed), atol=1e-3)


@pytest.mark.parametrize("keep", ["pass", "step"])
@pytest.mark.parametrize("name", ["mmdit", "hunyuan15", "wan"])
def test_chosen_shots_from_any_memory(name, keep):
    model, chosen = model_of(name), [[], [0], [0]]
    options = {"chosen": chosen}
    asked, sampling = scenes(model), Sampling(steps=2, guidance=1.5, keep=keep)
    usual = autoregressive(model, asked, sampling, **options)
    assert same(usual, autoregressive(model, asked, sampling, memory=Memory("cpu", layered=True), **options))
    assert not same(usual, autoregressive(model, asked, sampling))


@pytest.mark.parametrize("layered", [False, True], ids=["whole", "layered"])
@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_change_little(name, layered, capsys):
    model = model_of(name)
    asked, sampling = scenes(model), Sampling(steps=4)
    usual = latents(autoregressive(model, asked, sampling, memory=Memory()))
    small = latents(autoregressive(model, asked, sampling, memory=Memory(fp8=True, layered=layered)))
    error = float((small - usual).square().mean().sqrt() / usual.square().mean().sqrt())
    with capsys.disabled():
        print(f"\n8-bit pool, {name}: latents differ by {100 * error:.2f} % rms")
    assert 0 < error < 0.1


def test_eight_bits_keep_each_row_of_each_head():
    """Three bits of mantissa: every value within a sixteenth of itself or of a thousandth of its row's largest."""
    config = replace(tiny(), blocks=2)
    pool = HistoryPool(config, 1, 8, fp8=True)
    written = [drawn(f"rows {i}", 2, 6, config.kv_heads, config.head_dim).float() * 10**i for i in range(2)]
    slots = pool.admit([6])
    for block, rows in enumerate(pool.written(slots)):
        for into, x in zip(rows[:2], written[block], strict=True):
            into.copy_(x)
    for block in range(2):
        read = pool.read(block, [range(6)], torch.arange(6))
        for got, x in zip(read[:2], written[block], strict=True):
            slack = x.abs() / 16 + x.abs().amax(-1, keepdim=True) / 1000
            assert ((got[read.slots] - x).abs() <= slack).all()
    assert (read[0] == 0).logical_not().any()


def test_bytes_are_what_is_promised():
    config = replace(tiny(), blocks=6)
    half = HistoryPool(config, 1, 100, torch.bfloat16)
    small = HistoryPool(config, 1, 100, torch.bfloat16, fp8=True)
    assert half.bytes == 6 * 2 * 100 * 4 * 32 * 2
    assert small.bytes == half.bytes // 2 + 6 * 2 * 100 * 4 * 4  # and a scale for each row and head
    whole, layered = KVCache(config, 2, 50), LayeredContext(config, 2, 50)
    assert layered.bytes * 3 == whole.bytes and len(layered.keys) == 6


def test_a_layered_context_is_empty_after_rewinding():
    config = replace(tiny(), blocks=3)
    pool, cache = HistoryPool(config, 1, 10), LayeredContext(config, 1, 10)
    shot = Shot(1, (1, 2, 2))
    for block, rows in enumerate(pool.written(pool.admit([5]))):
        rows.keys.fill_(block + 1.0)
        rows.values.fill_(block + 1.0)
    pool.assemble_(cache, [[0]], SceneLayout([[shot]]))
    assert [float(rows.values[0, 0, 0]) for rows in cache.at(torch.arange(5))] == [1, 2, 3] and cache.shots == 1
    cache.rewind(0)
    for rows in cache.at(torch.arange(5)):
        rows.values.fill_(9)
    assert [float(rows.values[0, 0, 0]) for rows in cache.at(torch.arange(5))] == [9, 9, 9]


@pytest.mark.parametrize("name", NAMES)
def test_products_kept_in_half_precision_compute_the_same(name):
    model = model_of(name).float()
    half = deepcopy(model)
    for weight in map(half.get_parameter, half.stream_weights()):
        weight.data = weight.data.bfloat16()
    sampling = Sampling(steps=2, guidance=2.0, dtype="bfloat16")
    usual, small = (autoregressive(held, scenes(held), sampling) for held in (model, half))
    assert same(usual, small)
    assert sum(w.nbytes for w in half.parameters()) < 0.8 * sum(w.nbytes for w in model.parameters())


def test_weights_are_kept_in_half_precision_where_streams_are_computed_in_it(tmp_path):
    model, config = load_model(WEIGHTS)
    products = model.stream_weights()
    for stored in (torch.float32, torch.bfloat16):
        save_weights(path := tmp_path / f"{stored}.safetensors", dict(model.state_dict()), config, stored)
        small, same_config = load_model(path, dtype="bfloat16")
        assert same_config == config
        for name, weight in load_model(path, dtype="float32")[0].named_parameters():
            kept = small.get_parameter(name)
            assert weight.dtype == torch.float32
            assert kept.dtype == (torch.bfloat16 if name in products else torch.float32)
            assert torch.equal(kept, weight.to(kept.dtype))


def test_eight_bits_on_trained_weights(capsys):
    """Scenes of the findings' model: what a pool in 8 bits costs, in latents and in what is seen."""
    model, config = load_model(WEIGHTS)
    toy = ToyScenes("returning", max_shots=9)
    samples = [toy.evaluation_scene(i, 3, 6) for i in range(6)]
    asked = [SceneRequest.like(s, model.config.patch, 1000 * i, (0,)) for i, s in enumerate(samples)]
    sampling = Sampling.of(config, steps=10)
    usual, small = (autoregressive(model, asked, sampling, memory=memory) for memory in (Memory(), Memory(fp8=True)))
    error = float((latents(small) - latents(usual)).square().mean().sqrt())
    with capsys.disabled():
        print(f"\n8-bit pool, trained weights: latents of six shots differ by {error:.4f} rms of a range of 2")
    assert 0 < error < 0.1
