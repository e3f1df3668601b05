"""The concat critic: an MLP on the concatenated pair."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..ops.common.checks import backend_name, check_choice, check_integer, check_samples
from ..ops.common.statistics import Statistics
from ..ops.mlp_critic import api as mlp_critic
from ..ops.mlp_critic.schema import ACTIVATIONS, OUTPUTS
from .base import Critic, check_as_network, check_hidden, check_width
from .layers import GroupedLinear


class ConcatCritic(Critic):
    """f(x, y) = MLP([x, y]), one score per pair (Poole et al. 2019, section 3; FactorCL, Liang et al. 2023).

    x_dim, y_dim: widths of x [*, B, x_dim] and y [*, N, y_dim].
    hidden_dims: widths of the hidden layers. The default follows the public code of FactorCL, which has two hidden
        layers of 512; the paper says one.
    activation: of the hidden layers: relu, leaky_relu, tanh, sigmoid, elu, gelu or silu.
    output: "identity" or "softplus", applied to the score.
    groups: if given, G independent critics; parameters get a leading dimension G, and inputs are [G, B, .].
    memory_budget: bytes that saved activations may take (64 MiB). With ReLU and the compiled backend one bit per pair
        and unit is saved.

    `layers` are `nn.Linear` modules with default initialisation. Cost, with M = 2 B N sum_l H_l H_{l+1} FLOP over the
    hidden layers: M forward, 2 M backward if the saved activations fit memory_budget and 3 M otherwise; O(B + N) memory
    besides the budget. The first layer is applied to x and y separately, which is exact and costs O((B + N) D H).
    Raises ValueError for inputs of other widths, empty batches, mixed devices or dtypes and unknown names, and
    TypeError for wrong types.
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
        check_integer("x_dim", x_dim, least=1)
        check_integer("y_dim", y_dim, least=1)
        check_hidden(hidden_dims, least=1)
        check_choice("activation", activation, ACTIVATIONS)
        if groups is not None:
            check_integer("groups", groups, least=1)
        check_choice("output", output, OUTPUTS)
        check_integer("memory_budget", memory_budget, least=1)
        self.x_dim, self.y_dim, self.groups = x_dim, y_dim, groups
        self.activation, self.output = activation, output
        backend_name(backend)
        self.memory_budget, self.backend = memory_budget, backend
        widths = list(pairwise([x_dim + y_dim, *hidden_dims, 1]))
        self.layers: nn.ModuleList
        if groups is None:
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in widths)
        else:
            self.layers = nn.ModuleList(GroupedLinear(groups, i, o) for i, o in widths)

    def _parameters_of(self, name: str) -> list[Tensor]:
        return [getattr(layer, name) for layer in self.layers]

    def _check(self, x: Tensor, y: Tensor) -> None:
        for name, t, width in (("x", x, self.x_dim), ("y", y, self.y_dim)):
            check_samples(name, t)
            check_width(name, t, width)
            check_as_network(name, t, self.layers[0])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x, y)
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
        self._check(x, y)
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

