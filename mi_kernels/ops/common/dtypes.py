"""The dtype of sums and results."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_dtype(device: torch.device) -> torch.dtype:
    """The dtype of log-sum-exps between the forward and the backward pass: fp64, whatever the dtype of the scores.

    In fp32 a log-sum-exp near 900 is rounded by up to 3e-5. The probabilities exp(S - lse) of a row then sum to 1 +
    3e-5 instead of 1, so that a gradient in which they cancel against the positive pair keeps only four digits.
    """
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no fp64


def rounded_lse(lse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(lse in `dtype`, factor) such that exp(S - lse) = factor exp(S - rounded lse); None stands for 1."""
    short = lse.to(dtype)
    if short.dtype == lse.dtype:
        return short, None
    return short, (short - lse).nan_to_num(0.0).exp().to(dtype)  # -inf - -inf: a row without pairs
