"""Fixtures of the tests that run on a device."""

from __future__ import annotations

import pytest
import torch

import mi_kernels as mk


@pytest.fixture(params=["chunked", "cpu", "triton", "cuda"])
def device_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every backend that runs on the device."""
    name = request.param
    status = mk.backends().get(name, "no such backend in this version")
    if status != "available":
        pytest.skip(f"{name}: {status}")
    # Triton's status says whether it has a GPU or the interpreter.
    if (name == "cpu" and device.type != "cpu") or (name == "cuda" and device.type != "cuda"):
        pytest.skip(f"{name} does not run on {device}")
    return name


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The device, where it is a GPU."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device
