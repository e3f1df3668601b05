"""Shared by NTXentLoss and SupConLoss: argument checks, scores and reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import common
from ...ops.common.autograd import differentiable_gradients, readable
from ...ops.common.checks import check_tensor
from ...ops.common.precision import autocast_on
from ...ops.common.rows import widened
from . import original
from .pairs import Pairs, all_pairs, as_pairs

_BLOCK_BYTES = 2 << 20
_INNER_PRODUCT = ("forward", "compute_mat", "normalize", "maybe_normalize")


def check_inputs(name: str, embeddings: Tensor, label_name: str, labels: Tensor | None) -> None:
    check_tensor(name, embeddings)
    if embeddings.dim() != 2:
        raise ValueError(f"{name} must have shape [batch, features], got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {embeddings.dtype}")
    if labels is None:
        return
    check_tensor(label_name, labels)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{label_name} must have one entry for each row of {name} {tuple(embeddings.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    if labels.is_complex():
        raise ValueError(f"{label_name} must hold integers, got {labels.dtype}")
    if labels.is_floating_point() and readable(labels) and bool(labels.isnan().any()):
        raise ValueError(f"{label_name} must not be NaN: NaN equals no label, not even itself")


class _Again(torch.autograd.Function):
    """function(*tensors), recomputed in backward instead of stored. (torch.utils.checkpoint would import the compiler,
    which takes seconds and 150 MiB.)"""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        formula = lambda *tensors: (ctx.function(*tensors),)  # noqa: E731
        return None, *differentiable_gradients(formula, ctx.saved_tensors, ctx.needs_input_grad[1:], (g,))


class Scores(NamedTuple):
    """Scores / temperature, [B, N]: from features, multiplied in blocks of rows, or from the full matrix of a
    distance."""

    features: tuple[Tensor, Tensor] | None  # [B, D], [N, D]
    matrix: Tensor | None
    scale: float | Tensor
    shape: tuple[int, int]

    def whole(self) -> Tensor:
        if self.features is None:
            assert self.matrix is not None
            return self.matrix
        return self.features[0] @ self.features[1].mT * self.scale

    def over_blocks(self, function: Callable[..., Tensor], *by_row: Tensor) -> Iterator[Tensor]:
        """Yields function(scores [b, N], first row, *by_row [b]) for blocks of b rows. If there are several blocks,
        only their features are kept for backward. A stored matrix is one block."""
        rows, columns = self.shape
        if self.features is not None:
            x, y = self.features
            step = max(1, _BLOCK_BYTES // (x.element_size() * max(1, columns)))
            if step < rows:
                scale = torch.as_tensor(self.scale, dtype=x.dtype, device=x.device)
                parts = zip(*(t.split(step) for t in (x, *by_row)), strict=True)
                for first, (part, *beside) in zip(range(0, rows, step), parts, strict=True):

                    def block(part: Tensor, y: Tensor, scale: Tensor, *beside: Tensor, first: int = first) -> Tensor:
                        return function(part @ y.mT * scale, first, *beside)

                    yield _Again.apply(block, part, y, scale, *beside)
                return
        yield function(self.whole(), 0, *by_row)


def _is_inner_product(distance: Any) -> bool:
    """Whether a distance is certainly an inner product. If a subclass, an instance attribute, a hook or recorded
    statistics may change the result, the distance itself is called."""
    base = original.DotProductSimilarity
    return (
        isinstance(distance, base)
        and all(getattr(type(distance), name) is getattr(base, name) for name in _INNER_PRODUCT)
        and not any(name in vars(distance) for name in _INNER_PRODUCT)
        and not (distance._forward_hooks or distance._forward_pre_hooks or distance.collect_stats)
        and distance.power == 1
        and distance.is_inverted
    )


class PairLoss(original.BaseMetricLossFunction):
    """Base class of both losses: checks the inputs, chooses the implementation and reduces the losses."""

    # the reducer whose result a loss can compute without the individual losses
    own_reducer: Any = original.MeanReducer

    def __init__(self, temperature: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.temperature = temperature
        self.add_to_recordable_attributes(list_of_names=["temperature"], is_stat=False)

    def get_default_distance(self) -> Any:
        return original.CosineSimilarity()

    def get_default_reducer(self) -> Any:
        return self.own_reducer()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings [B, D], labels [B]; ref_emb [N, D], ref_labels [N] (default, or embeddings itself: the batch
        without the diagonal); indices_tuple of triplets (anchor, positive, negative) or pairs replaces the labels'
        pairs. Raises ValueError or TypeError naming the argument."""
        check_inputs("embeddings", embeddings, "labels", labels)
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
        elif ref_emb is embeddings and ref_labels is None:
            ref_labels = labels
        check_inputs("ref_emb", ref_emb, "ref_labels", ref_labels)
        if embeddings.shape[1] != ref_emb.shape[1]:
            raise ValueError(
                f"embeddings {tuple(embeddings.shape)} and ref_emb {tuple(ref_emb.shape)} must have as many features"
            )
        if embeddings.device != ref_emb.device or (
            embeddings.dtype != ref_emb.dtype and not autocast_on(embeddings.device.type)
        ):
            raise ValueError(
                f"embeddings and ref_emb must have one dtype and device, got {embeddings.dtype} on {embeddings.device} "
                f"and {ref_emb.dtype} on {ref_emb.device}"
            )
        if indices_tuple is None and (labels is None or ref_labels is None):
            raise ValueError("labels (and ref_labels with ref_emb) or indices_tuple must be given")
        device = embeddings.device
        labels, ref_labels = (None if t is None else t.to(device) for t in (labels, ref_labels))
        self.reset_stats()
        found = self.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        return self._reduced(found, embeddings, labels)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The original's dictionary of losses, indices and reduction_type; already reduced where the reducer is the
        default one."""
        if indices_tuple is not None:
            pairs = as_pairs(tuple(t.to(embeddings.device) for t in indices_tuple))
            if not pairs[0].numel() or not pairs[2].numel():
                return self.zero_losses()
            return self._of_pairs(self._scores(embeddings, ref_emb), pairs)
        assert labels is not None and ref_labels is not None
        if ref_emb is not embeddings:
            return self._of_labels(embeddings, labels, ref_emb, ref_labels, None)
        own = torch.arange(embeddings.shape[0], device=embeddings.device)
        if labels is ref_labels or torch.equal(labels, ref_labels):
            return self._of_labels(embeddings, labels, ref_emb, labels, own)
        # A row whose label differs from its label as a column: only a list of pairs can represent this.
        return self.compute_loss(embeddings, labels, all_pairs(labels, ref_labels, own), ref_emb, ref_labels)

    def against(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, own: Tensor | None
    ) -> Tensor:
        """The loss from labels; own [B] is the column of ref_emb that is the row itself, or None."""
        self.reset_stats()
        return self._reduced(self._of_labels(embeddings, labels, ref_emb, ref_labels, own), embeddings, labels)

    def _of_labels(
        self, embeddings: Tensor, labels: Any, ref_emb: Any, ref_labels: Any, own: Any
    ) -> dict[str, dict[str, Any]]:
        if not embeddings.shape[0] or not ref_emb.shape[0]:
            return self.zero_losses()
        return self._labelled(self._scores(embeddings, ref_emb), labels, ref_labels, own)

    def _reduced(self, losses: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor | None) -> Tensor:
        self.add_embedding_regularization_to_loss_dict(losses, embeddings)
        # Reducers create their sums in the dtype of the embeddings, and fp16 would limit the loss.
        return self.reducer(losses, widened(embeddings), labels)

    def _scores(self, embeddings: Tensor, ref_emb: Tensor) -> Scores:
        """The features whose inner products are the scores, or the matrix of the distance."""
        scale = common.inverse_temperature(self.temperature)
        distance: Any = self.distance
        shape = (embeddings.shape[0], ref_emb.shape[0])
        if not _is_inner_product(distance):
            if not any(True for _ in distance.parameters()):  # a learnable distance has its own dtype
                same = ref_emb is embeddings
                embeddings = widened(embeddings)
                ref_emb = embeddings if same else widened(ref_emb)
            matrix = widened(distance(embeddings, ref_emb))
            return Scores(None, (matrix if distance.is_inverted else -matrix) * scale, scale, shape)
        x = widened(embeddings)
        y = x if ref_emb is embeddings else widened(ref_emb)
        if distance.normalize_embeddings:
            unit = F.normalize(x, p=distance.p, dim=1)
            y = unit if y is x else F.normalize(y, p=distance.p, dim=1)
            x = unit
        return Scores((x, y), None, scale, shape)

    def _reduces_itself(self) -> bool:
        """Whether this class may reduce the loss, because the reducer is the default one and records nothing."""
        reducer: Any = self.reducer
        if type(reducer) is original.MultipleReducers and "loss" in reducer.reducers:
            reducer = reducer.reducers["loss"]
        return bool(
            type(reducer) is self.own_reducer
            and not reducer.collect_stats
            and not (reducer._forward_hooks or reducer._forward_pre_hooks)
        )

    def _labelled(
        self, scores: Scores, labels: Tensor, ref_labels: Tensor, own: Tensor | None
    ) -> dict[str, dict[str, Any]]:
        raise NotImplementedError

    def _of_pairs(self, scores: Scores, pairs: Pairs) -> dict[str, dict[str, Any]]:
        raise NotImplementedError


def sub_loss(losses: Tensor, indices: Any, kind: str) -> dict[str, dict[str, Any]]:
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}


def already_reduced(loss: Tensor) -> dict[str, dict[str, Any]]:
    return sub_loss(loss, None, "already_reduced")


class Lists(NamedTuple):
    """Pairs sorted by anchor, so that the pairs of a block of rows are contiguous."""

    rows: Tensor
    columns: Tensor
    order: Tensor | None  # the original position of each pair; None if they were sorted

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor) -> Lists:
        if bool((rows[1:] >= rows[:-1]).all()):
            return cls(rows, columns, None)
        order = torch.argsort(rows, stable=True)
        return cls(rows[order], columns[order], order)

    def within(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        """The pairs of a block of rows: row indices relative to the first row of the block, and columns."""
        ends = torch.searchsorted(self.rows, self.rows.new_tensor([first, first + rows]))
        part = slice(*ends.tolist())
        return self.rows[part] - first, self.columns[part]

    def as_given(self, values: Tensor) -> Tensor:
        """Values of the pairs in their original order."""
        return values if self.order is None else values[torch.argsort(self.order)]
