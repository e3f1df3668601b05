"""InfoNCE with explicit negatives, such as a memory bank or mined hard negatives.

The loss of query i is -log softmax of its positive among the positive and the negatives, which equals
softplus(lse_j(S_ij) - S_i,pos). All scores are taken relative to the positive score, so losses near zero stay precise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common import transforms
from ..ops.common.autograd import differentiable_gradients, needs_formula
from ..ops.common.checks import check_floats, check_one_dtype, check_same_device, check_samples, check_tensor
from ..ops.common.precision import autocast_on, joined, outside_autocast
from ..ops.common.rows import unit_rows, widened
from ..ops.dot_critic import api

_SMALL = 1 << 16  # up to this many scores plain torch is faster on a CPU, because fixed costs dominate
_PANEL = 1 << 22  # number of scores held at a time on a CPU: 16 MiB in fp32
_NEVER = 40.0  # threshold of F.softplus, beyond which it returns its argument: above 40 this is exact even in fp64

_Scale = float | Tensor


@outside_autocast
def shared_negatives(
    query: Tensor,
    positive_key: Tensor,
    negatives: Tensor,
    scale: _Scale,
    reduction: str,
    *,
    backend: str | None = None,
) -> Tensor:
    """Losses of queries [*, B, D] against negatives [*, M, D] that all queries share; reduction "none", "mean" or
    "sum".

    The arguments must be in the accumulation type. If a negative is as near as the positive, their gradients almost
    cancel, and rounding them to 16 bits first would leave only noise. Cost: 3N FLOP on a CPU with N = 2 B M D (4N for
    reduction "none" if the negatives need a gradient), 4N elsewhere; O((B + M) D) memory plus a panel of at most 16 MiB
    of scores.
    """
    if not negatives.shape[-2]:  # an empty memory bank: the positive is the only candidate
        return _reduced((query * positive_key).sum(-1) * 0, reduction)
    scores = query.shape[:-1].numel() * negatives.shape[-2]
    if query.device.type == "cpu" and backend is None and (scores <= _SMALL or transforms.active()):
        return _formula(query, positive_key, negatives, scale, reduction)
    if query.device.type == "cpu" and backend is None and not torch.compiler.is_compiling():
        factor = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=query.dtype)
        return _SharedNegatives.apply(query, positive_key, negatives, factor, reduction, torch.is_grad_enabled())
    positive = (query * positive_key).sum(-1) * _beside(scale, 1)
    found = api.statistics(query, negatives, scale, row_bias=-positive, backend=backend)
    assert found.row_lse is not None
    return _reduced(F.softplus(found.row_lse, threshold=_NEVER), reduction)


def explicit_negatives(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    scale: _Scale,
    reduction: str,
    mode: str,
    *,
    normalize: bool,
    mask: Tensor | None = None,
    in_batch: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Losses against negatives [*, M, D] ("unpaired", without in_batch) or [*, B, M, D] ("paired")."""
    check_negatives(query, positive_key, negative_keys, mode, mask)
    if mode == "unpaired" and normalize and query.shape[:-1].numel() * negative_keys.shape[-2] <= _SMALL:
        # One autograd node normalises all rows: at this size the number of nodes determines the time.
        sizes = [query.shape[-2], query.shape[-2], negative_keys.shape[-2]]
        q, k, n = unit_rows(joined([query, positive_key, negative_keys], -2)).split(sizes, -2)
        return shared_negatives(q, k, n, scale, reduction, backend=backend)
    prepared = unit_rows if normalize else widened
    query, positive_key = prepared(query), prepared(positive_key)
    if mode == "unpaired":
        return shared_negatives(query, positive_key, prepared(negative_keys), scale, reduction, backend=backend)
    return paired_negatives(
        query,
        positive_key,
        widened(negative_keys),
        scale,
        reduction,
        mask=mask,
        normalize=normalize,
        in_batch=in_batch,
        backend=backend,
    )


