"""Critics: modules that score every pair of a batch, and give a bound the statistics of those scores.

`critic(x, y)` returns the scores S[i, j] = f(x_i, y_j), [*, B, N], materialised, for looking at. Bounds call
`critic.statistics(x, y, ...)`, which never holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.dot_critic import api as dot_critic
from .ops.mlp_critic import api as mlp_critic
from .ops.mlp_critic.activations import ACTIVATIONS
from .ops.mlp_critic.schema import OUTPUTS, Statistics, accumulator, check_pairing, check_request


class Critic(nn.Module):
    """What a bound needs of a critic: `statistics`; `forward` for the scores themselves."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores S[i, j] = f(x_i, y_j): x [*, B, Dx], y [*, N, Dy] -> [*, B, N], materialised."""
        raise NotImplementedError

    def statistics(
        self,
        x: Tensor,
        y: Tensor,
        stats: Sequence[str] = ("positive", "row_lse"),
        pairs: str = "all",
        *,
        clip: float | None = None,
    ) -> Statistics:
        """`positive` [*, B], `row_lse` [*, B], `col_lse` [*, N], `row_sum` [*, B], `row_softplus` [*, B] and
        `clipped_row_lse` [*, B] (of scores clamped to [-clip, clip]; no gradient) of the scores; None if not in
        `stats`. `pairs` is "all" or "off_diagonal"."""
        raise NotImplementedError


def _check_width(name: str, t: Tensor, width: int) -> None:
    if t.dim() < 2 or t.shape[-1] != width:
        raise ValueError(f"{name} must be [*, batch, {width}], got {tuple(t.shape)}")


def _check_alike(x: Tensor, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


class _InnerProductCritic(Critic):
    """S[i, j] = scale <a_i, b_j>: subclasses say what a, b and the scale are."""

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        raise NotImplementedError

    def _checked_features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        for name, t in (("x", x), ("y", y)):
            if t.dim() < 2 or t.shape[:-1].numel() == 0:
                raise ValueError(
                    f"{name} must be [*, batch, features] with at least one sample, got {tuple(t.shape)}"
                )
        if x.shape[:-2] != y.shape[:-2]:
            raise ValueError(
                f"y must have the leading dimensions of x, {tuple(x.shape[:-2])}, got {tuple(y.shape[:-2])}"
            )
        _check_alike(x, y)
        a, b, scale = self.features(x, y)
        if a.dtype != b.dtype and torch.is_autocast_enabled(a.device.type):
            dtype = torch.get_autocast_dtype(a.device.type)
            a, b = a.to(dtype), b.to(dtype)
        if a.shape[-1] != b.shape[-1]:
            raise ValueError(f"y must have as many features as x ({a.shape[-1]}), got {b.shape[-1]}")
        return a, b, scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b, scale = self._checked_features(x, y)
        return scale * (a @ b.mT)

    def statistics(
        self,
        x: Tensor,
        y: Tensor,
        stats: Sequence[str] = ("positive", "row_lse"),
        pairs: str = "all",
        *,
        clip: float | None = None,
    ) -> Statistics:
        """As `Critic.statistics`. The log-sums and softplus sums cost 2 B N D FLOPs and O(B + N) memory beyond the
        features, `clipped_row_lse` as much again; `positive` and `row_sum` are exact in O((B + N) D)."""
        check_request(stats, pairs, clip)
        a, b, scale = self._checked_features(x, y)
        off_diagonal = pairs == "off_diagonal"
        check_pairing(stats, pairs, a.shape[-2], b.shape[-2])
        dtype = accumulator(a.dtype)
        found: dict[str, Tensor] = {}
        if "positive" in stats or (off_diagonal and "row_sum" in stats):
            found["positive"] = scale * (a.to(dtype) * b.to(dtype)).sum(-1)
        if "row_sum" in stats:
            found["row_sum"] = scale * (a.to(dtype) * b.sum(-2, keepdim=True, dtype=dtype)).sum(-1)
            if off_diagonal:
                found["row_sum"] = found["row_sum"] - found["positive"]
        wanted = tuple(s for s in ("row_lse", "col_lse", "row_softplus") if s in stats)
        if wanted:
            sums = dot_critic.statistics(a, b, scale, stats=wanted, pairs=pairs)
            found |= {s: getattr(sums, s) for s in wanted}
        if "clipped_row_lse" in stats:
            clipped = dot_critic.statistics(a, b, scale, pairs=pairs, clip=clip).row_lse
            assert clipped is not None
            found["clipped_row_lse"] = clipped
        return Statistics(**{s: t for s, t in found.items() if s in stats})


class DotCritic(_InnerProductCritic):
    """f(x, y) = <x, y> / temperature; the cosine when `normalize`.

    x [*, B, D], y [*, N, D]. `temperature` is a positive float, or a 0-d tensor (a Parameter is registered
    and learned). 2 B N D FLOPs.
    """

    def __init__(self, temperature: float | Tensor = 1.0, normalize: bool = False):
        super().__init__()
        if not isinstance(temperature, Tensor) and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.normalize = normalize

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        if self.normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return x, y, 1 / self.temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}"


