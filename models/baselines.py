"""SimCLR (across modalities), SupCon and Cross+Self with the encoders that FactorCL gets.

As in FactorCL's public code each modality has one head and the probe reads the encoders. Unlike there,
features are normalised, as in the original SimCLR and SupCon: without that the losses start in the tens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.data.base import Batch
from models.encoders import mlp
from models.factorcl import Pair, View, Views


class _Baseline(nn.Module):
    views = 0

    def __init__(
        self,
        encoder1: nn.Module,
        encoder2: nn.Module,
        feature_dims: tuple[int, int],
        projection_dim: int | None = None,
        temperature: float = 0.1,
        head_layers: int = 1,
    ):
        super().__init__()
        self.temperature = temperature
        self.encoders = nn.ModuleList([encoder1, encoder2])
        out = projection_dim or min(feature_dims)
        self.heads = nn.ModuleList([mlp(dim, dim, out, head_layers) for dim in feature_dims])

    def encode(self, x1: View, x2: View) -> Pair:
        return self.encoders[0](x1), self.encoders[1](x2)

    def project(self, x1: View, x2: View) -> Pair:
        """Normalised head outputs [B, P] of both modalities."""
        z1, z2 = (head(e) for head, e in zip(self.heads, self.encode(x1, x2), strict=True))
        return nn.functional.normalize(z1, dim=1), nn.functional.normalize(z2, dim=1)

    def objective(self, batch: Batch, views: Views) -> dict[str, Tensor]:
        raise NotImplementedError

    def loss(self, batch: Batch, views: Views | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        parts = self.objective(batch, views or [])
        return torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}

    def inner_parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def inner_loss(self, batch: Batch, views: Views | None = None) -> Tensor:
        raise RuntimeError("a baseline has no inner critics")


class SimCLR(_Baseline):
    """NT-Xent between the two modalities of a sample."""

    def objective(self, batch: Batch, views: Views) -> dict[str, Tensor]:
        return {"cross": mk.nt_xent(*self.project(batch.x1, batch.x2), self.temperature)}


class SupCon(_Baseline):
    """Supervised contrastive loss; the two modalities are the two views."""

    def objective(self, batch: Batch, views: Views) -> dict[str, Tensor]:
        features = torch.stack(self.project(batch.x1, batch.x2), 1)
        return {"supcon": mk.sup_con(features, batch.y, temperature=self.temperature)}


class CrossSelf(_Baseline):
    """SimCLR across the modalities plus SimCLR between two augmented views within each."""

    views = 2

    def objective(self, batch: Batch, views: Views) -> dict[str, Tensor]:
        if len(views) != 2:
            raise ValueError(f"CrossSelf needs two augmented views per modality, got {len(views)}")
        (a1, a2), (b1, b2) = (self.project(*view) for view in views)
        return {
            "cross": mk.nt_xent(*self.project(batch.x1, batch.x2), self.temperature),
            "self_x1": mk.nt_xent(a1, b1, self.temperature),
            "self_x2": mk.nt_xent(a2, b2, self.temperature),
        }
