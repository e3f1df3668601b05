"""Every argument of attention, the LSTM scans and the concat critic, replaced by unusual objects of many kinds.

A call may succeed, or raise ValueError, TypeError or RuntimeError with a sentence that names the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.mlp_critic import api
from tests.test_argument_kinds import NOT_FINITE, ODD


def functions() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(1))  # noqa: E731
    q, k, v = draw(2, 2, 3, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 3)
    lengths, keys = torch.tensor([3, 1]), torch.tensor([5, 0])
    rule = {"causal_offset": 1, "normalizer": "softmax", "dropout_p": 0.1, "scale": 0.5, "seed": 1, "backend": None}
    x, gates = draw(2, 3, 5), draw(2, 3, 16)
    weight_ih, weight_hh, bias, state = draw(16, 5), draw(16, 4), draw(16), draw(2, 4)
    layer = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias, "bias_hh": bias}
    states = {"h0": state, "c0": state, "lengths": lengths, "backend": None}
    samples = {"x": draw(4, 3), "y": draw(4, 2)}
    weights, biases = [draw(6, 5), draw(1, 6)], [draw(6), draw(1)]
    request = {"stats": ("row_lse", "clipped_row_lse"), "pairs": "all", "clip": 1.0}
    critic = mk.ConcatCritic(3, 2, (6,))
    sizes = {"x_dim": 3, "y_dim": 2, "hidden_dims": (4,), "activation": "relu", "groups": 2, "output": "identity"}
    return {
        "cross_attention": (
            mk.cross_attention,
            {"query": q, "key": k, "value": v, "query_lengths": lengths, "key_lengths": keys, **rule},
        ),
        "cross_attention_grouped": (
            mk.cross_attention_grouped,
            {"queries": [q], "keys": [k], "values": [v], "query_lengths": [lengths], "key_lengths": [keys], **rule},
        ),
        "lstm": (mk.lstm, {"x": x, **layer, **states}),
        "lstm_scan": (mk.lstm_scan, {"gates": gates, "weight_hh": weight_hh, "bias": bias, **states}),
        "lstm_decode": (mk.lstm_decode, {"code": state, **layer, "weight_ih": weight_hh, "steps": 3, "backend": None}),
        "critic": (critic, samples),
        "critic.statistics": (critic.statistics, {**samples, **request}),
        "mlp_critic.statistics": (
            api.statistics,
            {**samples, "weights": weights, "biases": biases, "activation": "relu", "memory_budget": 1, **request},
        ),
        "ConcatCritic": (mk.ConcatCritic, {**sizes, "memory_budget": 1, "backend": None}),
        "InfoNCE": (mk.InfoNCE(critic), samples),
    }


def variants(given: Any) -> Iterator[tuple[str, Any]]:
    """The given argument, converted to other types and shapes."""
    if isinstance(given, list):
        for k in range(len(given)):
            for kind, odd in [*variants(given[k]), ("None", None), ("a string", "a")]:
                yield f"[{k}] {kind}", [*given[:k], odd, *given[k + 1 :]]
        yield "one short", given[:-1]
    if not isinstance(given, Tensor):
        return
    yield from {
        "in NumPy": given.numpy(),
        "as a list": given.tolist(),
        "complex": given.to(torch.complex64),
        "in integers": given.long(),
        "in booleans": given.bool(),
        "in another dtype": given.double(),
        "in 8 bits": given.to(torch.float8_e4m3fn),
        "empty": given[:0],
        "of more dimensions": given.unsqueeze(0),
        "of fewer dimensions": given[0],
        "on another device": given.to("meta"),
        "negative": -given.abs() - 1,
        "too large": given.abs() + 100,
    }.items()


FUNCTIONS = functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_odd_arguments_work_or_are_named(name: str) -> None:
    function, given = FUNCTIONS[name]
    for argument in given:
        for kind, odd in [*ODD.items(), *variants(given[argument])]:
            if "device" in kind and "lengths" in argument:
                continue  # lengths may be on another device, but meta tensors have no values to read
            try:
                function(**{**given, argument: odd})
            except (ValueError, TypeError, RuntimeError) as error:
                named = (argument, *(a for a in given if _depends(a, argument)))
                assert any(n in str(error) for n in named), f"{argument} = {kind}: {error!r}"


def _depends(other: str, argument: str) -> bool:
    """Whether `other` must match `argument`, so that an error may name it instead."""
    first = {"query", "queries", "x", "gates", "code", "weight_hh", "key", "keys", "weights", "weight_ih"}
    return argument in first and other not in ("backend", "seed")


@pytest.mark.parametrize("name", ["cross_attention", "lstm", "lstm_scan", "lstm_decode", "critic"])
def test_what_is_not_finite_does_not_come_out_finite(name: str) -> None:
    function, given = FUNCTIONS[name]
    first = next(iter(given))
    for kind in NOT_FINITE[:2]:
        found = function(**{**given, first: torch.full_like(given[first], torch.nan)})
        found = found[0] if isinstance(found, tuple) else found
        assert not found.isfinite().all(), kind
