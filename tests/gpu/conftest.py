"""Fixtures for tests that run on a device."""

from __future__ import annotations

import pytest
import torch

import mi_kernels as mk


@pytest.fixture(params=["chunked", "cpu", "triton", "cuda"])
def device_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Parametrised over the backends; skips those that do not run on the device."""
    name = request.param
    status = mk.backends().get(name, "no such backend in this version")
    if status != "available":
        pytest.skip(f"{name}: {status}")
    # Triton needs no check here: its status tells whether there is a GPU or the interpreter.
    if (name == "cpu" and device.type != "cpu") or (name == "cuda" and device.type != "cuda"):
        pytest.skip(f"{name} does not run on {device}")
    return name


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The device; skips the test if it is not a GPU."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device
