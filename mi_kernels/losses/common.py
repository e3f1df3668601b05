"""Temperatures, biases and checks shared by the contrastive losses, their distributed versions and compat/."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.common.checks import (
    LIMITS,
    check_number,
    check_same_device,
    check_samples,
    check_temperature,
    check_tensor,
    positive_values,
)
from ..ops.common.dtypes import accumulate_dtype
from ..ops.common.precision import joined
from ..ops.common.rows import widened
from ..ops.dot_critic import api


def inverse_temperature(
    value: float | Tensor, groups: torch.Size | None = None, dtype: torch.dtype = torch.float32
) -> float | Tensor:
    """Returns 1 / temperature for a number, a 0-d tensor or one value per group.

    The values of CPU tensors are checked; reading a GPU tensor would stall the GPU. The accumulation type of the
    features' `dtype` must be able to hold the result.
    """
    if isinstance(value, Tensor):
        check_tensor("temperature", value)
        if groups is not None and value.numel() != 1 and value.shape != groups:
            raise ValueError(
                f"temperature must be a number, a 0-d tensor or have shape {tuple(groups)}, got {tuple(value.shape)}"
            )
        wide = widened(value)
        positive_values("temperature", wide, least=1.0 / LIMITS[wide.dtype])
        return wide.reciprocal()  # widened first: in fp16 the inverse of 1e-5 is infinite
    check_temperature("temperature", value, accumulate_dtype(dtype))
    return 1.0 / value


def over_groups(losses: Tensor) -> Tensor:
    """Sums the losses of the groups, [*], to one number."""
    return losses.sum() if losses.dim() else losses


def check_same_shape(name: str, a: Tensor, other: str, b: Tensor) -> None:
    check_tensor(name, a)
    check_tensor(other, b)
    if a.shape != b.shape:
        raise ValueError(f"{name} {tuple(a.shape)} and {other} {tuple(b.shape)} must have one shape")
    check_same_device(other, b, name, a)


def bias_rows(bias: Tensor | float | None, features: Tensor) -> Tensor | None:
    """Expands a logit bias, one number or one per group [*], to all rows [*, B]."""
    if bias is None:
        return None
    dtype = accumulate_dtype(features.dtype)
    if isinstance(bias, Tensor):
        check_tensor("logit_bias", bias)
        if bias.is_complex() or bias.dtype == torch.bool:
            raise ValueError(f"logit_bias must be real, got {bias.dtype}")
        if bias.is_meta != features.is_meta:
            check_same_device("logit_bias", bias, "the features", features)
        rows = bias.to(features.device, dtype)
    else:  # filled on the device, because copying from the host would stall a GPU
        check_number("logit_bias", bias, dtype=dtype)
        bias = float(bias) if type(bias) is int else bias
        rows = torch.full((), bias, dtype=dtype, device=features.device)
    groups = features.shape[:-2]
    if rows.numel() != 1 and rows.shape != groups:
        raise ValueError(f"logit_bias must be one number or have shape {tuple(groups)}, got {tuple(rows.shape)}")
    rows = rows.reshape(()) if rows.numel() == 1 else rows[..., None]
    return rows.expand(features.shape[:-1])


def nt_xent_scaled(out0: Tensor, out1: Tensor, scale: float | Tensor, backend: str | None = None) -> Tensor:
    """nt_xent with a scale (1 / temperature) of either sign."""
    check_same_shape("out0", out0, "out1", out1)
    check_samples("out0", out0)
    check_samples("out1", out1)
    views = joined([out0, out1], dim=-2)
    prepared = api.prepare(views, views, scale, pairs="off_diagonal", positive_shift=out0.shape[-2])
    w = 1.0 / views.shape[:-1].numel()
    return over_groups(api.loss(prepared, w_row=w, w_pos=w, normalize=True, backend=backend))
