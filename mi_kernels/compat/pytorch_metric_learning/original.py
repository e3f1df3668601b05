"""Bases of the losses: pytorch-metric-learning's own where it is installed, so that its wrappers, trainers and loggers
take these losses for its own; stand-ins otherwise."""

try:
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory
    from pytorch_metric_learning.reducers import AvgNonZeroReducer, DoNothingReducer, MeanReducer, MultipleReducers
    from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
except ImportError:  # not installed, or without what it imports
    from .standalone import (  # type: ignore[assignment]
        AvgNonZeroReducer,
        BaseMetricLossFunction,
        CosineSimilarity,
        CrossBatchMemory,
        DoNothingReducer,
        DotProductSimilarity,
        MeanReducer,
        ModuleWithRecords,
        MultipleReducers,
    )

__all__ = [
    "AvgNonZeroReducer",
    "BaseMetricLossFunction",
    "CosineSimilarity",
    "CrossBatchMemory",
    "DoNothingReducer",
    "DotProductSimilarity",
    "MeanReducer",
    "ModuleWithRecords",
    "MultipleReducers",
]
