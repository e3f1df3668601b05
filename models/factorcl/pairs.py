"""FactorCL on more than two modalities: the six terms of every pair, on one encoder per modality.

The paper treats two modalities; the sum over pairs is our extension. Each pair has its own heads and critics.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.batch import Batch, Inputs
from models.factorcl.config import FactorCLConfig
from models.factorcl.model import FactorCLSSL, FactorCLSUP, together
from models.model import Loss, Model, OptimizerConfig, Phase
from models.shares import by_rows


class _Given(nn.Module):
    """Replaces an encoder whose features have already been computed."""

    def forward(self, x: Inputs) -> Tensor:
        return x.values


class FactorCLPairs(Model):
    """The sum of the objectives of all pairs of M modalities: M (M - 1) / 2 times six terms, M encoders.

    Terms are called "first+second/term", in nats. kind: FactorCLSUP or FactorCLSSL; inner: as there. Representations:
    "encoder" and "full" as with two modalities, "S" of all pairs, and "U1" to "UM" of each modality from all its pairs.
    """

    headline = "full"

    def __init__(
        self,
        kind: type[FactorCLSUP] | type[FactorCLSSL],
        names: Sequence[str],
        encoders: Sequence[nn.Module],
        config: FactorCLConfig,
        *,
        inner_steps: int = 1,
        fresh: bool = False,
        inner_optimizer: OptimizerConfig | None = None,
    ):
        super().__init__()
        self.names, self.views = tuple(names), kind.views
        self.encoders = nn.ModuleList(encoders)
        self.places = list(itertools.combinations(range(len(self.names)), 2))
        inner: Any = {"inner_steps": inner_steps, "fresh": fresh, "inner_optimizer": inner_optimizer}
        self.pairs = nn.ModuleList([kind(_Given(), _Given(), config, **inner) for _ in self.places])
        self.shown = ("S", *(f"U{m}" for m in range(1, len(self.names) + 1)))

    def _models(self) -> list[FactorCLSUP | FactorCLSSL]:
        return list(self.pairs)  # type: ignore[arg-type]

    @by_rows
    def encode(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        return {name: encoder(inputs[name]) for name, encoder in zip(self.names, self.encoders, strict=True)}

    def _batches(self, batch: Batch) -> list[Batch]:
        """One batch per pair with features as inputs; every encoder runs once."""
        inputs = dict(batch.inputs)
        if batch.views:
            inputs = {name: together(inputs[name], batch.views[0][name]) for name in self.names}
        features = [e.chunk(2) if batch.views else (e,) for e in self.encode(inputs).values()]
        found = []
        for pair in self.places:
            given, *views = ({self.names[m]: Inputs(features[m][k]) for m in pair} for k in range(len(features[0])))
            found.append(batch._replace(inputs=given, views=tuple(views)))
        return found

    def loss(self, batch: Batch) -> Loss:
        return self._sum([model.loss(part) for model, part in zip(self._models(), self._batches(batch), strict=True)])

    def _sum(self, losses: Sequence[Loss]) -> Loss:
        labels = ["+".join(self.names[m] for m in pair) for pair in self.places]
        terms = {f"{label}/{n}": v for label, found in zip(labels, losses, strict=True) for n, v in found.terms.items()}
        return Loss(torch.stack([found.total for found in losses]).sum(), terms)

    @torch.no_grad()
    def inner_pairs(self, batch: Batch) -> list[Any]:
        batches = zip(self._models(), self._batches(batch), strict=True)
        return [model.inner_pairs(part) for model, part in batches]

    def inner_loss(self, fixed: list[Any]) -> Loss:
        return self._sum([model.inner_loss(part) for model, part in zip(self._models(), fixed, strict=True)])

    def usable(self, batch: Batch) -> Batch:
        return self._models()[0].usable(batch)

    def phases(self) -> list[Phase]:
        apart = [model.phases() for model in self._models()]
        joined = [[p for phase in same for p in phase.parameters] for same in zip(*apart, strict=True)]
        phases = [Phase("main", [*self.encoders.parameters(), *joined[0]], self.loss, usable=self.usable)]
        for same, parameters in zip(apart[0][1:], joined[1:], strict=True):
            changes = {"parameters": parameters, "loss": self.inner_loss, "fixed": self.inner_pairs}
            phases.append(same._replace(**changes, usable=self.usable))  # type: ignore[arg-type]
        return phases

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        encoded = list(self.encode(batch.inputs).values())
        shared: list[Tensor] = []
        unique: list[list[Tensor]] = [[] for _ in self.names]
        for (first, second), model in zip(self.places, self._models(), strict=True):
            s1, u1, s2, u2 = model.factors(Inputs(encoded[first]), Inputs(encoded[second]))
            shared += [s1, s2]
            unique[first].append(u1)
            unique[second].append(u2)
        parts = {"encoder": torch.cat(encoded, 1), "full": torch.cat([*shared, *itertools.chain(*unique)], 1)}
        parts |= {"S": torch.cat(shared, 1)} | {f"U{m}": torch.cat(u, 1) for m, u in enumerate(unique, 1)}
        return {name: part for name, part in parts.items() if part.shape[1]}
