"""The MMDiT: the single-shot model inside it, parameter and FLOP counts, the cache."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lct.layout import SceneLayout, Shot
from lct.model.cache import KVCache
from lct.model.config import lct_3b, preset, tiny
from lct.model.mmdit import MMDiT

SCENE = [Shot(5, (1, 1, 1), "global"), Shot(4, (2, 3, 2)), Shot(3, (1, 2, 2)), Shot(6, (3, 2, 2))]


def random_model(config=None, seed=0, dtype=torch.float64):
    """A model whose weights are all random: freshly initialised blocks are the identity and would hide mistakes."""
    torch.manual_seed(seed)
    model = MMDiT(config or replace(tiny(), blocks=2)).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


def inputs(layout, model, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(model.video_out.weight.dtype)  # noqa: E731
    return (
        draw(layout.video_rows, model.config.patch_channels),
        draw(layout.text_rows, model.config.text_channels),
        torch.rand(len(layout.shots), generator=g),
    )


def rows_of(layout, tensor, index, stream):
    """The rows of one shot in a packed stream."""
    sizes = [shot.video_rows if stream == "video" else shot.text for shot in layout.shots]
    return tensor.split(sizes)[index]


def test_lct_adds_no_parameter_and_a_one_shot_layout_is_the_single_shot_model():
    """Packed isolated shots without a global prompt equal separate single-shot calls: only relative positions count."""
    model, layout = random_model(), SceneLayout([SCENE[1:]], "isolated")
    video, text, times = inputs(layout, model)
    packed = model(video, text, times, layout)
    for i, shot in enumerate(layout.shots):
        alone = model(
            rows_of(layout, video, i, "video"),
            rows_of(layout, text, i, "text"),
            times[i : i + 1],
            SceneLayout([[shot]]),
        )
        assert torch.allclose(rows_of(layout, packed, i, "video"), alone, atol=1e-6, rtol=0)


def test_each_shot_is_modulated_by_its_own_time():
    model, layout = random_model(), SceneLayout([SCENE], "isolated")
    video, text, times = inputs(layout, model)
    changed = times.clone()
    changed[2] = 1 - changed[2]
    before, after = (model(video, text, t, layout) for t in (times, changed))
    moved = [not torch.equal(rows_of(layout, before, i, "video"), rows_of(layout, after, i, "video")) for i in range(4)]
    assert moved == [False, False, True, False]


def test_future_shots_leave_earlier_velocities_bitwise_equal():
    model, layout = random_model(dtype=torch.float32), SceneLayout([SCENE])
    video, text, times = inputs(layout, model)
    changed = video.clone()
    changed[-SCENE[3].video_rows :] = float("nan")
    before, after = model(video, text, times, layout), model(changed, text, times, layout)
    for i in range(3):
        assert torch.equal(rows_of(layout, before, i, "video"), rows_of(layout, after, i, "video"))


@pytest.mark.parametrize("chunks", [(4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)], ids=str)
def test_cache_equals_joint_in_any_chunking(chunks):
    model, layout = random_model(), SceneLayout([SCENE, SCENE])
    video, text, times = inputs(layout, model)
    joint = model(video, text, times, layout)
    cache = KVCache(model.config, 2, layout.scene_rows[0] + 3, torch.float64)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    pieces = {}
    for chunk in chunks:
        last = cache.shots + chunk
        geometry = SceneLayout([SCENE[:last]] * 2).tail(cache.shots, cache.capacity)
        new = [4 * b + i for b in range(2) for i in range(cache.shots, last)]
        gather = lambda x, stream: torch.cat([rows_of(layout, x, i, stream) for i in new])  # noqa: E731, B023
        out = model(gather(video, "video"), gather(text, "text"), times[new], geometry, cache)
        cache.commit(chunk)
        pieces |= dict(zip(new, out.split([layout.shots[i].video_rows for i in new]), strict=True))
    cached = torch.cat([pieces[i] for i in range(8)])
    assert (cached - joint).abs().max() <= 1e-10


def test_a_shot_in_the_making_is_rewritten_and_rewind_forgets():
    model = random_model()
    layout, cache = SceneLayout([SCENE]), KVCache(model.config, 1, 100, torch.float64)
    video, text, times = inputs(layout, model)
    first = SceneLayout([SCENE[:3]])
    rows = sum(shot.video_rows for shot in SCENE[:3]), sum(shot.text for shot in SCENE[:3])
    model(video[: rows[0]], text[: rows[1]], times[:3], first.tail(0, 100), cache)
    cache.commit(3)
    tail = layout.tail(3, 100)
    last = lambda t: model(video[rows[0] :], text[rows[1] :], t, tail, cache)  # noqa: E731
    expected = last(times[3:])
    last(torch.tensor([0.123]))
    assert torch.equal(last(times[3:]), expected)
    cache.commit()
    cache.rewind(3)
    assert torch.equal(last(times[3:]), expected)
    with pytest.raises(ValueError, match="shots: expected 0 to 3"):
        cache.rewind(4)


def test_lct_3b_has_three_billion_parameters():
    with torch.device("meta"):
        count = MMDiT(lct_3b()).parameter_count()
    assert abs(count - 3.0e9) <= 0.1e9


def test_flops_match_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model, layout = random_model(), SceneLayout([SCENE])
    with FlopCounterMode(display=False) as counter:
        model(*inputs(layout, model), layout)
    c = model.config
    attention = c.blocks * layout.flops(c.heads, c.head_dim)  # torch's counter does not look into this project's
    assert counter.get_total_flops() == model.flops(layout) - attention


def test_kv_bytes_are_those_of_the_cache():
    model = random_model()
    cache = KVCache(model.config, 2, 50, torch.float64)
    assert cache.bytes == model.kv_bytes(100, torch.float64)


def test_a_row_norm_and_fewer_key_heads_are_only_configuration():
    config = replace(tiny(), blocks=1, norm_scope="row", kv_heads=1, rope_axes=(8, 8, 8))
    model, layout = random_model(config), SceneLayout([SCENE])
    out = model(*inputs(layout, model), layout)
    assert out.shape == (layout.video_rows, 48) and out.isfinite().all()


def test_implementations_agree_through_the_whole_model():
    model, layout = random_model(), SceneLayout([SCENE, SCENE[1:]])
    x = inputs(layout, model)
    assert torch.allclose(model(*x, layout, impl="sdpa"), model(*x, layout, impl="reference"), atol=1e-12)


@pytest.mark.parametrize("wrong", ["video", "text", "times"])
def test_rows_that_do_not_match_the_layout_are_named(wrong):
    model, layout = random_model(), SceneLayout([SCENE])
    tensors = dict(zip(("video", "text", "times"), inputs(layout, model), strict=True))
    tensors[wrong] = tensors[wrong][:-1]
    with pytest.raises(ValueError, match=f"{wrong}: the layout and model expect"):
        model(**tensors, geometry=layout)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="lct_3b"):
        preset("lct_30b")


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"kv_heads": 3}, {"rope_axes": (16, 16, 16)}], ids=str)
def test_impossible_models_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        replace(tiny(), **wrong)


def test_a_cache_of_another_capacity_is_refused_before_it_is_written():
    model, layout = random_model(), SceneLayout([SCENE])
    cache = KVCache(model.config, 1, 100, torch.float64)
    for tensor in cache.keys:
        tensor.fill_(7.0)
    with pytest.raises(ValueError, match="cache: the geometry is for 2 blocks of 60 rows, got 2 of 100"):
        model(*inputs(layout, model), layout.tail(0, 60), cache)
    assert all((tensor == 7.0).all() for tensor in cache.keys)


def test_every_parameter_has_a_gradient():
    model, layout = random_model(), SceneLayout([SCENE])
    model.requires_grad_(True)
    ids = torch.arange(layout.text_rows) % model.config.vocabulary
    video, _, times = inputs(layout, model)
    model(video, model.text_encoder(ids, ids), times, layout).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == ["blocks.1.text.q_norm"]  # the last block's text is looked at, and looks at nothing that is read


def test_the_model_compiles_at_most_twice_over_one_to_nine_shots():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = random_model(dtype=torch.float32), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for shots in (1, 2, 4, 6, 9):
        layout = SceneLayout([[Shot(5 + i, (2, 3 + i, 4)) for i in range(shots)]])
        x = inputs(layout, model)
        geometry = layout.geometry()
        assert torch.allclose(compiled(*x, geometry), model(*x, geometry), atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_recompute_mismatch(impl):
    """Blocks recomputed in the backward pass (activation checkpointing) give the same loss and gradients."""
    model, layout = random_model(dtype=torch.float32).requires_grad_(), SceneLayout([SCENE], "context_causal")
    arguments = (*inputs(layout, model), layout.geometry())

    def loss_and_gradients():
        model.zero_grad()
        loss = model(*arguments, impl=impl).square().mean()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = loss_and_gradients()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    again, recomputed = loss_and_gradients()
    assert (again - loss).abs() <= 1e-5 * loss.abs()
    assert len(gradients) == len(recomputed) > 50
    for a, b in zip(gradients, recomputed, strict=True):
        assert (a - b).abs().max() <= 5e-5 * a.abs().max()
