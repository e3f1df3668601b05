"""Replaces SupContrast's `losses.py`: `from mi_kernels.compat.supcontrast import SupConLoss`.

Differences: features that are not normalised, or a single large one, give a finite loss (the original shifts by the
anchor's score with itself, everything else underflows and the loss is NaN); an anchor without a positive contributes 0
and counts in the mean, as in the current original (older copies give NaN); 16-bit features give an fp32 loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import common, supcon
from ..ops.common.dtypes import accumulate_dtype

__all__ = ["SupConLoss"]


class SupConLoss(nn.Module):
    """Supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2), times temperature / base_temperature.

    features [B, V, ...]: V views, flattened, normalised by the caller. labels [B] or mask [B, B] (may be asymmetric and
    weighted) say what is positive; without both, SimCLR. The mean is over all B V anchors ("all") or the B first views
    ("one"). No score is stored for a mask either: positives enter through mask @ features (2 B^2 D FLOP), the rest
    costs 4N with N = 2 (B V)^2 D. Raises ValueError naming the argument.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if labels is not None and mask is not None:
            raise ValueError("labels and mask cannot both be given")
        items = supcon.check_views(features, labels, self.base_temperature, self.contrast_mode)
        features = features.flatten(2)
        views = features.shape[1]
        contrast = features.transpose(0, 1).flatten(0, 1)
        anchors = contrast if self.contrast_mode == "all" else contrast[:items]
        own = torch.arange(anchors.shape[0], device=features.device)
        scale = common.inverse_temperature(self.temperature)
        repeats = anchors.shape[0] // items
        if mask is None:
            if labels is None:
                classes = own[:items]
            else:
                classes = torch.unique(labels.reshape(-1).to(features.device), return_inverse=True)[1]
            groups = (classes.repeat(repeats), classes.repeat(views))
            loss = supcon.class_mean(anchors, contrast, *groups, every=True, scale=scale)
        else:
            if mask.shape != (items, items):
                raise ValueError(f"mask must have shape {(items, items)}, got {tuple(mask.shape)}")
            mask = mask.to(features.device, accumulate_dtype(features.dtype))
            diagonal = mask.diagonal()
            towards = (mask @ features.to(mask.dtype).sum(1)).repeat(repeats, 1)
            towards = towards - diagonal.repeat(repeats)[:, None] * anchors
            weight = (views * mask.sum(1) - diagonal).repeat(repeats)
            rows, _ = supcon.weighted_rows(anchors, contrast, towards, weight, own=own, aligned=True, scale=scale)
            loss = rows.mean()
        return self.temperature / self.base_temperature * loss
