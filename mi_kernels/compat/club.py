"""Replaces CLUB's `mi_estimators.py`: `from mi_kernels.compat.club import CLUB, CLUBSample, MINE, ...`.

forward(x [B, x_dim], y [B, y_dim]) returns the estimate in nats, and learning_loss(x, y) the loss that trains the
networks. State-dict names, values and random draws are those of the original. Differences:
* CLUB and CLUBMean are exact and cost O(B D); the original stores B x B x D numbers. CLUBForCategorical stores B x C.
* L1OutUB runs on any device and excludes the anchor. The mask of the original has an extra dimension, so it computes
  another
  bound (0.0900 instead of -0.0798 in one example).
* MINE computes the logarithm of a mean stably; the original returns -inf for scores above about 88.
* NWJ and InfoNCE store no scores for more than 256 pairs. Wrong shapes, dtypes and integers raise ValueError or
  TypeError.
* log_sum_exp also works without a dim.

As in the original, all classes except NWJ, InfoNCE and CLUBForCategorical also accept [B, *, features]. Each position
is then a separate problem, and the value is the mean over the positions (loglikeli sums over the first of these
dimensions). VarUB keeps the original's mean over dimensions; multiplied by y_dim it is the bound E KL(q(y|x) || N(0,
I)).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.club.api import gaussian_club
from ..ops.common.autograd import readable
from ..ops.common.checks import check_floats, check_same_device, check_tensor
from ..ops.common.dtypes import accumulate_dtype
from ..ops.common.precision import autocast_on
from ..ops.dot_critic import api as dot_critic
from ._mlp import check_pair, first_layer, numpy_when_used, pair_statistics, star_modules

__all__ = [
    "CLUB",
    "MINE",
    "NWJ",
    "CLUBForCategorical",
    "CLUBMean",
    "CLUBSample",
    "InfoNCE",
    "L1OutUB",
    "VarUB",
    "log_sum_exp",
]
__all__ += star_modules("math", "nn", "np", "torch")  # the original's notebooks take them from here


def __getattr__(name: str) -> ModuleType:
    return numpy_when_used(__name__, name)


def log_sum_exp(value: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """log-sum-exp of value over dim, or over all entries if dim is None; a slice of -inf gives -inf."""
    if dim is None:
        return value.flatten().logsumexp(0)
    return value.logsumexp(dim, keepdim)


def _by_position(t: Tensor) -> Tensor:
    """[B, *, features] -> [*, B, features]: a separate problem for each position."""
    return t if t.dim() == 2 else t.movedim(0, -2)


def _over_positions(values: Tensor) -> Tensor:
    return values.mean() if values.dim() else values


def _network(inputs: int, hidden: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), *last)


class _Gaussian(nn.Module):
    """q(y | x) = N(p_mu(x), diag exp p_logvar(x)), with log-variances in (-1, 1)."""

    def __init__(self, x_dim: int, y_dim: int, hidden_size: int):
        super().__init__()
        if hidden_size < 2:
            raise ValueError(f"hidden_size must be at least 2 (the hidden width is half of it), got {hidden_size}")
        self.y_dim = y_dim
        self.p_mu = _network(x_dim, hidden_size // 2, y_dim)
        self.p_logvar = _network(x_dim, hidden_size // 2, y_dim, nn.Tanh())

    def _check(self, x_samples: Tensor, y_samples: Tensor) -> None:
        check_pair(x_samples, y_samples, self.p_mu, more_dimensions=True)
        if y_samples.shape[-1] != self.y_dim:
            raise ValueError(f"y_samples must have {self.y_dim} features, got {tuple(y_samples.shape)}")

    def get_mu_logvar(self, x_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(y | x), [B, y_dim] each."""
        return self.p_mu(x_samples), self.p_logvar(x_samples)

    def loglikeli(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        """Mean over the batch of sum_d -(mu - y)^2 / var - log var: twice the log-likelihood without its constant."""
        self._check(x_samples, y_samples)
        mu, logvar = self.get_mu_logvar(x_samples)
        return (-((mu - y_samples) ** 2) / logvar.exp() - logvar).sum(1).mean(0)

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        return -self.loglikeli(x_samples, y_samples)


class CLUB(_Gaussian):
    """Upper bound mean_i log q(y_i | x_i) - mean_ij log q(y_j | x_i) (Cheng et al. 2020, eq. 10), j = i included."""

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        self._check(x_samples, y_samples)
        mu, logvar = self.get_mu_logvar(x_samples)
        return _over_positions(gaussian_club(_by_position(mu), _by_position(logvar), _by_position(y_samples)))


class CLUBSample(_Gaussian):
    """CLUB with one negative per anchor, drawn by a permutation of the batch (which may leave y_i in place)."""

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        self._check(x_samples, y_samples)
        mu, logvar = self.get_mu_logvar(x_samples)
        shuffled = y_samples[torch.randperm(x_samples.shape[0]).to(y_samples.device)]
        distance = (mu - shuffled) ** 2 - (mu - y_samples) ** 2
        return (distance / logvar.exp()).sum(-1).mean() / 2


class CLUBMean(nn.Module):
    """CLUB with unit variances; p_mu is linear if hidden_size is None."""

    def __init__(self, x_dim: int, y_dim: int, hidden_size: int | None = None):
        super().__init__()
        self.p_mu: nn.Module
        self.p_mu = nn.Linear(x_dim, y_dim) if hidden_size is None else _network(x_dim, int(hidden_size), y_dim)

    def get_mu_logvar(self, x_samples: Tensor) -> tuple[Tensor, int]:
        return self.p_mu(x_samples), 0

    def _mu(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        check_pair(x_samples, y_samples, self.p_mu, more_dimensions=True)
        mu: Tensor = self.p_mu(x_samples)
        if mu.shape[-1] != y_samples.shape[-1]:
            raise ValueError(f"y_samples must have {mu.shape[-1]} features, got {tuple(y_samples.shape)}")
        return mu

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        mu = self._mu(x_samples, y_samples)
        return _over_positions(gaussian_club(_by_position(mu), None, _by_position(y_samples)))

    def loglikeli(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        return -((self._mu(x_samples, y_samples) - y_samples) ** 2).sum(1).mean(0)

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        return -self.loglikeli(x_samples, y_samples)


class CLUBForCategorical(nn.Module):
    """CLUB for labels: mean_i log q(c_i | x_i) - mean_ij log q(c_j | x_i), computed from label frequencies in O(B
    C)."""

    def __init__(self, input_dim: int, label_num: int, hidden_size: int | None = None):
        super().__init__()
        self.label_num = label_num
        self.variational_net: nn.Module
        if hidden_size is None:
            self.variational_net = nn.Linear(input_dim, label_num)
        else:
            self.variational_net = _network(input_dim, hidden_size, label_num)

    def _check(self, inputs: Tensor, labels: Tensor) -> None:
        check_floats("inputs", inputs)
        check_tensor("labels", labels)
        weight = first_layer(self.variational_net).weight
        if inputs.dim() != 2 or not inputs.shape[0] or inputs.shape[1] != weight.shape[1]:
            raise ValueError(f"inputs must have shape [B, {weight.shape[1]}] with B >= 1, got {tuple(inputs.shape)}")
        if inputs.device != weight.device or (inputs.dtype != weight.dtype and not autocast_on(inputs.device.type)):
            own, given = (f"{t.dtype} on {t.device}" for t in (weight, inputs))
            raise ValueError(f"inputs must be {own} as the network, got {given}")
        check_same_device("labels", labels, "inputs", inputs)
        if labels.shape != inputs.shape[:1] or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels must be integers, one for each row of inputs {tuple(inputs.shape)}, got {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        if not readable(labels):
            return  # gather raises then
        if int(labels.min()) < 0 or int(labels.max()) >= self.label_num:
            raise ValueError(f"labels must be in [0, {self.label_num}), got {int(labels.min())} to {int(labels.max())}")

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """inputs [B, input_dim], labels [B] integers -> nats."""
        self._check(inputs, labels)
        log_q = self.variational_net(inputs).log_softmax(-1)
        labels = labels.long()
        ones = log_q.new_ones(()).expand(labels.shape)
        frequency = log_q.new_zeros(log_q.shape[1]).scatter_add(0, labels, ones) / labels.shape[0]
        return log_q.gather(1, labels[:, None]).mean() - (log_q.mean(0) * frequency).sum()

    def loglikeli(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self._check(inputs, labels)
        return -F.cross_entropy(self.variational_net(inputs), labels.long())

    def learning_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return -self.loglikeli(inputs, labels)


class MINE(nn.Module):
    """Donsker-Varadhan; y drawn with replacement from the batch represents the product of the marginals (Belghazi et
    al. 2018)."""

    def __init__(self, x_dim: int, y_dim: int, hidden_size: int):
        super().__init__()
        self.T_func = _network(x_dim + y_dim, hidden_size, 1)

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        check_pair(x_samples, y_samples, self.T_func, joint=True, more_dimensions=True)
        size = y_samples.shape[0]
        shuffled = y_samples[torch.randint(size, (size,)).to(y_samples.device)]
        # One pass over both halves: small batches are bound by launches.
        pairs = torch.cat([torch.cat([x_samples, x_samples]), torch.cat([y_samples, shuffled])], -1)
        scores = self.T_func(pairs)
        joint, product = scores.to(accumulate_dtype(scores.dtype)).flatten().chunk(2)
        top = product.detach().amax()
        return joint.mean() - ((product - top).exp().mean().log() + top)

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        return -self.forward(x_samples, y_samples)


class NWJ(nn.Module):
    """mean_i f_ii - mean_ij exp(f_ij - 1) over all pairs, the diagonal included (Nguyen, Wainwright, Jordan 2010)."""

    def __init__(self, x_dim: int, y_dim: int, hidden_size: int):
        super().__init__()
        self.F_func = _network(x_dim + y_dim, hidden_size, 1)

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        check_pair(x_samples, y_samples, self.F_func, joint=True)
        found = pair_statistics(self.F_func, x_samples, y_samples, ("positive", "col_lse"))
        assert found.positive is not None and found.col_lse is not None
        return found.positive.mean() - (found.col_lse - 1 - math.log(x_samples.shape[0])).exp().mean()

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        return -self.forward(x_samples, y_samples)


class InfoNCE(nn.Module):
    """log B + mean_i (f_ii - logsumexp_j f(x_j, y_i)) with a critic that ends in Softplus; at most log B."""

    def __init__(self, x_dim: int, y_dim: int, hidden_size: int):
        super().__init__()
        self.F_func = _network(x_dim + y_dim, hidden_size, 1, nn.Softplus())

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        check_pair(x_samples, y_samples, self.F_func, joint=True)
        found = pair_statistics(self.F_func, x_samples, y_samples, ("positive", "col_lse"), output="softplus")
        assert found.positive is not None and found.col_lse is not None
        return (found.positive - found.col_lse).mean() + math.log(x_samples.shape[0])

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        return -self.forward(x_samples, y_samples)


class L1OutUB(_Gaussian):
    """mean_i [log q(y_i | x_i) - log mean_{j != i} q(y_i | x_j)] (Poole et al. 2019, eq. 13), for B of at least 2.

    log q(y_j | x_i) is an inner product of [y^2, y] and [-1 / (2 var), mu / var] plus a term of x_i, so pairs need not
    be stored: 8 B^2 D FLOP forward, O(B D) memory.
    """

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        self._check(x_samples, y_samples)
        size = x_samples.shape[0]
        if size < 2:
            raise ValueError(f"x_samples must hold at least two samples, got {tuple(x_samples.shape)}")
        mu, logvar = self.get_mu_logvar(x_samples)
        wide = accumulate_dtype(mu.dtype)
        mu, logvar, y = (_by_position(t.to(wide)) for t in (mu, logvar, y_samples))
        positive = (-((mu - y) ** 2) / logvar.exp() - logvar).sum(-1) / 2
        # The value depends only on differences. Large common offsets in y^2, mu y and mu^2 would lose precision.
        centre = y.mean(-2, keepdim=True).detach()
        mu, y = mu - centre, y - centre
        precision = (-logvar).exp()
        found = dot_critic.statistics(
            torch.cat([-precision / 2, mu * precision], -1),
            torch.cat([y**2, y], -1),
            row_bias=-(mu**2 * precision + logvar).sum(-1) / 2,
            pairs="off_diagonal",
            stats=("col_lse",),
        )
        assert found.col_lse is not None
        return (positive - found.col_lse).mean() + math.log(size - 1)


class VarUB(_Gaussian):
    """Mean over batch and dimensions of KL(q(y | x) || N(0, 1)): 1 / y_dim of the variational upper bound."""

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        self._check(x_samples, y_samples)
        mu, logvar = self.get_mu_logvar(x_samples)
        # Few operations, because the two networks are small: a product instead of a power, and 1 subtracted from the
        # mean.
        return (mu * mu + logvar.exp() - logvar).mean() / 2 - 0.5
