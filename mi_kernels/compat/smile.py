"""Replaces smile-mi-estimator's `estimators.py` and `utils.py`: `from mi_kernels.compat.smile import *`.

Bounds are functions of a score matrix [B, B] that the caller stores. They are in nats and are to be maximised.
Differences:
* Results stay on the device of the input. The original moves them to CUDA; `device` is accepted and ignored.
* estimate_mutual_information with this module's ConcatCritic stores neither scores nor activations.
* tuba_lower_bound does not change its input. The original subtracts the baseline in place.
* mine_lower_bound computes in log space, so scores of 500 stay finite.
* 16-bit scores give an fp32 result. Scores that are not [B, B] or not floating-point, and an unknown estimator, raise
  ValueError.

mk.InfoNCE, mk.NWJ, mk.SMILE and the other bounds of the package store no scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.common.checks import check_floats
from ..ops.common.dtypes import accumulate_dtype
from ._mlp import check_pair, mlp, numpy_when_used, pair_scores, pair_statistics, star_modules

__all__ = [
    "ConcatCritic",
    "SeparableCritic",
    "dv_upper_lower_bound",
    "estimate_mutual_information",
    "infonce_lower_bound",
    "js_fgan_lower_bound",
    "js_lower_bound",
    "log_prob_gaussian",
    "logmeanexp_diag",
    "logmeanexp_nodiag",
    "mi_schedule",
    "mi_to_rho",
    "mine_lower_bound",
    "mlp",
    "nwj_lower_bound",
    "rho_to_mi",
    "sample_correlated_gaussian",
    "smile_lower_bound",
    "tuba_lower_bound",
]
__all__ += star_modules("F", "nn", "np", "torch")  # `import *` of the original's two files exports these


def __getattr__(name: str) -> ModuleType:
    return numpy_when_used(__name__, name)


def _wide(scores: Tensor, least: int = 1) -> Tensor:
    """The scores in the accumulation type: the bounds are differences of numbers that 16 bits would round. Raises
    TypeError or ValueError unless they are floating-point [B, B] with B >= least."""
    check_floats("scores", scores)
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1] or scores.shape[0] < least:
        raise ValueError(f"scores must have shape [B, B] with B >= {least}, got {tuple(scores.shape)}")
    return scores.to(accumulate_dtype(scores.dtype))


def _without_diagonal(scores: Tensor, value: float) -> Tensor:
    return scores.masked_fill(torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device), value)


def logmeanexp_diag(x: Tensor, device: Any = None) -> Tensor:
    """log mean exp of the diagonal of x [B, B]."""
    return _wide(x).diagonal().logsumexp(0) - math.log(x.shape[0])


def logmeanexp_nodiag(x: Tensor, dim: int | tuple[int, ...] | None = None, device: Any = None) -> Tensor:
    """log mean exp of x [B, B] over `dim` (both by default), excluding the diagonal."""
    x = _wide(x, 2)
    size = x.shape[0]
    dims = (0, 1) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    count = size - 1 if len(dims) == 1 else size * (size - 1)
    return _without_diagonal(x, -math.inf).logsumexp(dims) - math.log(count)


def tuba_lower_bound(scores: Tensor, log_baseline: Tensor | None = None) -> Tensor:
    """1 + E_p[f - log a(y)] - E_pp[exp(f - log a(y))] (Poole et al. 2019, eq. 4); log_baseline [B] of the rows."""
    scores = _wide(scores, 2)
    if log_baseline is not None:
        if log_baseline.shape != scores.shape[:1]:
            raise ValueError(f"log_baseline must have shape {tuple(scores.shape[:1])}, got {tuple(log_baseline.shape)}")
        scores = scores - log_baseline[:, None]
    return 1 + scores.diagonal().mean() - logmeanexp_nodiag(scores).exp()


def nwj_lower_bound(scores: Tensor) -> Tensor:
    """TUBA with the baseline e (Nguyen, Wainwright, Jordan 2010)."""
    return tuba_lower_bound(_wide(scores, 2) - 1)


def infonce_lower_bound(scores: Tensor) -> Tensor:
    """log B + mean_i (f_ii - logsumexp_j f_ij), where the sum includes the diagonal; at most log B."""
    scores = _wide(scores)
    return math.log(scores.shape[0]) + (scores.diagonal() - scores.logsumexp(1)).mean()


def js_fgan_lower_bound(f: Tensor) -> Tensor:
    """E_p[-softplus(-f)] - E_pp[softplus(f)] (Nowozin et al. 2016); E_pp averages over off-diagonal pairs."""
    f = _wide(f, 2)
    size = f.shape[0]
    negative = _without_diagonal(F.softplus(f), 0).sum() / (size * (size - 1))
    return -F.softplus(-f.diagonal()).mean() - negative


def js_lower_bound(f: Tensor) -> Tensor:
    """NWJ's value with the gradient of js_fgan_lower_bound."""
    f = _wide(f, 2)
    js = js_fgan_lower_bound(f)
    return js + (nwj_lower_bound(f) - js).detach()


