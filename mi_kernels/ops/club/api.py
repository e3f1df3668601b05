"""Argument checks and autograd of the Gaussian CLUB bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import transforms
from ..common.autograd import batched, differentiable_gradients, needs, scaled
from ..common.checks import backend_name, check_choice, check_samples
from . import dispatch, reference
from .schema import NEED_LOGVAR, NEED_MU, NEED_Y

NEGATIVES = ("all", "others")


class _ClubFunction(torch.autograd.Function):
    # Inputs are made contiguous inside this function, where autograd does not record the copies.
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor | None, y: Tensor, backend: str) -> Any:
        run = torch.ops.mi_kernels.club_forward if torch.compiler.is_compiling() else dispatch.forward
        value, moments = run(*_contiguous(mu, logvar, y), backend)
        ctx.save_for_backward(mu, logvar, y, moments)
        ctx.backend = backend
        return value

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        mu, logvar, y, moments = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_gradients(_formula, (mu, logvar, y), ctx.needs_input_grad[:3], (g,)), None
        bits = (NEED_MU, NEED_LOGVAR, NEED_Y)
        wanted = needs(ctx.needs_input_grad, bits)
        run = torch.ops.mi_kernels.club_backward if torch.compiler.is_compiling() else dispatch.backward
        many = batched(g)  # for a batch of incoming gradients the kernel runs once with gradient 1, in fp32 for 16 bits
        slope = moments.new_ones(moments.shape[:-2]) if many else g.contiguous()
        problem = tuple(t if t is None or not many else t.to(moments.dtype) for t in (mu, logvar, y))
        gradients = run(*_contiguous(*problem), moments, slope, wanted, ctx.backend)
        found = [t if wanted & bit else None for t, bit in zip(gradients, bits, strict=True)]
        if many:
            found = [None if t is None else t.to(mu.dtype) for t in scaled(found, [g] * 3)]
        return *found, None


def _formula(mu: Tensor, logvar: Tensor | None, y: Tensor) -> tuple[Tensor]:
    return (reference.value(mu, logvar, y),)


def _bound(mu: Tensor, logvar: Tensor | None, y: Tensor, backend: str) -> Tensor:
    if not transforms.active():
        found: Tensor = _ClubFunction.apply(mu, logvar, y, backend)
        return found
    operator = transforms.Operator(
        lambda lead, *tensors: (_ClubFunction.apply(*tensors, backend),), lambda lead, *tensors: _formula(*tensors)
    )
    return transforms.apply(operator, mu, logvar, y)[0]


def _contiguous(mu: Tensor, logvar: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    return mu.contiguous(), None if logvar is None else logvar.contiguous(), y.contiguous()


def _check(name: str, t: Tensor, like: Tensor | None = None) -> None:
    check_samples(name, t)
    if like is None:
        return
    if t.shape != like.shape:
        raise ValueError(f"{name} must have the shape of mu, {tuple(like.shape)}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, mu is on {like.device}")


def gaussian_club(
    mu: Tensor, logvar: Tensor | None, y: Tensor, *, negatives: str = "all", backend: str | None = None
) -> Tensor:
    """CLUB with a Gaussian conditional: mean_i [log q(y_i | x_i) - mean_j log q(y_j | x_i)] in nats, [*], exact in O(B
    D).

    q(y | x_i) = N(mu_i, diag exp logvar_i) (Cheng et al. 2020, arXiv 2006.12013, vCLUB).

    mu, y: [*, B, D].
    logvar: [*, B, D], or None for unit variances.
    negatives: "all" takes the inner mean over all j including j = i, as the public code does, which scales the value by
        (B - 1) / B. "others" takes it over j != i and needs B >= 2.

    Inputs of different dtypes are promoted; the result is fp32 (fp64 for fp64 inputs). Twice differentiable. Cost:
    about 15 B D FLOP and 3 B D reads forward; 30 B D FLOP, 3 B D reads and 3 B D writes backward; 5 D numbers are kept
    besides the inputs. Raises ValueError or TypeError that names the argument, and RuntimeError if a named backend
    cannot run.
    """
    _check("mu", mu)
    _check("y", y, mu)
    check_choice("negatives", negatives, NEGATIVES)
    batch = mu.shape[-2]
    if negatives == "others" and batch < 2:
        raise ValueError(f"negatives='others' needs at least two samples, got mu {tuple(mu.shape)}")
    dtype = torch.promote_types(mu.dtype, y.dtype)
    if logvar is not None:
        _check("logvar", logvar, mu)
        dtype = torch.promote_types(dtype, logvar.dtype)
    cast = lambda t: t if t.dtype == dtype else t.to(dtype)  # noqa: E731
    value = _bound(cast(mu), None if logvar is None else cast(logvar), cast(y), backend_name(backend))
    return value * (batch / (batch - 1)) if negatives == "others" else value
