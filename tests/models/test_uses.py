"""The demo's measurements: the plain and the fused loss have the same value, and the fused one keeps less memory."""

import torch

from models.report import uses


def test_the_swapped_loss_is_the_same_loss_and_keeps_less_memory():
    x, y = torch.randn(2, 96, 8, dtype=torch.float64)
    torch.testing.assert_close(uses.fused(x, y), uses.eager(x, y))
    theirs, ours = (uses.cost(loss, 512, 1) for loss in (uses.eager, uses.fused))
    assert theirs.kept > 1024 * 1024 * 4 > ours.kept > 0
