"""Replaces `info_nce` (info-nce-pytorch 0.1.4): `from mi_kernels.compat.info_nce import InfoNCE, info_nce`.

Results are those of the original, including the helpers `normalize` and `transpose`. Differences:
* A temperature that is not positive, an unknown negative_mode or reduction, and empty batches raise ValueError. The
  original
  returns NaN or fails later.
* The temperature is one number. The original broadcasts a tensor over the logits.
* 16-bit inputs give an fp32 loss, and a row of zeros is finite in fp16 too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import contrastive
from ..ops.common.checks import check_choice, check_tensor

__all__ = ["InfoNCE", "info_nce", "normalize", "transpose"]


def transpose(x: Tensor) -> Tensor:
    """x with its last two dimensions exchanged."""
    return x.transpose(-2, -1)


def normalize(*xs: Tensor | None) -> list[Tensor | None]:
    """Every tensor with its last dimension scaled to length 1; None stays None."""
    return [None if x is None else F.normalize(x, dim=-1) for x in xs]


def _dimensions(name: str, t: Tensor, number: int) -> None:
    check_tensor(name, t)
    if t.dim() != number:
        raise ValueError(f"{name} must have {number} dimensions, got shape {tuple(t.shape)}")
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
    """InfoNCE in one direction (van den Oord et al. 2018, eq. 4), in nats. Features are normalised here.

    query, positive_key: [B, D]; row i of both is a positive pair.
    negative_keys: [M, D] ("unpaired") or [B, M, D] ("paired"). They replace the in-batch negatives.
    temperature: a number or a tensor with one element; may be learnable.
    reduction: "mean", "sum" or "none" for one loss per query, [B].

    Cost: 3N with N = 2 B^2 D FLOP, O(B D) memory. Raises ValueError or TypeError that names the argument.
    """
    check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
    _dimensions("query", query, 2)
    _dimensions("positive_key", positive_key, 2)
    if negative_keys is not None:
        check_tensor("negative_keys", negative_keys)
    if negative_keys is not None and negative_keys.dim() != (2 if negative_mode == "unpaired" else 3):
        expected = "[M, D]" if negative_mode == "unpaired" else "[N, M, D]"
        raise ValueError(
            f"negative_keys must be {expected} with negative_mode={negative_mode!r}, got {tuple(negative_keys.shape)}"
        )
    if negative_keys is not None and negative_keys.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"negative_keys must have the {query.shape[-1]} components of query, got {tuple(negative_keys.shape)}"
        )
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature)
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be one number, got shape {tuple(temperature.shape)}")
        temperature = temperature.reshape(())
    return contrastive.info_nce(query, positive_key, negative_keys, temperature, reduction, negative_mode)


class InfoNCE(nn.Module):
    """Module form of `info_nce`, without parameters or state."""

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
