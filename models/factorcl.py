"""FactorCL: factorized contrastive learning (Liang et al., NeurIPS 2023, arXiv 2306.05268).

Six mutual-information terms on top of two encoders, each with its own heads and critic (eq. 94-99):

    maximise  I(X1;X2) + I(X1;C1) + I(X2;C2) + I(X1;X2|C)   by InfoNCE        C = the label (SUP)
    minimise  I(X1;X2|C) + I(X1;X2)                         by NCE-CLUB       or augmented views (SSL)

NCE-CLUB needs the critic that is optimal for InfoNCE: ``inner_loss`` fits the two CLUB critics (Algorithm
3), and every other parameter follows ``loss``. Where the paper and its public code differ, FactorCLConfig
says what is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.data.base import Batch, Inputs
from models.encoders import mlp

MAXIMISED = ("infonce_x1x2", "infonce_x1y", "infonce_x2y", "infonce_x1x2_cond")
MINIMISED = ("club_x1x2_cond", "club_x1x2")
SAME_PAIR = {"club_x1x2": "infonce_x1x2", "club_x1x2_cond": "infonce_x1x2_cond"}
TERMS_OF_U = ("club_x1x2", "infonce_x1x2_cond")

View = Inputs | Tensor
Views = Sequence[tuple[View, View]]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FactorCLConfig:
    """The choices on which the paper and its public code differ. The defaults have the public code's sizes.

    FactorCLConfig() reproduces the public synthetic model's parameter counts: 4,039,686 (SUP, 20 classes) and
    4,411,398 (SSL). ``recommended()`` and ``paper()`` change what their docstrings say.

    critic_hidden: code (512, 512); the paper says one hidden layer, (512,).
    head_layers: synthetic code 1, two hidden layers; paper and the code for real data 0, one hidden layer.
    label: how y enters I(Xi;Y): code "scalar", the class number as one column; "one_hot" has no false order.
    condition_sides: where the label enters I(X1;X2|Y): the synthetic code "first"; its other models and the
        paper "both".
    ssl_club_condition: "augmented" (x' as in the paper, default); "repeated" is a defect of the synthetic
        code, which concatenates head(x) with itself.
    conditional_negatives: code "batch" (the condition is only concatenated); paper, eq. 13-14 "label",
        negatives of the same class (SUP only).
    anchor: code "second"; the paper's eq. 10 anchors the first modality, "first".
    u_terms_weight: 1.0 in code and eq. 96/99; 2.0 counts the two terms once for U1 and once for U2, as
        Algorithm 2 does.
    club_critic: code and Algorithm 3 "own", each CLUB term has a critic of its own; "shared" takes that of the
        InfoNCE term of the same pair (section 3's f* "for free"). Heads stay apart. A shared critic is stepped in
        the inner loop alone, by InfoNCE on the heads of both terms.
    """

    num_classes: int = 2
    feature_dims: tuple[int, int] = (128, 128)
    critic_hidden: tuple[int, ...] = (512, 512)
    head_layers: int = 1
    activation: str = "relu"
    label: str = "scalar"
    condition_sides: str = "first"
    ssl_club_condition: str = "augmented"
    conditional_negatives: str = "batch"
    anchor: str = "second"
    u_terms_weight: float = 1.0
    club_critic: str = "own"

    def __post_init__(self) -> None:
        choices = {
            "label": ("scalar", "one_hot"),
            "condition_sides": ("first", "both"),
            "anchor": ("first", "second"),
            "ssl_club_condition": ("augmented", "repeated"),
            "conditional_negatives": ("batch", "label"),
            "club_critic": ("own", "shared"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")

    def recommended(self) -> FactorCLConfig:
        """The code's sizes with one-hot labels, on both sides of the condition."""
        return replace(self, label="one_hot", condition_sides="both")

    def paper(self) -> FactorCLConfig:
        """The paper's text: shallow critics and heads, anchors of the first modality, negatives within the class."""
        return replace(
            self.recommended(),
            critic_hidden=self.critic_hidden[:1],
            head_layers=0,
            anchor="first",
            conditional_negatives="label",
        )

    @property
    def label_width(self) -> int:
        return 1 if self.label == "scalar" else self.num_classes


class Factors(NamedTuple):
    """Shared and unique representations of each modality (spec: eq. 6-7)."""

    s1: Tensor
    u1: Tensor
    s2: Tensor
    u2: Tensor


class _FactorCL(nn.Module):
    """What SUP and SSL share; they differ in how a term's pair of inputs is made."""

    views = 0

    def __init__(self, encoder1: nn.Module, encoder2: nn.Module, config: FactorCLConfig | None = None):
        super().__init__()
        self.config = config = config or FactorCLConfig()
        self.encoders = nn.ModuleList([encoder1, encoder2])
        d1, d2 = config.feature_dims
        self.heads1 = nn.ModuleDict(
            {name: self._head(d1) for name in (*MAXIMISED, *MINIMISED) if name != "infonce_x2y"}
        )
        self.heads2 = nn.ModuleDict(
            {name: self._head(d2) for name in (*MAXIMISED, *MINIMISED) if name != "infonce_x1y"}
        )
        anchor = "y" if config.anchor == "second" else "x"
        self.bounds = nn.ModuleDict()
        critics: dict[str, mk.ConcatCritic] = {}
        for name, (width1, width2) in self._critic_widths().items():
            critic = critics[SAME_PAIR[name]] if name in MINIMISED and config.club_critic == "shared" else None
            if critic is None:
                critic = mk.ConcatCritic(width1, width2, hidden_dims=config.critic_hidden, activation=config.activation)
            critics[name] = critic
            bound = mk.InfoNCE if name in MAXIMISED else mk.NCECLUB
            within_labels = config.conditional_negatives == "label" and name.endswith("_cond")
            self.bounds[name] = bound(critic, anchor=anchor, condition="group" if within_labels else "concat")

    def _head(self, dim: int) -> nn.Module:
        return mlp(dim, dim, dim, self.config.head_layers, self.config.activation)

    def _critic_widths(self) -> dict[str, tuple[int, int]]:
        raise NotImplementedError

    def _pairs(self, names: tuple[str, ...], batch: Batch, views: Views) -> dict[str, Pair]:
        raise NotImplementedError

    def encode(self, x1: View, x2: View) -> Pair:
        """Encoder outputs [B, d1], [B, d2]."""
        return self.encoders[0](x1), self.encoders[1](x2)

    def factors(self, x1: View, x2: View) -> Factors:
        """S: heads of I(X1;X2) and of the conditional CLUB; U: heads of CLUB, I(Xi;C) and I(X1;X2|C)."""
        e1, e2 = self.encode(x1, x2)

        def part(heads: nn.ModuleDict, e: Tensor, *names: str) -> Tensor:
            return torch.cat([heads[name](e) for name in names], 1)

        shared = ("infonce_x1x2", "club_x1x2_cond")
        return Factors(
            part(self.heads1, e1, *shared),
            part(self.heads1, e1, "club_x1x2", "infonce_x1y", "infonce_x1x2_cond"),
            part(self.heads2, e2, *shared),
            part(self.heads2, e2, "club_x1x2", "infonce_x2y", "infonce_x1x2_cond"),
        )

    def terms(self, batch: Batch, views: Views | None = None) -> dict[str, Tensor]:
        """The six estimates in nats; costs six critics of B^2 pairs."""
        pairs = self._pairs((*MAXIMISED, *MINIMISED), batch, views or [])
        return {name: self._estimate(name, *pair, batch.y) for name, pair in pairs.items()}

    def _estimate(self, name: str, a: Tensor, b: Tensor, y: Tensor, method: str = "forward") -> Tensor:
        call = getattr(self.bounds[name], method)
        return call(a, b, y) if self.bounds[name].condition == "group" else call(a, b)

    def loss(self, batch: Batch, views: Views | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of the encoders, heads and InfoNCE critics (theta), and the six terms detached."""
        terms = self.terms(batch, views)
        total = torch.stack(
            [
                (-1 if name in MAXIMISED else 1) * value * (self.config.u_terms_weight if name in TERMS_OF_U else 1)
                for name, value in terms.items()
            ]
        ).sum()
        return total, {name: value.detach() for name, value in terms.items()}

    def inner_parameters(self) -> Iterator[nn.Parameter]:
        """phi: the critics of the two CLUB terms, nothing else; shared ones serve InfoNCE terms as well."""
        for name in MINIMISED:
            yield from self.bounds[name].parameters()

    def inner_loss(self, batch: Batch, views: Views | None = None) -> Tensor:
        """InfoNCE loss of the CLUB critics; its inputs carry no gradient, since only phi is stepped."""
        shared = tuple(SAME_PAIR.values()) if self.config.club_critic == "shared" else ()
        with torch.no_grad():
            pairs = self._pairs((*MINIMISED, *shared), batch, views or [])
        return torch.stack(
            [self._estimate(name, *pair, batch.y, method="learning_loss") for name, pair in pairs.items()]
        ).sum()


class FactorCLSUP(_FactorCL):
    """FactorCL with labels (eq. 94-96). ``batch.y`` holds class numbers [B]."""

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

    def _pairs(self, names: tuple[str, ...], batch: Batch, views: Views) -> dict[str, Pair]:
        e1, e2 = self.encode(batch.x1, batch.x2)
        one_hot = nn.functional.one_hot(batch.y, self.config.num_classes).to(e1)
        column = one_hot if self.config.label == "one_hot" else batch.y[:, None].to(e1)
        pairs: dict[str, Pair] = {}
        for name in names:
            if name == "infonce_x1y":
                pairs[name] = (self.heads1[name](e1), column)
            elif name == "infonce_x2y":
                pairs[name] = (self.heads2[name](e2), column)
            else:
                a, b = self.heads1[name](e1), self.heads2[name](e2)
                if name.endswith("_cond"):
                    a = torch.cat([a, one_hot], 1)
                    b = torch.cat([b, one_hot], 1) if self.config.condition_sides == "both" else b
                pairs[name] = (a, b)
        return pairs


class FactorCLSSL(_FactorCL):
    """FactorCL without labels (eq. 97-99): one augmented view per modality replaces the label."""

    views = 1

    def __init__(self, encoder1: nn.Module, encoder2: nn.Module, config: FactorCLConfig | None = None):
        super().__init__(encoder1, encoder2, config)
        if self.config.conditional_negatives == "label":
            raise ValueError('conditional_negatives="label" needs labels: it is for FactorCLSUP')

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

    def _pairs(self, names: tuple[str, ...], batch: Batch, views: Views) -> dict[str, Pair]:
        if not views:
            raise ValueError("FactorCLSSL needs views=[(x1_augmented, x2_augmented)]")
        e1, e2 = self.encode(batch.x1, batch.x2)
        v1, v2 = self.encode(*views[0])
        pairs: dict[str, Pair] = {}
        for name in names:
            if name == "infonce_x1y":
                pairs[name] = (self.heads1[name](e1), self.heads1[name](v1))
            elif name == "infonce_x2y":
                pairs[name] = (self.heads2[name](e2), self.heads2[name](v2))
            elif not name.endswith("_cond"):
                pairs[name] = (self.heads1[name](e1), self.heads2[name](e2))
            else:
                repeated = name in MINIMISED and self.config.ssl_club_condition == "repeated"
                c1, c2 = (e1, e2) if repeated else (v1, v2)
                pairs[name] = (
                    torch.cat([self.heads1[name](e1), self.heads1[name](c1)], 1),
                    torch.cat([self.heads2[name](e2), self.heads2[name](c2)], 1),
                )
        return pairs
