"""Estimators by name: what the critic minimises, and the value that is reported."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .. import bounds
from ..critics import Critic


class SymmetricInfoNCE(nn.Module):
    """The mean of InfoNCE with x and with y as the anchor: at most log B, one pass over the scores."""

    def __init__(self, critic: Critic):
        super().__init__()
        self.critic = critic

    def contributions(self, x: Tensor, y: Tensor) -> Tensor:
        """One per sample, [B], whose mean is the value."""
        found = self.critic.statistics(x, y, stats=("positive", "row_lse", "col_lse"))
        assert found.positive is not None and found.row_lse is not None and found.col_lse is not None
        return found.positive - (found.row_lse + found.col_lse) / 2 + math.log(x.shape[-2])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.contributions(x, y).mean(-1)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.forward(x, y)


_BOUNDS = {
    "nce_club": "NCECLUB",
    "nwj": "NWJ",
    "tuba": "TUBA",
    "dv": "DonskerVaradhan",
    "mine": "MINE",
    "js": "JensenShannon",
    "smile": "SMILE",
    "interpolated": "InterpolatedBound",
}
# InfoNCE cannot exceed the logarithm of its candidates; the interpolated bound, at alpha 1 / 2, that plus 1 + log 2.
CEILINGS = {"infonce": 0.0, "interpolated": 1 + math.log(2)}


def estimators() -> tuple[str, ...]:
    """Names that `estimate_mi` takes."""
    return ("infonce", *(name for name, bound in _BOUNDS.items() if hasattr(bounds, bound)))


def check_estimator(name: str) -> None:
    if name not in estimators():
        raise ValueError(f"estimator must be one of {', '.join(estimators())}, got {name!r}")


def objective(name: str, critic: Critic) -> nn.Module:
    """A module with `forward(x, y)`, in nats, and `learning_loss(x, y)`. Raises ValueError for other names."""
    check_estimator(name)
    if name == "infonce":
        return SymmetricInfoNCE(critic)
    bound: nn.Module = getattr(bounds, _BOUNDS[name])(critic)
    return bound
