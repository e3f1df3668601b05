"""Bounds on mutual information, in nats, computed from statistics of a critic's scores.

`bound(x, y)` returns the value, [*]. `bound.learning_loss(x, y)` returns the loss that trains the critic. Both are
differentiable in x, y and the critic. The score matrix is never materialised; the cost is that of the critic's
`statistics`.

Every bound registers its name, kind (lower, upper or neither), ceiling and supported critics in `registry`;
`python -m mi_kernels bounds` prints them. This file imports every module of the folder, so a bound in a new file is
registered, and its class becomes an attribute of this package, without a change here.
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
