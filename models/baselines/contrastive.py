"""SimCLR (across modalities), SupCon and Cross+Self with the encoders that FactorCL gets; all terms in nats.

As in FactorCL's public code, each modality has one head, and probes use the encoder outputs. Unlike there, features are
normalised, as in the original SimCLR and SupCon; otherwise the losses would start above 10. With more than two
modalities SimCLR sums over their pairs, and SupCon treats each modality as a view. Losses ignore rows that lack a
modality.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.batch import Batch, Inputs
from models.data.dataset import Dataset
from models.layers.encoders import EncoderConfig, make_encoder, mlp
from models.model import Loss, Model, Phase, needs_classes
from models.shares import by_rows, own_rows


@dataclass(frozen=True)
class Settings:
    """temperature: of all losses. head_layers: hidden layers - 1 of the heads. projection: their width, 0 for the
    encoders'."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    temperature: float = 0.1
    head_layers: int = 1
    projection: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.head_layers < 0 or self.projection < 0:
            raise ValueError(
                f"head_layers and projection must not be negative, got {self.head_layers} and {self.projection}"
            )


class _Contrastive(Model):
    def __init__(self, names: tuple[str, ...], encoders: list[nn.Module], config: Settings):
        super().__init__()
        if len(names) < 2:
            raise ValueError(f"a contrastive model needs two modalities or more, the data has {', '.join(names)}")
        self.names, self.temperature = names, config.temperature
        self.encoders = nn.ModuleList(encoders)
        dim = config.encoder.out_dim
        out = config.projection or dim
        self.heads = nn.ModuleList([mlp(dim, dim, out, config.head_layers) for _ in encoders])

    @by_rows
    def encode(self, inputs: Mapping[str, Inputs]) -> list[Tensor]:
        return [encoder(inputs[name]) for encoder, name in zip(self.encoders, self.names, strict=True)]

    def project(self, inputs: Mapping[str, Inputs]) -> list[Tensor]:
        """Normalised head outputs [B, P] of every modality."""
        outputs = [head(e) for head, e in zip(self.heads, self.encode(inputs), strict=True)]
        return [nn.functional.normalize(z, dim=1) for z in outputs]

    def across(self, projected: list[Tensor]) -> Tensor:
        """NT-Xent of every pair of modalities, summed."""
        pairs = itertools.combinations(projected, 2)
        return torch.stack([mk.distributed.nt_xent(a, b, self.temperature) for a, b in pairs]).sum()

    def objective(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def loss(self, batch: Batch) -> Loss:
        with own_rows(batch) as mine:
            return Loss.of(self.objective(mine))

    def usable(self, batch: Batch) -> Batch:
        """Rows that have every modality."""
        return batch.complete()

    def phases(self) -> list[Phase]:
        return [Phase("main", list(self.parameters()), self.loss, usable=self.usable)]

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """ "encoder": the concatenated encoder outputs."""
        return {"encoder": torch.cat(self.encode(batch.inputs), 1)}


class SimCLR(_Contrastive):
    """NT-Xent between the modalities of a sample."""

    def objective(self, batch: Batch) -> dict[str, Tensor]:
        return {"cross": self.across(self.project(batch.inputs))}


class SupCon(_Contrastive):
    """Supervised contrastive loss with modalities as views. Rows without a label are ignored."""

    def usable(self, batch: Batch) -> Batch:
        return batch.complete_with_labels()

    def objective(self, batch: Batch) -> dict[str, Tensor]:
        features = torch.stack(self.project(batch.inputs), 1)
        return {"supcon": mk.distributed.sup_con(features, batch.target, temperature=self.temperature)}


class CrossSelf(_Contrastive):
    """SimCLR across the modalities plus SimCLR between two augmented views within each."""

    views = 2

    def objective(self, batch: Batch) -> dict[str, Tensor]:
        if len(batch.views) != 2:
            raise ValueError(f"CrossSelf needs two augmented views in batch.views, got {len(batch.views)}")
        first, second = (self.project(view) for view in batch.views)
        terms = {"cross": self.across(self.project(batch.inputs))}
        for index, (a, b) in enumerate(zip(first, second, strict=True), 1):
            terms[f"self_x{index}"] = mk.distributed.nt_xent(a, b, self.temperature)
        return terms


def _build(kind: type[_Contrastive], config: Settings, data: Dataset) -> Model:
    return kind(data.names, [make_encoder(modality, config.encoder) for modality in data.modalities], config)


def build_simclr(config: Settings, data: Dataset) -> Model:
    return _build(SimCLR, config, data)


def build_supcon(config: Settings, data: Dataset) -> Model:
    needs_classes("supcon", data.target)
    return _build(SupCon, config, data)


def build_cross_self(config: Settings, data: Dataset) -> Model:
    return _build(CrossSelf, config, data)