def dv_upper_lower_bound(f: Tensor) -> Tensor:
    """E_p[f] - log E_pp[exp f] (Donsker-Varadhan). With the log of a batch mean it is neither a lower nor an upper
    bound."""
    f = _wide(f, 2)
    return f.diagonal().mean() - logmeanexp_nodiag(f)


def mine_lower_bound(f: Tensor, buffer: Tensor | None = None, momentum: float = 0.9) -> tuple[Tensor, Tensor]:
    """Donsker-Varadhan value with MINE's gradient (Belghazi et al. 2018, section 3.2), and the updated running mean.

    buffer: the running mean of E_pp[exp f], initially 1. The gradient of the partition function is divided by the
    updated mean instead of the batch mean. The returned mean is at most the largest finite number of its dtype.
    """
    f = _wide(f, 2)
    log_update = logmeanexp_nodiag(f)
    largest = torch.finfo(log_update.dtype).max
    update = log_update.exp().clamp(max=largest)
    old = torch.ones_like(log_update) if buffer is None else buffer.detach().to(log_update)
    with torch.no_grad():
        # An infinite old mean is replaced by the largest finite number, whose logarithm is finite.
        log_old = old.clamp(max=largest).log() + _log(momentum)
        log_new = torch.logaddexp(log_old, log_update + _log(1 - momentum)).clamp(min=math.log(1e-4))
    ratio = (log_update - log_new).exp()
    return f.diagonal().mean() - log_update.detach() - ratio + ratio.detach(), update


