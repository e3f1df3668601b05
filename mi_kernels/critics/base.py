"""The critic protocol that bounds use, and argument checks that critics share.

`critic(x, y)` returns the materialised scores S[i, j] = f(x_i, y_j), [*, B, N], for inspection. Bounds call
`critic.statistics(x, y, ...)`, which never stores the score matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.common.checks import check_choice, check_integer, check_tensor
from ..ops.common.precision import autocast_on
from ..ops.common.statistics import Statistics
from ..ops.mlp_critic.activations import ACTIVATIONS


class Critic(nn.Module):
    """Base class of critics. Bounds need `statistics`; `forward` returns the scores themselves."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The score matrix S[i, j] = f(x_i, y_j): x [*, B, Dx], y [*, N, Dy] -> [*, B, N]."""
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
        """Returns the statistics of the scores that `stats` names; the others are None.

        They are `positive` [*, B] (the diagonal), the log-sum-exps `row_lse` [*, B] and `col_lse` [*, N], `row_sum` [*,
        B], `row_softplus` [*, B], and `clipped_row_lse` [*, B] of scores clamped to [-clip, clip], which has no
        gradient. `pairs` is "all" or "off_diagonal".
        """
        raise NotImplementedError


def check_width(name: str, t: Tensor, width: int) -> None:
    check_tensor(name, t)
    if t.dim() < 2 or t.shape[-1] != width:
        raise ValueError(f"{name} must be [*, batch, {width}], got {tuple(t.shape)}")


def check_alike(x: Tensor, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    if x.dtype != y.dtype and not autocast_on(x.device.type):
        raise ValueError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")


def check_as_network(name: str, t: Tensor, network: nn.Module) -> None:
    """Raises ValueError unless t has the device and, without autocast, the dtype of the network that reads it. NumPy's
    float64 arrays are the usual case."""
    layer = network[0] if isinstance(network, nn.Sequential) else network
    weight = getattr(layer, "weight", None)  # a network of the user may begin with a layer that has none
    if not isinstance(weight, Tensor):
        return
    if t.device != weight.device:
        raise ValueError(f"{name} must be on the device of the network, {weight.device}, got {t.device}")
    if t.dtype != weight.dtype and not autocast_on(t.device.type):
        raise ValueError(f"{name} must have the dtype of the network, {weight.dtype}, got {t.dtype}")


def check_positive(**values: int) -> None:
    for name, value in values.items():
        check_integer(name, value, least=1)


def check_hidden(hidden_dims: Sequence[int], least: int = 0) -> None:
    """Raises TypeError or ValueError unless hidden_dims is a sequence of at least `least` positive widths."""
    if isinstance(hidden_dims, str) or not isinstance(hidden_dims, Sequence):
        raise TypeError(f"hidden_dims must be a sequence of widths, got {type(hidden_dims).__name__}")
    if len(hidden_dims) < least:
        raise ValueError(f"hidden_dims must hold at least one positive width, got {tuple(hidden_dims)}")
    for k, width in enumerate(hidden_dims):
        check_integer(f"hidden_dims[{k}]", width, least=1)


def check_activation(activation: str) -> None:
    check_choice("activation", activation, tuple(ACTIVATIONS))
