"""The problems that are timed: our losses on every backend of the device, beside eager torch, torch.compile, rivals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk
from bench.club import club_closed, club_pairs, mmd_gram
from mi_kernels.ops.club.api import gaussian_club

from . import exact, rivals
from .problem import Loss, Problem

_SCORES_LIMIT = 24 << 30  # bytes of scores, gradients and copies beyond which a contender that keeps them is left out
COMPILED = "torch.compile"  # the contender's name
_PAIRS_LIMIT = 16 << 30


def backends(device: torch.device) -> list[str]:
    """Those that run on this device without keeping scores."""
    names = [n for n, status in mk.backends().items() if status == "available" and n != "reference"]
    return [n for n in names if n != "cpu"] if device.type == "cuda" else [n for n in names if n in ("cpu", "chunked")]


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_()


def compiled(problem: Problem, eager: Callable[..., Tensor], wanted: bool) -> None:
    """Adds torch.compile of `eager`; every size gets a program of its own."""
    if not wanted:
        problem.absent[COMPILED] = "compiled at a few sizes alone, to save time"
        return
    torch._dynamo.reset()
    program = torch.compile(eager, dynamic=False)
    problem.contenders[COMPILED] = lambda: program(*problem.leaves)


def graphed(problem: Problem, name: str, loss: Loss) -> None:
    """Adds a replayed CUDA graph of loss and gradients; what it returns are the graph's own outputs."""
    if problem.leaves[0].device.type != "cuda":
        problem.absent[f"{name}, CUDA graph"] = "runs on a GPU alone"
        return
    problem.contenders[f"{name}, CUDA graph"] = Graphed(loss, problem.leaves)


class Graphed:
    """Loss and gradients captured on the first call and replayed by every call. `gradients` holds what was written."""

    def __init__(self, loss: Loss, leaves: list[Tensor]):
        self.loss, self.leaves = loss, leaves
        self.graph: torch.cuda.CUDAGraph | None = None
        self.value: Tensor | None = None
        self.gradients: list[Tensor] = []

    def step(self) -> None:
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()

    def __call__(self) -> Tensor:
        raise TypeError("a captured loss is replayed by step()")

    def _once(self) -> None:
        value = self.loss()
        self.gradients = list(torch.autograd.grad(value, self.leaves))
        self.value = value.detach()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._once()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._once()