class BilinearCritic(_InnerProductCritic):
    """f(x, y) = x^T W y (CPC, van den Oord et al. 2018, eq. 3), W [x_dim, y_dim].

    2 B Dx Dy + 2 B N Dy FLOPs. Raises ValueError for inputs of other widths.
    """

    def __init__(self, x_dim: int, y_dim: int):
        super().__init__()
        _check_positive(x_dim=x_dim, y_dim=y_dim)
        self.x_dim, self.y_dim = x_dim, y_dim
        self.weight = nn.Parameter(torch.empty(x_dim, y_dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(x_dim), 1 / math.sqrt(x_dim))

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        _check_width("x", x, self.x_dim)
        _check_width("y", y, self.y_dim)
        return x @ self.weight, y, 1.0

    def extra_repr(self) -> str:
        return f"x_dim={self.x_dim}, y_dim={self.y_dim}"


class MLP(nn.Module):
    def __init__(self, widths: Sequence[int], activation: str):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            h = layer(ACTIVATIONS[self.activation].apply(h) if k else h)
        return h


class SeparableCritic(_InnerProductCritic):
    """f(x, y) = <g(x), h(y)> with two MLPs (Poole et al. 2019, section 3).

    x [*, B, x_dim], y [*, N, y_dim]; both MLPs have `hidden_dims` and end in `embed_dim`. Two MLP passes plus
    2 B N embed_dim FLOPs. Raises ValueError for inputs of other widths and unknown activations.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        embed_dim: int = 32,
        activation: str = "relu",
    ):
        super().__init__()
        _check_positive(x_dim=x_dim, y_dim=y_dim, embed_dim=embed_dim)
        _check_activation(activation)
        self.x_dim, self.y_dim = x_dim, y_dim
        self.x_encoder = MLP([x_dim, *hidden_dims, embed_dim], activation)
        self.y_encoder = MLP([y_dim, *hidden_dims, embed_dim], activation)

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        _check_width("x", x, self.x_dim)
        _check_width("y", y, self.y_dim)
        return self.x_encoder(x), self.y_encoder(y), 1.0


class GroupedLinear(nn.Module):
    """G independent `nn.Linear` in one: weight [G, out, in], bias [G, out]; each initialised as `nn.Linear`
    is."""

    def __init__(self, groups: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(groups, out_features))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias.unsqueeze(-2)

    def extra_repr(self) -> str:
        groups, out_features, in_features = self.weight.shape
        return f"groups={groups}, in_features={in_features}, out_features={out_features}"


class ConcatCritic(Critic):
    """f(x, y) = MLP([x, y]), one score per pair (Poole et al. 2019, section 3; FactorCL, Liang et al. 2023).

    x [*, B, x_dim], y [*, N, y_dim]. `layers` are `nn.Linear` with their default initialisation, the first
    taking x and y in this order, the last giving the score; `activation` (relu, leaky_relu, tanh, sigmoid, elu,
    gelu, silu) stands between them, and `output` ("identity" or "softplus") behind the last. With `groups=G` there
    are G independent critics, every parameter has a leading dimension G, and inputs are [G, B, .].

    Cost with M = 2 B N sum_l H_l H_{l+1} over the hidden layers: M FLOPs forward, 2 M backward where what is kept
    (with ReLU in the compiled backend, a bit per pair and unit) fits `memory_budget` bytes (64 MiB), 3 M where it
    does not; O(B + N) memory beyond that budget. The first layer is applied to x and y apart, which is exact and
    costs O((B + N) D H).

    The public FactorCL code has two hidden layers of 512 where the paper says one; the default follows the
    code. Raises ValueError for inputs of other widths, empty batches, mixed devices or dtypes, unknown names.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden_dims: Sequence[int] = (512, 512),
        activation: str = "relu",
        groups: int | None = None,
        *,
        output: str = "identity",
        memory_budget: int = mlp_critic.DEFAULT_MEMORY_BUDGET,
        backend: str | None = None,
    ):
        super().__init__()
        _check_positive(x_dim=x_dim, y_dim=y_dim)
        _check_activation(activation)
        if len(hidden_dims) == 0 or min(hidden_dims) < 1:
            raise ValueError(f"hidden_dims must hold at least one positive width, got {tuple(hidden_dims)}")
        if groups is not None:
            _check_positive(groups=groups)
        self.x_dim, self.y_dim, self.groups = x_dim, y_dim, groups
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        self.activation, self.output = activation, output
        self.memory_budget, self.backend = memory_budget, backend
        widths = list(pairwise([x_dim + y_dim, *hidden_dims, 1]))
        self.layers: nn.ModuleList
        if groups is None:
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in widths)
        else:
            self.layers = nn.ModuleList(GroupedLinear(groups, i, o) for i, o in widths)

    def _parameters_of(self, name: str) -> list[Tensor]:
        return [getattr(layer, name) for layer in self.layers]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _check_width("x", x, self.x_dim)
        _check_width("y", y, self.y_dim)
        return mlp_critic.scores(
            x,
            y,
            self._parameters_of("weight"),
            self._parameters_of("bias"),
            activation=self.activation,
            output=self.output,
        )

    def statistics(
        self,
        x: Tensor,
        y: Tensor,
        stats: Sequence[str] = ("positive", "row_lse"),
        pairs: str = "all",
        *,
        clip: float | None = None,
    ) -> Statistics:
        _check_width("x", x, self.x_dim)
        _check_width("y", y, self.y_dim)
        return mlp_critic.statistics(
            x,
            y,
            self._parameters_of("weight"),
            self._parameters_of("bias"),
            activation=self.activation,
            stats=stats,
            pairs=pairs,
            clip=clip,
            output=self.output,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"x_dim={self.x_dim}, y_dim={self.y_dim}, activation={self.activation!r}, groups={self.groups}"
