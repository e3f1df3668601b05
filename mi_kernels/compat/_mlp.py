"""The multi-layer perceptrons of the replaced libraries, with their state-dict names."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.common.statistics import Statistics
from ..ops.mlp_critic import api as mlp_critic

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(dim: int, hidden_dim: int, output_dim: int, layers: int, activation: str) -> nn.Sequential:
    """Linear and activation, `layers` times more of hidden_dim, and a last Linear: layers + 2 Linears in all."""
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


def pair_scores(network: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """S[i, j] = network([x_i, y_j]), [B, N], materialised."""
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
) -> Statistics:
    """Statistics of S[i, j] = network([x_i, y_j]) / temperature without keeping S."""
    weights, biases, activation = _layers(network, temperature)
    return mlp_critic.statistics(x, y, weights, biases, activation=activation, output=output, stats=stats)


def check_pair(x_samples: Tensor, y_samples: Tensor) -> None:
    """Raises ValueError unless both are [B, features] with one B >= 1."""
    for name, t in (("x_samples", x_samples), ("y_samples", y_samples)):
        if t.dim() != 2 or not t.shape[0]:
            raise ValueError(f"{name} must have shape [B, features] with at least one sample, got {tuple(t.shape)}")
    if x_samples.shape[0] != y_samples.shape[0]:
        raise ValueError(f"y_samples must hold {x_samples.shape[0]} samples as x_samples, got {y_samples.shape[0]}")
