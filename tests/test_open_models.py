"""HunyuanVideo, HunyuanVideo-1.5 and Wan against diffusers' own modules, tiny and random, in float64."""

import pytest
import torch
from open_models import AGREES, GOLDEN, TINY, Scene, golden, theirs
from safetensors.torch import load_file

from lct import SceneLayout
from lct.model.cache import KVCache
from lct.model.config import PRESETS
from lct.model.families import build
from lct.pretrained import files
from lct.pretrained.keys import keys

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our model from the files that diffusers wrote."""
    root = tmp_path_factory.mktemp("diffusers")
    for i, name in enumerate(TINY):
        theirs(name).save_pretrained(root / f"{i}")
    return lambda name: files.load(root / f"{list(TINY).index(name)}")


def test_the_golden_tensors_are_what_diffusers_makes():
    kept, now = load_file(GOLDEN), golden()
    assert kept.keys() == now.keys()
    assert all(torch.allclose(kept[key], now[key], rtol=1e-9, atol=1e-12) for key in now)


def close(got, expected):
    assert (got - expected).abs().max() <= AGREES * max(1.0, expected.abs().max())


def geometry(model, layout, text_scale=0.0):
    return layout.geometry(text_scale=text_scale, cross=model.config.cross)


@pytest.mark.parametrize("name", TINY)
def test_a_shot_is_what_diffusers_makes_of_it(name, ours):
    model = ours(name)
    scene = Scene(name, model.config)
    for i in range(3):
        video, text, times = scene.packed([i])
        got = model(video, text, times, geometry(model, SceneLayout([[scene.shot(i)]])))
        close(got, scene.theirs(i, theirs(name)))


@pytest.mark.parametrize("name", TINY)
def test_packed_shots_that_see_themselves_are_separate_calls(name, ours):
    model = ours(name)
    scene = Scene(name, model.config)
    shots = [scene.shot(i) for i in range(3)]
    expected = torch.cat([scene.theirs(i, theirs(name)) for i in range(3)])
    layout = SceneLayout([shots], "isolated")
    got = model(*scene.packed(), geometry(model, layout))
    close(got, expected)
    # wherever the shots stand
    apart = SceneLayout([shots], "isolated", offsets=[[37.0, 74.0, 111.0]])
    close(model(*scene.packed(), geometry(model, apart)), expected)


@pytest.mark.parametrize("name", TINY)
def test_context_causal_begins_as_the_single_shot_model_and_cached_is_joint(name, ours):
    model = ours(name)
    scene, c = Scene(name, model.config), model.config
    shots = [scene.shot(i) for i in range(3)]
    layout = SceneLayout([shots])
    joint = model(*scene.packed(), geometry(model, layout, 1.0))
    first = shots[0].video_rows
    alone = model(*scene.packed([0]), geometry(model, SceneLayout([shots[:1]]), 1.0))
    assert torch.allclose(joint[:first], alone, rtol=1e-12, atol=1e-12)
    rows = sum(s.video_rows if c.cross else s.rows for s in shots)
    cache = KVCache(c, 1, rows, torch.float64)
    made = []
    with torch.no_grad():
        for i in range(3):
            tail = SceneLayout([shots[: i + 1]]).tail(i, rows, text_scale=1.0, cross=c.cross)
            made.append(model(*scene.packed([i]), tail, cache))
            cache.commit()
    assert torch.allclose(torch.cat(made), joint, rtol=1e-11, atol=1e-11)
    assert (joint[first:] - model(*scene.packed(), geometry(model, layout))[first:]).abs().max() > 1e-3 or c.cross


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_diffusers(name, ours):
    model, module = ours(name).requires_grad_(True), theirs(name)
    scene = Scene(name, model.config)
    i = 1
    video, text, times = scene.packed([i])
    weights = torch.randn(len(video), model.config.patch_channels, generator=torch.Generator().manual_seed(3)).double()
    module.zero_grad()
    (scene.theirs(i, module) * weights).sum().backward()
    (model(video, text, times, geometry(model, SceneLayout([[scene.shot(i)]]))) * weights).sum().backward()
    parts = dict(module.named_parameters())
    own = dict(model.named_parameters())
    for key in keys(model.config):
        there = [parts[n].grad if parts[n].grad is not None else torch.zeros_like(parts[n]) for n in key.theirs]
        here = own[key.ours].grad if own[key.ours].grad is not None else torch.zeros_like(own[key.ours])
        expected = key.read(there)
        assert (here - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max()), key.ours


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shard", [files.SHARD, 40_000], ids=["whole", "sharded"])
def test_files_go_through_unchanged(name, shard, ours, tmp_path):
    saved, before = tmp_path / "saved", theirs(name).state_dict()
    files.save(ours(name), saved, shard)
    assert (saved / files.INDEX).is_file() == (shard == 40_000)
    stored = {key: x for file in saved.glob("*.safetensors") for key, x in load_file(file).items()}
    assert before.keys() == stored.keys() and all(torch.equal(before[key], stored[key]) for key in before)
    again = getattr(diffusers, TINY[name][0]).from_pretrained(saved, dtype=torch.float64)  # Wan keeps some in fp32
    assert all(torch.equal(before[key].to(x.dtype), x) for key, x in again.state_dict().items())
    listed = {key: list(x) if isinstance(x, tuple) else x for key, x in theirs(name).config.items() if key[0] != "_"}
    assert listed == {key: again.config[key] for key in listed}
    reloaded = files.load(saved).state_dict()
    assert all(torch.equal(weight, reloaded[key]) for key, weight in ours(name).state_dict().items())


PUBLISHED = {
    "hunyuan": ("HunyuanVideoTransformer3DModel", {}, 12.821),
    "hunyuan15": ("HunyuanVideo15Transformer3DModel", {}, 8.327),
    "wan_1_3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 1.419),
    "wan_5b": (
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        5.000,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_as_many_parameters_as_diffusers(name):
    kind, options, billions = PUBLISHED[name]
    with torch.device("meta"):
        own, there = build(PRESETS[name]()), getattr(diffusers, kind)(**options)
    assert own.parameter_count() == sum(p.numel() for p in there.parameters())
    assert round(own.parameter_count() / 1e9, 3) == billions
    shapes = {n: x.shape for key in keys(own.config) for n, x in key.write(own.state_dict()[key.ours]).items()}
    assert shapes == {n: x.shape for n, x in there.state_dict().items()}
