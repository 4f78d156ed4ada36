"""Settings shared by all tests: reproducible hypothesis runs, and GPU tests that skip where there is no GPU."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads it at its first import
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu`, saying why, on a machine without a CUDA device."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    if torch.cuda.is_available():
        return
    for item in gpu_tests:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))