def check_negatives(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor, mode: str, mask: Tensor | None
) -> None:
    """Raises TypeError or ValueError naming the argument."""
    check_samples("query", query)
    check_samples("positive_key", positive_key)
    check_same_device("positive_key", positive_key, "query", query)
    check_one_dtype("positive_key", positive_key, "query", query)
    check_floats("negative_keys", negative_keys)
    if negative_keys.dtype != query.dtype and not autocast_on(query.device.type):
        raise ValueError(f"negative_keys must have the dtype of query, {query.dtype}, got {negative_keys.dtype}")
    check_same_device("negative_keys", negative_keys, "query", query)
    groups, dim = query.shape[:-2], query.shape[-1]
    leading = groups if mode == "unpaired" else query.shape[:-1]
    if negative_keys.shape[:-2] != leading or negative_keys.shape[-1:] != (dim,):
        shape = ", ".join([*(str(n) for n in leading), "M", str(dim)])
        raise ValueError(f"negative_keys must have shape [{shape}] when {mode}, got {tuple(negative_keys.shape)}")
    if mask is None:
        return
    check_tensor("negative_mask", mask)
    if mode != "paired" or mask.dtype != torch.bool or mask.shape != negative_keys.shape[:-1]:
        raise ValueError(
            f"negative_mask must be boolean of shape {tuple(negative_keys.shape[:-1])} with negative_mode='paired', "
            f"got {mask.dtype} {tuple(mask.shape)} with {mode!r}"
        )
    check_same_device("negative_mask", mask, "query", query)


@outside_autocast
def paired_negatives(
    query: Tensor,
    positive_key: Tensor,
    negatives: Tensor,
    scale: _Scale,
    reduction: str,
    *,
    mask: Tensor | None = None,
    normalize: bool = False,
    in_batch: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Losses of queries [*, B, D] against negatives [*, B, M, D], one set per query, and with in_batch also against the
    other positive keys.

    The boolean mask [*, B, M] marks the negatives that exist. `normalize` divides the scores by the lengths of the
    negatives, which avoids a normalised copy of them. Stores O(B M) scores and, with a mask, one copy of the negatives
    in which the missing entries are zero: masking only the scores would let NaN entries reach the gradients as 0 times
        NaN.
    """
    if mask is not None:
        negatives = negatives.masked_fill(~mask[..., None], 0)
    scores = torch.matmul(negatives, query[..., None]).squeeze(-1)
    if normalize:
        lengths = torch.linalg.vector_norm(negatives, dim=-1)
        scores = scores / lengths.masked_fill(lengths == 0, torch.inf)
    positive = (query * positive_key).sum(-1, keepdim=True)
    relative = (scores - positive) * _beside(scale, 2)
    if mask is not None:
        # A finite minimum instead of -inf: a query without negatives then has loss 0 and no NaN in its gradient.
        relative = relative.masked_fill(~mask, torch.finfo(relative.dtype).min / 2)
    log_sum = relative.logsumexp(-1)
    if in_batch and query.shape[-2] > 1:
        shift = -positive.squeeze(-1) * _beside(scale, 1)
        found = api.statistics(
            query, positive_key, scale, row_bias=shift, pairs="off_diagonal", backend=backend
        )
        assert found.row_lse is not None
        log_sum = torch.logaddexp(log_sum, found.row_lse)
    return _reduced(F.softplus(log_sum, threshold=_NEVER), reduction)


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def _beside(scale: _Scale, dims: int) -> _Scale:
    """Reshapes a scale [*] so that it multiplies tensors with `dims` more dimensions."""
    if isinstance(scale, Tensor) and scale.dim():
        return scale.reshape(*scale.shape, *(1,) * dims)
    return scale


def _factor(scale: Tensor, like: Tensor) -> _Scale:
    """A Python number for a 0-d scale, otherwise [*, 1]."""
    return scale.to(like.dtype)[..., None] if scale.dim() else scale.item()


def _formula(query: Tensor, positive_key: Tensor, negatives: Tensor, scale: _Scale, reduction: str) -> Tensor:
    """The definition of the loss, with materialised scores."""
    query = query * _beside(scale, 2)  # scales the queries, which are fewer numbers than the scores
    positive = (query * positive_key).sum(-1, keepdim=True)
    logits = joined([positive, query @ negatives.mT], -1)
    logits = logits.flatten(0, -2)
    target = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    rows = F.cross_entropy(logits, target, reduction=reduction)
    return rows.reshape(query.shape[:-1]) if reduction == "none" else rows


class _SharedNegatives(torch.autograd.Function):
    """Computes the losses in panels of rows whose scores stay in cache.

    With r_i = lse_j(S_ij) - S_i,pos, p = softmax_j S_ij and the scale s, the gradients of the loss of query i are
    d / d q_i = sigmoid(r_i) s (sum_j p_ij n_j - k_i), d / d k_i = -sigmoid(r_i) s q_i,
    d / d n_j = sum_i sigmoid(r_i) s p_ij q_i and d / d s = sigmoid(r_i) <q_i, sum_j p_ij n_j - k_i>.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive_key: Tensor,
        negatives: Tensor,
        scale: Tensor,
        reduction: str,
        recording: bool,
    ) -> Any:
        # needs_input_grad ignores no_grad, so `recording` says whether gradients are recorded.
        needs = ctx.needs_input_grad
        rows, slopes, away, by_negative = _panels(
            query,
            positive_key,
            negatives,
            _factor(scale, query),
            recording and any(needs),
            recording and needs[2] and reduction != "none",
            None,
        )
        ctx.save_for_backward(query, positive_key, negatives, scale, slopes, away, by_negative)
        ctx.reduction = reduction
        return _reduced(rows, reduction)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        query, positive_key, negatives, scale, slopes, away, by_negative = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if needs_formula((g,)):
            inputs = (query, positive_key, negatives, scale)
            formula = lambda q, k, n, s: (_formula(q, k, n, s, ctx.reduction),)  # noqa: E731
            return *differentiable_gradients(formula, inputs, needs[:4], (g,)), None, None
        if ctx.reduction == "mean":
            g = g / query.shape[:-1].numel()
        factor = _factor(scale, query)
        weight = slopes * g * factor  # [*, B]
        found: list[Tensor | None] = [None, None, None, None]
        if needs[0]:
            found[0] = weight[..., None] * away
        if needs[1]:
            found[1] = -weight[..., None] * query
        if needs[2]:
            if by_negative is not None:
                found[2] = by_negative * g
            else:
                found[2] = _panels(query, positive_key, negatives, factor, False, True, g)[3]
        if needs[3]:
            by_row = slopes * g * (query * away).sum(-1)
            found[3] = by_row.sum(-1).to(scale.dtype) if scale.dim() else by_row.sum().to(scale.dtype)
        return *found, None, None


