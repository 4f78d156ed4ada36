"""diffusers' config.json of a transformer, as a configuration of ours and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from lct.model.config import HunyuanConfig, ModelConfig, WanConfig, hunyuan, hunyuan15, wan_1_3b

HUNYUAN, HUNYUAN15, WAN = (
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "WanTransformer3DModel",
)
CLASS = "_class_name"
FIELDS = {
    HUNYUAN: {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_theta": 256.0,
        "rope_axes_dim": [16, 56, 56],
        "image_condition_type": None,
    },
    HUNYUAN15: {
        "in_channels": 65,
        "out_channels": 32,
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 54,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 1152,
        "rope_theta": 256.0,
        "rope_axes_dim": [16, 56, 56],
        "target_size": 640,
        "task_type": "i2v",
        "use_meanflow": False,
    },
    WAN: {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    },
}
"""Fields of each class with the values that a config.json which leaves them out means."""
FIXED = {
    HUNYUAN: {"qk_norm": "rms_norm", "image_condition_type": None},
    HUNYUAN15: {"qk_norm": "rms_norm", "use_meanflow": False},
    WAN: {
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    },
}
"""What the models here are made for: video from text, without images through a side entrance."""
EMBEDDED_GUIDANCE = 6.0


def of_diffusers(values: dict[str, Any]) -> ModelConfig:
    """The configuration that diffusers' config.json describes. ValueError for another class, a field that it does not
    have, and a variant that has no model here."""
    name = values.get(CLASS)
    if name not in FIELDS:
        raise ValueError(f"{CLASS}: expected one of {', '.join(FIELDS)}, got {name!r}")
    known = FIELDS[name]
    unknown = sorted(key for key in values if not key.startswith("_") and key not in known)
    if unknown:
        raise ValueError(f"config.json: expected the fields of {name}, got {', '.join(unknown)} as well")
    v = known | {key: value for key, value in values.items() if key in known}
    for field, expected in FIXED[name].items():
        if v[field] != expected:
            raise ValueError(f"{field}: expected {expected!r}, which the model here is made for, got {v[field]!r}")
    try:
        config = _wan(v) if name == WAN else _hunyuan(name, v)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: {error}") from None
    return replace(config, others=_others(config, values))


def to_diffusers(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a configuration; of one from `of_diffusers`, what it said."""
    if not isinstance(config, HunyuanConfig | WanConfig):
        raise ValueError(f"family: expected hunyuan or wan, which diffusers has, got {config.family!r}")
    return _of_ours(config) | json.loads(config.others)


def _others(config: ModelConfig, values: dict[str, Any]) -> str:
    own = _of_ours(config)
    return json.dumps({key: value for key, value in values.items() if key not in own or own[key] != value})


def _hunyuan(name: str, v: dict[str, Any]) -> HunyuanConfig:
    heads, head_dim, patch = v["num_attention_heads"], v["attention_head_dim"], v["patch_size"]
    single = v.get("num_single_layers", 0)
    shared = {
        "blocks": v["num_layers"] + single,
        "single_blocks": single,
        "refiner_blocks": v["num_refiner_layers"],
        "width": heads * head_dim,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "mlp_width": int(heads * head_dim * v["mlp_ratio"]),
        "latent_channels": v["out_channels"],
        "patch": (v["patch_size_t"], patch, patch),
        "text_channels": v["text_embed_dim"],
        "rope_theta": float(v["rope_theta"]),
        "rope_axes": tuple(v["rope_axes_dim"]),
    }
    if name == HUNYUAN15:
        return replace(
            hunyuan15(),
            **shared,
            frame_channels=v["in_channels"] - v["out_channels"],
            glyph_channels=v["text_embed_2_dim"],
            image_channels=v["image_embed_dim"],
        )
    if v["in_channels"] != v["out_channels"]:
        raise ValueError(f"in_channels: expected out_channels {v['out_channels']}, got {v['in_channels']}")
    guidance = EMBEDDED_GUIDANCE if v["guidance_embeds"] else None
    return replace(hunyuan(), **shared, pooled_channels=v["pooled_projection_dim"], guidance=guidance)


def _wan(v: dict[str, Any]) -> WanConfig:
    if v["in_channels"] != v["out_channels"]:
        raise ValueError(f"in_channels: expected out_channels {v['out_channels']}, got {v['in_channels']}")
    heads, head_dim = v["num_attention_heads"], v["attention_head_dim"]
    side = 2 * (head_dim // 6)
    return replace(
        wan_1_3b(),
        blocks=v["num_layers"],
        width=heads * head_dim,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=v["ffn_dim"],
        latent_channels=v["out_channels"],
        patch=tuple(v["patch_size"]),
        text_channels=v["text_dim"],
        time_channels=v["freq_dim"],
        rope_axes=(head_dim - 2 * side, side, side),
    )


def _of_ours(c: ModelConfig) -> dict[str, Any]:
    """Every field of theirs, from what ours says."""
    shared = {"num_attention_heads": c.heads, "attention_head_dim": c.head_dim, "out_channels": c.latent_channels}
    if isinstance(c, WanConfig):
        return FIELDS[WAN] | shared | {
            CLASS: WAN,
            "patch_size": list(c.patch),
            "in_channels": c.latent_channels,
            "text_dim": c.text_channels,
            "freq_dim": c.time_channels,
            "ffn_dim": c.mlp_width,
            "num_layers": c.blocks,
        }  # fmt: skip
    assert isinstance(c, HunyuanConfig)
    shared |= {
        "in_channels": c.latent_channels + c.frame_channels,
        "num_layers": c.blocks - c.single_blocks,
        "num_refiner_layers": c.refiner_blocks,
        "mlp_ratio": c.mlp_width / c.width,
        "patch_size": c.patch[2],
        "patch_size_t": c.patch[0],
        "text_embed_dim": c.text_channels,
        "rope_theta": c.rope_theta,
        "rope_axes_dim": list(c.rope_axes),
    }
    if c.of_kinds:
        own = {CLASS: HUNYUAN15, "text_embed_2_dim": c.glyph_channels, "image_embed_dim": c.image_channels}
        return FIELDS[HUNYUAN15] | shared | own
    own = {CLASS: HUNYUAN, "num_single_layers": c.single_blocks, "pooled_projection_dim": c.pooled_channels}
    return FIELDS[HUNYUAN] | shared | own | {"guidance_embeds": c.guidance is not None}
