"""Every argument of the public losses and bounds, replaced by every odd kind of thing.

A call may succeed, or raise ValueError, TypeError or RuntimeError with a sentence that names the argument. A value that
is not finite may not come out finite.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mi_kernels as mk

ODD: dict[str, Any] = {
    "None": None,
    "letters": "a",
    "a list": [1.0, 2.0],
    "NumPy": np.ones((4, 3)),
    "3": 3,
    "-1": -1.0,
    "NaN": math.nan,
    "infinity": math.inf,
    "0": 0,
    "True": True,
    "a complex number": 1j,
    "a huge integer": 10**30,
    "a dict": {},
    "complex": torch.ones(4, 3, dtype=torch.complex64),
    "integers": torch.ones(4, 3, dtype=torch.long),
    "booleans": torch.ones(4, 3, dtype=torch.bool),
    "no rows": torch.zeros(0, 3),
    "one element": torch.tensor(1.0),
    "a vector": torch.ones(4),
    "two": torch.ones(2),
    "another shape": torch.ones(5, 2),
    "another dtype": torch.ones(4, 3, dtype=torch.double),
    "NaNs": torch.full((4, 3), math.nan),
    "an infinite tensor": torch.tensor(math.inf),
    "a negative tensor": torch.tensor(-1.0),
    "a zero tensor": torch.tensor(0.0),
}
NOT_FINITE = ("NaN", "NaNs", "infinity", "an infinite tensor")


def functions() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    torch.manual_seed(0)
    a, b, negatives = torch.randn(4, 3), torch.randn(4, 3), torch.randn(6, 3)
    labels = torch.tensor([0, 1, 0, 1])
    images = {"image_features": a, "text_features": b, "logit_scale": 10.0}
    pair = {"query": a, "positive_key": b, "temperature": 0.1, "reduction": "mean", "backend": None}
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "info_nce": (mk.info_nce, {**pair, "query_ids": None, "key_ids": None, "memory_budget": 0}),
        "info_nce, negatives": (mk.info_nce, {**pair, "negative_keys": negatives, "negative_mode": "unpaired"}),
        "clip_loss": (mk.clip_loss, {**images, "logit_bias": None, "memory_budget": 0, "backend": None}),
        "siglip_loss": (mk.siglip_loss, {**images, "logit_bias": -10.0, "backend": None}),
        "nt_xent": (mk.nt_xent, {"out0": a, "out1": b, "temperature": 0.5, "backend": None}),
        "sup_con": (
            mk.sup_con,
            {
                "features": torch.randn(4, 2, 3),
                "labels": labels,
                "temperature": 0.07,
                "base_temperature": 0.07,
                "contrast_mode": "all",
                "backend": None,
            },
        ),
        "DotCritic": (mk.DotCritic, {"temperature": 1.0}),
        "BilinearCritic": (mk.BilinearCritic, {"x_dim": 3, "y_dim": 3}),
        "SeparableCritic": (
            mk.SeparableCritic,
            {"x_dim": 3, "y_dim": 3, "hidden_dims": (4,), "embed_dim": 2, "activation": "relu"},
        ),
        "InfoNCE within labels": (
            mk.InfoNCE(mk.DotCritic(), condition="group"),
            {"x": a, "y": b, "condition": labels},
        ),
    }
    critics = {"dot": mk.DotCritic(), "bilinear": mk.BilinearCritic(3, 3)}
    critics["separable"] = mk.SeparableCritic(3, 3, (4,), 2)
    bounds = "InfoNCE NCECLUB NWJ SMILE DonskerVaradhan MINE JensenShannon TUBA WassersteinDependency".split()
    for name in bounds:
        kind = getattr(mk, name)
        for critic_name, critic in critics.items():
            found[f"{name} over {critic_name}"] = (kind(critic), {"x": a, "y": b})
        parameters = inspect.signature(kind).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        found[f"making {name}"] = (kind, {"critic": critics["dot"], **defaults})
    return found


FUNCTIONS = functions()
# Arguments whose kind is their caller's business: any truth value, and sizes that only memory refuses.
FREE = {("making WassersteinDependency", "spectral_norm")}
SIZES = ("x_dim", "y_dim", "embed_dim", "seed")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_odd_arguments_work_or_are_named(name: str) -> None:
    function, given = FUNCTIONS[name]
    for argument in given:
        if (name, argument) in FREE:
            continue
        for kind, odd in ODD.items():
            if kind == "a huge integer" and argument in SIZES:
                continue
            try:
                found = function(**{**given, argument: odd})
            except (ValueError, TypeError, RuntimeError) as error:
                assert argument in str(error), f"{argument} = {kind}: {error}"
                continue
            if isinstance(found, Tensor) and kind in NOT_FINITE:
                assert not found.isfinite().all(), f"{argument} = {kind} gave {found}"


@pytest.mark.parametrize("loss", ["clip_loss", "info_nce", "symmetric", "siglip_loss", "rows"])
def test_infinite_features_never_give_finite_gradients(loss: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    x[1, 2] = math.inf
    x.requires_grad_()
    value = {
        "clip_loss": lambda: mk.clip_loss(x, y, 1.0),
        "info_nce": lambda: mk.info_nce(x, y, normalize=False),
        "symmetric": lambda: mk.info_nce(x, y, normalize=False, symmetric=True),
        "siglip_loss": lambda: mk.siglip_loss(x, y, 1.0, 0.0),
        "rows": lambda: mk.info_nce(x, y, normalize=False, reduction="none").sum(),
    }[loss]()
    (gradient,) = torch.autograd.grad(value, x)
    assert not (value.isfinite() and gradient.isfinite().all())
    if loss != "siglip_loss":  # whose softplus of -inf is 0
        assert not gradient[1].isfinite().all()
