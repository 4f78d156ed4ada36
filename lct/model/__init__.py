"""The long-context MMDiT, its configurations, KV cache and the flow it is trained on."""

from lct.model.cache import KVCache
from lct.model.config import PRESETS, ModelConfig, lct_3b, preset, tiny
from lct.model.mmdit import MMDiT

__all__ = ["PRESETS", "KVCache", "MMDiT", "ModelConfig", "lct_3b", "preset", "tiny"]