@outside_autocast
def _panels(
    query: Tensor,
    positive_key: Tensor,
    negatives: Tensor,
    factor: Tensor | float,
    toward_query: bool,
    toward_negatives: bool,
    g: Tensor | None,
) -> Any:
    """Returns the losses [*, B] and sigmoid(r) [*, B]; if toward_query, sum_j p_ij n_j - k_i [*, B, D]; if
    toward_negatives, the gradient of the negatives sum_i g_i d loss_i / d n_j [*, M, D]."""
    with torch.no_grad():
        positive = (query * positive_key).sum(-1)
        groups, size, columns = query.shape[:-2], query.shape[-2], negatives.shape[-2]
        step = max(1, _PANEL // max(1, columns * groups.numel()))
        rows, slopes = query.new_empty(query.shape[:-1]), query.new_empty(query.shape[:-1])
        away = torch.empty_like(query, memory_format=torch.contiguous_format) if toward_query else None
        by_negative = None
        for first in range(0, size, step):
            part = slice(first, first + step)
            own = query[..., part, :]
            scores = own @ negatives.mT
            scores.sub_(positive[..., part, None]).mul_(factor[..., None] if isinstance(factor, Tensor) else factor)
            top = scores.amax(-1, keepdim=True)
            total = scores.sub_(top).exp_().sum(-1)
            relative = total.log() + top.squeeze(-1)
            rows[..., part] = F.softplus(relative, threshold=_NEVER)
            slopes[..., part] = slope = relative.sigmoid()
            if away is not None:
                mean = (scores @ negatives).div_(total[..., None])
                away[..., part, :] = mean.sub_(positive_key[..., part, :])
            if toward_negatives:
                weight = slope / total * factor
                if g is not None:
                    weight = weight * (g[..., part] if g.dim() else g)
                found = scores.mT @ (own * weight[..., None])
                by_negative = found if by_negative is None else by_negative.add_(found)
        return rows, slopes, away, by_negative
