"""Replacements for base classes, default distances and reducers of pytorch-metric-learning, used if it is not
installed.

Names and attributes are those of the original, as far as the losses need them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossDict = dict[str, dict[str, Any]]


class ModuleWithRecords(nn.Module):
    """Names of attributes that loggers may record."""

    def __init__(self, collect_stats: bool | None = None):
        super().__init__()
        self.collect_stats = bool(collect_stats)
        self._record_these: list[str] = []

    def add_to_recordable_attributes(self, name: Any = None, list_of_names: Any = None, is_stat: bool = False) -> None:
        if not is_stat:
            self._record_these += ([] if name is None else [name]) + list(list_of_names or ())

    def reset_stats(self) -> None:
        pass


class DotProductSimilarity(ModuleWithRecords):
    """<query, ref> of normalised or unchanged rows."""

    def __init__(self, normalize_embeddings: bool = True, p: float = 2, power: float = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.normalize_embeddings, self.p, self.power, self.is_inverted = normalize_embeddings, p, power, True

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        query = self.maybe_normalize(query_emb)
        matrix = self.compute_mat(query, query if ref_emb is None else self.maybe_normalize(ref_emb))
        return matrix if self.power == 1 else matrix**self.power

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return query_emb @ ref_emb.mT

    def normalize(self, embeddings: Tensor, dim: int = 1) -> Tensor:
        return F.normalize(embeddings, p=self.p, dim=dim)  # type: ignore[arg-type]

    def maybe_normalize(self, embeddings: Tensor, dim: int = 1) -> Tensor:
        return self.normalize(embeddings, dim) if self.normalize_embeddings else embeddings


class CosineSimilarity(DotProductSimilarity):
    """The cosine."""

    def __init__(self, **kwargs: Any):
        super().__init__(normalize_embeddings=True, **kwargs)


class MeanReducer(ModuleWithRecords):
    """The mean of each sub-loss; 0 if it is empty."""

    def forward(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        (found,) = loss_dict.values()
        losses = found["losses"]
        if not isinstance(losses, Tensor):
            return (embeddings * 0).sum() + losses
        return losses if found["reduction_type"] == "already_reduced" else self.reduced(losses)

    def reduced(self, losses: Tensor) -> Tensor:
        return losses.mean()


class AvgNonZeroReducer(MeanReducer):
    """The mean of the losses above 0."""

    def reduced(self, losses: Tensor) -> Tensor:
        counted = losses > 0
        return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)


class DoNothingReducer(ModuleWithRecords):
    """Returns the sub-losses unchanged."""

    def forward(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> LossDict:
        return loss_dict


class MultipleReducers(ModuleWithRecords):
    """The sum of sub-losses, each reduced by the reducer of its name."""

    def __init__(self, reducers: dict[str, nn.Module], **kwargs: Any):
        super().__init__(**kwargs)
        self.reducers = nn.ModuleDict(reducers)
        self.default_reducer = MeanReducer()

    def forward(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        pick = lambda name: self.reducers[name] if name in self.reducers else self.default_reducer  # noqa: E731
        return torch.stack([pick(name)({name: found}, embeddings, labels) for name, found in loss_dict.items()]).sum()


class BaseMetricLossFunction(ModuleWithRecords):
    """A loss with a distance, a reducer and a regularizer; compute_loss gives its sub-losses."""

    def __init__(
        self,
        collect_stats: bool | None = None,
        embedding_regularizer: nn.Module | None = None,
        embedding_reg_weight: float = 1,
        reducer: nn.Module | None = None,
        distance: nn.Module | None = None,
    ):
        super().__init__(collect_stats)
        self.embedding_regularizer, self.embedding_reg_weight = embedding_regularizer, embedding_reg_weight
        self.distance = self.get_default_distance() if distance is None else distance
        self.set_reducer(reducer)

    def set_reducer(self, reducer: nn.Module | None) -> None:
        if isinstance(reducer, (MultipleReducers, DoNothingReducer)) or (
            reducer is not None and len(self.sub_loss_names()) == 1
        ):
            self.reducer: Any = reducer
        elif len(self.sub_loss_names()) == 1:
            self.reducer = self.get_default_reducer()
        else:
            made = {n: self.get_default_reducer() if reducer is None else reducer for n in self.sub_loss_names()}
            self.reducer = MultipleReducers(made)

    def get_default_distance(self) -> nn.Module:
        return CosineSimilarity()

    def get_default_reducer(self) -> nn.Module:
        return MeanReducer()

    def sub_loss_names(self) -> list[str]:
        return ["loss"] if self.embedding_regularizer is None else ["loss", "embedding_reg_loss"]

    def zero_losses(self) -> LossDict:
        return {n: {"losses": 0, "indices": None, "reduction_type": "already_reduced"} for n in self.sub_loss_names()}

    def add_embedding_regularization_to_loss_dict(self, loss_dict: LossDict, embeddings: Tensor) -> None:
        if self.embedding_regularizer is not None:
            loss = self.embedding_regularizer(embeddings) * self.embedding_reg_weight
            loss_dict["embedding_reg_loss"] = {"losses": loss, "indices": None, "reduction_type": "already_reduced"}


class CrossBatchMemory(ModuleWithRecords):
    """Base class of this package's CrossBatchMemory."""
