"""What the contrastive losses of functional.py share with their distributed twins and with compat/."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.dtypes import accumulate_dtype
from ..ops.dot_critic import api


def inverse_temperature(value: float | Tensor) -> float | Tensor:
    """1 / temperature. A tensor on the CPU is checked; reading one on a GPU would stall the device."""
    if isinstance(value, Tensor):
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            low = float(value.detach().min())
            if not (low > 0 and math.isfinite(float(value.detach().max()))):
                raise ValueError(f"temperature must be positive and finite, got {value.detach().tolist()}")
        return value.reciprocal()
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"temperature must be positive and finite, got {value}")
    return 1.0 / value


def reduced(rows: Tensor, reduction: str) -> Tensor:
    """Losses of rows as they are ("none"), their "mean" or their "sum"."""
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def over_groups(losses: Tensor) -> Tensor:
    """One number from the losses of the groups, [*]."""
    return losses.sum() if losses.dim() else losses


def check_same_shape(name: str, a: Tensor, other: str, b: Tensor) -> None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise TypeError(f"{name} and {other} must be tensors, got {type(a).__name__} and {type(b).__name__}")
    if a.shape != b.shape:
        raise ValueError(f"{name} {tuple(a.shape)} and {other} {tuple(b.shape)} must have one shape")


def explicit_negatives(
    query: Tensor, positive_key: Tensor, negatives: Tensor, scale: float | Tensor, mode: str, backend: str | None
) -> Tensor:
    """Losses of rows [*, B] against their positive and negatives given apart, [*, M, D] or, "paired", [*, B, M, D]."""
    wide = accumulate_dtype(query.dtype)
    factor = scale[..., None] if isinstance(scale, Tensor) and scale.dim() else scale
    positive = (query.to(wide) * positive_key.to(wide)).sum(-1) * factor
    if mode == "unpaired":
        if negatives.dim() != query.dim():
            raise ValueError(f"negative_keys must have shape [*, M, D] when unpaired, got {tuple(negatives.shape)}")
        if not negatives.shape[-2]:
            return positive * 0  # a memory bank before its first batch: the positive is the only candidate
        lse = api.statistics(query, negatives, scale, backend=backend).row_lse
    else:
        fits = negatives.shape[:-2] == query.shape[:-1] and negatives.shape[-1] == query.shape[-1]
        if negatives.dim() != query.dim() + 1 or not fits:
            raise ValueError(f"negative_keys must have shape [*, B, M, D] when paired, got {tuple(negatives.shape)}")
        scores = torch.matmul(negatives.to(wide), query.to(wide)[..., None]).squeeze(-1)
        lse = (scores * (factor[..., None] if isinstance(factor, Tensor) and factor.dim() else factor)).logsumexp(-1)
    assert lse is not None
    return F.softplus(lse - positive)


def bias_rows(bias: Tensor | float | None, features: Tensor) -> Tensor | None:
    """A logit bias, one number or one a group [*], for every row [*, B]."""
    if bias is None:
        return None
    dtype = accumulate_dtype(features.dtype)
    if isinstance(bias, Tensor):
        rows = bias.to(features.device, dtype)
    else:  # filled on the device: a copy from the host would make a GPU wait
        rows = torch.full((), float(bias), dtype=dtype, device=features.device)
    groups = features.shape[:-2]
    if rows.numel() != 1 and rows.shape != groups:
        raise ValueError(f"logit_bias must be one number or have shape {tuple(groups)}, got {tuple(rows.shape)}")
    rows = rows.reshape(()) if rows.numel() == 1 else rows[..., None]
    return rows.expand(features.shape[:-1])


def nt_xent_scaled(out0: Tensor, out1: Tensor, scale: float | Tensor, backend: str | None = None) -> Tensor:
    """nt_xent whose scale, 1 / temperature, may have either sign."""
    check_same_shape("out0", out0, "out1", out1)
    views = torch.cat([out0, out1], dim=-2)
    prepared = api.prepare(views, views, scale, pairs="off_diagonal", positive_shift=out0.shape[-2])
    w = 1.0 / views.shape[:-1].numel()
    return over_groups(api.loss(prepared, w_row=w, w_pos=w, normalize=True, backend=backend))
