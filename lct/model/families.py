"""Which module a configuration describes."""

from __future__ import annotations

from lct.model.config import HunyuanConfig, ModelConfig, WanConfig
from lct.model.mmdit import MMDiT


def build(config: ModelConfig) -> MMDiT:
    """A new model of this configuration; the ones that others trained are imported only where one is asked for."""
    if isinstance(config, HunyuanConfig):
        from lct.model.hunyuan import Hunyuan

        return Hunyuan(config)
    if isinstance(config, WanConfig):
        from lct.model.wan import Wan

        return Wan(config)
    return MMDiT(config)
