"""Argument checks and entry points of the MLP critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import transforms
from ..common.checks import backend_name, check_choice, check_floats, check_integer, check_samples
from ..common.precision import autocast_on
from ..common.statistics import STATISTICS, Statistics, check_pairing, check_request
from . import autograd, chunked, dispatch, first_layer, reference
from .problem import Score
from .schema import ACTIVATIONS, BITS, OUTPUTS

DEFAULT_MEMORY_BUDGET = 64 * 2**20


def _backend(device: torch.device, requested: str | None, layers: int) -> str:
    return dispatch.backend_for(device, requested, layers)


# What torch.compiler.assume_constant_result sets; the decorator itself would import the compiler, and so triton.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_parameters(x: Tensor, y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    for name, given in (("weights", weights), ("biases", biases)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, one per layer, got {type(given).__name__}")
        for k, t in enumerate(given):
            check_floats(f"{name}[{k}]", t)
    if len(weights) < 2 or len(weights) != len(biases):
        raise ValueError(
            "weights and biases must have one entry per layer, at least one hidden and the output layer, "
            f"got {len(weights)} weights and {len(biases)} biases"
        )
    lead = tuple(x.shape[:-2])
    width = x.shape[-1] + y.shape[-1]
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() not in (2, 3) or weight.dim() != weights[0].dim():
            raise ValueError(
                f"weights[{k}] must be [out, in], or [G, out, in] for all, got {tuple(weight.shape)}"
            )
        if weight.dim() == 3 and lead != (weight.shape[0],):
            raise ValueError(
                f"weights[{k}] has {weight.shape[0]} groups, so x must be [{weight.shape[0]}, B, Dx], "
                f"got {tuple(x.shape)}"
            )
        if weight.shape[-1] != width:
            source = (
                f"x and y have {x.shape[-1]} + {y.shape[-1]} features"
                if k == 0
                else "the width of the previous layer"
            )
            raise ValueError(f"weights[{k}] must take {width} features ({source}), got {tuple(weight.shape)}")
        if bias.shape != weight.shape[:-1]:
            raise ValueError(f"biases[{k}] must be {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
        width = weight.shape[-2]
    if width != 1:
        raise ValueError(f"weights[{len(weights) - 1}] must give one score, got {tuple(weights[-1].shape)}")


def _check_alike(x: Tensor, y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Checks that all tensors are on one device and, without autocast, have one dtype. Returns whether autocast is
    on."""
    others = {"y": y}
    for kind, tensors in (("weights", weights), ("biases", biases)):
        others.update({f"{kind}[{k}]": t for k, t in enumerate(tensors)})
    for name, t in others.items():
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
    if autocast_on(x.device.type) and x.dtype != torch.float64:
        return True
    for name, t in others.items():
        if t.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
    return False


