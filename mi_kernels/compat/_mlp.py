"""MLPs of the replaced libraries, with the originals' state-dict names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from ..ops.common.checks import check_floats, check_one_dtype, check_same_device
from ..ops.common.precision import autocast_on
from ..ops.common.statistics import Statistics
from ..ops.mlp_critic import api as mlp_critic

_FEW = 32 * 32  # up to this many pairs, concatenation is faster than splitting the first layer
_FEWEST = 16 * 16  # up to this many pairs, a one-layer network on stored pairs is faster than the operators
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(dim: int, hidden_dim: int, output_dim: int, layers: int, activation: str) -> nn.Sequential:
    """An MLP with layers + 1 hidden layers of width hidden_dim, that is, layers + 2 Linear modules."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    modules: list[nn.Module] = [nn.Linear(dim, hidden_dim), _ACTIVATIONS[activation]()]
    for _ in range(layers):
        modules += [nn.Linear(hidden_dim, hidden_dim), _ACTIVATIONS[activation]()]
    return nn.Sequential(*modules, nn.Linear(hidden_dim, output_dim))


def _layers(network: nn.Sequential, temperature: float) -> tuple[list[Tensor], list[Tensor], str]:
    linear = [module for module in network if isinstance(module, nn.Linear)]
    weights: list[Tensor] = [layer.weight for layer in linear]
    biases: list[Tensor] = [layer.bias for layer in linear]
    if temperature != 1:
        weights, biases = [*weights[:-1], weights[-1] / temperature], [*biases[:-1], biases[-1] / temperature]
    return weights, biases, "tanh" if isinstance(network[1], nn.Tanh) else "relu"


def _few(x: Tensor, y: Tensor, limit: int = _FEW) -> bool:
    return x.shape[0] * y.shape[0] <= limit and x.dtype == y.dtype


def _joined_scores(network: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    rows, columns = x[:, None].expand(-1, y.shape[0], -1), y.expand(x.shape[0], -1, -1)
    return network(torch.cat([rows, columns], -1)).squeeze(-1)


def _is_small(network: nn.Sequential, x: Tensor, y: Tensor) -> bool:
    """Whether evaluating a one-layer network on stored pairs is faster than the fixed cost of the operators."""
    shallow = len(network) == 3 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return shallow and _few(x, y, _FEWEST) and not autocast_on("cpu")


def _reduced(scores: Tensor, stats: tuple[str, ...]) -> Statistics:
    reductions: dict[str, Callable[[], Tensor]] = {
        "positive": scores.diagonal,
        "row_lse": lambda: scores.logsumexp(1),
        "col_lse": lambda: scores.logsumexp(0),
        "row_sum": lambda: scores.sum(1),
    }
    return Statistics(**{name: reductions[name]() for name in stats})


def pair_scores(network: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """S[i, j] = network([x_i, y_j]), [B, N], materialised."""
    if _few(x, y):
        return _joined_scores(network, x, y)
    weights, biases, activation = _layers(network, 1.0)
    return mlp_critic.scores(x, y, weights, biases, activation=activation)


def pair_statistics(
    network: nn.Sequential,
    x: Tensor,
    y: Tensor,
    stats: tuple[str, ...],
    *,
    temperature: float = 1.0,
    output: str = "identity",
    pairs: str = "all",
) -> Statistics:
    """Statistics of S[i, j] = network([x_i, y_j]) / temperature without keeping S."""
    if _is_small(network, x, y) and pairs == "all" and output == "identity":
        return _reduced(_joined_scores(network, x, y) / temperature, stats)
    weights, biases, activation = _layers(network, temperature)
    return mlp_critic.statistics(x, y, weights, biases, activation=activation, output=output, stats=stats, pairs=pairs)


def first_layer(network: nn.Module) -> nn.Linear:
    layer = network[0] if isinstance(network, nn.Sequential) else network
    assert isinstance(layer, nn.Linear)
    return layer


def _everyday(x: Tensor, y: Tensor, network: nn.Module, joint: bool) -> bool:
    """A quick test for valid arguments of the usual kind; the detailed checks would cost 2 % of the time of a small
    batch."""
    weight = network._modules.get("0", network)._parameters.get("weight")  # type: ignore[union-attr]
    if weight is None or not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.is_nested or y.is_nested:
        return False
    alike = x.dtype == y.dtype == weight.dtype and x.device == y.device == weight.device
    strided = x.layout is torch.strided and y.layout is torch.strided
    if not (alike and strided and x.dim() == y.dim() == 2 and x.is_floating_point()):
        return False
    (rows, width), (others, more) = x.shape, y.shape
    return rows == others > 0 and more > 0 and width + (more if joint else 0) == weight.shape[1]


def check_pair(
    x_samples: Tensor,
    y_samples: Tensor,
    network: nn.Module | None = None,
    *,
    joint: bool = False,
    more_dimensions: bool = False,
) -> None:
    """Raises TypeError or ValueError unless both are floating-point [B, features] with equal B >= 1, or with
    more_dimensions [B, *, features] that differ only in the features. `network` is applied to x, or with `joint` to the
    concatenated x and y, which must match its dtype, device and width."""
    if network is not None and _everyday(x_samples, y_samples, network, joint):
        return
    for name, t in (("x_samples", x_samples), ("y_samples", y_samples)):
        check_floats(name, t)
        if t.dim() < 2 or (t.dim() > 2 and not more_dimensions) or not t.numel():
            shape = "[B, *, features]" if more_dimensions else "[B, features]"
            raise ValueError(f"{name} must have shape {shape} with at least one sample, got {tuple(t.shape)}")
    if x_samples.shape[:-1] != y_samples.shape[:-1]:
        raise ValueError(
            f"x_samples {tuple(x_samples.shape)} and y_samples {tuple(y_samples.shape)} must agree in all dimensions "
            "except the last (features)"
        )
    check_same_device("y_samples", y_samples, "x_samples", x_samples)
    check_one_dtype("y_samples", y_samples, "x_samples", x_samples)
    if network is None:
        return
    weight = first_layer(network).weight
    given = "x_samples and y_samples" if joint else "x_samples"
    width = x_samples.shape[-1] + (y_samples.shape[-1] if joint else 0)
    if width != weight.shape[-1]:
        raise ValueError(f"{given} must have {weight.shape[-1]} features, got {width}")
    if weight.device != x_samples.device or (
        weight.dtype != x_samples.dtype and not autocast_on(x_samples.device.type)
    ):
        raise ValueError(
            f"{given} must be {weight.dtype} on {weight.device} as the network, got {x_samples.dtype} on "
            f"{x_samples.device}"
        )


def star_modules(*names: str) -> list[str]:
    """Names of modules that `from ... import *` of the original exports and its scripts rely on; np only if
    installed."""
    return [name for name in names if name != "np" or importlib.util.find_spec("numpy") is not None]


def numpy_when_used(module: str, name: str) -> ModuleType:
    """A module-level `__getattr__` that imports NumPy as `np` only when it is used."""
    if name == "np":
        return importlib.import_module("numpy")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