def info_nce(
    device: torch.device,
    batch: int,
    depth: int,
    symmetric: bool,
    dtype: torch.dtype,
    with_compile: bool,
    ours_only: bool,
) -> Problem:
    q, k = draw(device, batch, depth, dtype=dtype), draw(device, batch, depth, dtype=dtype, seed=1)
    factor = 4 if symmetric else 3
    problem = Problem(
        [q, k],
        {},
        partial(exact.info_nce, q, k, 0.1, symmetric),
        flop=factor * 2.0 * batch**2 * depth,
        convention=f"{factor}N, N = 2 B^2 D",
        moved_bytes=4.0 * batch * depth * q.element_size(),
    )
    for name in backends(device):
        loss = partial(mk.info_nce, q, k, temperature=0.1, symmetric=symmetric, backend=name)
        problem.contenders[f"mi_kernels {name}"] = loss
        if batch <= 2048 and name in ("triton", "cuda"):
            graphed(problem, f"mi_kernels {name}", loss)
    if ours_only:
        return problem

    def both(rows: rivals.Rows, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        found = rows(a / 0.1, b)
        return (found + rows(b / 0.1, a)) / 2 if symmetric else found

    def materialised(a: Tensor, b: Tensor) -> Tensor:
        labels = torch.arange(len(a), device=a.device)
        scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.1
        found = F.cross_entropy(scores, labels)
        return (found + F.cross_entropy(scores.T, labels)) / 2 if symmetric else found

    if 4 * batch**2 * q.element_size() <= _SCORES_LIMIT:
        problem.contenders["eager"] = lambda: materialised(q, k)
        compiled(problem, materialised, with_compile)
    else:
        problem.absent["eager"] = problem.absent[COMPILED] = "its scores would not fit"
    found, absent = rivals.cross_entropy(device)
    problem.contenders |= {name: partial(both, rows, q, k) for name, rows in found.items()}
    problem.absent |= absent
    return problem


def siglip(device: torch.device, batch: int, depth: int, dtype: torch.dtype, with_compile: bool) -> Problem:
    scale, bias = 10.0, -10.0
    image, text = (
        F.normalize(draw(device, batch, depth, seed=s).detach(), dim=-1).to(dtype).requires_grad_() for s in (0, 1)
    )
    problem = Problem(
        [image, text],
        {},
        partial(exact.siglip, image, text, scale, bias),
        flop=3 * 2.0 * batch**2 * depth,
        convention="3N, N = 2 B^2 D",
        moved_bytes=4.0 * batch * depth * image.element_size(),
    )
    for name in backends(device):
        problem.contenders[f"mi_kernels {name}"] = partial(mk.siglip_loss, image, text, scale, bias, backend=name)

    def materialised(a: Tensor, b: Tensor) -> Tensor:
        sign = 2 * torch.eye(len(a), device=a.device, dtype=a.dtype) - 1
        return -F.logsigmoid(sign * (a @ b.T * scale + bias)).sum() / len(a)

    if 6 * batch**2 * image.element_size() <= _SCORES_LIMIT:
        problem.contenders["eager"] = lambda: materialised(image, text)
        compiled(problem, materialised, with_compile)
    else:
        problem.absent["eager"] = problem.absent[COMPILED] = "its scores would not fit"
    found, absent = rivals.sigmoid(device)
    problem.contenders |= {name: partial(run, image, text, scale, bias) for name, run in found.items()}
    problem.absent |= absent
    return problem


def concat(
    device: torch.device,
    batch: int,
    width: int,
    hidden: int,
    groups: int | None,
    dtype: torch.dtype,
    with_compile: bool,
) -> Problem:
    """InfoNCE of one concat critic, or of `groups` of them in one call; x and y are `width` wide."""
    torch.manual_seed(0)
    critic = mk.ConcatCritic(width, width, hidden_dims=(hidden, hidden), groups=groups).to(device, dtype)
    lead = () if groups is None else (groups,)
    x, y = (draw(device, *lead, batch, width, dtype=dtype, seed=s) for s in (0, 1))
    parameters = [layer.weight for layer in critic.layers] + [layer.bias for layer in critic.layers]
    problem = Problem(
        [x, y, *parameters],
        {},
        lambda: exact.mlp_info_nce(x, y, parameters),
        flop=3 * 2.0 * (groups or 1) * batch**2 * hidden**2,
        convention="3M, M = 2 G B^2 H^2",
        slack=4.0,  # gradients of weights are differences of nearly equal sums at initialisation
    )

    def ours(name: str, budget: int = critic.memory_budget) -> Tensor:
        critic.memory_budget = budget
        with mk.use_backend(name):
            return (math.log(batch) - mk.InfoNCE(critic)(x, y)).sum()

    for name in backends(device):
        problem.contenders[f"mi_kernels {name}"] = partial(ours, name)
        if name == "triton" and batch >= 1024:  # layers of a chunk are stored, for torch's matmuls
            problem.contenders["mi_kernels triton, 512 MiB"] = partial(ours, name, 2**29)

    def apart(a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        w1, w2, w3, b1, b2, b3 = weights
        u, v = a @ w1[..., :width].mT, b @ w1[..., width:].mT + b1.unsqueeze(-2)
        h = F.relu(u.unsqueeze(-2) + v.unsqueeze(-3))
        h = F.relu(h @ w2.mT.unsqueeze(-3) + b2[..., None, None, :])
        s = (h @ w3.mT.unsqueeze(-3) + b3[..., None, None, :]).squeeze(-1).float()
        return (s.logsumexp(-1) - s.diagonal(0, -2, -1)).mean(-1).sum()

    if 6 * (groups or 1) * batch**2 * hidden * x.element_size() <= _PAIRS_LIMIT:
        problem.contenders["split form, eager"] = lambda: apart(*problem.leaves)
        compiled(problem, apart, with_compile)
    else:
        problem.absent["split form, eager"] = problem.absent[COMPILED] = "its activations would not fit"

    def public(a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        """FactorCL's public formulation: every pair concatenated and sent through all layers, positives apart."""
        w, bias = weights[:3], weights[3:]

        def network(h: Tensor) -> Tensor:
            for k in range(3):
                lead = h.dim() - w[k].dim()
                matrix, shift = w[k].mT, bias[k]
                for _ in range(lead):
                    matrix, shift = matrix.unsqueeze(-3), shift.unsqueeze(-2)
                h = (h.relu() if k else h) @ matrix + shift.unsqueeze(-2)
            return h.squeeze(-1)

        rows = a.shape[-2]
        shape = (*a.shape[:-1], rows, a.shape[-1])
        pairs = torch.cat([a.unsqueeze(-2).expand(shape), b.unsqueeze(-3).expand(shape)], -1)
        positive, scores = network(torch.cat([a, b], -1)).float(), network(pairs).float()
        return (scores.logsumexp(-1) - positive).mean(-1).sum()

    if 8 * (groups or 1) * batch**2 * max(hidden, 2 * width) * x.element_size() <= _PAIRS_LIMIT:
        problem.contenders["public FactorCL formulation, eager"] = lambda: public(*problem.leaves)
    else:
        problem.absent["public FactorCL formulation, eager"] = "its pairs would not fit"
    return problem


def club(device: torch.device, batch: int, depth: int, dtype: torch.dtype, with_compile: bool) -> Problem:
    mu, logvar, y = (draw(device, batch, depth, dtype=dtype, seed=s) for s in range(3))
    problem = Problem(
        [mu, logvar, y],
        {},
        lambda: exact.from_formula(club_closed, [mu, logvar, y]),
        flop=45.0 * batch * depth,
        convention="45 B D",
        moved_bytes=9.0 * batch * depth * mu.element_size(),
    )
    for name in backends(device):
        problem.contenders[f"mi_kernels {name}"] = partial(gaussian_club, mu, logvar, y, backend=name)
    problem.contenders["closed form, eager"] = lambda: club_closed(mu, logvar, y)
    compiled(problem, club_closed, with_compile)
    if 4 * batch**2 * depth * mu.element_size() <= _PAIRS_LIMIT:
        problem.contenders["all pairs, eager"] = lambda: club_pairs(mu, logvar, y)
    else:
        problem.absent["all pairs, eager"] = "its B x B x D tensor would not fit"
    return problem


def mmd(device: torch.device, batch: int, depth: int, with_compile: bool) -> Problem:
    x, y = draw(device, batch, depth), draw(device, batch, depth, seed=1)
    with torch.no_grad():
        y += 0.3  # away from the null, where plain torch has no digits left
    problem = Problem(
        [x, y],
        {},
        lambda: exact.from_formula(mmd_gram, [x, y]),
        flop=7 * 2.0 * batch**2 * depth,
        convention="7M, M = 2 B^2 D",
        moved_bytes=4.0 * batch * depth * x.element_size(),
    )
    s = float((2 * depth) ** 0.5)
    for name in backends(device):
        problem.contenders[f"mi_kernels {name}"] = partial(mk.mmd, x, y, bandwidth=s, backend=name)
    problem.contenders["three Gram matrices, eager"] = lambda: mmd_gram(x, y)
    compiled(problem, mmd_gram, with_compile)
    return problem
