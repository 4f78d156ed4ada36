"""VAE and text encoders of a diffusers pipeline's folder: frames to latents and back, prompts to rows of features.

Needs the extra `pretrained`. Nothing is fetched and nothing unpickled: the folder is on disk, in safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lct.model.config import HunyuanConfig, ModelConfig, WanConfig
from lct.model.hunyuan import GLYPHS, LANGUAGE
from lct.model.mmdit import MMDiT
from lct.model.text import Finished
from lct.pretrained.files import load_config

INDEX = "model_index.json"
WAN_TEXT = 512  # rows of a prompt in Wan: what is behind it is zero, and read like the rest
CODEC = "vae/"
PARTS = ("text_encoder*", "tokenizer*", "vae")


def diffusers() -> Any:
    """The package; ModuleNotFoundError says how to get it."""
    try:
        import diffusers
        import transformers  # noqa: F401  its text encoders
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name}: needed for VAEs and text encoders; pip install 'lct[pretrained]'"
        ) from None
    return diffusers


class Pipeline:
    """The parts of a pipeline beside its transformer, each loaded when it is first asked for.

    folder  such as `DiffusionPipeline.save_pretrained` writes: of HunyuanVideo, HunyuanVideo-1.5 or Wan, from text
    dtype   of text encoders and VAE; the VAE of Wan, which is the better for it, is float32 always
    batch   prompts that go through the text encoders together
    """

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, batch: int = 8
    ):
        self.folder, self.device, self.dtype, self.batch = Path(folder), torch.device(device), dtype, batch
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"{index}: no such file; name the folder of a diffusers pipeline")
        self.name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if self.name not in _ENCODE:
            raise ValueError(f"{index}: expected one of {', '.join(_ENCODE)}, got {self.name}")
        self.config = load_config(self.folder)
        self.found: dict[str, Tensor] = {}

    @cached_property
    def _text(self) -> Any:
        """The pipeline without its transformer."""
        kind = getattr(diffusers(), self.name)
        others = dict.fromkeys(("transformer", *(("transformer_2",) if self.name == "WanPipeline" else ())))
        options = {"dtype": self.dtype, "local_files_only": True, "use_safetensors": True}
        # a pipeline asks its VAE for its sizes as soon as it is made
        return kind.from_pretrained(self.folder, vae=self.codec.model, **others, **options).to(self.device)

    @cached_property
    def codec(self) -> Vae:
        """The VAE."""
        model = diffusers().AutoModel.from_pretrained(
            str(self.folder), subfolder="vae", dtype=torch.float32 if self.name == "WanPipeline" else self.dtype,
            local_files_only=True, use_safetensors=True,
        )  # fmt: skip
        return Vae(model.to(self.device).eval().requires_grad_(False))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Per prompt, its rows of features as the model of this pipeline takes them, on the CPU."""
        rows = []
        for start in range(0, len(prompts), self.batch):
            rows += _ENCODE[self.name](self, list(prompts[start : start + self.batch]))
        return [x.float().cpu() for x in rows]

    def tokenize(self, prompt: str) -> Tensor:
        """The rows of one prompt, computed once."""
        if prompt not in self.found:
            (self.found[prompt],) = self.encode([prompt])
        return self.found[prompt]

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Compute the rows of all these prompts, and let go of the text encoders, whose memory sampling needs; returns
        all rows that are `found`."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.found]
        self.found |= zip(missing, self.encode(missing), strict=True) if missing else ()
        self.__dict__.pop("_text", None)
        return self.found

    def let_go(self) -> None:
        """Of what is in memory; it is loaded again when it is asked for."""
        for part in ("_text", "codec"):
            self.__dict__.pop(part, None)

    def speak_for(self, model: MMDiT) -> None:
        """Become the text encoder of a model tuned from this pipeline's transformer; ValueError for another model."""
        self.check(model.config)
        model.text_encoder = Finished(self.tokenize)

    def check(self, config: ModelConfig) -> None:
        """ValueError for a model that cannot have been tuned from this pipeline's transformer."""
        for name in ("family", "text_row_channels", "latent_channels"):
            own, asked = getattr(self.config, name), getattr(config, name)
            if own != asked:
                raise ValueError(
                    f"pipeline: {self.folder} has {name} {own}, the weights {asked}; name the one they were tuned from"
                )

    @property
    def fps(self) -> float:
        """Frames a second that its model was trained at."""
        return 16.0 if isinstance(self.config, WanConfig) and self.config.latent_channels == 16 else 24.0

    @cached_property
    def digest(self) -> str:
        """A hash of the configurations of text encoders and VAE and the sizes of their weights, to tell pipelines from
        one another without reading them."""
        files = sorted(f for part in PARTS for f in self.folder.glob(f"{part}/*") if f.is_file())
        told = [(f.parent.name, f.name, f.read_text() if f.suffix == ".json" else f.stat().st_size) for f in files]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def pipeline_of(folder: Path | None, device: str, dtype: str | None) -> Pipeline | None:
    """See `Pipeline`; the dtype by its name, float32 by default. None where no folder is named."""
    return None if folder is None else Pipeline(folder, device, getattr(torch, dtype or "float32"))


