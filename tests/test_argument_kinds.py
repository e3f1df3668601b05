"""Every argument of the public losses and bounds, replaced by unusual objects of many kinds.

A call may succeed, or raise ValueError, TypeError or RuntimeError with a sentence that names the argument. An input
that is not finite must not give a finite result.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mi_kernels as mk

with warnings.catch_warnings():  # torch warns that both kinds are in beta
    warnings.simplefilter("ignore")
    _COMPRESSED = torch.eye(4, 3).to_sparse_csr()
    _NESTED = torch.nested.nested_tensor([torch.ones(4, 3), torch.ones(2, 3)])

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
    "no features": torch.zeros(4, 0),
    "no groups": torch.zeros(0, 4, 3),
    "an empty slice": torch.ones(4, 3)[2:2],
    "a strided view": torch.ones(8, 6)[::2, ::2],
    "a transposed view": torch.ones(3, 4).mT,
    "an expanded view": torch.ones(1, 1).expand(4, 3),
    "one element": torch.tensor(1.0),
    "a vector": torch.ones(4),
    "two": torch.ones(2),
    "another shape": torch.ones(5, 2),
    "another dtype": torch.ones(4, 3, dtype=torch.double),
    "NaNs": torch.full((4, 3), math.nan),
    "an infinite tensor": torch.tensor(math.inf),
    "a negative tensor": torch.tensor(-1.0),
    "a zero tensor": torch.tensor(0.0),
    "a tiny number": 1e-40,
    "an integer beyond floats": 10**400,
    "a tiny tensor": torch.tensor(1e-40),
    "on another device": torch.ones(4, 3, device="meta"),
    "sparse": torch.eye(4, 3).to_sparse(),
    "compressed": _COMPRESSED,
    "nested": _NESTED,
}
NOT_BOOL = ("no", 1, 0.0, None, torch.tensor(True), np.bool_(True))
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
        "info_nce, masked": (
            mk.info_nce,
            {
                **pair,
                "negative_keys": torch.randn(4, 2, 3),
                "negative_mode": "paired",
                "negative_mask": torch.ones(4, 2, dtype=torch.bool),
            },
        ),
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
        "sup_con, masked": (mk.sup_con, {"features": torch.randn(4, 2, 3), "mask": torch.eye(4)}),
        "mmd": (mk.mmd, {"x": a, "y": b, "bandwidth": None, "backend": None}),
        "hsic": (mk.hsic, {"x": a, "y": b, "bandwidth": None, "backend": None}),
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


def work_or_are_named(function: Callable[..., Any], given: dict[str, Any], unread: Collection[str] = ()) -> None:
    """Replaces each argument by each odd object. Only in `unread` arguments may a non-finite value give a finite
    result."""
    for argument in given:
        for kind, odd in ODD.items():
            try:
                found = function(**{**given, argument: odd})
            except (ValueError, TypeError, RuntimeError) as error:
                assert argument in str(error), f"{argument} = {kind}: {error}"
                assert type(error) is not RuntimeError or "backend" in argument, f"{argument} = {kind}: {error!r}"
                continue
            if isinstance(found, Tensor) and kind in NOT_FINITE and argument not in unread:
                assert not found.isfinite().all(), f"{argument} = {kind} gave {found}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_odd_arguments_work_or_are_named(name: str) -> None:
    work_or_are_named(*FUNCTIONS[name])


def flags() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any], str]]:
    """Every bool argument of the public functions and classes, with the other arguments of a valid call."""
    x, y, q = torch.randn(4, 3), torch.randn(4, 3), torch.randn(1, 1, 4, 3)
    pair = {"image_features": x, "text_features": y, "logit_scale": 1.0, "logit_bias": 0.0}
    given: dict[Any, dict[str, Any]] = {
        mk.info_nce: {"query": x, "positive_key": y},
        mk.siglip_loss: pair,
        mk.hsic: {"x": x, "y": y},
        mk.DotCritic: {},
        mk.WassersteinDependency: {"critic": mk.ConcatCritic(3, 3, (4,))},
        mk.MemoryBank: {"size": 4, "dim": 3},
        mk.cross_attention: {"query": q, "key": q, "value": q},
        mk.estimate_mi: {"x": torch.randn(60, 2), "y": torch.randn(60, 2)},
        mk.distributed.info_nce: {"query": x, "positive_key": y},
        mk.distributed.cross_entropy_rows: {"rows": x, "columns": y, "scale": 1.0, "positive_shift": 0},
        mk.tasks.gaussian: {"mutual_information": 1.0},
    }
    for name in [*mk.__all__, *(f"distributed.{n}" for n in mk.distributed.__all__)]:
        public = functools.reduce(getattr, name.split("."), mk)
        parameters = inspect.signature(public).parameters.values() if callable(public) else ()
        for argument in (p.name for p in parameters if p.annotation in (bool, "bool")):
            yield name, public, given[public], argument
    yield "tasks.gaussian", mk.tasks.gaussian, given[mk.tasks.gaussian], "cubic"


@pytest.mark.parametrize(
    ("function", "given", "argument"), [pytest.param(*f[1:], id=f"{f[0]}, {f[3]}") for f in flags()]
)
def test_bools_must_be_bools(function, given, argument) -> None:
    for odd in NOT_BOOL:
        with pytest.raises((TypeError, ValueError), match=f"{argument} must be True or False"):
            function(**given, **{argument: odd})


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
    if loss != "siglip_loss":  # softplus(-inf) is 0, and so is its gradient
        assert not gradient[1].isfinite().all()
