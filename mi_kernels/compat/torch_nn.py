"""InfoNCE as PyTorch's proposal spells it (pytorch/pytorch pull request 195380, open): `torch.nn.functional.
info_nce_loss` and `torch.nn.InfoNCELoss`.

    from mi_kernels.compat.torch_nn import InfoNCELoss, info_nce_loss

One direction, embeddings normalised inside, negatives in the batch or one shared set. The proposal forms all logits;
here none are kept. Its module's examples use a temperature of 0.07, which is the default here. A pair-wise set of
negatives, ids and both directions are in `mk.info_nce`.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import info_nce as _library

__all__ = ["InfoNCELoss", "info_nce_loss"]


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax of the positive among the candidates, in nats (van den Oord et al. 2018, eq. 4).

    query, positive_key [N, D]: positive_key[i] belongs to query[i]. Candidates are all positive keys, or the own one
    and negative_keys [M, D]. reduction "none" [N], "mean" or "sum". Cost and errors as `mk.info_nce`.
    """
    return _library.info_nce(query, positive_key, negative_keys, temperature, reduction)


class InfoNCELoss(nn.Module):
    """The module form of `info_nce_loss`; without parameters or state."""

    def __init__(self, temperature: float | Tensor = 0.07, reduction: str = "mean"):
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce_loss(query, positive_key, negative_keys, self.temperature, self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
