"""Runs: functions that return a complete configuration, in the order of the paper's stages (§ 3.2.2 to § 3.4, § 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lct.model.config import hunyuan15, lct_3b, micro, tiny, wan_5b
from lct.train.config import DataConfig, TrainConfig

PRETRAINED = "asset:tiny_pretrained"


def tiny_pretrain() -> TrainConfig:
    """Single-shot pre-training with video-only RoPE: the model that LCT starts from."""
    return TrainConfig(
        name="tiny_pretrain",
        model=tiny(),
        data=DataConfig(
            source="toy", toy="one_character", shots=4, single=1.0, cut=0.0, no_cut=0.0,
            image_probability=0.1, drop_probability=0.1,
        ),
        init=None,
        visibility="bidirectional",
        text_scale=0.0,
        steps=12_000,
        scenes=32,
        lr=2e-3,
        warmup=100,
        lr_end=0.02,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        clip=1.0,
        ema=0.998,
        time_mean=0.0,
        time_std=1.0,
        shift=1.0,
        seed=0,
        save_every=1_000,
    )  # fmt: skip


def tiny_text_rope() -> TrainConfig:
    """Text tokens get diagonal positions: short tuning on single shots (§ 3.2.2)."""
    return replace(
        tiny_pretrain(), name="tiny_text_rope", init=PRETRAINED, text_scale=1.0, steps=500, warmup=20, ema=0.98
    )


def tiny_lct() -> TrainConfig:
    """Long context tuning, bidirectional, on scenes and single shots together (§ 3.2).

    Times spread wider than in pre-training: a given shot sits at t = 0, which sigmoid(N(0, 1)) all but never draws, and
    a model that has not met nearly clean shots beside noisy ones reads less from them.
    """
    stage = tiny_text_rope()
    return replace(
        stage,
        name="tiny_lct",
        data=replace(stage.data, single=0.2, cut=0.8 / 3, no_cut=1.6 / 3),
        init="runs/tiny_text_rope",
        steps=1_250,
        scenes=16,
        lr=2e-3,
        warmup=30,
        ema=0.99,
        time_std=1.6,
    )


def tiny_causal() -> TrainConfig:
    """Context-causal tuning from the bidirectional weights (§ 3.3)."""
    return replace(
        tiny_lct(),
        name="tiny_causal",
        init="runs/tiny_lct",
        visibility="context_causal",
        steps=150,
        lr=1e-3,
        warmup=10,
        ema=0.96,
    )


def micro_pretrain() -> TrainConfig:
    """Single shots of a character who comes, goes and returns in a woven world: that of the findings."""
    stage = tiny_pretrain()
    return replace(
        stage,
        name="micro_pretrain",
        model=micro(),
        data=replace(stage.data, toy="returning", shots=9),
        steps=10_000,
        save_every=500,
    )


def micro_text_rope() -> TrainConfig:
    """Text RoPE for `micro_pretrain`: the single-shot model that the findings compare with."""
    stage = tiny_text_rope()
    start = micro_pretrain()
    return replace(
        stage, name="micro_text_rope", model=start.model, data=start.data, init="runs/micro_pretrain", save_every=500
    )


def micro_lct() -> TrainConfig:
    """Long context tuning on scenes of up to nine shots, as in the paper (§ 4).

    Half of the draws are single shots: losses are averaged over shots, and with a fifth only one shot in twenty is.
    """
    stage, start = tiny_lct(), micro_text_rope()
    return replace(
        stage,
        name="micro_lct",
        model=start.model,
        data=replace(start.data, single=0.5, cut=0.3, no_cut=0.2),
        init="runs/micro_text_rope",
        steps=6_000,
        ema=0.995,
        save_every=250,
    )


def micro_causal() -> TrainConfig:
    """Context-causal tuning of `micro_lct`, a ninth of the steps and the rest (§ 3.3, Fig. 9)."""
    return replace(
        micro_lct(),
        name="micro_causal",
        init="runs/micro_lct",
        visibility="context_causal",
        steps=900,
        lr=1e-3,
        warmup=10,
        ema=0.98,
        save_every=50,
    )


def film() -> TrainConfig:
    """A few scenes of one's own film, ingested with `lct ingest`: context-causal tuning of the tiny model."""
    stage = tiny_causal()
    return replace(
        stage,
        name="film",
        data=replace(stage.data, source="scenes", toy="", shots=9, single=0.1, cut=0.8, no_cut=0.1),
        init=PRETRAINED,
        steps=300,
        scenes=2,
        lr=2e-3,
    )


