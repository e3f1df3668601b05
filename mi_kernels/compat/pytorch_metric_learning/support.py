"""Checks which losses the wrappers accept."""

from __future__ import annotations

from typing import Any

from . import original
from .base import PairLoss

_BOTH = (
    "AngularLoss",
    "CircleLoss",
    "ContrastiveLoss",
    "GeneralizedLiftedStructureLoss",
    "IntraPairVarianceLoss",
    "LiftedStructureLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "NTXentLoss",
    "SignalToNoiseRatioContrastiveLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "TupletMarginLoss",
)
SELF_SUPERVISED = _BOTH
CROSS_BATCH = (*_BOTH, "MarginLoss")


def refuse(wrapper: Any, loss_name: str) -> None:
    """Raises ValueError for a name that the wrapper does not support."""
    if loss_name not in wrapper.supported_losses():
        supported = ", ".join(wrapper.supported_losses())
        raise ValueError(f"{wrapper.__name__} not supported for {loss_name}: loss must be one of {supported}")


def check_support(wrapper: Any, loss: Any) -> None:
    """Raises an error for losses of the original that the wrapper would train wrongly. Other callables are accepted."""
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {type(loss).__name__}")
    if isinstance(loss, original.BaseMetricLossFunction) and not isinstance(loss, PairLoss):
        kind = next((k for k in type(loss).__mro__ if k.__module__.startswith("pytorch_metric_learning.")), None)
        if kind is not None and kind is not original.BaseMetricLossFunction and kind.__name__ != "GenericPairLoss":
            wrapper.check_loss_support(kind.__name__)
