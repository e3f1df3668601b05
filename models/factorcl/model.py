"""FactorCL: factorized contrastive learning (Liang et al., NeurIPS 2023, arXiv 2306.05268).

Six mutual-information terms on top of two encoders, each with its own heads and critic (eq. 94-99):

    maximise  I(X1;X2) + I(X1;C1) + I(X2;C2) + I(X1;X2|C)   by InfoNCE        C = the label (SUP)
    minimise  I(X1;X2|C) + I(X1;X2)                         by NCE-CLUB       or augmented views (SSL)

NCE-CLUB needs the critic that is optimal for InfoNCE. The phase "club" trains the two CLUB critics (Algorithm 3) on
fixed features, and the phase "main" trains all other parameters. All terms are in nats. FactorCLConfig lists the
choices on which the paper and its public code differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.batch import Batch, Inputs
from models.factorcl.config import MAXIMISED, MINIMISED, SAME_PAIR, FactorCLConfig
from models.factorcl.critics import ProjectedCritic, grouped_concat, grouped_info_nce, make_critic
from models.layers.encoders import mlp
from models.model import Loss, Model, OptimizerConfig, Phase
from models.shares import by_rows

TERMS_OF_U = ("club_x1x2", "infonce_x1x2_cond")
SHARED_PARTS = ("infonce_x1x2", "club_x1x2_cond")
UNIQUE_PARTS = ("club_x1x2", "infonce_x1y", "infonce_x2y", "infonce_x1x2_cond")

View = Inputs | Tensor
Pair = tuple[Tensor, Tensor]
Pairs = dict[str, Pair]


class Factors(NamedTuple):
    """Shared and unique representations of each modality (eq. 6-7)."""

    s1: Tensor
    u1: Tensor
    s2: Tensor
    u2: Tensor


class _FactorCL(Model):
    """Base class of SUP and SSL, which differ in the inputs of the terms.

    Losses ignore rows that lack a modality. inner_steps, fresh and inner_optimizer are settings of the phase "club".
    """

    headline = "full"
    shown = ("S", "U1", "U2")

    def __init__(
        self,
        encoder1: nn.Module,
        encoder2: nn.Module,
        config: FactorCLConfig | None = None,
        *,
        inner_steps: int = 1,
        fresh: bool = False,
        inner_optimizer: OptimizerConfig | None = None,
    ):
        super().__init__()
        self.inner_steps, self.fresh = inner_steps, fresh
        self.inner_optimizer = inner_optimizer or OptimizerConfig()
        self.config = config = config or FactorCLConfig()
        self.encoders = nn.ModuleList([encoder1, encoder2])
        d1, d2 = config.feature_dims
        self.heads1, self.heads2 = nn.ModuleDict(), nn.ModuleDict()
        for heads, dim, other in ((self.heads1, d1, "infonce_x2y"), (self.heads2, d2, "infonce_x1y")):
            for key in dict.fromkeys(self.key(name) for name in config.terms if name != other):
                heads[key] = self._head(dim)
        anchor = "y" if config.anchor == "second" else "x"
        self.bounds = nn.ModuleDict()
        critics: dict[str, mk.ConcatCritic | ProjectedCritic] = {}
        for name, widths in self._critic_widths().items():
            if name not in config.terms:
                continue
            critic = critics[SAME_PAIR[name]] if name in MINIMISED and config.club_critic == "shared" else None
            if critic is None:
                choice = (config.critic_hidden, config.activation, config.critic_dim, config.temperature)
                critic = make_critic(config.critic_of(name), widths, *choice)
            critics[name] = critic
            bound = mk.InfoNCE if name in MAXIMISED else mk.NCECLUB
            within_labels = config.conditional_negatives == "label" and name.endswith("_cond")
            self.bounds[name] = bound(critic, anchor=anchor, condition="group" if within_labels else "concat")

    def key(self, term: str) -> str:
        """The key of the head that a term uses."""
        return term if self.config.heads == "term" else "S" if term in SHARED_PARTS else "U"

    def first(self, term: str, e1: Tensor) -> Tensor:
        """The features of the first modality for this term, [B, d1]."""
        return self.heads1[self.key(term)](e1)

    def second(self, term: str, e2: Tensor) -> Tensor:
        return self.heads2[self.key(term)](e2)

    def _head(self, dim: int) -> nn.Module:
        return mlp(dim, dim, dim, self.config.head_layers, self.config.activation)

    def _critic_widths(self) -> dict[str, tuple[int, int]]:
        raise NotImplementedError

    def _pairs(self, names: tuple[str, ...], batch: Batch) -> Pairs:
        raise NotImplementedError

    @by_rows
    def encode(self, x1: View, x2: View) -> Pair:
        """Encoder outputs [B, d1], [B, d2]."""
        return self.encoders[0](x1), self.encoders[1](x2)

    def factors(self, x1: View, x2: View) -> Factors:
        """S: heads of I(X1;X2) and of the conditional CLUB; U: heads of CLUB, I(Xi;C) and I(X1;X2|C)."""
        return self._factors(*self.encode(x1, x2))

    def _factors(self, e1: Tensor, e2: Tensor) -> Factors:
        """Factors without a term in the objective are [B, 0]."""

        def part(heads: nn.ModuleDict, e: Tensor, names: tuple[str, ...]) -> Tensor:
            keys = dict.fromkeys(self.key(name) for name in names)
            found = [heads[key](e) for key in keys if key in heads]
            return torch.cat(found, 1) if found else e[:, :0]

        return Factors(
            part(self.heads1, e1, SHARED_PARTS),
            part(self.heads1, e1, UNIQUE_PARTS),
            part(self.heads2, e2, SHARED_PARTS),
            part(self.heads2, e2, UNIQUE_PARTS),
        )

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """ "encoder": outputs of both encoders; "S": shared factor; "U1", "U2": unique factors; "full": all factors."""
        e1, e2 = self.encode(*_two(batch))
        s1, u1, s2, u2 = self._factors(e1, e2)
        parts = {
            "encoder": torch.cat([e1, e2], 1),
            "full": torch.cat([s1, u1, s2, u2], 1),
            "S": torch.cat([s1, s2], 1),
            "U1": u1,
            "U2": u2,
        }
        return {name: part for name, part in parts.items() if part.shape[1]}

    def phases(self) -> list[Phase]:
        phi = list(dict.fromkeys(self.inner_parameters()))
        inner = {id(parameter) for parameter in phi}
        theta = [parameter for parameter in self.parameters() if id(parameter) not in inner]
        phases = [Phase("main", theta, self.loss, usable=self.usable)]
        if self.inner_steps and phi:
            settings = (self.inner_steps, self.inner_optimizer, self.inner_pairs, self.fresh, self.usable)
            phases.append(Phase("club", phi, self.inner_loss, *settings))
        return phases

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The six estimates in nats; costs six critics of B^2 pairs."""
        return self._estimates(self._pairs(self.config.terms, batch), batch.target)

    def usable(self, batch: Batch) -> Batch:
        """Rows that have both modalities (and a label where labels are used)."""
        return batch.complete()

    def _estimate(self, name: str, a: Tensor, b: Tensor, y: Tensor | None, method: str = "forward") -> Tensor:
        call = getattr(self.bounds[name], method)
        return call(a, b, y) if self.bounds[name].condition == "group" else call(a, b)

    def _estimates(self, pairs: Pairs, y: Tensor | None, fitting: bool = False) -> dict[str, Tensor]:
        """The estimate of every term, or the loss of its critic if ``fitting``.

        Critics of the same kind with the same statistic share a call; conditional terms within label groups are
        separate calls.
        """

        def chosen(kind: type, upper: bool) -> Pairs:
            return {
                name: pair
                for name, pair in pairs.items()
                if isinstance(self.bounds[name].critic, kind)
                and self.bounds[name].condition != "group"
                and (name in MINIMISED and not fitting) == upper
            }

        bounds: Any = self.bounds
        found = grouped_info_nce(bounds, chosen(ProjectedCritic, False))
        for upper in (False, True):
            found |= grouped_concat(bounds, chosen(mk.ConcatCritic, upper), upper)
        method, sign = ("learning_loss", -1) if fitting else ("forward", 1)
        return {
            name: sign * found[name] if name in found else self._estimate(name, *pair, y, method)
            for name, pair in pairs.items()
        }

    def loss(self, batch: Batch) -> Loss:
        """The objective of the encoders, heads and InfoNCE critics (theta), and the estimated terms."""
        config, terms = self.config, self.terms(batch)
        weights = {
            name: (-1.0 if name in MAXIMISED else config.club_weight)
            * (config.u_terms_weight if name in TERMS_OF_U else 1.0)
            for name in terms
        }
        followed = terms
        if config.club_floor is not None:
            # A clamped estimate has no gradient below the floor.
            floor = config.club_floor
            followed = {name: value.clamp(min=floor) if name in MINIMISED else value for name, value in terms.items()}
        return Loss(Loss.of(followed, weights).total, {name: value.detach() for name, value in terms.items()})

    def inner_parameters(self) -> Iterator[nn.Parameter]:
        """phi: only the critics of the two CLUB terms; if they are shared, InfoNCE terms use them too."""
        for name in MINIMISED:
            if name in self.bounds:
                yield from self.bounds[name].parameters()

    @torch.no_grad()
    def inner_pairs(self, batch: Batch) -> tuple[Pairs, Tensor | None]:
        """The inputs of the CLUB critics, which are fixed in the phase "club", and the labels. No gradients."""
        shared = tuple(SAME_PAIR.values()) if self.config.club_critic == "shared" else ()
        names = tuple(name for name in (*MINIMISED, *shared) if name in self.bounds)
        return self._pairs(names, batch), batch.target

    def inner_loss(self, fixed: tuple[Pairs, Tensor | None]) -> Loss:
        """InfoNCE loss of the CLUB critics on ``inner_pairs``."""
        pairs, y = fixed
        return Loss.of(self._estimates(pairs, y, fitting=True))


