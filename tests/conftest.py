"""Settings shared by all tests: reproducible hypothesis runs, and GPU tests that skip where there is no GPU."""

import os
import tempfile

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads it at its first import
    os.environ["TRITON_INTERPRET"] = "1"

# What `lct doctor --validate` remembers of this machine stays outside, and what a test makes it remember stays inside.
CACHE = tempfile.TemporaryDirectory(prefix="lct-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


# Modules whose tests share one costly fixture, or the repository's root: each stays with one worker of pytest-xdist.
TOGETHER = {f"test_{name}" for name in ("ahead_of_time", "native", "cli", "demo", "film", "ingest", "readme")}


def pytest_collection_modifyitems(items):
    """Keep some modules' tests together; skip tests marked `gpu`, saying why, where there is no CUDA device."""
    for item in items:
        if item.module.__name__ in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))
