"""Replaces pytorch-metric-learning's contrastive losses: `from mi_kernels.compat.pytorch_metric_learning import losses`
or `from mi_kernels.compat.pytorch_metric_learning.losses import NTXentLoss`. The module `losses` lists the
differences."""

from . import losses, utils

__all__ = ["losses", "utils"]
