"""Generating scenes: all shots at once, on given media, or shot by shot over a KV cache (paper Fig. 4)."""

from lct.sample.autoregressive import autoregressive
from lct.sample.joint import joint
from lct.sample.request import Sampling, SceneRequest, ShotRequest

__all__ = ["Sampling", "SceneRequest", "ShotRequest", "autoregressive", "joint"]
