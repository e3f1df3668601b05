"""Argument checks and public functions of the LSTM layer, the LSTM scan and the LSTM decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import backend_name, check_floats, check_integer, check_lengths, check_tensor
from ..common.precision import autocast_on
from . import autograd, dispatch  # noqa: F401  (dispatch registers the operators)
from .problem import Layer, Scan


def _check_tensor(name: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    check_tensor(name, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning} = {list(shape)}, got {list(t.shape)}")


def _check_weight(name: str, weight: Tensor) -> None:
    check_tensor(name, weight)
    if weight.dim() not in (2, 3) or weight.numel() == 0 or weight.shape[-2] != 4 * weight.shape[-1]:
        raise ValueError(f"{name} must have shape [4H, H], or [G, 4H, H] for G groups, got {list(weight.shape)}")


def _check_vectors(tensors: dict[str, Tensor | None], shape: tuple[int, ...], meaning: str) -> None:
    """Checks optional tensors of one shape; `meaning` is that shape in letters, without the group dimension."""
    grouped = len(shape) > meaning.count(",") + 1
    for name, t in tensors.items():
        if t is not None:
            _check_tensor(name, t, shape, meaning.replace("[", "[G, ") if grouped else meaning)


def _check_kinds(first: str, like: Tensor, others: dict[str, Tensor | None]) -> None:
    """Checks that all tensors have one supported dtype and one device; under autocast their dtypes may differ."""
    present = {name: t for name, t in others.items() if t is not None}
    check_floats(first, like)
    for name, t in present.items():
        check_floats(name, t)
        if t.device != like.device:
            raise ValueError(f"{name} must be on the device of {first}, {like.device}, got {t.device}")
    autocast = autocast_on(like.device.type)
    for name, t in present.items():
        if t.dtype != like.dtype and not autocast:
            raise ValueError(f"{name} must have the dtype of {first}, {like.dtype}, got {t.dtype}")


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Applies autocast, except if an input is fp64."""
    present = [t for t in tensors if t is not None]
    device = present[0].device.type
    if not autocast_on(device):
        return list(tensors)
    double = any(t.dtype == torch.float64 for t in present)
    dtype = torch.float64 if double else torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in tensors]


def _checked_lengths(lengths: Tensor | None, batch: tuple[int, ...], steps: int, device: torch.device) -> Tensor | None:
    if lengths is None:
        return None
    check_lengths("lengths", lengths, batch, "[B]" if len(batch) == 1 else "[G, B]", steps, "T")
    return lengths.to(device, torch.int64)