def _log(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {value}")
    return math.log(value) if value else -math.inf


def smile_lower_bound(f: Tensor, clip: float | None = None) -> Tensor:
    """Donsker-Varadhan with scores clipped to +-clip in the partition function only, and the gradient of
    js_fgan_lower_bound (Song and Ermon 2020, eq. 9)."""
    f = _wide(f, 2)
    partition = logmeanexp_nodiag(f if clip is None else f.clamp(-clip, clip))
    js = js_fgan_lower_bound(f)
    return js + (f.diagonal().mean() - partition - js).detach()


def estimate_mutual_information(
    estimator: str,
    x: Tensor,
    y: Tensor,
    critic_fn: Callable[[Tensor, Tensor], Tensor],
    baseline_fn: Callable[[Tensor], Tensor] | None = None,
    alpha_logit: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """The bound `estimator` ('infonce', 'nwj', 'tuba', 'js', 'smile', 'dv') of critic_fn(x, y) [B, B], in nats.

    baseline_fn(y) [B] or [B, 1] is TUBA's log baseline; kwargs go to SMILE (clip). alpha_logit is not used, as in the
    original. Raises ValueError for an unknown estimator.
    """
    bounds: dict[str, Callable[[Tensor], Tensor]] = {
        "infonce": infonce_lower_bound,
        "nwj": nwj_lower_bound,
        "js": js_lower_bound,
        "dv": dv_upper_lower_bound,
    }
    if estimator not in (*bounds, "tuba", "smile"):
        raise ValueError(f"estimator must be one of {', '.join((*bounds, 'tuba', 'smile'))}, got {estimator!r}")
    if type(critic_fn) is ConcatCritic and estimator in ("infonce", "nwj", "dv"):
        return _without_scores(estimator, x, y, critic_fn)
    scores = critic_fn(x, y)
    if estimator == "smile":
        return smile_lower_bound(scores, **kwargs)
    if estimator == "tuba":
        return tuba_lower_bound(scores, None if baseline_fn is None else baseline_fn(y).reshape(-1))
    return bounds[estimator](scores)


def _without_scores(estimator: str, x: Tensor, y: Tensor, critic: ConcatCritic) -> Tensor:
    """The bounds that need only log-sum-exps, computed from a critic's statistics without storing scores."""
    check_pair(x, y)
    size = x.shape[0]
    if estimator == "infonce":
        found = pair_statistics(critic._f, x, y, ("positive", "row_lse"))
        assert found.positive is not None and found.row_lse is not None
        return math.log(size) + (found.positive - found.row_lse).mean()
    if size < 2:
        raise ValueError(f"x must hold at least two samples, got {tuple(x.shape)}")
    found = pair_statistics(critic._f, x, y, ("row_lse",), pairs="off_diagonal")
    assert found.row_lse is not None
    log_mean = found.row_lse.logsumexp(0) - math.log(size * (size - 1))
    joint = critic._f(torch.cat([x, y], -1)).mean()
    return joint - log_mean if estimator == "dv" else joint - (log_mean - 1).exp()


class SeparableCritic(nn.Module):
    """scores[i, j] = <h(y_i), g(x_j)>."""

    def __init__(self, dim: int, hidden_dim: int, embed_dim: int, layers: int, activation: str, **extra_kwargs: Any):
        super().__init__()
        self._g = mlp(dim, hidden_dim, embed_dim, layers, activation)
        self._h = mlp(dim, hidden_dim, embed_dim, layers, activation)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._h(y) @ self._g(x).mT


class ConcatCritic(nn.Module):
    """scores[i, j] = f([x_i, y_j])."""

    def __init__(self, dim: int, hidden_dim: int, layers: int, activation: str, **extra_kwargs: Any):
        super().__init__()
        self._f = mlp(dim * 2, hidden_dim, 1, layers, activation)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return pair_scores(self._f, x, y)


def sample_correlated_gaussian(
    rho: float = 0.5, dim: int = 20, batch_size: int = 128, cubic: bool | None = None
) -> tuple[Tensor, Tensor]:
    """x, y [batch_size, dim] with correlation rho in each dimension; y^3 if cubic. cubic=False works, unlike in the
    original."""
    x, noise = torch.randn(batch_size, 2 * dim).chunk(2, dim=1)
    y = rho * x + torch.tensor(1 - rho**2, dtype=x.dtype).sqrt() * noise
    return x, y**3 if cubic else y


def rho_to_mi(dim: int, rho: Any) -> Any:
    """-dim / 2 log(1 - rho^2) in nats, for a number or an array."""
    import numpy as np

    return -0.5 * np.log(1 - rho**2) * dim


def mi_to_rho(dim: int, mi: Any) -> Any:
    """sqrt(1 - exp(-2 mi / dim)), for a number or an array."""
    import numpy as np

    return np.sqrt(1 - np.exp(-2.0 / dim * mi))


def mi_schedule(n_iter: int) -> Any:
    """The staircase 2, 4, 6, 8, 10 over n_iter steps, fp32 array."""
    import numpy as np

    return (2.0 * np.round(np.linspace(0.5, 5.5 - 1e-9, n_iter))).astype(np.float32)


def log_prob_gaussian(x: Tensor) -> Tensor:
    """Log-density of the standard Gaussian, summed over the last dimension."""
    return (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum(-1)
