"""Validation and autograd of the Gaussian CLUB bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import autograd as handover
from ..common.checks import check_samples
from . import dispatch, reference
from .schema import NEED_LOGVAR, NEED_MU, NEED_Y

NEGATIVES = ("all", "others")


class _ClubFunction(torch.autograd.Function):
    # Copies of inputs that are not contiguous are made here, where autograd does not record them.
    @staticmethod
    def forward(ctx, mu, logvar, y, backend):
        run = torch.ops.mi_kernels.club_forward if torch.compiler.is_compiling() else dispatch.forward
        value, moments = run(*_contiguous(mu, logvar, y), backend)
        ctx.save_for_backward(mu, logvar, y, moments)
        ctx.backend = backend
        return value

    @staticmethod
    def backward(ctx, g):
        mu, logvar, y, moments = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [t for t in (mu, logvar, y) if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(reference.value(mu, logvar, y), inputs, g, create_graph=True))
            return *(next(found) if t is not None and t.requires_grad else None for t in (mu, logvar, y)), None
        bits = (NEED_MU, NEED_LOGVAR, NEED_Y)
        needs = handover.needs(ctx.needs_input_grad, bits)
        run = torch.ops.mi_kernels.club_backward if torch.compiler.is_compiling() else dispatch.backward
        gradients = run(*_contiguous(mu, logvar, y), moments, g.contiguous(), needs, ctx.backend)
        return *(t if needs & bit else None for t, bit in zip(gradients, bits, strict=True)), None


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
    """CLUB with a Gaussian conditional, exact in O(B D): mean_i [log q(y_i | x_i) - mean_j log q(y_j | x_i)], nats [*].

    q(y | x_i) = N(mu_i, diag exp logvar_i); mu, y [*, B, D]; logvar [*, B, D], or None for unit variances. Cheng et
    al. 2020 (arXiv 2006.12013, vCLUB), with the inner mean over all j, j = i among them, as their public code has it;
    that scales the estimate by (B - 1) / B, which negatives="others" (j != i, B of two or more) undoes.

    Inputs of unlike dtypes are promoted; fp32 out (fp64 for fp64). Differentiable twice. Cost: about 15 B D FLOP and
    3 B D reads forward, 30 B D FLOP, 3 B D reads and 3 B D writes backward; 5 D numbers are kept besides the inputs.
    Raises ValueError or TypeError naming the argument; RuntimeError if a backend that was named cannot run.
    """
    _check("mu", mu)
    _check("y", y, mu)
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives must be one of {', '.join(NEGATIVES)}, got {negatives!r}")
    batch = mu.shape[-2]
    if negatives == "others" and batch < 2:
        raise ValueError(f"negatives='others' needs a batch of two or more, got mu {tuple(mu.shape)}")
    dtype = torch.promote_types(mu.dtype, y.dtype)
    if logvar is not None:
        _check("logvar", logvar, mu)
        dtype = torch.promote_types(dtype, logvar.dtype)
    cast = lambda t: t if t.dtype == dtype else t.to(dtype)  # noqa: E731
    value = _ClubFunction.apply(cast(mu), None if logvar is None else cast(logvar), cast(y), backend or "")
    return value * (batch / (batch - 1)) if negatives == "others" else value
