"""A diffusers transformer that sees shots: one shot is the module as it was, later shots change no earlier one."""

import pytest
import torch
from open_models import theirs

pytest.importorskip("diffusers")

from lct.pretrained.processor import Shots, _Texts, use_shots

NAMES = ("hunyuan", "hunyuan15", "wan")
FRAMES, HEIGHT, WIDTH = 5, 4, 6


def inputs(name, module, batch=2):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    c = module.config
    latents, when = normal(batch, c.in_channels, FRAMES, HEIGHT, WIDTH), torch.full((batch,), 500.0).double()
    if name == "wan":
        return {"hidden_states": latents, "timestep": when, "encoder_hidden_states": normal(batch, 6, c.text_dim)}
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])[:batch]
    given = {"hidden_states": latents, "timestep": when, "encoder_attention_mask": mask}
    given["encoder_hidden_states"] = normal(batch, 6, c.text_embed_dim)
    if name == "hunyuan":
        guidance = torch.full((batch,), 6000.0).double()
        return given | {"pooled_projections": normal(batch, c.pooled_projection_dim), "guidance": guidance}
    glyphs = {"encoder_hidden_states_2": normal(batch, 3, c.text_embed_2_dim), "encoder_attention_mask_2": mask[:, 1:4]}
    return given | glyphs | {"image_embeds": torch.zeros(batch, 2, c.image_embed_dim).double()}


@torch.no_grad()
def run(module, given):
    return module(**given).sample


def seen(module, shots, given):
    restore = use_shots(module, shots)
    try:
        return run(module, given)
    finally:
        restore()


@pytest.mark.parametrize("name", NAMES)
def test_one_shot_and_a_whole_view_are_the_module_as_it_was(name):
    module = theirs(name)
    given = inputs(name, module)
    expected = run(module, given)
    for shots in (Shots((FRAMES,)), Shots((2, 1, 2), "bidirectional")):
        assert torch.allclose(seen(module, shots, given), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(run(module, given), expected)  # and the old processors are back


@pytest.mark.parametrize("name", NAMES)
def test_later_shots_change_no_earlier_one(name):
    module, shots = theirs(name), Shots((2, 1, 2))
    given = inputs(name, module)
    usual = seen(module, shots, given)
    for last, same in ((2, 3), (1, 2)):  # change the last shot, then the last two
        other = dict(given, hidden_states=given["hidden_states"].clone())
        other["hidden_states"][:, :, same:] *= -1
        changed = seen(module, shots, other)
        assert torch.equal(changed[:, :, :same], usual[:, :, :same]), last
        assert (changed[:, :, same:] - usual[:, :, same:]).abs().max() > 1e-3
    earlier = dict(given, hidden_states=given["hidden_states"].clone())
    earlier["hidden_states"][:, :, :2] *= -1
    assert (seen(module, shots, earlier)[:, :, 3:] - usual[:, :, 3:]).abs().max() > 1e-4
    alone = Shots((2, 1, 2), "isolated")
    if name == "wan":
        assert torch.equal(seen(module, alone, earlier)[:, :, 2:], seen(module, alone, given)[:, :, 2:])


def test_each_shot_reads_the_global_prompt_and_its_own():
    module = theirs("wan")
    given = inputs("wan", module)
    shots = Shots((2, 1, 2), "isolated", texts=((1, 3), (3, 5), (5, 6)))
    usual = seen(module, shots, given)
    bounds = ((0, 2), (2, 3), (3, 5))
    for row, readers in ((0, (0, 1, 2)), (2, (0,)), (3, (1,)), (5, (2,))):
        other = dict(given, encoder_hidden_states=given["encoder_hidden_states"].clone())
        other["encoder_hidden_states"][:, row] *= -1
        changed = seen(module, shots, other)
        for i, (a, b) in enumerate(bounds):
            assert torch.equal(changed[:, :, a:b], usual[:, :, a:b]) == (i not in readers)


def test_the_mask_is_read_once_a_pass(monkeypatch):
    module = theirs("hunyuan15")
    given, read = inputs("hunyuan15", module), []
    counts = _Texts.counts

    def counted(self, mask, words, batch):
        before = self._counts
        found = counts(self, mask, words, batch)
        read.append(found is not before)
        return found

    monkeypatch.setattr(_Texts, "counts", counted)
    first = seen(module, Shots((2, 3)), given)
    assert len(read) == len(module.transformer_blocks) > 1 and sum(read) == 1
    mask = torch.tensor([[1, 1, 0]])
    texts = _Texts()
    assert texts.counts(mask, 3, 1) == (2,)
    mask[0, 1] = 0  # the same tensor, and no longer the same mask
    assert texts.counts(mask, 3, 1) == (1,)
    assert torch.equal(first, seen(module, Shots((2, 3)), given))
    with torch.inference_mode():  # whose tensors count no changes
        assert torch.equal(first, seen(module, Shots((2, 3)), inputs("hunyuan15", module)))


def test_what_does_not_fit_is_refused():
    module = theirs("wan")
    with pytest.raises(ValueError, match="do they add up"):
        seen(module, Shots((2, 2, 3)), inputs("wan", module))
    use_shots(module, Shots((FRAMES,)))()
    with pytest.raises(TypeError, match="Linear"):
        use_shots(torch.nn.Linear(1, 1), Shots((1,)))
    with pytest.raises(ValueError, match="jointly"):
        use_shots(theirs("hunyuan"), Shots((2, 3), texts=((0, 1), (1, 2))))
    for wrong in ({"frames": ()}, {"frames": (0,)}, {"frames": (1,), "visibility": "all"}):
        with pytest.raises(ValueError, match="expected"):
            Shots(**wrong)
    with pytest.raises(ValueError, match="texts"):
        Shots((1, 2), texts=((0, 1),))
