"""HunyuanVideo, HunyuanVideo-1.5 and Wan against what diffusers made of the same weights, where it is not installed."""

import pytest
import torch
from open_models import AGREES, GOLDEN, TINY, Scene, ours
from safetensors.torch import load_file

from lct import SceneLayout
from lct.model.lora import add_lora, merge_lora


def run(model, scene, which=(0, 1, 2), visibility="isolated", text_scale=0.0):
    layout = SceneLayout([[scene.shot(i) for i in which]], visibility)
    return model(*scene.packed(which), layout.geometry(text_scale=text_scale, cross=model.config.cross))


@pytest.mark.parametrize("name", TINY)
def test_packed_shots_are_what_diffusers_makes_of_each(name):
    kept, model = load_file(GOLDEN), ours(name)
    expected = torch.cat([kept[f"{name}.{i}"] for i in range(3)])
    got = run(model, Scene(name, model.config))
    assert (got - expected).abs().max() <= AGREES * max(1.0, expected.abs().max())
    assert expected.abs().max() > 0.1  # there is something to agree on


@pytest.mark.parametrize("name", TINY)
def test_another_time_text_or_weight_is_seen(name):
    model = ours(name)
    scene = Scene(name, model.config)
    video, text, times = scene.packed([0])
    geometry = SceneLayout([[scene.shot(0)]]).geometry(text_scale=0.0, cross=model.config.cross)
    usual = model(video, text, times, geometry)
    others = [(video, text, times + 0.125), (video, text * torch.linspace(0.5, 1, text.shape[1]).double(), times)]
    if name != "hunyuan15":  # whose first channel of text says what the rest is
        others.append((video, -text, times))
    assert all((model(*other, geometry) - usual).abs().max() > 1e-3 for other in others)


@pytest.mark.parametrize("name", TINY)
def test_lora_changes_nothing_at_first_and_merges_to_what_it_was(name):
    model = ours(name)
    scene = Scene(name, model.config)
    before = run(model, scene, visibility="context_causal")
    names = add_lora(model, rank=3)
    drawn = [model.get_submodule(name).down for name in names]
    assert all(0.7 < x.std() * x.shape[1] ** 0.5 < 1.3 for x in drawn) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(run(model, scene, visibility="context_causal"), before)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(f"{n}.{part}" for n in names for part in ("down", "up"))
    run(model, scene, visibility="context_causal").square().sum().backward()
    with torch.no_grad():
        for n, p in model.named_parameters():
            unread = name == "hunyuan15" and n.startswith("blocks.1.text.out")  # nothing follows the last block's text
            assert (p.grad is not None and p.grad.isfinite().all()) == (n in trained and not unread)
            if n.endswith(".up"):
                assert unread or p.grad.abs().max() > 0
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
        applied = run(model, scene, visibility="context_causal")
        merge_lora(model)
        assert not any(n.endswith((".down", ".up")) for n in model.state_dict())
        merged = run(model, scene, visibility="context_causal")
    assert (applied - before).abs().max() > 1e-2
    assert torch.allclose(applied, merged, rtol=1e-10, atol=1e-10)


def test_lora_of_nothing_is_refused():
    model = ours("wan")
    with pytest.raises(ValueError, match="targets"):
        add_lora(model, 4, ["nothing"])
    with pytest.raises(ValueError, match="rank"):
        add_lora(model, 0)
