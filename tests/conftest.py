"""Settings shared by all tests: reproducible hypothesis runs, and GPU tests that skip where there is no GPU."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads it at its first import
    os.environ["TRITON_INTERPRET"] = "1"

# A home of the tests' own: what `lct doctor --validate` remembers of this machine stays outside, and what a test makes
# it remember stays inside. Git's settings and Triton's compiled kernels are the user's as before.
os.environ.setdefault("GIT_CONFIG_GLOBAL", str(Path.home() / ".gitconfig"))
os.environ.setdefault("TRITON_HOME", str(Path.home()))
HOME = tempfile.TemporaryDirectory(prefix="lct-tests-")
os.environ["HOME"] = HOME.name

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("fresh", deadline=None)
settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu`, saying why, on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))
