"""Replaces open_clip's losses: `from mi_kernels.compat.open_clip import ClipLoss`, and SigLipLoss, CoCaLoss,
DistillClipLoss, gather_features.

Takes the keywords of 3.3.0 and of the main branch: chunk_size is accepted and not needed, memory is O(B D) anyway;
use_horovod=True raises. Features are normalised by the caller and logit_scale multiplies, as in the original.
Differences: the loss comes out in fp32 for 16-bit features; batches of different sizes, an unknown dist_impl and a
world_size that is not the process group's raise ValueError; logit_bias takes part, so DistributedDataParallel does not
find it unused. All of SigLipLoss's dist_impl give one result; here each gathers the texts once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..losses import common, contrastive
from ..ops.common.dtypes import accumulate_dtype
from ..ops.dot_critic import api

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "gather_features"]


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

    gather_with_grad: gradients return to the rank that owns the row. Without it only this rank's rows carry one, and
    with local_loss none does: the gradient is then not that of the loss, as in the original.
    """
    _check_world(rank, world_size, use_horovod)
    keep_own = not local_loss
    return (
        _gather(image_features, gather_with_grad, keep_own, rank),
        _gather(text_features, gather_with_grad, keep_own, rank),
    )


class ClipLoss(nn.Module):
    """CLIP's symmetric cross-entropy, 4N FLOP (N = 2 B^2 D), O(B D) memory; see `mk.clip_loss`.

    world_size > 1: local_loss scores this rank's rows against all columns (6 N W FLOP), else all against all
    (4 N W^2); with gather_with_grad both give the gradients of a single process after the ranks' average.
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
        """Logits per image and per text, materialised, for looking at; the loss never calls this."""
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
    """ClipLoss and the caption's cross-entropy without pad_id (Yu et al. 2022, eq. 4): (clip_loss, caption_loss)."""

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
        if self.clip_loss_weight:
            clip_loss = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        else:
            clip_loss = torch.tensor(0, device=logits.device)
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss


def _distill_rows(
    rows: Tensor, columns: Tensor, scale: float | Tensor, teacher_rows: Tensor, teacher_columns: Tensor, teacher_scale
) -> Tensor:
    """Mean over the rows of the cross-entropy from the teacher's softmax to the student's.

    sum_j p_ij S_ij = scale <x_i, sum_j p_ij y_j>, and sum_j p_ij y_j is attention of the teacher's rows over its
    columns with the student's columns as values.
    """
    wide = accumulate_dtype(rows.dtype)
    lse = api.statistics(rows, columns, scale).row_lse
    assert lse is not None
    query, key, value = (t.to(wide)[None, None] for t in (teacher_scale * teacher_rows, teacher_columns, columns))
    expected = F.scaled_dot_product_attention(query, key, value, scale=1.0)[0, 0]
    return (lse - scale * (rows.to(wide) * expected).sum(-1)).mean()


class DistillClipLoss(ClipLoss):
    """ClipLoss and the cross-entropy from a teacher's softmaxes: (contrastive_loss, distill_loss).

    The teacher's expectation is computed as attention, so no scores are stored where torch's attention is fused.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The original's formula over stored logits [B, N]."""
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean(dim=0)

    def _sides(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image rows, their columns, text rows, their columns."""
        if self.world_size == 1:
            return image_features, text_features, text_features, image_features
        images, texts = self._gathered(image_features, text_features)
        if self.local_loss:
            return image_features, texts, text_features, images
        return images, texts, texts, images

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
        """The dist_ arguments are the teacher's: features [B, D'] of any width."""
        names = ("dist_image_features", "dist_text_features")
        common.check_same_shape(names[0], dist_image_features, names[1], dist_text_features)
        if dist_image_features.shape[0] != image_features.shape[0]:
            raise ValueError(
                f"dist_image_features must hold {image_features.shape[0]} rows, got {tuple(dist_image_features.shape)}"
            )
        loss = self._contrastive(image_features, text_features, logit_scale)
        student = self._sides(image_features, text_features)
        teacher = self._sides(dist_image_features, dist_text_features)
        forth = _distill_rows(*student[:2], logit_scale, *teacher[:2], dist_logit_scale)
        back = _distill_rows(*student[2:], logit_scale, *teacher[2:], dist_logit_scale)
        distill = (forth + back) / 2
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
        if chunk_size < 0:
            raise ValueError(f"chunk_size must not be negative, got {chunk_size}")
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
        """Materialised logits, for looking at; the loss never calls this."""
        logits = logit_scale * image_features @ text_features.mT
        return logits if logit_bias is None else logits + logit_bias

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
            loss = contrastive.siglip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
