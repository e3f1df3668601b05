"""MISA: modality-invariant and -specific representations (Hazarika et al., ACM MM 2020, arXiv 2005.03545).

The utterance vector u_m of every modality is projected to h_m [B, D]; a shared and a private encoder compute h^c_m and
h^p_m:

    L = L_task + similarity sum CMD(h^c_m, h^c_n) / pairs + difference sum L_diff + reconstruction mean_m MSE(u^_m, h_m)

L_diff(A, B) = mean (A^T B)^2 of centred rows of norm 1 over all (h^c_m, h^p_m) and (h^p_m, h^p_n), u^_m = W_m (h^c_m +
h^p_m) + b_m. One transformer layer over the 2 M vectors fuses them. As in the public code, the encoders have sigmoids,
CMD uses five moments without scaling by the interval, and norms are treated as constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from models.baselines.supervised import UtteranceSettings, outputs_of
from models.batch import Batch, Inputs
from models.data.dataset import Dataset
from models.layers.dropout import Dropout
from models.layers.prediction import Scale
from models.layers.sequence import check_positive
from models.layers.text import TextConfig
from models.layers.transformer import check_heads
from models.layers.utterance import Utterances
from models.model import Loss, Model, Phase
from models.shares import by_rows

MOMENTS = 5


@dataclass(frozen=True)
class MISASettings(UtteranceSettings):
    """hidden: of the two bidirectional LSTMs per modality (the public code has each modality's own width). dim: width
    of the shared and private vectors. heads: of the attention that fuses them. similarity, difference, reconstruction:
    weights of these losses, by default the public code's. A text encoder is read by its masked mean.
    """

    hidden: int = 64
    dim: int = 128
    heads: int = 2
    text: TextConfig = field(default_factory=lambda: TextConfig(readout="mean"))
    similarity: float = 1.0
    difference: float = 0.3
    reconstruction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(hidden=self.hidden)
        check_heads(self.dim, self.heads)
        for name in ("similarity", "difference", "reconstruction"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class MISA(Model):
    """Any number of modalities. Representations: "shared" and "private", [B, M D], and "fused".

    Terms: the prediction's (cross entropy in nats, or the error of the standardised target), "similarity",
    "difference", "reconstruction". Rows need every modality and a label.
    """

    headline = "head"

    def __init__(self, config: MISASettings, data: Dataset):
        super().__init__()
        self.config, self.scale = config, Scale(data, config.loss)
        text = config.encoder_of_text
        self.utterances = Utterances(data.modalities, config.hidden, 2, config.embedding, config.stride, text)
        count, dim = len(data.modalities), config.dim
        self.project = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.LayerNorm(dim)) for width in self.utterances.dims]
        )
        self.private = nn.ModuleList([nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid()) for _ in range(count)])
        self.shared = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.rebuild = nn.ModuleList([nn.Linear(dim, dim) for _ in range(count)])
        # Feed-forward width and dropout are the public code's, which are torch's defaults.
        self.fusion = nn.TransformerEncoderLayer(dim, config.heads, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(2 * count * dim, 3 * dim),
            Dropout(config.dropout),
            nn.ReLU(),
            nn.Linear(3 * dim, outputs_of(data.target)),
        )

    @by_rows
    def parts(self, inputs: Mapping[str, Inputs]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """h_m, h^p_m and h^c_m of every modality."""
        projected = [net(u) for net, u in zip(self.project, self.utterances(inputs), strict=True)]
        private = [net(h) for net, h in zip(self.private, projected, strict=True)]
        return projected, private, [self.shared(h) for h in projected]

    def fused(self, private: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return self.fusion(torch.stack([*private, *shared], 1)).flatten(1)

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        _, private, shared = self.parts(batch.inputs)
        fused = self.fused(private, shared)
        return {"shared": torch.cat(shared, 1), "private": torch.cat(private, 1), "fused": fused}

    def predict(self, batch: Batch) -> Tensor:
        return self.scale.predicted(self.head(self.fused(*self.parts(batch.inputs)[1:])))

    def loss(self, batch: Batch) -> Loss:
        projected, private, shared = self.parts(batch.inputs)
        if batch.target is None:
            raise ValueError("the batch has no labels")
        terms = {self.scale.name: self.scale.loss(self.head(self.fused(private, shared)), batch.target)}
        if len(shared) > 1:
            distances = [moment_distance(a, b) for a, b in combinations(shared, 2)]
            terms["similarity"] = torch.stack(distances).mean()
        apart = [*zip(private, shared, strict=True), *combinations(private, 2)]
        terms["difference"] = torch.stack([overlap(a, b) for a, b in apart]).sum()
        rebuilt = [net(p + s) for net, p, s in zip(self.rebuild, private, shared, strict=True)]
        errors = [nn.functional.mse_loss(r, h) for r, h in zip(rebuilt, projected, strict=True)]
        terms["reconstruction"] = torch.stack(errors).mean()
        config = self.config
        weights = {name: getattr(config, name) for name in ("similarity", "difference", "reconstruction")}
        return Loss.of(terms, weights)

    def phases(self) -> list[Phase]:
        return [Phase("main", list(self.parameters()), self.loss, usable=Batch.complete_with_labels)]


def moment_distance(a: Tensor, b: Tensor) -> Tensor:
    """Central moment discrepancy [] of samples [B, D]: distance of the means plus those of the moments 2 to 5."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    found = _norm(mean_a - mean_b)
    for power in range(2, MOMENTS + 1):
        found = found + _norm((a - mean_a).pow(power).mean(0) - (b - mean_b).pow(power).mean(0))
    return found


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """mean (A^T B)^2 [] over all pairs of features, of samples [B, D] centred and scaled to rows of norm 1."""
    rows = []
    for x in (a, b):
        x = x - x.mean(0)
        rows.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True).detach() + 1e-6))
    return (rows[0].mT @ rows[1]).square().mean()


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm; its gradient at 0 is 0, where that of the square root would be NaN."""
    return torch.linalg.vector_norm(x)


def build_misa(config: MISASettings, data: Dataset) -> MISA:
    return MISA(config, data)
