"""Critics whose score is an inner product of features: dot-product (cosine), bilinear and separable critics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.common.checks import check_bool, check_samples, check_temperature, positive_values
from ..ops.common.dtypes import accumulate_dtype
from ..ops.common.precision import autocast_on
from ..ops.common.rows import unit_rows
from ..ops.common.statistics import Statistics, check_pairing, check_request
from ..ops.dot_critic import api as dot_critic
from .base import (
    Critic,
    check_activation,
    check_alike,
    check_as_network,
    check_hidden,
    check_positive,
    check_width,
)
from .layers import MLP


class InnerProductCritic(Critic):
    """S[i, j] = scale <a_i, b_j>. Subclasses define a, b and the scale in `features(x, y) -> (a, b, scale)`.

    `rows_of_input_dtype` means that a and b may have a wider dtype than x and y, but that the dtype of x and y
    represents their values exactly.
    """

    rows_of_input_dtype = False

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        raise NotImplementedError

    def _checked_features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        check_samples("x", x)
        check_samples("y", y)
        if x.shape[:-2] != y.shape[:-2]:
            raise ValueError(
                f"y must have the leading dimensions of x, {tuple(x.shape[:-2])}, got {tuple(y.shape[:-2])}"
            )
        check_alike(x, y)
        a, b, scale = self.features(x, y)
        if a.dtype != b.dtype and autocast_on(a.device.type):
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
        """As `Critic.statistics`. The log-sum-exps and softplus sums cost 2 B N D FLOP and O(B + N) memory besides the
        features; `clipped_row_lse` costs the same again. `positive` and `row_sum` cost only O((B + N) D)."""
        check_request(stats, pairs, clip)
        a, b, scale = self._checked_features(x, y)
        off_diagonal = pairs == "off_diagonal"
        check_pairing(stats, pairs, a.shape[-2], b.shape[-2])
        # Positives and log-sum-exps are computed in fp32: gradients that were rounded to 16 bits first would not
        # cancel.
        tiles, dtype = x.dtype if self.rows_of_input_dtype else a.dtype, accumulate_dtype(a.dtype)
        a, b = a.to(dtype), b.to(dtype)
        factor = scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale
        found: dict[str, Tensor] = {}
        wanted = tuple(s for s in ("row_lse", "col_lse", "row_softplus") if s in stats)
        if wanted and "positive" in stats and not off_diagonal:
            wanted = (*wanted, "positive")
        elif "positive" in stats or (off_diagonal and "row_sum" in stats):
            found["positive"] = factor * (a * b).sum(-1)
        if "row_sum" in stats:
            found["row_sum"] = factor * (a * b.sum(-2, keepdim=True)).sum(-1)
            if off_diagonal:
                found["row_sum"] = found["row_sum"] - found["positive"]
        if wanted:
            sums = dot_critic.statistics(a, b, scale, stats=wanted, pairs=pairs, tiles=tiles)
            found.update({s: getattr(sums, s) for s in wanted})
        if "clipped_row_lse" in stats:
            clipped = dot_critic.statistics(a, b, scale, pairs=pairs, clip=clip, tiles=tiles).row_lse
            assert clipped is not None
            found["clipped_row_lse"] = clipped
        return Statistics(**{s: t for s, t in found.items() if s in stats})


class DotCritic(InnerProductCritic):
    """f(x, y) = <x, y> / temperature for x [*, B, D] and y [*, N, D].

    temperature: a positive number or a 0-d tensor; a Parameter is registered and learned.
    normalize: whether to use unit-length rows, which makes the inner product a cosine.

    Cost: 2 B N D FLOP.
    """

    rows_of_input_dtype = True

    def __init__(self, temperature: float | Tensor = 1.0, normalize: bool = False):
        super().__init__()
        if isinstance(temperature, Tensor):
            positive_values("temperature", temperature)
        else:
            check_temperature("temperature", temperature)
        check_bool(normalize=normalize)
        self.temperature = temperature
        self.normalize = normalize

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        if not isinstance(self.temperature, Tensor):
            check_temperature("temperature", self.temperature, accumulate_dtype(x.dtype))
        if self.normalize:
            x, y = unit_rows(x), unit_rows(y)
        return x, y, 1 / self.temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}"


class BilinearCritic(InnerProductCritic):
    """f(x, y) = x^T W y with W [x_dim, y_dim] (CPC, van den Oord et al. 2018, eq. 3).

    Cost: 2 B Dx Dy + 2 B N Dy FLOP. Raises ValueError for inputs of other widths.
    """

    def __init__(self, x_dim: int, y_dim: int):
        super().__init__()
        check_positive(x_dim=x_dim, y_dim=y_dim)
        self.x_dim, self.y_dim = x_dim, y_dim
        self.weight = nn.Parameter(torch.empty(x_dim, y_dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(x_dim), 1 / math.sqrt(x_dim))

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        check_width("x", x, self.x_dim)
        check_width("y", y, self.y_dim)
        check_as_network("x", x, self)
        return x @ self.weight, y, 1.0

    def extra_repr(self) -> str:
        return f"x_dim={self.x_dim}, y_dim={self.y_dim}"


class SeparableCritic(InnerProductCritic):
    """f(x, y) = <g(x), h(y)> with two MLPs g and h (Poole et al. 2019, section 3).

    x_dim, y_dim: widths of x [*, B, x_dim] and y [*, N, y_dim].
    hidden_dims, activation: of both MLPs.
    embed_dim: width of g(x) and h(y).

    Cost: two MLP passes plus 2 B N embed_dim FLOP. Raises ValueError for inputs of other widths and unknown
        activations.
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
        check_positive(x_dim=x_dim, y_dim=y_dim, embed_dim=embed_dim)
        check_hidden(hidden_dims)
        check_activation(activation)
        self.x_dim, self.y_dim = x_dim, y_dim
        self.x_encoder = MLP([x_dim, *hidden_dims, embed_dim], activation)
        self.y_encoder = MLP([y_dim, *hidden_dims, embed_dim], activation)

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        check_width("x", x, self.x_dim)
        check_width("y", y, self.y_dim)
        check_as_network("x", x, self.x_encoder.layers[0])
        check_as_network("y", y, self.y_encoder.layers[0])
        return self.x_encoder(x), self.y_encoder(y), 1.0