def paper_text_rope() -> TrainConfig:
    """Text tokens get diagonal positions, on single shots (§ 3.2.2): before `paper_lct`, for weights that rotate video
    alone. No figure of this stage is published."""
    stage = paper_lct()
    return replace(
        stage,
        name="paper_text_rope",
        data=replace(stage.data, single=1.0, cut=0.0, no_cut=0.0),
        init="single_shot_3b.safetensors",
        steps=5_000,
        ema=0.998,
    )


def paper_lct() -> TrainConfig:
    """LCT as the paper did it: 3 B parameters, nine shots, 480×480 area, 135 K iterations on 128 H800 (§ 4).

    Of its other figures the paper says that times are logit-normal and that it takes twice as many long shots as scenes
    with cuts; batch, learning rate, warm-up, betas, clip, EMA, the share of single shots, substitution and dropping are
    this project's choice. Half of the draws are single shots, as in `micro_lct`.
    """
    return TrainConfig(
        name="paper_lct",
        model=lct_3b(),
        data=DataConfig(
            source="scenes", toy="", shots=9, single=0.5, cut=0.5 / 3, no_cut=1.0 / 3,
            image_probability=0.1, drop_probability=0.1,
        ),
        init="runs/paper_text_rope",
        visibility="bidirectional",
        text_scale=1.0,
        steps=135_000,
        scenes=128,
        lr=1e-5,
        warmup=1_000,
        lr_end=1.0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip=1.0,
        ema=0.9999,
        time_mean=0.0,
        time_std=1.0,
        shift=1.0,
        seed=0,
        save_every=1_000,
        compute_dtype="bfloat16",
    )  # fmt: skip


def paper_lct_causal() -> TrainConfig:
    """Context-causal tuning as the paper did it: 9 K iterations from the weights after LCT (§ 4), of which 1 K show
    what it gives (§ 4.2, Fig. 9)."""
    return replace(
        paper_lct(),
        name="paper_lct_causal",
        init="runs/paper_lct",
        visibility="context_causal",
        steps=9_000,
        warmup=100,
        ema=0.999,
    )


def hunyuan15_lct() -> TrainConfig:
    """HunyuanVideo-1.5 tuned on scenes, its text brought to the paper's positions on the way: low-rank changes.

    Half of the shots take the time shift that the model was trained with; the others spread as widely as in `tiny_lct`,
    so that shots nearly as clean as history are met beside noisy ones.
    """
    return replace(
        paper_lct(),
        name="hunyuan15_lct",
        model=hunyuan15(),
        data=replace(paper_lct().data, source="encoded"),
        init="HunyuanVideo-1.5",
        lora=64,
        text_scale_start=0.0,
        text_scale_steps=1_000,
        steps=10_000,
        scenes=8,
        lr=1e-4,
        warmup=100,
        ema=0.999,
        shift=5.0,
        unshifted=0.5,
        time_std=1.6,
        save_every=500,
    )


def hunyuan15_lct_causal() -> TrainConfig:
    """The same tuned further with context-causal attention, for generation over a cache."""
    stage = hunyuan15_lct()
    return replace(
        stage,
        name="hunyuan15_lct_causal",
        init="runs/hunyuan15_lct",
        visibility="context_causal",
        text_scale_start=None,
        text_scale_steps=0,
        steps=1_000,
        ema=0.99,
    )


def wan5b_lct() -> TrainConfig:
    """Wan 2.2 TI2V 5B tuned on scenes, context-causal from the start: its text has no positions that would change."""
    return replace(
        hunyuan15_lct(),
        name="wan5b_lct",
        model=wan_5b(),
        init="Wan2.2-TI2V-5B",
        visibility="context_causal",
        text_scale_start=None,
        text_scale_steps=0,
    )


RUNS: dict[str, Callable[[], TrainConfig]] = {
    run.__name__: run
    for run in (
        *(tiny_pretrain, tiny_text_rope, tiny_lct, tiny_causal),
        *(micro_pretrain, micro_text_rope, micro_lct, micro_causal),
        *(film, paper_text_rope, paper_lct, paper_lct_causal, hunyuan15_lct, hunyuan15_lct_causal, wan5b_lct),
    )
}


def run(name: str) -> TrainConfig:
    """The configuration of the run called `name`; ValueError lists the names there are."""
    if name not in RUNS:
        raise ValueError(f"run: expected one of {tuple(RUNS)}, got {name!r}")
    return RUNS[name]()
