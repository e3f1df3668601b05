"""Replaces open_clip's losses: `from mi_kernels.compat.open_clip import ClipLoss`, and SigLipLoss, CoCaLoss,
DistillClipLoss, GenLipLoss, gather_features, fused_linear_cross_entropy, neighbour_exchange and its variants.

Accepts the keywords of version 3.3.0 and of the main branch. As in the original, the caller normalises the features,
and logit_scale multiplies the scores. Differences:
* chunk_size is accepted but has no effect, because memory is O(B D) in any case. use_horovod=True raises ValueError.
* 16-bit features give an fp32 loss.
* Batches of different sizes, an unknown dist_impl, and a world_size that differs from the process group's raise
  ValueError.
* logit_bias is connected to the graph, so DistributedDataParallel does not report it as unused.
* All values of SigLipLoss's dist_impl gather the texts once; their results are equal in the original too.
* Features are gathered by mk.distributed.gather. The private names `_all_gather_with_grad` and `dist_fcol` do not
  exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..losses import common, contrastive
from ..ops.common.checks import check_number, check_one_dtype, check_same_device, check_samples, check_tensor
from ..ops.common.dtypes import accumulate_dtype
from ..ops.common.rows import widened
from ..ops.dot_critic import api
from ._captions import GenLipLoss, fused_linear_cross_entropy
from ._distillation import expected_score, from_scores
from ._neighbours import (
    NeighbourExchange,
    NeighbourExchangeBidir,
    neighbour_exchange,
    neighbour_exchange_bidir,
    neighbour_exchange_bidir_with_grad,
    neighbour_exchange_with_grad,
)

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "GenLipLoss",
    "NeighbourExchange",
    "NeighbourExchangeBidir",
    "SigLipLoss",
    "fused_linear_cross_entropy",
    "gather_features",
    "neighbour_exchange",
    "neighbour_exchange_bidir",
    "neighbour_exchange_bidir_with_grad",
    "neighbour_exchange_with_grad",
]


_HELD = 256 * 256  # SigLipLoss and DistillClipLoss store up to this many scores
_FEW = 32 * 32  # ClipLoss stores up to this many scores; its operator has a lower fixed cost


def _held(rows: Tensor, columns: Tensor, limit: int = _HELD) -> bool:
    """Whether to store all scores: on a CPU, up to 256 KiB of scores cost less than the fixed cost of the operators."""
    return rows.device.type == "cpu" and rows.dim() == columns.dim() == 2 and rows.shape[0] * columns.shape[0] <= limit


def _check_inputs(
    images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor | None = None
) -> None:
    """Raises TypeError or ValueError that names the argument. Used with stored scores; the operators have their own
    checks."""
    check_samples("image_features", images)
    check_samples("text_features", texts)
    check_same_device("text_features", texts, "image_features", images)
    check_one_dtype("text_features", texts, "image_features", images)
    for name, value in (("logit_scale", scale), ("logit_bias", bias)):
        if value is None and name == "logit_bias":
            continue
        if not isinstance(value, Tensor):
            check_number(name, value, dtype=accumulate_dtype(images.dtype))
            continue
        check_tensor(name, value)
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or value.is_meta != images.is_meta:
            given = f"{value.dtype} {tuple(value.shape)} on {value.device}"
            raise ValueError(f"{name} must be one real number, got {given}")


def _number(value: Any) -> Any:
    """Converts integers to floats, because torch does not accept integers of more than 64 bits."""
    return float(value) if type(value) is int else value


def _check_world(rank: int, world_size: int, use_horovod: bool = False) -> None:
    if use_horovod:
        raise ValueError("use_horovod must be False: only torch.distributed is supported")
    if world_size > 1 and distributed.rank_and_size() != (rank, world_size):
        raise ValueError(
            f"rank={rank} and world_size={world_size} must be the process group's, {distributed.rank_and_size()}"
        )


def _gather(features: Tensor, with_grad: bool, keep_own: bool, rank: int) -> Tensor:
    if with_grad:
        return distributed.gather(features)
    every = distributed.gather(features.detach())
    if not keep_own:
        return every
    first = rank * features.shape[0]
    return torch.cat([every[:first], features, every[first + features.shape[0] :]])


def gather_features(
    image_features: Tensor,
    text_features: Tensor,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    rank: int = 0,
    world_size: int = 1,
    use_horovod: bool = False,
) -> tuple[Tensor, Tensor]:
    """Image and text features of all ranks, [W B, D] each.

    With gather_with_grad, gradients return to the rank that owns a row. Without it only this rank's rows have
    gradients, and with local_loss no row has. The result is then not the gradient of the loss, as in the original.
    """
    _check_world(rank, world_size, use_horovod)
    keep_own = not local_loss
    return (
        _gather(image_features, gather_with_grad, keep_own, rank),
        _gather(text_features, gather_with_grad, keep_own, rank),
    )


class ClipLoss(nn.Module):
    """CLIP's symmetric cross-entropy, see `mk.clip_loss`. Cost: 4N with N = 2 B^2 D FLOP, O(B D) memory.

    With world_size > 1, local_loss scores this rank's rows against all columns (6 N W FLOP); otherwise every rank
    scores all rows against all columns (4 N W^2). With gather_with_grad both give the gradients of a single process
    after averaging over ranks.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            _check_world(rank, world_size, use_horovod)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """The positive column of every row of `get_logits`, [num_logits]."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def _gathered(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        return gather_features(
            image_features,
            text_features,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
        )

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Materialised logits per image and per text, for inspection; the loss does not use them."""
        images, texts = image_features, text_features
        if self.world_size > 1:
            images, texts = self._gathered(image_features, text_features)
        if self.world_size > 1 and self.local_loss:
            per_image, per_text = logit_scale * image_features @ texts.mT, logit_scale * text_features @ images.mT
        else:
            per_image = logit_scale * images @ texts.mT
            per_text = per_image.mT
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def _contrastive(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        common.check_same_shape("image_features", image_features, "text_features", text_features)
        if self.world_size == 1 and _held(image_features, text_features, _FEW):
            _check_inputs(image_features, text_features, logit_scale, logit_bias)
            logits = _number(logit_scale) * widened(image_features) @ widened(text_features).mT
            logits = logits if logit_bias is None else logits + _number(logit_bias)
            labels = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2
        if self.world_size == 1:
            return contrastive.clip_loss(image_features, text_features, logit_scale, logit_bias)
        images, texts = self._gathered(image_features, text_features)
        if not self.local_loss:
            return contrastive.clip_loss(images, texts, logit_scale, logit_bias)
        bias = common.bias_rows(logit_bias, image_features)
        first = self.rank * image_features.shape[0]
        forth = distributed.cross_entropy_rows(image_features, texts, logit_scale, first, row_bias=bias)
        return (forth + distributed.cross_entropy_rows(text_features, images, logit_scale, first, row_bias=bias)) / 2

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """ClipLoss and the cross-entropy of the captions, ignoring pad_id (Yu et al. 2022, eq. 4): (clip_loss,
    caption_loss)."""

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """logits [B, T, vocabulary] and labels [B, T] of the captions."""
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            given = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
            raise ValueError(f"logits must be [B, T, vocabulary] and labels [B, T], got {given}")
        if self.clip_loss_weight:
            clip_loss = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        else:
            clip_loss = torch.tensor(0, device=logits.device)
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss


class DistillClipLoss(ClipLoss):
    """ClipLoss and the cross-entropy to a teacher's softmax: (contrastive_loss, distill_loss).

    Both need the same log-sum-exps of the student's scores. The second loss therefore equals the first, plus the mean
    positive score, minus the mean score under the teacher's softmax. Cost: 7N FLOP and 1 or 2 times the teacher's 2 B^2
    D'; O(B D) memory.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The formula of the original on stored logits [B, N]."""
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean(dim=0)

    def _expected(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], teacher_scale: Tensor | float
    ) -> Tensor:
        """The expected student score (without its scale) under the teacher's softmax, averaged over both directions."""
        if self.world_size == 1:
            return expected_score(*student, *teacher, teacher_scale, both=True)
        every, taught = self._gathered(*student), self._gathered(*teacher)
        if not self.local_loss:
            return expected_score(*every, *taught, teacher_scale, both=True)
        forth = expected_score(student[0], every[1], teacher[0], taught[1], teacher_scale, both=False)
        back = expected_score(student[1], every[0], teacher[1], taught[0], teacher_scale, both=False)
        return (forth + back) / 2

    def _positive(self, student: tuple[Tensor, Tensor]) -> Tensor:
        """The mean inner product of the positive pairs of the contrastive loss."""
        images, texts = student if self.world_size == 1 or self.local_loss else self._gathered(*student)
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            # The columns are gathered features without a gradient, so each direction has gradients in its rows only.
            return ((images * texts.detach()).sum() + (images.detach() * texts).sum()) / (2 * images.shape[0])
        return (images * texts).sum() / images.shape[0]

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The dist_ arguments are the teacher's features [B, D'] and scale; D' may differ from D."""
        common.check_same_shape("image_features", image_features, "text_features", text_features)
        names = ("dist_image_features", "dist_text_features")
        common.check_same_shape(names[0], dist_image_features, names[1], dist_text_features)
        if dist_image_features.shape[0] != image_features.shape[0]:
            raise ValueError(
                f"dist_image_features must hold {image_features.shape[0]} rows, got {tuple(dist_image_features.shape)}"
            )
        # Widened first: if the student matches the teacher, the gradients of the three terms below cancel.
        student = widened(image_features), widened(text_features)
        teacher = (dist_image_features, dist_text_features)
        if self.world_size == 1 and _held(*student):
            _check_inputs(image_features, text_features, logit_scale)
            loss, distill = from_scores(*student, _number(logit_scale), *teacher, dist_logit_scale)
        else:
            loss = self._contrastive(*student, logit_scale)
            expected = self._expected(student, teacher, dist_logit_scale)
            distill = loss + logit_scale * (self._positive(student) - expected)
        if output_dict:
            return {"contrastive_loss": loss, "distill_loss": distill}
        return loss, distill


