"""Bounds conditional on labels: each group of samples with equal labels is a separate problem, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..critics import Critic
from ..ops.common.checks import check_tensor
from ..ops.common.rows import sums_of
from ..ops.common.statistics import Statistics

StatisticsOf = Callable[..., Statistics]
Terms = Callable[[StatisticsOf, Tensor, Tensor], Tensor]


class _AsForward(nn.Module):
    """Exposes a critic's `statistics` as `forward`, which `functional_call` needs."""

    def __init__(self, critic: Critic):
        super().__init__()
        self.critic = critic

    def forward(self, *args: Any, **options: Any) -> Statistics:
        return self.critic.statistics(*args, **options)


def _of_group(critic: Critic, group: int) -> StatisticsOf:
    """The `statistics` method of a single one of the independent critics in a grouped critic."""
    module = _AsForward(critic)
    parameters = {name: p[group] for name, p in module.named_parameters()}
    return lambda *args, **options: torch.func.functional_call(module, parameters, args, options)


def _cells(labels: Tensor) -> Iterator[Tensor]:
    """Yields the positions of the samples of each label, [cells, size], for all labels with the same number of samples
    at once. labels [n] on the CPU."""
    _, cell, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    order = cell.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    for size in sizes.unique().tolist():
        first = starts[sizes == size]
        yield order[first[:, None] + torch.arange(size)]


def _checked(labels: Tensor, x: Tensor) -> Tensor:
    """Checks the labels and returns them on the CPU, [groups, B]."""
    check_tensor("condition", labels)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"condition must hold integer labels when it groups the samples, got {labels.dtype}")
    lead = x.shape[:-1]
    if labels.shape != lead and labels.shape != (*lead, 1):
        raise ValueError(f"condition must be {tuple(lead)} labels, one a sample, got {tuple(labels.shape)}")
    # The number and sizes of the label groups decide how many launches follow and on which shapes, so labels on a GPU
    # are copied to the host, once a call. Labels that are on the host already cost nothing.
    return labels.reshape(-1, lead[-1]).cpu()


def within_labels(critic: Critic, terms: Terms, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples of terms(statistics, x', y') [cells, n], where x' and y' are the n samples of one label.

    x [*, B, Dx], y [*, B, Dy], labels [*, B] -> [*]. Labels on a GPU cause one synchronisation, labels on the CPU none.
    """
    labels = _checked(labels, x)
    groups, batch = labels.shape
    if getattr(critic, "groups", None) is not None:
        xs, ys = x.reshape(groups, batch, -1), y.reshape(groups, batch, -1)
        means = [_mean(_of_group(critic, g), terms, xs[g], ys[g], labels[g : g + 1]) for g in range(groups)]
        return torch.cat(means).reshape(x.shape[:-2])
    flat = _mean(critic.statistics, terms, x.reshape(groups * batch, -1), y.reshape(groups * batch, -1), labels)
    return flat.reshape(x.shape[:-2])


def _mean(statistics: StatisticsOf, terms: Terms, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """The mean of every group, [groups], from samples [groups B, .] and labels [groups, B]."""
    groups, batch = labels.shape
    _, codes = torch.unique(labels, return_inverse=True)
    codes = codes + torch.arange(groups)[:, None] * (codes.max() + 1)
    total: Tensor | None = None
    shapes, order = zip(*((p.shape, p.flatten()) for p in _cells(codes.flatten())), strict=True)
    # One copy to the device for cells of all sizes.
    there = torch.cat(order).to(x.device, non_blocking=True).split([shape.numel() for shape in shapes])
    for shape, flat in zip(shapes, there, strict=True):
        positions = flat.view(shape)
        sums = terms(statistics, x[positions], y[positions]).sum(-1)
        total = sums.new_zeros(groups) if total is None else total
        total = total + sums_of(groups, positions[:, 0] // batch, sums)
    assert total is not None
    return total / batch
