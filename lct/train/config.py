"""What a run is: one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from lct.layout import VISIBILITIES
from lct.model.config import FAMILIES, ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Where scenes come from, and in which mixture (§ 3.2.1, § 3.4)."""

    source: str
    """"toy", or a folder of scenes: ingested, encoded, or packed."""
    toy: str
    """Preset of the toy scenes."""
    shots: int
    """Most shots of a scene, the global prompt not counted; nine in the paper (§ 4)."""
    single: float
    """Share of single shots, which keep what the model could do before (§ 3.4)."""
    cut: float
    """Share of authentic multi-shot scenes; the paper has half as many of them as of segmented long shots."""
    no_cut: float
    """Share of long shots divided into segments without a cut."""
    image_probability: float
    """Chance that a shot is replaced by one of its frames, as an image (§ 3.4; the paper does not say how often)."""
    drop_probability: float
    """Chance that a prompt is replaced by the null prompt, for guidance; drawn per shot and for the global prompt."""

    @property
    def mixture(self) -> dict[str, float]:
        """Shares by kind of scene."""
        return {"single": self.single, "cut": self.cut, "no_cut": self.no_cut}


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    name: str
    model: ModelConfig
    data: DataConfig
    init: str | None
    """Weights to start from: a .safetensors file, a checkpoint folder or "asset:NAME" of this package; None: new."""
    visibility: str
    """"bidirectional" for LCT (§ 3.2.2), "context_causal" for the tuning after it (§ 3.3)."""
    text_scale: float
    """λ of the positions: 0 rotates video only, 1 is the paper's layout (§ 3.2.2)."""
    steps: int
    scenes: int
    """Scenes of the global batch; see `batch_rows`."""
    lr: float
    warmup: int
    """Steps of linear warm-up."""
    lr_end: float
    """Where the linear decay of the learning rate would be after the last step, as a part of `lr`."""
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    """Largest norm of the gradient."""
    ema: float
    """Decay of the moving average of the weights, which begins with those after the first step; decay^(steps − 1) of it
    are these."""
    time_mean: float
    time_std: float
    """Training times are sigmoid(N(mean, std²)), one for each shot (§ 3.4)."""
    shift: float
    """Further shift of the times towards noise; 1, as in the paper, is none."""
    seed: int
    save_every: int
    """Steps between checkpoints; the last step is always saved."""
    compute_dtype: str = "float32"
    shift_rows: int = 0
    """Video rows of the shot that the shift is for; larger shots get more of it. 0: the same for all."""
    unshifted: float = 0.0
    """Share of the shots whose time is drawn without the shift, which leaves hardly any shot as clean as those that
    others are conditioned on: with 5, one in 14,000 below 0.1, where the paper has one in 70."""
    shared_time: bool = False
    """One time for all shots of a scene instead of one for each (§ 3.2.3), to see what is lost by it."""
    one_place: bool = False
    """All shots of a scene at the same positions instead of one behind the other (§ 3.2.2), to see what is lost."""
    text_scale_start: float | None = None
    """λ at the first step, from which it goes evenly to `text_scale` over `text_scale_steps`; None: no such way. From 0
    it begins exactly as a model that does not rotate text."""
    text_scale_steps: int = 0
    batch_rows: int = 0
    """Rows of the global batch: scenes are drawn until there are as many, the last one whole, since to leave out what
    does not fit would leave out long scenes; 0: `scenes` of them."""
    lora: int = 0
    """Rank of low-rank changes that alone are trained, beside the frozen weights of `init`; 0 trains all weights."""
    init_digest: Annotated[str | None, tyro.conf.Suppress] = None
    """Hash of the weights of `init` that low-rank changes are trained beside; a run finds it out when it begins."""

    def __post_init__(self):
        if self.visibility not in VISIBILITIES:
            raise ValueError(f"visibility: expected one of {VISIBILITIES}, got {self.visibility!r}")
        if self.steps < 1 or self.scenes < 1 or self.save_every < 1:
            raise ValueError(
                f"steps, scenes, save_every: expected at least 1, got {self.steps}, {self.scenes}, {self.save_every}"
            )
        if self.batch_rows < 0:
            raise ValueError(f"batch_rows: expected 0 or more, got {self.batch_rows}")
        if self.lora < 0 or (self.lora and self.init is None):
            raise ValueError(f"lora: expected 0, or a rank beside the weights of init, got {self.lora} and {self.init}")
        if (self.text_scale_start is None) != (self.text_scale_steps == 0) or self.text_scale_steps < 0:
            raise ValueError(
                "text_scale_start, text_scale_steps: expected both or neither, "
                f"got {self.text_scale_start} and {self.text_scale_steps}"
            )
        if self.text_scale_steps > self.steps:
            raise ValueError(f"text_scale_steps: expected at most {self.steps} steps, got {self.text_scale_steps}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"compute_dtype: expected float32 or bfloat16, got {self.compute_dtype!r}; gradients in float16 would "
                "need a scale, and weights are float32"
            )
        for name in ("warmup", "lr_end", "weight_decay", "shift_rows", "text_scale", "text_scale_start"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        if not abs(self.time_mean) < float("inf"):
            raise ValueError(f"time_mean: expected a number, got {self.time_mean}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer of 63 bits, 0 or more, got {self.seed}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers of at least 0 and below 1, got {self.betas}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: expected a positive number, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay of at least 0 and below 1, got {self.ema}")
        for name, value in (("clip", self.clip), ("shift", self.shift), ("time_std", self.time_std)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= self.unshifted <= 1:
            raise ValueError(f"unshifted: expected a share, 0 to 1, got {self.unshifted}")
        data = self.data
        for name in ("image_probability", "drop_probability"):
            if not 0 <= getattr(data, name) <= 1:
                raise ValueError(f"data.{name}: expected 0 to 1, got {getattr(data, name)}")
        if data.shots < 1:
            raise ValueError(f"data.shots: expected at least 1, got {data.shots}")
        if data.shots == 1 and data.cut + data.no_cut > 0:
            raise ValueError("data.shots: expected at least 2 for scenes, got 1; or set data.cut and data.no_cut to 0")
        if not all(0 <= share < float("inf") for share in data.mixture.values()) or not sum(data.mixture.values()):
            raise ValueError(f"data: expected shares of at least 0 and one above it, got {data.mixture}")

    def text_scale_at(self, step: int) -> float:
        """λ of the positions in a step."""
        if self.text_scale_start is None or step >= self.text_scale_steps:
            return self.text_scale
        return self.text_scale_start + (self.text_scale - self.text_scale_start) * step / self.text_scale_steps

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `dataclasses.asdict` after a way through JSON; ValueError names what does not fit."""

        def build(kind: type, fields: dict[str, Any]) -> Any:
            return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})

        try:
            family = FAMILIES[values["model"].get("family", ModelConfig.family)]
            nested = {"model": build(family, values["model"]), "data": build(DataConfig, values["data"])}
            return build(cls, values | nested)
        except (KeyError, TypeError) as error:
            raise ValueError(f"config: not a training configuration of this version ({error})") from None
