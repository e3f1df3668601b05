"""Losses and gradients to check contenders against: plain torch in fp32 without TF32, in row chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Answer

_CHUNK_BYTES = 256 << 20


def _rows(rows: int, columns: int, width: int = 1) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (4 * columns * width))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _units(t: Tensor) -> tuple[Tensor, Tensor]:
    leaf = t.detach().float().requires_grad_()
    return leaf, F.normalize(leaf, dim=-1)


def info_nce(query: Tensor, key: Tensor, temperature: float, symmetric: bool) -> Answer:
    (q, q_unit), (k, k_unit) = _units(query), _units(key)
    a, b = q_unit.detach() / temperature, k_unit.detach()
    n = len(a)
    diagonal = (a * b).sum(-1).double()
    row_lse = torch.empty(n, device=a.device)
    col_lse = torch.full((n,), -torch.inf, device=a.device)
    for part in _rows(n, n):
        s = a[part] @ b.T
        row_lse[part] = s.logsumexp(1)
        if symmetric:
            col_lse = torch.logaddexp(col_lse, s.logsumexp(0))
    value = (row_lse.double() - diagonal).mean()
    if symmetric:
        value = (value + (col_lse.double() - diagonal).mean()) / 2
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for part in _rows(n, n):
        s = a[part] @ b.T
        d = (s - row_lse[part, None]).exp()
        if symmetric:
            d = (d + (s - col_lse).exp()) / 2
        da[part] = d @ b
        db += d.T @ a[part]
    torch.autograd.backward([q_unit, k_unit], [(da - b) / (n * temperature), (db - a) / n])
    assert q.grad is not None and k.grad is not None
    return value, [q.grad, k.grad]


def siglip(image: Tensor, text: Tensor, scale: float, bias: float) -> Answer:
    """Features are taken as they are."""
    a, b = image.detach().float(), text.detach().float()
    n = len(a)
    value = torch.zeros((), dtype=torch.float64, device=a.device)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for part in _rows(n, n):
        s = a[part] @ b.T * scale + bias
        own = torch.arange(n, device=a.device)[part]
        sign = torch.ones_like(s)
        sign[torch.arange(len(own), device=a.device), own] = -1
        value += F.softplus(s * sign).sum(dtype=torch.float64)
        d = (s * sign).sigmoid() * sign * (scale / n)
        da[part] = d @ b
        db += d.T @ a[part]
    return value / n, [da, db]


def mlp_info_nce(x: Tensor, y: Tensor, parameters: list[Tensor]) -> Answer:
    """InfoNCE of ReLU critics with two hidden layers on concatenated rows, summed over groups [*, B, D], by rows."""
    leaves = [t.detach().float().requires_grad_() for t in (x, y, *parameters)]
    groups = x.shape[0] if x.dim() == 3 else 1
    n, depth = x.shape[-2:]
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for g in range(groups):
        a, b, w1, w2, w3, b1, b2, b3 = (t if x.dim() == 2 else t[g] for t in leaves)
        for part in _rows(n, n, 4 * w2.shape[0]):
            u, v = a[part] @ w1[:, :depth].T, b @ w1[:, depth:].T + b1
            hidden = F.relu(u[:, None] + v[None])
            s = (F.relu(hidden @ w2.T + b2) @ w3.T + b3).squeeze(-1)
            own = torch.arange(n, device=x.device)[part]
            loss = (s.logsumexp(1) - s[torch.arange(len(own), device=x.device), own]).sum() / n
            loss.backward()
            total += loss.detach()
    return total, [t.grad for t in leaves if t.grad is not None]


def from_formula(formula, leaves: list[Tensor]) -> Answer:
    """A formula of the leaves in fp64, with autograd."""
    wide = [t.detach().double().requires_grad_() for t in leaves]
    value = formula(*wide)
    return value.detach(), list(torch.autograd.grad(value, wide))
