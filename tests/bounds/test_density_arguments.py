"""Bad arguments of the bounds with a conditional density, and of CLUB, raise one sentence that names the argument."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club

GAUSSIAN = [mk.CLUB, mk.CLUBSample, mk.LeaveOneOut, mk.VariationalUpperBound, mk.BarberAgakov]
BOUNDS = [*GAUSSIAN, mk.CLUBMean, mk.CLUBCategorical]
BAD_SAMPLES = [
    None, 1.0, "x", [[1.0, 2.0]], np.zeros((5, 3), np.float32), torch.zeros(5, 3, dtype=torch.long),
    torch.zeros(5, 3, dtype=torch.bool), torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(3), torch.zeros(()),
    torch.zeros(0, 3), torch.zeros(5, 4), torch.zeros(2, 5, 3, 3), torch.zeros(5, 3, device="meta"),
]  # fmt: skip
BAD_LABELS = [
    None, 1, "x", [0, 1], np.zeros(5, np.int64), torch.zeros(5), torch.zeros(5, dtype=torch.complex64),
    torch.zeros(4, dtype=torch.long), torch.zeros(5, 1, dtype=torch.long), torch.full((5,), 3), torch.full((5,), -1),
    torch.zeros(5, dtype=torch.long, device="meta"),
]  # fmt: skip


def refused(call, name: str, what: object) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    message = str(raised.value)
    assert re.match(rf"{name}\b", message) and "\n" not in message, f"{name}={what!r}: {message}"


@pytest.mark.parametrize("kind", BOUNDS)
def test_bad_samples_are_named(kind):
    module = kind(3, 3) if kind in (mk.CLUBMean, mk.CLUBCategorical) else kind(3, 3, 4)
    x, y = torch.randn(5, 3), torch.randint(3, (5,)) if kind is mk.CLUBCategorical else torch.randn(5, 3)
    for method in (module, module.learning_loss, module.loglikeli):
        for bad in BAD_SAMPLES:
            if isinstance(bad, torch.Tensor) and bad.shape == (2, 5, 3, 3):
                continue  # valid for x alone; the error would name y, whose shape does not match
            if not (isinstance(bad, torch.Tensor) and bad.is_meta):
                refused(lambda m=method, b=bad: m(b, y), "x", bad)
        for bad in BAD_LABELS if kind is mk.CLUBCategorical else BAD_SAMPLES:
            refused(lambda m=method, b=bad: m(x, b), "labels" if kind is mk.CLUBCategorical else "y", bad)


@pytest.mark.parametrize("kind", BOUNDS)
def test_bad_settings_are_named(kind):
    second = "num_classes" if kind is mk.CLUBCategorical else "y_dim"
    good = {"x_dim": 3, second: 3, "hidden_dim": 4}
    for name in (*good, "groups"):
        for bad in (0, -1, 2.5, "3", True, torch.tensor(3), [3]):
            refused(lambda n=name, b=bad: kind(**good | {n: b}), name, bad)
    if kind in GAUSSIAN:
        for bad in (0, -1.0, float("nan"), float("inf"), "6", 1j, True, [6.0]):
            refused(lambda b=bad: kind(**good, logvar_bound=b), "logvar_bound", bad)
    if kind in (mk.CLUB, mk.CLUBSample, mk.CLUBMean, mk.CLUBCategorical):
        for bad in ("some", None, 1, ["all"]):
            refused(lambda b=bad: kind(**good, negatives=b), "negatives", bad)


def test_a_bad_entropy_is_named():
    bound, x, y = mk.BarberAgakov(3, 3, 4), torch.randn(5, 3), torch.randn(5, 3)
    for bad in ("1", 1j, [1.0], True, torch.zeros(2), torch.tensor(1j), lambda y: "1"):
        refused(lambda b=bad: bound(x, y, b), "entropy", bad)


def test_bad_arguments_of_gaussian_club_are_named():
    good = {name: torch.randn(5, 3) for name in ("mu", "logvar", "y")}
    for name in good:
        for bad in BAD_SAMPLES:
            if name == "mu" and isinstance(bad, torch.Tensor) and bad.dim() >= 2 and bad.dtype.is_floating_point:
                continue  # valid for mu alone; the error would name y, whose shape or device does not match
            if not (name == "logvar" and bad is None):
                refused(lambda n=name, b=bad: gaussian_club(**good | {n: b}), name, bad)
    for bad in ("some", None, 1, ["all"]):
        refused(lambda b=bad: gaussian_club(**good, negatives=b), "negatives", bad)


DENSITIES = {
    "club": lambda: mk.CLUB(4, 4, 8),
    "mean": lambda: mk.CLUBMean(4, 4),
    "sample": lambda: mk.CLUBSample(4, 4, 8),
    "leave one out": lambda: mk.LeaveOneOut(4, 4, 8),
    "upper": lambda: mk.VariationalUpperBound(4, 4, 8),
    "barber-agakov": lambda: mk.BarberAgakov(4, 4, 8),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_float64_arrays_meet_a_float32_network(name: str) -> None:
    bound, x = DENSITIES[name](), torch.randn(6, 4, dtype=torch.float64)
    for call in (bound, bound.learning_loss):
        with pytest.raises(ValueError, match=r"x must have the dtype of the network, torch.float32, got torch.float64"):
            call(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(bound(x.float(), x.float()))


def test_float64_arrays_meet_other_float32_networks() -> None:
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    with pytest.raises(ValueError, match=r"x must have the dtype of the network"):
        mk.CLUBCategorical(4, 3)(x, labels)
    with pytest.raises(ValueError, match=r"z must have the dtype of the network"):
        mk.TotalCorrelation(mk.JointCritic(8))(x, x)
