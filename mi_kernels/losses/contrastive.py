"""Contrastive losses as functions, computed from log-sum-exps of dot-product scores without a B x B tensor.

All losses are to be minimised. They return nats in fp32 (fp64 for fp64 inputs) and are twice differentiable in features
and scales. N stands for 2 B^2 D FLOP; forward and backward together cost 3N for one-sided and 4N for symmetric losses.
"""

from __future__ import annotations

from torch import Tensor

from ..ops.common.checks import backend_name, check_bool, check_choice, check_integer
from ..ops.common.precision import joined
from ..ops.dot_critic import api
from . import common, negatives

PAIR = ("image_features", "text_features", "logit_scale", "row_ids", "col_ids")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    normalize: bool = True,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    in_batch: bool = False,
    negative_mask: Tensor | None = None,
    memory_budget: int = 0,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE: mean of -log softmax of the positive pair among all candidates (van den Oord et al. 2018, eq. 4), in
    nats.

    query, positive_key: [*, B, D]. Row i of both is a positive pair; the other keys of the batch are its negatives.
    negative_keys: optional negatives, [*, M, D] shared by all queries ("unpaired") or [*, B, M, D], one set per query
        ("paired"). They replace the in-batch negatives, or are added to them with in_batch=True (hard negatives).
    temperature: a number, a 0-d tensor or one value per group [*]; may be learnable.
    reduction: "mean", "sum" or "none" for one loss per query, [*, B].
    negative_mode: "unpaired" or "paired", the layout of negative_keys.
    normalize: scale all rows to unit length, so that scores are cosines over the temperature.
    symmetric: average the losses of both directions, as CLIP does.
    query_ids, key_ids: integers [*, B]. Pairs with equal ids are not negatives; key_ids defaults to query_ids.
    negative_mask: boolean [*, B, M] for "paired" negatives; False marks entries that do not exist.
    memory_budget: bytes that stored scores may take. If they fit, the symmetric loss costs 3N instead of 4N; on a CPU
        16 MiB are always allowed.
    backend: name of a backend, see `mk.backends()`; by default chosen from the device.

    Cost: 3N one-sided, 4N symmetric or with reduction="none" (N = 2 B^2 D FLOP); O(B D) memory. Raises ValueError or
    TypeError that names the argument, and RuntimeError if a named backend cannot run.
    """
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
    check_bool(normalize=normalize, symmetric=symmetric, in_batch=in_batch)
    check_integer("memory_budget", memory_budget)
    backend_name(backend)
    common.check_same_shape("query", query, "positive_key", positive_key)
    scale = common.inverse_temperature(temperature, query.shape[:-2], query.dtype)
    if negative_keys is not None:
        if symmetric or query_ids is not None or key_ids is not None:
            raise ValueError("negative_keys cannot be combined with symmetric, query_ids or key_ids")
        if negative_mode == "paired" or not in_batch:
            return negatives.explicit_negatives(
                query,
                positive_key,
                negative_keys,
                scale,
                reduction,
                negative_mode,
                normalize=normalize,
                mask=negative_mask,
                in_batch=in_batch,
                backend=backend,
            )
        negatives.check_negatives(query, positive_key, negative_keys, negative_mode, negative_mask)
        positive_key = joined([positive_key, negative_keys], dim=-2)
    elif in_batch or negative_mask is not None:
        raise ValueError("in_batch and negative_mask need negative_keys")
    if query_ids is None and key_ids is not None:
        raise ValueError("key_ids was given without query_ids")
    key_ids = query_ids if key_ids is None else key_ids
    prepared = api.prepare(
        query,
        positive_key,
        scale,
        row_ids=query_ids,
        col_ids=key_ids,
        positive_shift=0,
        pairs="all" if query_ids is None else "unequal_ids_or_positive",
        names=("query", "positive_key", "temperature", "query_ids", "key_ids"),
    )
    if reduction == "none":
        return api.row_losses(prepared, symmetric=symmetric, normalize=normalize, backend=backend)
    count = query.shape[:-1].numel() if reduction == "mean" else 1
    w = 0.5 / count if symmetric else 1.0 / count
    return common.over_groups(
        api.loss(
            prepared,
            w_row=w,
            w_col=w if symmetric else 0.0,
            w_pos=1.0 / count,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
    )


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: Tensor | None = None,
    *,
    memory_budget: int = 0,
    backend: str | None = None,
) -> Tensor:
    """CLIP loss: the mean of the cross-entropies image-to-text and text-to-image (Radford et al. 2021, figure 3), in
    nats.

    image_features, text_features: [*, B, D], normalised by the caller, as in open_clip.
    logit_scale: factor of the scores, after exponentiation; a number, a 0-d tensor or one value per group [*].
    logit_bias: accepted for compatibility; it cancels in both softmaxes.
    memory_budget: bytes that stored scores may take, see `info_nce`.
    backend: name of a backend; by default chosen from the device.

    Cost: 4N (N = 2 B^2 D FLOP), or 3N if the scores fit memory_budget; O(B D) memory. Raises ValueError or TypeError
    that names the argument.
    """
    common.check_same_shape(PAIR[0], image_features, PAIR[1], text_features)
    bias = common.bias_rows(logit_bias, image_features)
    check_integer("memory_budget", memory_budget)
    prepared = api.prepare(image_features, text_features, logit_scale, row_bias=bias, positive_shift=0, names=PAIR)
    count = image_features.shape[:-1].numel()
    return common.over_groups(
        api.loss(
            prepared,
            w_row=0.5 / count,
            w_col=0.5 / count,
            w_pos=1.0 / count,
            memory_budget=memory_budget,
            backend=backend,
        )
    )


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: Tensor | float | None,
    *,
    negative_only: bool = False,
    backend: str | None = None,
) -> Tensor:
    """SigLIP loss: -1/B sum_ij log sigmoid(z_ij S_ij) with z = 1 on the diagonal and -1 elsewhere (Zhai et al. 2023,
    eq. 1).

    image_features, text_features: [*, B, D], normalised by the caller.
    logit_scale, logit_bias: S_ij = logit_scale <image_i, text_j> + logit_bias; numbers, 0-d tensors or one per group
        [*].
    negative_only: treat every pair as a negative, as open_clip does for features of another rank.
    backend: name of a backend; by default chosen from the device.

    Cost: 3N (N = 2 B^2 D FLOP), O(B D) memory. Raises ValueError or TypeError that names the argument.
    """
    common.check_same_shape(PAIR[0], image_features, PAIR[1], text_features)
    check_bool(negative_only=negative_only)
    bias = common.bias_rows(logit_bias, image_features)
    shift = -1 if negative_only else 0
    prepared = api.prepare(image_features, text_features, logit_scale, row_bias=bias, positive_shift=shift, names=PAIR)
    return common.over_groups(
        api.loss(
            prepared, w_soft=1.0 / image_features.shape[:-1].numel(), soft_signed=not negative_only, backend=backend
        )
    )


def nt_xent(out0: Tensor, out1: Tensor, temperature: float | Tensor = 0.5, *, backend: str | None = None) -> Tensor:
    """SimCLR's NT-Xent (Chen et al. 2020, eq. 1), in nats: each of the 2B views is scored against the 2B - 1 others.

    out0, out1: [*, B, D], two views of the same items. The loss normalises them.
    temperature: a number, a 0-d tensor or one value per group [*]; may be learnable.
    backend: name of a backend; by default chosen from the device.

    Returns the mean over the 2B anchors. Cost: 3N with N = 8 B^2 D FLOP, O(B D) memory. Raises ValueError or TypeError
    that names the argument.
    """
    common.check_same_shape("out0", out0, "out1", out1)
    scale = common.inverse_temperature(temperature, out0.shape[:-2], out0.dtype)
    return common.nt_xent_scaled(out0, out1, scale, backend)