def _prepare(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, output: str
) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Checks the arguments, applies autocast and the separable first layer. Returns u [*, B, H_1], v [*, N, H_1] and
    the weights and biases of the later layers."""
    check_samples("x", x)
    check_samples("y", y)
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"y must have the leading dimensions of x, {tuple(x.shape[:-2])}, got {tuple(y.shape[:-2])}"
        )
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("output", output, OUTPUTS)
    _check_parameters(x, y, weights, biases)
    if _check_alike(x, y, weights, biases):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(dtype), y.to(dtype)
        weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    u, v = first_layer.apart(x, y, weights[0], biases[0])
    return u, v, weights[1:], biases[1:]


def scores(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    output: str = "identity",
) -> Tensor:
    """The materialised score matrix S[i, j] = f(x_i, y_j), [*, B, N].

    Arguments and errors are those of `statistics`. Memory is O(B N sum of hidden widths) if a gradient is needed.
    """
    u, v, later, later_biases = _prepare(x, y, weights, biases, activation, output)
    s = reference.scores(autograd.flat((u, v, *later, *later_biases)), activation, output)
    return s.reshape(*x.shape[:-1], y.shape[-2])


def statistics(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    output: str = "identity",
    stats: Sequence[str] = ("positive", "row_lse"),
    pairs: str = "all",
    clip: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
) -> Statistics:
    """Statistics of S[i, j] = MLP([x_i, y_j]) over all pairs, without storing S or the activations.

    x, y: [*, B, Dx] and [*, N, Dy].
    weights, biases: from the first layer, [H_1, Dx + Dy] and [H_1], to the last, [1, H_k] and [1], as in
        `torch.nn.Linear`. At least one hidden layer. All may have a leading group dimension [G, ...] for x [G, B, Dx].
    activation: relu, leaky_relu (slope 0.01), tanh, sigmoid, elu, gelu or silu.
    output: "identity" or "softplus".
    stats: names of `positive` [*, B], `row_lse` [*, B], `col_lse` [*, N], `row_sum` [*, B], `row_softplus` [*, B] (sums
        of log(1 + exp S)) and `clipped_row_lse` [*, B], the log-sum-exp of scores clamped to [-clip, clip], which has
        no gradient.
    pairs: "all" or "off_diagonal". `positive` and off-diagonal pairs need N = B.
    memory_budget: bytes that saved or stored intermediate values may take.

    Statistics are fp32 (fp64 for fp64 inputs). Under autocast the layers run in its dtype. For 16-bit inputs the
    pre-activations of the first layer are computed in fp32 and rounded once (`backend="cuda"` rounds its two halves
    before adding them); gradients are summed in fp32 and rounded once. torch.func transforms and forward mode work:
    values and first gradients use the kernels, vmap becomes a group dimension, and second derivatives and forward mode
    materialise the scores.

    Cost for two hidden layers, with M = 2 B N H_1 H_2 FLOP per group: M forward. Backward costs 2 M if the activation
    is relu or leaky_relu and `memory_budget` allows to save one bit per pair and unit of the second layer (B N H_2 / 8
    bytes) and one score per pair; otherwise 3 M. One hidden layer costs O(B N H) and saves nothing. Deeper critics run
    in chunks of rows in plain torch, with activations of at most `memory_budget` bytes at a time.

    Precision of products: with `torch.set_float32_matmul_precision("medium")` or bf16 inputs the compiled backend
    multiplies 16-bit tiles and accumulates in fp32 if the CPU supports it. Triton multiplies in the dtype of its
    inputs, or in TF32 if torch allows it for CUDA matmuls. `backend="cuda"` does the same, with three TF32 products for
    fp32; it supports two hidden layers with relu or leaky_relu, and no fp64.

    Raises TypeError for wrong types, ValueError for empty batches, wrong widths, mixed devices or dtypes, unknown names
    and invalid budgets, and RuntimeError for a named backend that cannot run.
    """
    check_request(stats, pairs, clip)
    check_integer("memory_budget", memory_budget, least=1)
    u, v, later, later_biases = _prepare(x, y, weights, biases, activation, output)
    check_pairing(stats, pairs, u.shape[-2], v.shape[-2])
    name = _backend(x.device, backend_name(backend) or None, len(weights))
    score = Score(activation, output, pairs == "off_diagonal")
    if transforms.active():
        named = {"stats": stats, "clip": clip or 0.0, "memory_budget": memory_budget, "backend": name}
        return Statistics(**autograd.transformed((u, v, *later, *later_biases), score, **named))  # type: ignore[arg-type]
    flat = lambda: autograd.flat((u, v, *later, *later_biases))  # noqa: E731
    found: Sequence[Tensor]
    if tuple(stats) == ("positive",):
        flat_u, flat_v, flat_weights, flat_biases = flat()
        found = (reference.apply_layers(flat_u + flat_v, flat_weights, flat_biases, activation, output),)
    elif name == "reference" or (name == "chunked" and chunked.fits(flat(), memory_budget)):
        found = reference.statistics(flat(), score, clip if "clipped_row_lse" in stats else None)
    else:
        bits = sum(bit for s, bit in BITS.items() if s in stats)
        found = autograd.statistics(
            u, v, later, later_biases, score, stats=bits, clip=clip or 0.0, memory_budget=memory_budget, backend=name
        )
    lead = x.shape[:-2]
    shaped = lambda t: t if t.dim() == len(lead) + 1 else t.reshape(*lead, t.shape[-1])  # noqa: E731
    return Statistics(**{s: shaped(t) for s, t in zip(STATISTICS[: len(found)], found, strict=True) if s in stats})
