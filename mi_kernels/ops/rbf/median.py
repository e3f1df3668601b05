"""The median distance between rows, as an operator, because the numbers decide whether inner products are accurate
enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import transforms
from ..common.precision import outside_autocast
from .distances import NEAR
from .schema import library


def _median(rows: Tensor) -> Tensor:
    """The median distances [G] of rows [G, n, D]; 1 instead of 0."""
    if rows.shape[1] < 2:
        return rows.new_ones(rows.shape[0])
    first, second = torch.triu_indices(rows.shape[1], rows.shape[1], 1, device=rows.device)
    about = rows - rows.mean(1, keepdim=True)
    peak = about.abs().amax((1, 2))
    unit = torch.where(peak == 0, 1, peak)[:, None, None]  # prevents overflow and underflow of squares
    about = about / unit
    norms = about.square().sum(-1)
    squares = norms[:, :, None] + norms[:, None] - 2 * (about @ about.mT)
    found = squares[:, first, second].median(-1).values
    if not rows.is_cpu or not (found >= 2 * NEAR * norms.amax(-1)).all():
        # The rounding error of the norms exceeds the median, so distances are computed from differences of rows. On a
        # GPU this is always done, because testing would synchronise.
        given = rows.double() / unit
        apart = torch.cdist(given, given, compute_mode="donot_use_mm_for_euclid_dist")
        found = apart[:, first, second].median(-1).values.square()
    return torch.where(found == 0, 1, found.sqrt() * unit[:, 0, 0]).to(rows.dtype)


library.define("rbf_median(Tensor rows) -> Tensor")
for _key in ("CPU", "CUDA"):
    library.impl("rbf_median", _median, _key)


@torch.library.register_fake("mi_kernels::rbf_median", lib=library)
def _(rows: Tensor) -> Any:
    return rows.new_empty(rows.shape[0])


class _Constant(torch.autograd.Function):
    """The median under torch.func's transforms."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return _median(rows.flatten(0, -3)).view(rows.shape[:-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, dims: tuple[int], rows: Tensor) -> tuple[Tensor, int]:
        return _Constant.apply(rows.movedim(dims[0], 0)), 0

    @staticmethod
    def jvp(ctx: Any, _: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


@outside_autocast
def median_distance(rows: Tensor) -> Tensor:
    """The median distance between different rows of [G, n, D], [G], or 1 if it is 0. It has no gradient."""
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.mi_kernels.rbf_median(rows.detach())
    elif transforms.active():
        found = _Constant.apply(rows)
    else:
        with torch.no_grad():
            found = _median(rows.detach())
    return found
