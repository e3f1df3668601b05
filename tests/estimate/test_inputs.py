"""estimate_mi with good and bad arguments of every kind: an estimate, or one sentence that names the argument."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.bounds import registry

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
NUMPY = GOOD.double().numpy()
BAD_SAMPLES: dict[str, Any] = {
    "nan": GOOD.index_fill(0, torch.tensor([3]), math.nan),
    "inf": GOOD.index_fill(0, torch.tensor([3]), math.inf),
    "constant": torch.ones(60, 2),
    "short": GOOD[:40],
    "complex": GOOD.to(torch.complex64),
    "empty": GOOD[:, :0],
    "3d": GOOD.view(60, 2, 1),
    "0d": torch.tensor(1.0),
    "sparse": GOOD.to_sparse(),
    "meta": GOOD.to("meta"),
    "object": NUMPY.astype(object),
    "numpy complex": NUMPY.astype("complex128"),
    "str": NUMPY.astype(str),
    "dates": NUMPY.astype("datetime64[s]"),
    "masked": np.ma.masked_where(NUMPY > 1, NUMPY),
    "ragged": [[1.0, 2.0]] * 59 + [[1.0]],
    "complex list": [[1j]] * 60,
    "strings": ["a"] * 60,
    "nones": [None] * 60,
    "text": "text",
    "bytes": b"bytes",
    "number": 3.0,
    "dict": {"x": GOOD},
    "set": {1.0, 2.0},
    "iterator": iter(range(60)),
    "type": Tensor,
    "none": None,
}
GOOD_SAMPLES: dict[str, Any] = {
    "lists": GOOD.tolist(),
    "tuple": tuple(GOOD[:, 0].tolist()),
    "large integers": [[10**30 + k, -k] for k in range(60)],
    "bool": GOOD > 0,
    "bfloat16": GOOD.bfloat16(),
    "float16": GOOD.half(),
    "float8": GOOD.to(torch.float8_e4m3fn),
    "int8": (GOOD * 20).to(torch.int8),
    "uint16": (GOOD.abs() * 100).to(torch.uint16),
    "numpy float32": NUMPY.astype("float32"),
    "numpy uint8": (abs(NUMPY) * 20).astype("uint8"),
    "numpy reversed": NUMPY[::-1, ::-1],
    "numpy fortran": np.asfortranarray(NUMPY),
    "numpy big endian": NUMPY.astype(">f8"),
    "numpy read-only": np.broadcast_to(NUMPY[:, :1], (60, 3)),
    "unmasked": np.ma.masked_array(NUMPY),
    "strided": GOOD.repeat(1, 3)[:, ::2],
    "expanded": GOOD[:, :1].expand(60, 3),
    "graph": GOOD.clone().requires_grad_(),
    "huge": GOOD.double() * 1e306,
    "tiny": GOOD.double() * 1e-310,
    "one differs": torch.zeros(60, 1).index_fill(0, torch.tensor([4]), 1.0),
}
BAD_SETTINGS: dict[str, list[Any]] = {
    "max_steps": [0, -1, 1.5, True, "9", None, [9], GOOD, math.nan],
    "batch_size": [1, -4, 2.0, False, "9", None, (9,), NUMPY],
    "seed": [-1, 1.5, "0", None, True, 2**64, GOOD, math.inf],
    "held_out": [0.0, 1.0, -1, math.nan, "0.5", None, [0.5], NUMPY, 1j, True],
    "learning_rate": [-1e-3, 0, math.inf, math.nan, "1e-3", [1e-3], GOOD, 1j, True],
    "estimator": ["best", None, 3, ["nwj"], mk.NWJ, "wasserstein", NUMPY],
    "critic": ["big", None, nn.Linear(2, 2), mk.SeparableCritic, NUMPY, GOOD, ["hybrid"]],
    "device": ["nowhere", "cpu:x", "meta", 3.5, GOOD, []],
    "progress": [None, "yes", 2, NUMPY],
}
ARGUMENTS = ("x", "y", *BAD_SETTINGS)


def outcome(**changed: Any) -> mk.MIEstimate | str:
    """Returns the estimate or the error message, which must be one sentence about one of the arguments."""
    try:
        return mk.estimate_mi(**({"x": GOOD, "y": GOOD.flip(0), "max_steps": 1, "progress": False} | changed))
    except (TypeError, ValueError) as error:
        message = str(error)
    assert message.split(" must ")[0] in ARGUMENTS and ". " not in message, message
    return message


@pytest.mark.parametrize("kind", BAD_SAMPLES)
@pytest.mark.parametrize("side", ["x", "y"])
def test_bad_samples_are_refused_by_name(kind: str, side: str) -> None:
    message = outcome(**{side: BAD_SAMPLES[kind]})
    assert isinstance(message, str) and message.startswith(f"{side} must")


@pytest.mark.parametrize("kind", GOOD_SAMPLES)
def test_every_kind_of_real_numbers_is_taken(kind: str) -> None:
    found = outcome(x=GOOD_SAMPLES[kind])
    assert isinstance(found, mk.MIEstimate) and math.isfinite(found.value) and math.isfinite(found.standard_error)


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(name: str) -> None:
    for value in BAD_SETTINGS[name]:
        message = outcome(**{name: value})
        assert isinstance(message, str) and message.startswith(f"{name} must"), (value, message)


def test_mixtures_of_arguments_give_an_estimate_or_one_sentence() -> None:
    draw = random.Random(0)
    samples = [*BAD_SAMPLES.values(), *GOOD_SAMPLES.values()]
    settings: dict[str, list[Any]] = {
        "max_steps": [1, 2, np.int64(2)], "batch_size": [2, 7, 1000], "seed": [0, 2**63 - 1, np.int32(3)],
        "held_out": [0.1, 0.9, np.float32(0.5)], "learning_rate": [None, 1e-9, 10, 1], "device": [None, "cpu"],
        "estimator": list(registry.estimators()), "critic": ["hybrid", "concat", "separable", "bilinear"],
    }
    for _ in range(120):
        chosen: dict[str, Any] = {side: draw.choice(samples) for side in "xy" if draw.random() < 0.4}
        for name, values in settings.items():
            chosen[name] = draw.choice(BAD_SETTINGS[name] if draw.random() < 0.03 else values)
        outcome(**chosen)


def test_differing_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="y must have as many samples as x, 60, got 50"):
        mk.estimate_mi(GOOD, GOOD[:50], progress=False)
