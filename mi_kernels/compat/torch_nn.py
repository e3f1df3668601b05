"""InfoNCE with the interface of an open proposal to PyTorch (pytorch/pytorch pull request 195380):
`torch.nn.functional.info_nce_loss` and `torch.nn.InfoNCELoss`.

    from mi_kernels.compat.torch_nn import InfoNCELoss, info_nce_loss

The loss has one direction, normalises the embeddings, and uses in-batch negatives or one shared set of negatives.
Unlike the proposal it stores no logits. The default temperature is 0.07, as in the examples of the proposal.
`mk.info_nce` also supports a set of negatives per query, ids and both directions.
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

    query, positive_key: [N, D]; positive_key[i] is the positive of query[i].
    negative_keys: [M, D]. If given, they are the negatives of every query; otherwise the other positive keys are.
    reduction: "mean", "sum" or "none" for one loss per query, [N].

    Cost and errors are those of `mk.info_nce`.
    """
    return _library.info_nce(query, positive_key, negative_keys, temperature, reduction)


class InfoNCELoss(nn.Module):
    """Module form of `info_nce_loss`, without parameters or state."""

    def __init__(self, temperature: float | Tensor = 0.07, reduction: str = "mean"):
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce_loss(query, positive_key, negative_keys, self.temperature, self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
