"""What NTXentLoss and SupConLoss share: the checks, which path runs, and the reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses import common
from ...ops.common.dtypes import accumulate_dtype
from .pairs import Pairs, all_pairs, as_pairs


def check_inputs(name: str, embeddings: Tensor, label_name: str, labels: Tensor | None) -> None:
    if embeddings.dim() != 2 or not embeddings.shape[0]:
        raise ValueError(f"{name} must have shape [batch, features] with batch >= 1, got {tuple(embeddings.shape)}")
    if labels is not None and labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{label_name} must have shape {tuple(embeddings.shape[:1])}, got {tuple(labels.shape)}")


class PairLoss(nn.Module):
    """What both losses share: the inputs' checks, which path runs, and the reduction."""

    def __init__(
        self,
        temperature: float,
        collect_stats: bool | None = None,
        embedding_regularizer: nn.Module | None = None,
        embedding_reg_weight: float = 1,
        reducer: Callable[..., Tensor] | None = None,
        distance: nn.Module | None = None,
    ):
        super().__init__()
        self.temperature = temperature
        self.collect_stats = bool(collect_stats)
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        self.reducer = reducer
        self.distance = distance

    def _features(self, *embeddings: Tensor) -> list[Tensor] | None:
        """What the scores are inner products of; None for a distance that is no inner product."""
        if self.distance is None:
            return [F.normalize(e.to(accumulate_dtype(e.dtype)), dim=1) for e in embeddings]
        kind = {base.__name__ for base in type(self.distance).__mro__}
        if "DotProductSimilarity" not in kind or getattr(self.distance, "power", 1) != 1:
            return None
        if not self.distance.normalize_embeddings:
            return [e.to(accumulate_dtype(e.dtype)) for e in embeddings]
        p: Any = self.distance.p
        return [F.normalize(e.to(accumulate_dtype(e.dtype)), p=p, dim=1) for e in embeddings]

    def _matrix(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Scores / temperature, [B, N]."""
        features = self._features(embeddings, ref_emb)
        scale = common.inverse_temperature(self.temperature)
        if features is not None:
            return features[0] @ features[1].mT * scale
        assert self.distance is not None
        scores = self.distance(embeddings, ref_emb)
        return (scores if self.distance.is_inverted else -scores) * scale

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings [B, D], labels [B]; ref_emb [N, D], ref_labels [N] (default: the batch itself without the
        diagonal); indices_tuple of triplets (anchor, positive, negative) or pairs replaces the labels' pairs."""
        check_inputs("embeddings", embeddings, "labels", labels)
        own = None
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
            own = torch.arange(embeddings.shape[0], device=embeddings.device)
        check_inputs("ref_emb", ref_emb, "ref_labels", ref_labels)
        if indices_tuple is None and (labels is None or ref_labels is None):
            raise ValueError("labels (and ref_labels with ref_emb) or indices_tuple must be given")
        if indices_tuple is None:
            assert labels is not None and ref_labels is not None
            device = embeddings.device
            return self.against(embeddings, labels.to(device), ref_emb, ref_labels.to(device), own)
        loss = self._listed(self._matrix(embeddings, ref_emb), as_pairs(indices_tuple), embeddings, labels)
        return self._regularized(loss, embeddings)

    def against(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, own: Tensor | None
    ) -> Tensor:
        """The loss from labels; own [B] is the column of ref_emb that is the row itself, None if there is none."""
        features = self._features(embeddings, ref_emb)
        if features is None:
            pairs = all_pairs(labels, ref_labels, own)
            loss = self._listed(self._matrix(embeddings, ref_emb), pairs, embeddings, labels)
        else:
            classes = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)[1].split(
                [labels.shape[0], ref_labels.shape[0]]
            )
            loss = self._fused(features[0], features[1], classes[0], classes[1], own, embeddings, labels)
        return self._regularized(loss, embeddings)

    def _regularized(self, loss: Tensor, embeddings: Tensor) -> Tensor:
        if self.embedding_regularizer is None:
            return loss
        return loss + self.embedding_reg_weight * self.embedding_regularizer(embeddings)

    def _reduce(self, losses: Tensor, indices: Any, kind: str, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        if self.reducer is not None:
            found = {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}
            return self.reducer(found, embeddings, labels)
        return self._default_reduction(losses)

    def _default_reduction(self, losses: Tensor) -> Tensor:
        raise NotImplementedError

    def _listed(self, scores: Tensor, pairs: Pairs, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _fused(
        self,
        x: Tensor,
        y: Tensor,
        row_class: Tensor,
        col_class: Tensor,
        own: Tensor | None,
        embeddings: Tensor,
        labels: Tensor,
    ) -> Tensor:
        raise NotImplementedError


def zero_loss(embeddings: Tensor) -> Tensor:
    """0 with a gradient of zeros."""
    return (embeddings.to(accumulate_dtype(embeddings.dtype)) * 0).sum()