def _summed(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM layer. Returns all hidden and cell states, h [B, T, H] and c [B, T, H].

    x: inputs [B, T, D].
    weight_ih, weight_hh, bias_ih, bias_hh: [4H, D], [4H, H] and [4H] (or None), as in a layer of `torch.nn.LSTM`.
    h0, c0: initial states [B, H], zeros by default.
    lengths: integers [B]. Beyond its length a row has h = c = 0 and no gradient, and x may contain anything there, even
        NaN.
    backend: name of a backend; by default chosen from the device.

    With a leading group dimension on every argument, G layers run in one call. This is `lstm_scan` together with the
    projection of the input; on a CPU the gates of a few steps at a time stay in cache, which saves 8 H numbers of
    memory traffic per step.

    Dtypes, autocast, second derivatives, determinism and errors are those of `lstm_scan`; 16-bit inputs are projected
    in 16 bits and scanned in fp32. Cost per row and step: 8 H (D + H) FLOP forward and twice that backward; x and 6 H
    numbers are kept for backward. Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.
    """
    _check_weight("weight_hh", weight_hh)
    width, hidden = weight_hh.shape[-2:]
    lead = tuple(weight_hh.shape[:-2])
    check_tensor("x", x)
    if x.dim() != 3 + len(lead) or tuple(x.shape[:-3]) != lead or not x.numel():
        letters = "[G, B, T, D]" if lead else "[B, T, D]"
        raise ValueError(
            f"x must have shape {letters} and not be empty (weight_hh is {list(weight_hh.shape)}), got {list(x.shape)}"
        )
    *batch, steps, features = x.shape
    _check_tensor("weight_ih", weight_ih, (*lead, width, features), "[G, 4H, D]" if lead else "[4H, D]")
    _check_vectors({"bias_ih": bias_ih, "bias_hh": bias_hh}, (*lead, width), "[4H]")
    _check_vectors({"h0": h0, "c0": c0}, (*batch, hidden), "[B, H]")
    others = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    _check_kinds("x", x, {**others, "h0": h0, "c0": c0})
    lengths = _checked_lengths(lengths, tuple(batch), steps, x.device)
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0 = _autocast(  # type: ignore[assignment]
        x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
    )
    problem = Layer(x, weight_ih, weight_hh, _summed(bias_ih, bias_hh), h0, c0, lengths)
    h, c = autograd.lstm(problem, backend_name(backend))
    return h.to(x.dtype), c.to(x.dtype)


def lstm_scan(
    gates: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of an LSTM. Returns all hidden and all cell states, h [B, T, H] and c [B, T, H].

    gates: input projections x W_ih^T + b_ih of all steps (one matmul), [B, T, 4H], in torch's order i, f, g, o.
    weight_hh, bias: [4H, H] and [4H], as in `torch.nn.LSTM`. Projecting without a bias and passing b_ih + b_hh here
        costs a little less.
    h0, c0: initial states [B, H], zeros by default.
    lengths: integers [B] from 0 to T. Beyond its length a row has h = c = 0 and no gradient, and `gates` may contain
        anything there, even NaN.
    backend: name of a backend; by default chosen from the device.

    With a leading group dimension on every argument (`weight_hh` [G, 4H, H], `gates` [G, B, T, 4H]), G scans run in one
    call.

    Results have the dtype of `gates`; 16-bit inputs are scanned in fp32. Under autocast all inputs are cast to its
    dtype. Differentiable any number of times, also in forward mode and under torch.func transforms. Values and first
    gradients use the kernels (vmap becomes a group dimension); other derivatives use plain torch step by step.
    Deterministic.

    Cost per row and step: 8 H^2 FLOP forward and 16 H^2 backward. Activations and states (6 H numbers) are kept for
    backward, `gates` are not. Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as in
    `torch.nn.LSTM`.

    Raises ValueError or TypeError that names the argument (values of `lengths` are not checked on a GPU, in a compiled
    graph or under vmap), and RuntimeError if a named backend cannot run.
    """
    _check_weight("weight_hh", weight_hh)
    check_tensor("gates", gates)
    width, hidden = weight_hh.shape[-2:]
    lead = tuple(weight_hh.shape[:-2])
    letters = "[G, B, T, 4H]" if lead else "[B, T, 4H]"
    if gates.dim() != 3 + len(lead) or gates.shape[-1] != width or tuple(gates.shape[:-3]) != lead or not gates.numel():
        raise ValueError(
            f"gates must have shape {letters} with 4H = {width} and not be empty (weight_hh is "
            f"{list(weight_hh.shape)}), got {list(gates.shape)}"
        )
    *batch, steps = gates.shape[:-1]
    _check_vectors({"bias": bias}, (*lead, width), "[4H]")
    _check_vectors({"h0": h0, "c0": c0}, (*batch, hidden), "[B, H]")
    _check_kinds("gates", gates, {"weight_hh": weight_hh, "bias": bias, "h0": h0, "c0": c0})
    lengths = _checked_lengths(lengths, tuple(batch), steps, gates.device)
    gates, weight_hh, bias, h0, c0 = _autocast(gates, weight_hh, bias, h0, c0)  # type: ignore[assignment]
    h, c = autograd.scan(Scan(gates, weight_hh, bias, h0, c0, lengths), steps, backend_name(backend))
    return h.to(gates.dtype), c.to(gates.dtype)


def lstm_decode(
    code: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    steps: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """An LSTM decoder that feeds its output back as input. Returns the hidden states h [B, steps, H].

    code: input of step 0, [B, H]. The input of every later step is the previous h. Initial states are zero.
    weight_ih, weight_hh: [4H, H]. bias_ih, bias_hh: [4H] or None.
    steps: number of steps.

    A leading group dimension on every argument runs G decoders in one call. From step 1 on both weights multiply the
    same vector, so they are added once, which halves the multiplications. `weight_ih` receives gradients from step 0
    and from the sum, `weight_hh` only from the sum. Dtypes, second derivatives and errors are those of `lstm_scan`.
    Cost per row and step: 8 H^2 FLOP forward and 16 H^2 backward. This is the decoder of Tsai et al. 2019 (arXiv
    1806.06176); their code multiplies by both weights, which gives the same function with different rounding.
    """
    _check_weight("weight_hh", weight_hh)
    _check_tensor("weight_ih", weight_ih, tuple(weight_hh.shape), "of weight_hh")
    width, hidden = weight_hh.shape[-2:]
    lead = tuple(weight_hh.shape[:-2])
    letters = "[G, B, H]" if lead else "[B, H]"
    check_tensor("code", code)
    if code.dim() != 2 + len(lead) or code.shape[-1] != hidden or tuple(code.shape[:-2]) != lead or not code.numel():
        raise ValueError(
            f"code must have shape {letters} with H = {hidden} and not be empty (weight_hh is "
            f"{list(weight_hh.shape)}), got {list(code.shape)}"
        )
    _check_vectors({"bias_ih": bias_ih, "bias_hh": bias_hh}, (*lead, width), "[4H]")
    check_integer("steps", steps, least=1)
    weights = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    _check_kinds("code", code, weights)
    code, weight_ih, weight_hh, bias_ih, bias_hh = _autocast(code, weight_ih, weight_hh, bias_ih, bias_hh)  # type: ignore[assignment]
    bias = _summed(bias_ih, bias_hh)
    # torch's bf16 product on CPUs reads one number beyond rows of odd length, and a NaN there would affect the result.
    first = (code.contiguous() @ weight_ih.mT).unsqueeze(-2)
    problem = Scan(first, weight_ih + weight_hh, bias, None, None, None)
    h, _ = autograd.scan(problem, steps, backend_name(backend))
    return h.to(code.dtype)