class FactorCLSUP(_FactorCL):
    """FactorCL with labels (eq. 94-96). ``batch.target`` holds class numbers [B]; rows without a label are ignored."""

    def usable(self, batch: Batch) -> Batch:
        return batch.complete_with_labels()

    def _critic_widths(self) -> dict[str, tuple[int, int]]:
        (d1, d2), classes, column = self.config.feature_dims, self.config.num_classes, self.config.label_width
        cond = (d1 + classes, d2 + (classes if self.config.condition_sides == "both" else 0))
        return {
            "infonce_x1x2": (d1, d2),
            "infonce_x1y": (d1, column),
            "infonce_x2y": (d2, column),
            "infonce_x1x2_cond": cond,
            "club_x1x2_cond": cond,
            "club_x1x2": (d1, d2),
        }

    def _pairs(self, names: tuple[str, ...], batch: Batch) -> Pairs:
        y = batch.target
        if y is None:
            raise ValueError("FactorCLSUP needs class labels in batch.target")
        e1, e2 = self.encode(*_two(batch))
        one_hot = nn.functional.one_hot(y, self.config.num_classes).to(e1)
        column = one_hot if self.config.label == "one_hot" else y[:, None].to(e1)
        pairs: Pairs = {}
        for name in names:
            if name == "infonce_x1y":
                pairs[name] = (self.first(name, e1), column)
            elif name == "infonce_x2y":
                pairs[name] = (self.second(name, e2), column)
            else:
                a, b = self.first(name, e1), self.second(name, e2)
                if name.endswith("_cond"):
                    a = torch.cat([a, one_hot], 1)
                    b = torch.cat([b, one_hot], 1) if self.config.condition_sides == "both" else b
                pairs[name] = (a, b)
        return pairs