class SigLipLoss(nn.Module):
    """-1/B sum_ij log sigmoid(z_ij S_ij) (Zhai et al. 2023, eq. 1), 3N FLOP, O(W B D) memory; see `mk.siglip_loss`."""

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl must be 'bidir', 'shift', 'reduce' or 'gather', got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def get_ground_truth(
        self, device: torch.device | str, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """1 on the diagonal unless negative_only, -1 elsewhere, [num_logits, num_logits]."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Materialised logits, for inspection; the loss does not use them."""
        logits = logit_scale * image_features @ text_features.mT
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The loss of this rank's images [B, D] against texts [N, D], divided by B. With negative_only all pairs are
        negatives."""
        check_tensor("image_features", image_features)
        check_tensor("text_features", text_features)
        if image_features.shape == text_features.shape:
            if _held(image_features, text_features):
                _check_inputs(image_features, text_features, logit_scale, logit_bias)
                return self._from_scores(image_features, text_features, logit_scale, logit_bias, negative_only)
            return contrastive.siglip_loss(
                image_features, text_features, logit_scale, logit_bias, negative_only=negative_only
            )
        return self._rectangular(image_features, text_features, logit_scale, logit_bias, negative_only)

    def _from_scores(
        self, images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float | None, negative_only: bool
    ) -> Tensor:
        wide = accumulate_dtype(images.dtype)
        logits = self.get_logits(images.to(wide), texts.to(wide), _number(scale), _number(bias))
        target = torch.zeros_like(logits) if negative_only else torch.eye(len(logits), dtype=wide, device=logits.device)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(logits)

    def _rectangular(
        self, images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float | None, negative_only: bool
    ) -> Tensor:
        """Computes all pairs as negatives, softplus(S), and subtracts S for positives: softplus(-S) = softplus(S) -
        S."""
        if images.dim() != 2 or texts.dim() != 2 or images.shape[1] != texts.shape[1] or not self.chunk_size > 0:
            raise ValueError(
                f"image_features {tuple(images.shape)} and text_features {tuple(texts.shape)} must have one shape, or "
                "equal widths with a chunk_size"
            )
        prepared = api.prepare(images, texts, scale, row_bias=common.bias_rows(bias, images))
        loss = api.loss(prepared, w_soft=1.0 / images.shape[0])
        if negative_only:
            return loss
        pairs, wide = min(images.shape[0], texts.shape[0]), accumulate_dtype(images.dtype)
        positive = (images[:pairs].to(wide) * texts[:pairs].to(wide)).sum() * scale
        return loss - (positive if bias is None else positive + pairs * bias) / images.shape[0]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size > 1:
            _check_world(self.rank, self.world_size)
            loss = distributed.siglip_loss(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
