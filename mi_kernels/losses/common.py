"""What the contrastive losses of functional.py share with their distributed twins and with compat/."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.checks import FLOATS, check_number, check_samples, check_tensor, positive_values
from ..ops.common.dtypes import accumulate_dtype
from ..ops.common.rows import unit_rows, widened
from ..ops.dot_critic import api


def inverse_temperature(value: float | Tensor, groups: torch.Size | None = None) -> float | Tensor:
    """1 / temperature: a number, one element, or one a group. Its values are checked on a CPU; a GPU would stall."""
    if isinstance(value, Tensor):
        if groups is not None and value.numel() != 1 and value.shape != groups:
            raise ValueError(
                f"temperature must be a number, a 0-d tensor or have shape {tuple(groups)}, got {tuple(value.shape)}"
            )
        positive_values("temperature", value)
        return value.reciprocal()
    check_number("temperature", value, positive=True)
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
    check_tensor(name, a)
    check_tensor(other, b)
    if a.shape != b.shape:
        raise ValueError(f"{name} {tuple(a.shape)} and {other} {tuple(b.shape)} must have one shape")


def explicit_negatives(
    query: Tensor,
    positive_key: Tensor,
    negatives: Tensor,
    scale: float | Tensor,
    mode: str,
    backend: str | None,
    normalize: bool = False,
) -> Tensor:
    """Losses of rows [*, B] against their positive and negatives given apart, [*, M, D] or, "paired", [*, B, M, D].

    Products are taken in the accumulation type: a negative may be as near as the positive, and in 16-bit tiles the
    gradients of the two would be rounded before they cancel.
    """
    check_samples("query", query)
    check_samples("positive_key", positive_key)
    check_tensor("negative_keys", negatives)
    if positive_key.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(f"query and positive_key must have one dtype, got {query.dtype} and {positive_key.dtype}")
    if negatives.dtype not in FLOATS:
        raise ValueError(f"negative_keys must be float64, float32, bfloat16 or float16, got {negatives.dtype}")
    if negatives.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(f"negative_keys must have the dtype of query, {query.dtype}, got {negatives.dtype}")
    if negatives.device != query.device:
        raise ValueError(f"negative_keys must be on the device of query, {query.device}, got {negatives.device}")
    prepared = unit_rows if normalize else widened
    query, positive_key, negatives = prepared(query), prepared(positive_key), prepared(negatives)
    factor = scale[..., None] if isinstance(scale, Tensor) and scale.dim() else scale
    positive = (query * positive_key).sum(-1) * factor
    if mode == "unpaired":
        if negatives.dim() != query.dim() or negatives.shape[:-2] + negatives.shape[-1:] != (
            query.shape[:-2] + query.shape[-1:]
        ):
            raise ValueError(f"negative_keys must have shape [*, M, D] when unpaired, got {tuple(negatives.shape)}")
        if not negatives.shape[-2]:
            return positive * 0  # a memory bank before its first batch: the positive is the only candidate
        lse = api.statistics(query, negatives, scale, backend=backend).row_lse
    else:
        fits = negatives.shape[:-2] == query.shape[:-1] and negatives.shape[-1] == query.shape[-1]
        if negatives.dim() != query.dim() + 1 or not fits:
            raise ValueError(f"negative_keys must have shape [*, B, M, D] when paired, got {tuple(negatives.shape)}")
        scores = torch.matmul(negatives, query[..., None]).squeeze(-1)
        lse = (scores * (factor[..., None] if isinstance(factor, Tensor) and factor.dim() else factor)).logsumexp(-1)
    assert lse is not None
    return F.softplus(lse - positive, threshold=40.0)  # beyond it, a difference of e^-40: below fp64's rounding


def bias_rows(bias: Tensor | float | None, features: Tensor) -> Tensor | None:
    """A logit bias, one number or one a group [*], for every row [*, B]."""
    if bias is None:
        return None
    dtype = accumulate_dtype(features.dtype)
    if isinstance(bias, Tensor):
        if bias.is_complex() or bias.dtype == torch.bool:
            raise ValueError(f"logit_bias must be real, got {bias.dtype}")
        rows = bias.to(features.device, dtype)
    else:  # filled on the device: a copy from the host would make a GPU wait
        check_number("logit_bias", bias)
        bias = float(bias) if type(bias) is int else bias
        rows = torch.full((), bias, dtype=dtype, device=features.device)
    groups = features.shape[:-2]
    if rows.numel() != 1 and rows.shape != groups:
        raise ValueError(f"logit_bias must be one number or have shape {tuple(groups)}, got {tuple(rows.shape)}")
    rows = rows.reshape(()) if rows.numel() == 1 else rows[..., None]
    return rows.expand(features.shape[:-1])


def nt_xent_scaled(out0: Tensor, out1: Tensor, scale: float | Tensor, backend: str | None = None) -> Tensor:
    """nt_xent whose scale, 1 / temperature, may have either sign."""
    check_same_shape("out0", out0, "out1", out1)
    check_samples("out0", out0)
    check_samples("out1", out1)
    views = torch.cat([out0, out1], dim=-2)
    prepared = api.prepare(views, views, scale, pairs="off_diagonal", positive_shift=out0.shape[-2])
    w = 1.0 / views.shape[:-1].numel()
    return over_groups(api.loss(prepared, w_row=w, w_pos=w, normalize=True, backend=backend))
