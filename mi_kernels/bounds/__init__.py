"""Bounds on the mutual information between batches, in nats: a few lines over a critic's statistics.

`bound(x, y)` is the estimate, [*]; `bound.learning_loss(x, y)` is what the critic minimises. Both are differentiable
in x, y and the critic. Scores are never materialised; the cost is that of the critic's `statistics`.

| bound | which | value | its gradient | negatives |
|---|---|---|---|---|
| `InfoNCE` | lower, at most log B | itself | its own | all pairs |
| `TUBA`, `NWJ` | lower | itself | its own | off the diagonal |
| `DonskerVaradhan` | lower in the limit | itself | its own | off the diagonal |
| `MINE` | lower in the limit | Donsker-Varadhan | with an averaged denominator | off the diagonal |
| `JensenShannon` | lower | NWJ at T + 1 | of the Jensen-Shannon objective | off the diagonal |
| `SMILE` | neither | Donsker-Varadhan, clipped | of the Jensen-Shannon objective | off the diagonal |
| `InterpolatedBound` | lower | itself | its own | off the diagonal |
| `NCECLUB` | upper at the optimal critic | itself | its own | all pairs |
| `WassersteinDependency` | not MI: W_1 | itself | its own | off the diagonal |
| `TotalCorrelation` | lower, two or more modalities | itself | its own | shuffled modalities |
"""

from .club import CLUB, CLUBCategorical, CLUBMean, CLUBSample
from .density import BarberAgakov, LeaveOneOut, VariationalUpperBound
from .info_nce import NCECLUB, InfoNCE
from .total_correlation import JointCritic, TotalCorrelation
from .variational import MINE, NWJ, SMILE, TUBA, DonskerVaradhan, InterpolatedBound, JensenShannon
from .wasserstein import WassersteinDependency

__all__ = [
    "CLUB",
    "MINE",
    "NCECLUB",
    "NWJ",
    "SMILE",
    "TUBA",
    "BarberAgakov",
    "CLUBCategorical",
    "CLUBMean",
    "CLUBSample",
    "DonskerVaradhan",
    "InfoNCE",
    "InterpolatedBound",
    "JensenShannon",
    "JointCritic",
    "LeaveOneOut",
    "TotalCorrelation",
    "VariationalUpperBound",
    "WassersteinDependency",
]
