"""The critics of FactorCL's terms, and fused calls that estimate several terms at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.critics import InnerProductCritic
from mi_kernels.ops.common.rows import unit_rows
from mi_kernels.ops.mlp_critic import api as mlp_critic

CRITICS = ("concat", "cosine", "dot")

Pair = tuple[Tensor, Tensor]


class ProjectedCritic(InnerProductCritic):
    """f(x, y) = <W x, V y> / temperature; with ``normalize`` the projections have unit length. B x B scores cost 2 B^2
    dim FLOP.

    x [*, B, x_dim], y [*, N, y_dim]. A concat critic costs 2 B^2 H^2 and fits badly with few samples. This critic
    cannot represent every density ratio. With ``normalize`` scores lie in [-1, 1] / temperature, which limits the
    estimates.
    """

    def __init__(self, x_dim: int, y_dim: int, dim: int, temperature: float, normalize: bool):
        super().__init__()
        self.x_projection, self.y_projection = nn.Linear(x_dim, dim), nn.Linear(y_dim, dim)
        self.temperature, self.normalize = temperature, normalize

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        a, b = self.x_projection(x), self.y_projection(y)
        if self.normalize:
            a, b = unit_rows(a), unit_rows(b)
        return a, b, 1 / self.temperature


def make_critic(
    kind: str, widths: tuple[int, int], hidden: Sequence[int], activation: str, dim: int, temperature: float
) -> mk.ConcatCritic | ProjectedCritic:
    """A critic of CRITICS for inputs of ``widths``."""
    if kind == "concat":
        return mk.ConcatCritic(*widths, hidden_dims=tuple(hidden), activation=activation)
    return ProjectedCritic(*widths, dim, temperature, kind == "cosine")


def grouped_concat(
    bounds: Mapping[str, mk.InfoNCE | mk.NCECLUB], pairs: Mapping[str, Pair], upper: bool
) -> dict[str, Tensor]:
    """InfoNCE of every pair (NCE-CLUB if ``upper``), in nats, in one pass over the scores of all concat critics.

    Inputs of different widths and the first layers are padded with zeros, which does not change the scores. The critics
    must have equal hidden widths and activations, and the bounds equal anchors. This saves launches, mostly for small
    batches; from B = 128 on the 2 B^2 H^2 FLOP per critic dominate.
    """
    if not pairs:
        return {}
    critics = [critic for name in pairs if isinstance(critic := bounds[name].critic, mk.ConcatCritic)]
    widths = max(c.x_dim for c in critics), max(c.y_dim for c in critics)

    def padded(parts: Sequence[Tensor], width: int) -> Tensor:
        return torch.stack([nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts])

    x, y = (padded(side, width) for side, width in zip(zip(*pairs.values(), strict=True), widths, strict=True))
    first: list[Tensor] = [critic.layers[0].weight for critic in critics]  # type: ignore[misc] # [H, x_dim + y_dim]
    left = padded([w[:, : c.x_dim] for w, c in zip(first, critics, strict=True)], widths[0])
    right = padded([w[:, c.x_dim :] for w, c in zip(first, critics, strict=True)], widths[1])
    layers = list(zip(*(critic.layers for critic in critics), strict=True))
    weights = [torch.cat([left, right], 2), *(torch.stack([m.weight for m in layer]) for layer in layers[1:])]
    biases = [torch.stack([m.bias for m in layer]) for layer in layers]
    log_sum = "row_lse" if bounds[next(iter(pairs))].anchor == "x" else "col_lse"
    stats = ("positive", "row_sum" if upper else log_sum)
    options = {"activation": critics[0].activation, "memory_budget": critics[0].memory_budget, "stats": stats}
    found = mlp_critic.statistics(x, y, weights, biases, **options)._asdict()  # type: ignore[arg-type]
    rows = x.shape[-2]
    if upper:
        values = found["positive"].mean(-1) - found["row_sum"].mean(-1) / rows
    else:
        values = (found["positive"] - found[log_sum]).mean(-1) + math.log(rows)
    return dict(zip(pairs, values.unbind(), strict=True))


def grouped_info_nce(bounds: Mapping[str, mk.InfoNCE | mk.NCECLUB], pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """InfoNCE of every pair, in nats, in one pass over the scores of all projected critics with equal temperature.

    ``bounds[name].critic`` must be a ProjectedCritic, all with the same width, temperature and anchor.
    """
    if not pairs:
        return {}
    critics = [critic for name in pairs if isinstance(critic := bounds[name].critic, ProjectedCritic)]
    features = [critic.features(*pair) for critic, pair in zip(critics, pairs.values(), strict=True)]
    a, b = torch.stack([f[0] for f in features]), torch.stack([f[1] for f in features])  # [G, B, dim]
    first = bounds[next(iter(pairs))]
    log_sum = "row_lse" if first.anchor == "x" else "col_lse"
    found = mk.DotCritic(critics[0].temperature).statistics(a, b, ("positive", log_sum))._asdict()
    values = (found["positive"] - found[log_sum]).mean(-1) + math.log(a.shape[-2])
    return dict(zip(pairs, values.unbind(), strict=True))
