"""Base classes of the losses: those of pytorch-metric-learning if it is installed, so that its wrappers, trainers and
loggers accept these losses; otherwise replacements."""

try:
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory
    from pytorch_metric_learning.reducers import AvgNonZeroReducer, DoNothingReducer, MeanReducer, MultipleReducers
    from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
except ImportError:  # not installed, or one of its dependencies is missing
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
