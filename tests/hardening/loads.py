"""Workloads for the tests of threads, forks and memory: every operator at small sizes, and three losses in training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club


def _leaf(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).requires_grad_()


def steps(seed: int = 0) -> dict[str, Callable[[], list[Tensor]]]:
    """Maps names to steps. A step runs one forward and backward pass and returns the value and the gradients."""
    g = torch.Generator().manual_seed(seed)
    x, y = _leaf(g, 33, 20), _leaf(g, 33, 20)
    q, k, v = (_leaf(g, 2, 2, 9, 8) for _ in range(3))
    series, w_ih, w_hh = _leaf(g, 4, 6, 20), _leaf(g, 20, 20), _leaf(g, 20, 5)
    labels = torch.arange(33) % 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        concat = mk.InfoNCE(mk.ConcatCritic(20, 20, (16, 16)))
    cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "info_nce": (lambda a, b: mk.info_nce(a, b, symmetric=True), [x, y]),
        "rows": (lambda a, b: mk.info_nce(a, b, reduction="none").sum(), [x, y]),
        "siglip_loss": (lambda a, b: mk.siglip_loss(a, b, 3.0, -1.0), [x, y]),
        "nt_xent": (mk.nt_xent, [x, y]),
        "sup_con": (lambda a, b: mk.sup_con(torch.stack([a, b], 1), labels), [x, y]),
        "smile": (mk.SMILE(mk.DotCritic(1.0)), [x, y]),
        "concat critic": (concat, [x, y, *concat.parameters()]),
        "gaussian_club": (lambda a, b: gaussian_club(a, None, b), [x, y]),
        "mmd": (mk.mmd, [x, y]),
        "hsic": (mk.hsic, [x, y]),
        "attention": (lambda *t: mk.cross_attention(*t).square().sum(), [q, k, v]),
        "sparsemax": (lambda *t: mk.cross_attention(*t, normalizer="sparsemax").square().sum(), [q, k, v]),
        "lstm": (lambda s, a, b: mk.lstm(s, a, b)[0].square().sum(), [series, w_ih, w_hh]),
        "lstm_decode": (
            lambda s, a, b: mk.lstm_decode(s, a, b, None, None, 4).square().sum(),
            [_leaf(g, 4, 5), _leaf(g, 20, 5), w_hh],
        ),
    }

    def step(name: str) -> list[Tensor]:
        function, leaves = cases[name]
        # The critic's parameters are leaves but not arguments.
        value = function(*leaves[:2]) if name == "concat critic" else function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return {name: partial(step, name) for name in cases}


def training(seed: int = 0) -> dict[str, Callable[[], Tensor]]:
    """Maps names to training steps: new rows, encoders, a loss, backward and Adam. A step returns the loss."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {name: nn.ModuleList(nn.Linear(24, 16) for _ in range(2)) for name in ("info_nce", "smile", "club")}
        bounds = {"smile": mk.SMILE(mk.ConcatCritic(16, 16, (32, 32))), "club": mk.CLUB(16, 16, hidden_dim=32)}
    losses: dict[str, Callable[..., Tensor]] = {
        "info_nce": partial(mk.info_nce, symmetric=True),
        "smile": bounds["smile"].learning_loss,
        "club": lambda a, b: bounds["club"](a, b) + bounds["club"].learning_loss(a, b),
    }

    def step(name: str, optimizer: torch.optim.Optimizer) -> Tensor:
        x = torch.randn(32, 24, generator=g)
        y = x + 0.5 * torch.randn(32, 24, generator=g)
        loss = losses[name](*(encode(t) for encode, t in zip(encoders[name], (x, y), strict=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return {
        name: partial(step, name, torch.optim.Adam([*layers.parameters(), *_parameters(bounds.get(name))], lr=1e-3))
        for name, layers in encoders.items()
    }


def _parameters(bound: nn.Module | None) -> list[nn.Parameter]:
    return [] if bound is None else list(bound.parameters())
