"""MMIM: mutual information maximisation at the input and the fusion (Han et al., EMNLP 2021, arXiv 2109.00412).

With z_m one vector per modality, z_1 the text's (or the first modality's) and F the fused vector,

    L = L_task + contrast sum_m CPC(z_m, F) - bound sum_{m > 1} I_BA(z_1; z_m)

CPC is InfoNCE of z_m and W_m F with cosines as scores. I_BA is the Barber-Agakov bound: a learned q(z_m | z_1) and a
Gaussian entropy of z_m. Differences from the public code: the entropy is that of a batch instead of that of classes
with a history, and q is trained after every main step instead of every other epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.baselines.supervised import UtteranceSettings, outputs_of
from models.batch import Batch
from models.data.dataset import Dataset
from models.layers.dropout import Dropout
from models.layers.prediction import Scale
from models.layers.sequence import check_positive
from models.layers.text import TextConfig
from models.layers.utterance import Utterances
from models.model import Loss, Model, OptimizerConfig, Phase, needs_several
from models.shares import by_rows


@dataclass(frozen=True)
class MMIMSettings(UtteranceSettings):
    """hidden: of the LSTMs. dim: of z_m. contrast, bound: the public alpha and beta. bound_hidden, bound_lr,
    bound_steps: hidden width, learning rate and steps per batch of q. A text encoder is read at its first state.

    For a batch of at most ``dim`` rows the entropy estimate would be that of a degenerate Gaussian, minus infinity, so
    the bound is 0. ``training.batch_size`` must exceed ``dim`` for the bound to have an effect.
    """

    hidden: int = 32
    dim: int = 16
    fused: int = 128
    text: TextConfig = field(default_factory=lambda: TextConfig(readout="first"))
    dropout: float = 0.1
    contrast: float = 0.1
    bound: float = 0.1
    bound_hidden: int = 16
    bound_lr: float = 1e-3
    bound_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(hidden=self.hidden, dim=self.dim, fused=self.fused, bound_steps=self.bound_steps)
        check_positive(bound_hidden=self.bound_hidden)
        for name in ("contrast", "bound"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class MMIM(Model):
    """Two modalities or more. Representations: "z_NAME", [B, dim] each, and "fused".

    Terms: the prediction's, "contrast" (nats, summed over modalities), "bound" (nats, summed over pairs). Rows need
    every modality and a label.
    """

    headline = "head"

    def __init__(self, config: MMIMSettings, data: Dataset):
        super().__init__()
        needs_several("mmim", data.names)
        self.config, self.names, self.scale = config, data.names, Scale(data, config.loss)
        tokens = [index for index, modality in enumerate(data.modalities) if modality.is_tokens]
        self.anchor = tokens[0] if tokens else 0
        text = config.encoder_of_text
        self.utterances = Utterances(data.modalities, config.hidden, 1, config.embedding, config.stride, text)
        self.codes = nn.ModuleList([nn.Linear(width, config.dim) for width in self.utterances.dims])
        count = len(data.names)
        self.fusion = nn.Sequential(
            Dropout(config.dropout),
            nn.Linear(count * config.dim, config.fused),
            nn.Tanh(),
            nn.Linear(config.fused, config.fused),
            nn.Tanh(),
        )
        self.head = nn.Linear(config.fused, outputs_of(data.target))
        self.predictors = nn.ModuleList([nn.Linear(config.fused, config.dim) for _ in data.names])
        self.q = mk.BarberAgakov(config.dim, config.dim, config.bound_hidden, groups=count - 1)

    @by_rows
    def encoded(self, batch: Batch) -> list[Tensor]:
        return [net(u) for net, u in zip(self.codes, self.utterances(batch.inputs), strict=True)]

    def sides(self, codes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The anchor and every other code, [M - 1, B, dim] each."""
        others = torch.stack([z for m, z in enumerate(codes) if m != self.anchor])
        return codes[self.anchor].expand_as(others), others

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        codes = self.encoded(batch)
        fused = self.fusion(torch.cat(codes, 1))
        return {f"z_{name}": z for name, z in zip(self.names, codes, strict=True)} | {"fused": fused}

    def predict(self, batch: Batch) -> Tensor:
        return self.scale.predicted(self.head(self.fusion(torch.cat(self.encoded(batch), 1))))

    def loss(self, batch: Batch) -> Loss:
        if batch.target is None:
            raise ValueError("the batch has no labels")
        codes = self.encoded(batch)
        fused = self.fusion(torch.cat(codes, 1))
        keys = torch.stack([net(fused) for net in self.predictors])
        contrast = mk.info_nce(torch.stack(codes), keys, temperature=1.0, reduction="none").mean(-1).sum()
        # With fewer rows than features the Gaussian entropy is minus infinity, so such a batch has no bound.
        bound = self.q(*self.sides(codes)).sum() if batch.size > self.config.dim else fused.new_zeros(())
        terms = {self.scale.name: self.scale.loss(self.head(fused), batch.target), "contrast": contrast, "bound": bound}
        return Loss.of(terms, {"contrast": self.config.contrast, "bound": -self.config.bound})

    def _fixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.sides(self.encoded(batch))

    def _fit(self, sides: tuple[Tensor, Tensor]) -> Loss:
        return Loss.of({"likelihood": self.q.learning_loss(*sides).sum()})

    def phases(self) -> list[Phase]:
        mine = {id(p) for p in self.q.parameters()}
        main = [p for p in self.parameters() if id(p) not in mine]
        learn = OptimizerConfig(self.config.bound_lr, 0.0)
        return [
            Phase("main", main, self.loss, usable=Batch.complete_with_labels),
            Phase(
                "bound",
                list(self.q.parameters()),
                self._fit,
                self.config.bound_steps,
                learn,
                self._fixed,
                usable=Batch.complete_with_labels,
            ),
        ]


def build_mmim(config: MMIMSettings, data: Dataset) -> MMIM:
    return MMIM(config, data)