class FactorCLSSL(_FactorCL):
    """FactorCL without labels (eq. 97-99): one augmented view per modality replaces the label."""

    views = 1

    def __init__(self, encoder1: nn.Module, encoder2: nn.Module, config: FactorCLConfig | None = None, **inner: Any):
        super().__init__(encoder1, encoder2, config, **inner)
        if self.config.conditional_negatives == "label":
            raise ValueError('conditional_negatives="label" needs labels, which only FactorCLSUP has')

    def _critic_widths(self) -> dict[str, tuple[int, int]]:
        d1, d2 = self.config.feature_dims
        cond = (2 * d1, 2 * d2)
        return {
            "infonce_x1x2": (d1, d2),
            "infonce_x1y": (d1, d1),
            "infonce_x2y": (d2, d2),
            "infonce_x1x2_cond": cond,
            "club_x1x2_cond": cond,
            "club_x1x2": (d1, d2),
        }

    def _pairs(self, names: tuple[str, ...], batch: Batch) -> Pairs:
        if not batch.views:
            raise ValueError("FactorCLSSL needs an augmented view in batch.views")
        # Inputs and views pass through an encoder in one batch.
        both = [together(x, v) for x, v in zip(_two(batch), batch.views[0].values(), strict=True)]
        (e1, v1), (e2, v2) = (e.chunk(2) for e in self.encode(*both))
        pairs: Pairs = {}
        for name in names:
            if name == "infonce_x1y":
                pairs[name] = (self.first(name, e1), self.first(name, v1))
            elif name == "infonce_x2y":
                pairs[name] = (self.second(name, e2), self.second(name, v2))
            elif not name.endswith("_cond"):
                pairs[name] = (self.first(name, e1), self.second(name, e2))
            else:
                repeated = name in MINIMISED and self.config.ssl_club_condition == "repeated"
                c1, c2 = (e1, e2) if repeated else (v1, v2)
                pairs[name] = (
                    torch.cat([self.first(name, e1), self.first(name, c1)], 1),
                    torch.cat([self.second(name, e2), self.second(name, c2)], 1),
                )
        return pairs


def together(first: Inputs, second: Inputs) -> Inputs:
    """The rows of both, which must have the same shape, as one batch."""

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    values = torch.cat([first.values, second.values])
    return Inputs(values, both(first.lengths, second.lengths), both(first.present, second.present))


def _two(batch: Batch) -> tuple[Inputs, Inputs]:
    x1, x2 = batch.inputs.values()
    return x1, x2
