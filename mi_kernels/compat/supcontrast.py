"""Replaces SupContrast's `losses.py`: `from mi_kernels.compat.supcontrast import SupConLoss`.

Differences: features that are not normalised, or a single large one, give a finite loss (the original shifts by the
anchor's score with itself, everything else underflows and the loss is NaN); an anchor without a positive contributes 0
and counts in the mean, as in the current original (older copies give NaN); 16-bit features give an fp32 loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import common, supcon
from ..ops.common.dtypes import accumulate_dtype

__all__ = ["SupConLoss"]

_HELD = 256 * 256


class SupConLoss(nn.Module):
    """Supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2), times temperature / base_temperature.

    features [B, V, ...]: V views, flattened, normalised by the caller. labels [B] or mask [B, B] (may be asymmetric and
    weighted) say what is positive; without both, SimCLR. The mean is over all B V anchors ("all") or the B first views
    ("one"). No score is stored for a mask either: positives enter through mask @ features (2 B^2 D FLOP), the rest
    costs 3N with N = 2 (B V)^2 D, or 4N where an anchor has no positive. On a CPU up to 256 x 256 scores are held: they
    cost less than the operator's fixed part. Raises ValueError naming the argument.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if labels is not None and mask is not None:
            raise ValueError("labels and mask cannot both be given")
        items = supcon.check_views(features, labels, self.base_temperature, self.contrast_mode, any_labels=True)
        features = features.flatten(2)
        views = features.shape[1]
        contrast = features.transpose(0, 1).flatten(0, 1)
        anchors = contrast if self.contrast_mode == "all" else contrast[:items]
        scale = common.inverse_temperature(self.temperature)
        if mask is not None and mask.shape != (items, items):
            raise ValueError(f"mask must have shape {(items, items)}, got {tuple(mask.shape)}")
        if anchors.device.type == "cpu" and anchors.shape[0] * contrast.shape[0] <= _HELD:
            loss = _from_scores(anchors, contrast, _mask(labels, mask, anchors, items), views, scale)
        elif mask is None:
            if labels is None:
                classes = torch.arange(items, device=features.device)
            else:
                classes = torch.unique(labels.reshape(-1).to(features.device), return_inverse=True)[1]
            groups = (classes.repeat(anchors.shape[0] // items), classes.repeat(views))
            loss = supcon.class_mean(anchors, contrast, *groups, every=True, scale=scale)
        else:
            repeats = anchors.shape[0] // items
            towards, weight = supcon.masked_positives(features, mask.to(features.device), repeats)
            loss = supcon.weighted_mean(anchors, contrast, towards, weight, every=True, scale=scale)
        return self.temperature / self.base_temperature * loss


def _mask(labels: Tensor | None, mask: Tensor | None, like: Tensor, items: int) -> Tensor:
    """Which items are positive for which, [B, B], in the accumulation type."""
    wide = accumulate_dtype(like.dtype)
    if mask is not None:
        return mask.to(like.device, wide)
    if labels is None:
        return torch.eye(items, dtype=wide, device=like.device)
    labels = labels.reshape(-1).to(like.device)
    return (labels[:, None] == labels).to(wide)


def _from_scores(anchors: Tensor, contrast: Tensor, mask: Tensor, views: int, scale: float | Tensor) -> Tensor:
    """The mean over the anchors with all scores held; anchor i is column i."""
    scores = anchors.to(mask.dtype) @ contrast.to(mask.dtype).mT * scale
    own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    positive = mask.detach().repeat(scores.shape[0] // mask.shape[0], views).masked_fill(own, 0)
    weight = positive.sum(1, keepdim=True)
    target = positive.div_(torch.where(weight > supcon.NONE, weight, torch.inf))  # no positive: a row of zeros
    # Finite, because 0 times -inf is NaN.
    return F.cross_entropy(scores.masked_fill(own, -1e30), target)
