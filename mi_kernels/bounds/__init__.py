"""Bounds on the mutual information between batches, in nats: a few lines over a critic's statistics.

`bound(x, y)` is the estimate, [*]; `bound.learning_loss(x, y)` is what the critic minimises. Both are differentiable
in x, y and the critic. Scores are never materialised; the cost is that of the critic's `statistics`.

Every bound declares its name, its kind (lower, upper or neither), its ceiling and the critics that it takes to
`registry`; `python -m mi_kernels bounds` prints them. Every module of this folder is imported here, so that a bound in
a new file is declared, and its class is an attribute of this package, without a line in this one.
"""

import importlib
import pkgutil

from . import registry
from .club import CLUB, CLUBCategorical, CLUBMean, CLUBSample
from .density import BarberAgakov, LeaveOneOut, VariationalUpperBound
from .info_nce import NCECLUB, InfoNCE
from .total_correlation import JointCritic, TotalCorrelation
from .variational import MINE, NWJ, SMILE, TUBA, DonskerVaradhan, InterpolatedBound, JensenShannon
from .wasserstein import WassersteinDependency

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
globals().update({d.bound.__name__: d.bound for d in registry.declarations()})

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
