"""The LSTM scan and its autonomous mode: validation and public functions."""

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
    """Optional tensors of one shape; `meaning` is that shape in letters, without the group dimension."""
    grouped = len(shape) > meaning.count(",") + 1
    for name, t in tensors.items():
        if t is not None:
            _check_tensor(name, t, shape, meaning.replace("[", "[G, ") if grouped else meaning)


def _check_kinds(first: str, like: Tensor, others: dict[str, Tensor | None]) -> None:
    """One known dtype and one device; under autocast any dtypes that it casts."""
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
    """Casts as autocast asks; fp64 stays where any input is fp64."""
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
    """One LSTM layer: all hidden and cell states, h [B, T, H] and c [B, T, H], of inputs x [B, T, D].

    `lstm_scan` with the projection of the input: a CPU forms the gates of a few steps at a time in cache and uses them
    there, which saves 8 H numbers a step of memory traffic. Parameters are those of a layer of `torch.nn.LSTM`
    (`weight_ih` [4H, D], `weight_hh` [4H, H], biases [4H] or None), `h0` and `c0` [B, H] default to zeros. `lengths`
    [B]: from its length on a row is zero in h and c, passes no gradient, and may hold anything in x, NaN too. With a
    leading group dimension on every argument G layers run in one call.

    Dtypes, autocast, second derivatives, determinism and errors as in `lstm_scan`; 16-bit inputs are projected in 16
    bits and scanned in fp32. Cost, per row and step: 8 H (D + H) FLOP forward and twice that backward; x and 6 H
    numbers are kept for the backward pass. Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000.
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
    """All hidden and cell states of an LSTM: h [B, T, H] and c [B, T, H], c not only of the last step.

    `gates` [B, T, 4H] are the input projections x W_ih^T + b_ih of all steps (one matmul), in torch's order i, f, g, o;
    `weight_hh` [4H, H] and `bias` [4H] are those of `torch.nn.LSTM` (x W_ih^T with b_ih + b_hh as the bias costs a
    little less); `h0` and `c0` [B, H] default to zeros. `lengths` [B], integers from 0 to T: from its length on a row
    is zero in h and c, passes no gradient, and may hold anything in `gates`, NaN too. With a leading group dimension
    on every argument (`weight_hh` [G, 4H, H], `gates` [G, B, T, 4H]) G scans run in one call.

    Results have the dtype of `gates`; 16-bit inputs are scanned in fp32. Under autocast every input takes its dtype.
    Differentiable any number of times, also in forward mode and under torch.func's transforms: values and first
    gradients run in the kernels (vmap becomes a group dimension), the rest step by step in plain torch. Deterministic.

    Cost, per row and step: 8 H^2 FLOP forward and 16 H^2 backward; the activations and states, 6 H numbers, are kept
    for the backward pass, `gates` are not. Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as
    `torch.nn.LSTM` computes it.

    Raises ValueError or TypeError naming the argument (values of `lengths` are not checked on a GPU, in a compiled
    graph or under vmap); RuntimeError if a backend that was named cannot run.
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
    """An LSTM that runs on its own output: hidden states h [B, steps, H].

    Starts from h = c = 0. The input of step 0 is `code` [B, H], the input of every later step is the h before it. From
    step 1 on both weights [4H, H] multiply the same vector, so their sum is formed once: half the multiplications.
    Biases are [4H] or None; a leading group dimension on every argument runs G decoders in one call.

    Gradients reach `weight_ih` through step 0 and through the sum, `weight_hh` through the sum alone. Dtypes, second
    derivatives and errors as in `lstm_scan`; cost, per row and step, 8 H^2 FLOP forward and 16 H^2 backward. Decoder of
    Tsai et al. 2019 (arXiv 1806.06176), whose code multiplies by both weights: the same function, rounded differently.
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
    # torch's bf16 product on CPUs reads one number behind rows of odd length: NaN there would reach the result.
    first = (code.contiguous() @ weight_ih.mT).unsqueeze(-2)
    problem = Scan(first, weight_ih + weight_hh, bias, None, None, None)
    h, _ = autograd.scan(problem, steps, backend_name(backend))
    return h.to(code.dtype)