def _hunyuan(p: Pipeline, prompts: list[str]) -> list[Tensor]:
    rows, pooled, mask = p._text.encode_prompt(prompts, device=p.device, dtype=p.dtype)
    return [
        torch.cat([x[m.bool()], one.expand(int(m.sum()), -1)], 1) for x, one, m in zip(rows, pooled, mask, strict=True)
    ]


def _hunyuan15(p: Pipeline, prompts: list[str]) -> list[Tensor]:
    assert isinstance(p.config, HunyuanConfig)
    rows, mask, glyphs, glyph_mask = p._text.encode_prompt(
        prompts, device=p.device, dtype=p.dtype, batch_size=len(prompts)
    )

    def of_kind(kind: int, x: Tensor) -> Tensor:
        wide = F.pad(x, (1, p.config.text_row_channels - 1 - x.shape[1]))
        wide[:, 0] = kind
        return wide

    return [
        torch.cat([of_kind(GLYPHS, g[gm.bool()]), of_kind(LANGUAGE, x[m.bool()])])
        for x, m, g, gm in zip(rows, mask, glyphs, glyph_mask, strict=True)
    ]


def _wan(p: Pipeline, prompts: list[str]) -> list[Tensor]:
    rows, _ = p._text.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=WAN_TEXT, device=p.device, dtype=p.dtype
    )
    return list(rows)


_ENCODE = {"HunyuanVideoPipeline": _hunyuan, "HunyuanVideo15Pipeline": _hunyuan15, "WanPipeline": _wan}


class Vae:
    """A video VAE with the face of `PixelCodec`. Latents are scaled as the transformer takes them.

    channels, stride, time_stride  C of the latents, pixels per latent pixel, frames per latent frame after the first
    """

    def __init__(self, model: Any):
        config = model.config
        self.model = model
        self.channels = int(config.get("z_dim") or config["latent_channels"])
        self.stride = int(config.get("scale_factor_spatial") or getattr(model, "spatial_compression_ratio", 8))
        self.time_stride = int(config.get("scale_factor_temporal") or getattr(model, "temporal_compression_ratio", 4))
        if config.get("latents_mean") is not None:
            mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
        else:
            mean, std = torch.zeros(self.channels), torch.full((self.channels,), 1 / config["scaling_factor"])
        self._mean, self._std = (x.view(-1, 1, 1, 1).to(model.device, torch.float32) for x in (mean, std))
        model.enable_tiling()
        model.enable_slicing()  # one video at a time: the VAE of HunyuanVideo-1.5 refuses several

    @property
    def name(self) -> str:
        """What a scene file calls latents of this VAE."""
        return f"{CODEC}{type(self.model).__name__}/{self.channels}x{self.time_stride}x{self.stride}"

    @torch.no_grad()
    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 [T, H, W, 3] -> float32 [1 + (T − 1)/time_stride, H/stride, W/stride, C], the mode of the posterior.

        ValueError for another dtype or shape, and for sizes that the strides do not divide.
        """
        pixels = torch.as_tensor(frames)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"frames: expected uint8 [T, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        T, H, W, _ = pixels.shape
        if (T - 1) % self.time_stride or H % self.stride or W % self.stride:
            raise ValueError(
                f"frames: expected 1 + a multiple of {self.time_stride} frames and sides that {self.stride} divides, "
                f"got {[T, H, W]}; trim or resize them"
            )
        return self._encoded(pixels.permute(3, 0, 1, 2)[None])[0]

    def encode_images(self, frames: np.ndarray | Tensor) -> Tensor:
        """Frames as images, each on its own, in one batch: uint8 [K, H, W, 3] -> float32 [K, H/stride, W/stride, C]."""
        pixels = torch.as_tensor(frames)
        return self._encoded(pixels.permute(0, 3, 1, 2)[:, :, None])[:, 0]

    def _encoded(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, T, H, W] -> float32 [B, T', H', W', C]."""
        x = pixels.to(self.model.device).float() / 127.5 - 1
        latents = self.model.encode(x.to(self.model.dtype)).latent_dist.mode().float()
        return ((latents - self._mean) / self._std).permute(0, 2, 3, 4, 1).contiguous().cpu()

    @torch.no_grad()
    def decode(self, latents: np.ndarray | Tensor) -> Tensor:
        """float [T, H, W, C] -> uint8 [1 + (T − 1)·time_stride, H·stride, W·stride, 3], in tiles where it is large."""
        x = torch.as_tensor(latents)
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"latents: expected [T, H, W, {self.channels}], got {list(x.shape)}; unpatchify first")
        z = x.to(self.model.device, torch.float32).permute(3, 0, 1, 2) * self._std + self._mean
        frames = self.model.decode(z[None].to(self.model.dtype)).sample[0].float()
        return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
