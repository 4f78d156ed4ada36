"""Long Context Tuning for video generation. Importing this package imports neither torch nor any optional package."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Shot": "lct.layout",
    "SceneLayout": "lct.layout",
    "Plan": "lct.plan",
    "attention": "lct.kernels",
    "norm_rope_join": "lct.kernels",
    "norm_rope_append_": "lct.kernels",
    "KVCache": "lct.model.cache",
    "MMDiT": "lct.model.mmdit",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lct' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
