"""Tiny random HunyuanVideo, HunyuanVideo-1.5 and Wan, and scenes for them; what diffusers makes of these is kept in
`golden/`, so that it can be checked where diffusers is not installed. `python tests/open_models.py` writes that file.
"""

import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lct import Shot
from lct.data.latents import patchify
from lct.model.families import build
from lct.model.hunyuan import GLYPHS, IMAGE, LANGUAGE
from lct.pretrained.configs import CLASS, of_diffusers
from lct.pretrained.keys import keys

GOLDEN = Path(__file__).parent / "golden" / "open_models.safetensors"
AGREES = 1e-6  # of the largest value: their rotation tables are fp32
SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12), "num_refiner_layers": 2}
TINY = {
    "hunyuan": ("HunyuanVideoTransformer3DModel", SIZES | {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": 24,
        "pooled_projection_dim": 12,
    }),
    "hunyuan, not distilled": ("HunyuanVideoTransformer3DModel", SIZES | {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "text_embed_dim": 24,
        "pooled_projection_dim": 12, "guidance_embeds": False, "patch_size_t": 2,
    }),
    "hunyuan15": ("HunyuanVideo15Transformer3DModel", SIZES | {
        "in_channels": 13, "out_channels": 6, "num_layers": 2, "text_embed_dim": 24, "text_embed_2_dim": 20,
        "image_embed_dim": 16, "target_size": 480, "task_type": "t2v",
    }),
    "wan": ("WanTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 36, "in_channels": 4, "out_channels": 4, "text_dim": 24,
        "freq_dim": 32, "ffn_dim": 96, "num_layers": 2,
    }),
}  # fmt: skip
TIMES = (0.75, 0.5, 0.125)  # as timesteps they are exact in fp32
SHOTS = ((3, 4, 6), (1, 6, 4), (2, 2, 8))  # latent frames, height, width
LENGTHS = (5, 3, 7)  # of text


def drawn(name, *shape):
    """Numbers with a deviation of one that follow from a name, on every machine."""
    uniform = np.random.default_rng(zlib.crc32(name.encode())).random(shape)
    return torch.from_numpy(math.sqrt(12) * (uniform - 0.5))


def weight(name, shape):
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    return drawn(name, *shape) * 0.5 / math.sqrt(fan_in)


@cache
def theirs(name):
    """A module of diffusers in float64."""
    import diffusers

    kind, options = TINY[name]
    model = getattr(diffusers, kind)(**options).double().eval()
    model.load_state_dict({key: weight(key, x.shape) for key, x in model.state_dict().items()})
    return model


def ours(name):
    """Our model with the same weights, without a way through files."""
    kind, options = TINY[name]
    model = build(of_diffusers({CLASS: kind} | options)).double()
    own = model.state_dict()
    shapes = {key: [(n, x.shape) for n, x in key.write(own[key.ours]).items()] for key in keys(model.config)}
    model.load_state_dict({key.ours: key.read([weight(*part) for part in parts]) for key, parts in shapes.items()})
    return model.eval()


class Scene:
    """Three shots of random media and text, for both sides."""

    def __init__(self, name, c):
        def normal(*shape):
            self.draws += 1
            return drawn(f"{name} {self.draws}", *shape)

        self.draws = 0
        self.name, self.c = name, c
        channels = c.latent_channels + c.condition_channels
        frames = [(t * c.patch[0], h, w) for t, h, w in SHOTS]
        self.latents = [normal(*size, channels) for size in frames]
        self.language = [normal(count, c.text_channels) for count in LENGTHS]
        if name == "hunyuan15":
            self.glyphs = [normal(count, c.glyph_channels) for count in (2, 0, 4)]
            self.images = [normal(3, c.image_channels) if i == 1 else normal(0, c.image_channels) for i in range(3)]
        if name.startswith("hunyuan") and name != "hunyuan15":
            self.pooled = [normal(c.pooled_channels) for _ in LENGTHS]

    def text(self, i):
        """Rows of one shot's text as our model takes them."""
        c, language = self.c, self.language[i]
        if self.name == "wan":
            return language
        if self.name != "hunyuan15":
            return torch.cat([language, self.pooled[i].expand(len(language), -1)], 1)
        parts = []
        for kind, rows in ((IMAGE, self.images[i]), (GLYPHS, self.glyphs[i]), (LANGUAGE, language)):
            wide = torch.zeros(len(rows), c.text_row_channels, dtype=torch.float64)
            wide[:, 0], wide[:, 1 : 1 + rows.shape[1]] = kind, rows
            parts.append(wide)
        return torch.cat(parts)

    def shot(self, i):
        t, h, w, _ = self.latents[i].shape
        pt, ph, pw = self.c.patch
        return Shot(len(self.text(i)), (t // pt, h // ph, w // pw))

    def rows(self, i):
        return patchify(self.latents[i], self.c.patch)

    def packed(self, which=(0, 1, 2)):
        return (
            torch.cat([self.rows(i) for i in which]),
            torch.cat([self.text(i) for i in which]),
            torch.tensor([TIMES[i] for i in which], dtype=torch.float64),
        )

    def theirs(self, i, model, padding=4):
        """What diffusers makes of one shot, its text padded behind."""
        latents = self.latents[i].permute(3, 0, 1, 2)[None]
        when = torch.tensor([1000 * TIMES[i]], dtype=torch.float64)

        def padded(rows, extra=padding):
            mask = torch.tensor([[1] * len(rows) + [0] * extra])
            return torch.cat([rows, 9 + rows.new_zeros(extra, rows.shape[1])])[None], mask

        text, mask = padded(self.language[i])
        if self.name == "wan":
            out = model(latents, when, self.language[i][None])
        elif self.name == "hunyuan15":
            glyphs, glyph_mask = padded(self.glyphs[i], 3)
            image = self.images[i][None] if len(self.images[i]) else torch.zeros(1, 3, self.c.image_channels).double()
            out = model(
                latents, when, text, mask, encoder_hidden_states_2=glyphs, encoder_attention_mask_2=glyph_mask,
                image_embeds=image,
            )  # fmt: skip
        else:
            guidance = None if self.c.guidance is None else torch.tensor([1000 * self.c.guidance]).double()
            out = model(latents, when, text, mask, self.pooled[i][None], guidance)
        return patchify(out.sample[0].permute(1, 2, 3, 0), self.c.patch)


def golden():
    """What diffusers makes of every shot, by model and number of the shot."""
    with torch.no_grad():
        scenes = {name: Scene(name, ours(name).config) for name in TINY}
        return {f"{name}.{i}": s.theirs(i, theirs(name)).contiguous() for name, s in scenes.items() for i in range(3)}


if __name__ == "__main__":
    save_file(golden(), GOLDEN)
