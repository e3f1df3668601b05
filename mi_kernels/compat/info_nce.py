"""Replaces `info_nce` (info-nce-pytorch 0.1.4): `from mi_kernels.compat.info_nce import InfoNCE, info_nce`.

Results are the original's. Differences, each where the original fails: a temperature that is not positive (0 gave NaN),
an unknown negative_mode or reduction, and empty batches raise ValueError; 16-bit inputs give an fp32 loss.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..losses import contrastive

__all__ = ["InfoNCE", "info_nce"]


def _dimensions(name: str, t: Tensor, number: int, why: str = "") -> None:
    if t.dim() != number:
        raise ValueError(f"{name} must have {number} dimensions{why}, got shape {tuple(t.shape)}")
    if not t.shape[0]:
        raise ValueError(f"{name} must not be empty, got shape {tuple(t.shape)}")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE of normalised query, positive_key [N, D], in one direction (van den Oord et al. 2018, eq. 4).

    Without negative_keys the other positives are the negatives; with them, [M, D] ("unpaired") or [N, M, D]
    ("paired"), only they are. reduction "none" [N], "mean" or "sum". 3 N FLOP with N = 2 B^2 D, O(B D) memory.
    Raises ValueError naming the argument.
    """
    if negative_mode not in ("unpaired", "paired"):
        raise ValueError(f"negative_mode must be 'unpaired' or 'paired', got {negative_mode!r}")
    _dimensions("query", query, 2)
    _dimensions("positive_key", positive_key, 2)
    if negative_keys is not None and negative_keys.dim() != (2 if negative_mode == "unpaired" else 3):
        expected = "[M, D]" if negative_mode == "unpaired" else "[N, M, D]"
        raise ValueError(
            f"negative_keys must be {expected} with negative_mode={negative_mode!r}, got {tuple(negative_keys.shape)}"
        )
    if negative_keys is not None and negative_keys.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"negative_keys must have the {query.shape[-1]} components of query, got {tuple(negative_keys.shape)}"
        )
    return contrastive.info_nce(query, positive_key, negative_keys, temperature, reduction, negative_mode)


class InfoNCE(nn.Module):
    """The module form of `info_nce`; without parameters or state."""

    def __init__(self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"):
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )
