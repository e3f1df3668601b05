"""MMD and HSIC with arguments of every kind: a finite value, or one sentence that names the argument."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

import mi_kernels as mk

ENTRIES = {
    "mmd": (mk.mmd, ("x", "y", "bandwidth", "kernel", "estimator", "backend")),
    "gaussian_mmd": (mk.gaussian_mmd, ("z", "prior_samples", "bandwidth", "backend")),
    "hsic": (mk.hsic, ("x", "y", "bandwidth", "backend")),
}
SAMPLES = ("x", "y", "z", "prior_samples")
GOOD = {"x": torch.randn(5, 3), "y": torch.randn(5, 3), "z": torch.randn(5, 3)}
BAD_SAMPLES = [
    None, 1.0, "x", [[1.0, 2.0]], np.zeros((5, 3), np.float32), torch.zeros(5, 3, dtype=torch.long),
    torch.zeros(5, 3, dtype=torch.bool), torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(3), torch.zeros(()),
    torch.zeros(0, 3), torch.zeros(5, 0), torch.zeros(2, 5, 3, 7), torch.zeros(5, 3, device="meta"),
]  # fmt: skip
BAD_BANDWIDTHS = [
    0, 0.0, -1.0, float("nan"), float("inf"), 1e-60, 1e60, 1j, "1", True, b"1", {}, object(), [], [1.0, -1.0],
    ["1", "2"], [1.0, None, 2.0], np.ones(3), torch.ones(3), torch.zeros(()), torch.tensor(-1.0),
    torch.tensor(float("nan")), torch.tensor(1j), torch.tensor(True), torch.tensor(float("inf")),
]  # fmt: skip
GOOD_BANDWIDTHS = [
    None, 1, 2.5, np.float32(1.5), np.float64(2), torch.tensor(2.0), torch.tensor(2), torch.ones(1).double(),
]  # fmt: skip


def choices(name: str) -> list[object]:
    if name in ("x", "z"):  # any shape and device is valid here; the later arguments must match it
        return [b for b in BAD_SAMPLES if not (isinstance(b, torch.Tensor) and (b.dim() == 4 or b.is_meta))]
    if name in SAMPLES:
        return [b for b in BAD_SAMPLES if name != "prior_samples" or b is not None]
    if name == "bandwidth":
        return BAD_BANDWIDTHS
    return [1, "none such", 3.5, ["cpu"]] if name == "backend" else [None, 1, "none such", ["biased"]]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_bad_argument_is_named(entry):
    function, names = ENTRIES[entry]
    for name in names:
        for bad in choices(name):
            arguments = {n: GOOD[n] for n in names if n in GOOD} | {name: bad}
            with pytest.raises((TypeError, ValueError)) as raised:
                function(**arguments)
            message = str(raised.value)
            assert re.match(rf"{name}\b", message) and "\n" not in message, f"{type(bad)}: {message}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_good_arguments_of_every_kind_give_finite_values(entry):
    """Random dtypes, strides, group shapes and bandwidths."""
    function, names = ENTRIES[entry]
    draw = random.Random(0)

    def sample(groups: tuple[int, ...], batch: int, depth: int) -> torch.Tensor:
        t = torch.randn(*groups, depth, batch) if draw.random() < 0.5 else torch.randn(*groups, batch, 2 * depth)
        t = t.mT if t.shape[-1] == batch and t.shape[-2] == depth else t[..., ::2]
        return t.to(draw.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16]))

    for _ in range(150):
        groups = draw.choice([(), (1,), (3,), (2, 2)])
        batch, depth = draw.choice([1, 2, 5, 66]), draw.choice([1, 3, 40])
        other = batch if entry == "hsic" else draw.choice([1, 4, 70])
        arguments = {names[0]: sample(groups, batch, depth).requires_grad_()}
        if draw.random() < 0.7 or names[1] == "y":
            arguments[names[1]] = sample(groups, other, depth if entry != "hsic" else draw.choice([1, 4]))
        arguments["bandwidth"] = draw.choice([*GOOD_BANDWIDTHS, torch.rand(groups) + 1])
        value = function(**arguments)
        assert value.shape == groups and value.isfinite().all()
        value.sum().backward()
        gradient = arguments[names[0]].grad
        assert gradient.isfinite().all() and gradient.dtype == arguments[names[0]].dtype
