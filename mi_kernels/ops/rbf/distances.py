"""Squared distances between rows: from inner products, or from differences of rows if products are not accurate enough.

|a|^2 + |b|^2 - 2 a.b has an error of the order of eps (|a|^2 + |b|^2). In units of the smallest bandwidth, this matters
only for pairs with large norms (samples that spread over many bandwidths) and a small distance. For all other pairs the
kernel is accurate to about 1e-6 in fp32. On a CPU `squared` looks for such pairs. On other devices it always uses
differences, because looking for pairs would synchronise.

Formulas use `Apart`, `Pull` and `Along`. Their derivatives of any order are composed of each other and of matrix
products, also under torch.func.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SAFE_NORMS = 32.0  # squared norms in squared bandwidths, below which every distance is accurate enough
NEAR = 1 / 64  # squared distances above this fraction of the squared norms are accurate
LARGEST_NORMS = 1e30  # above this, products may overflow
FARTHEST = 1e36  # largest squared distance; finite, so that a kernel value of 0 times it is 0


def kernels(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """(k, k - 1), k = exp(exponents), both with a small relative error and differentiable: (k - 1) + 1 would leave no
    digits of a small k, nor would the derivative of expm1."""
    near = exponents > -1
    e, k = exponents.expm1(), exponents.exp()
    return torch.where(near, e + 1, k), torch.where(near, e, k - 1)


class Points(NamedTuple):
    """Rows in units of a bandwidth, [*, n, D]: as given and centred; and the squared norms of the centred rows, [*,
    n]."""

    given: Tensor
    about: Tensor
    norms: Tensor

    def rows(self, part: slice) -> Points:
        return Points(self.given[..., part, :], self.about[..., part, :], self.norms[..., part])


def units(bandwidth: Tensor) -> tuple[Tensor, Tensor]:
    """For bandwidths [*, K], returns 1 / unit [*] and gamma [*, K] for samples in that unit.

    The unit is the largest power of two that does not exceed the smallest bandwidth. Scaling by it is exact, and
    squares neither overflow nor underflow. Bandwidths of 0, infinity and NaN give NaN.
    """
    smallest = bandwidth.detach().amin(-1)
    scale = 2 * smallest.frexp().mantissa / smallest
    return scale, 0.5 / (bandwidth * scale[..., None]).square()


def points(scale: Tensor, *samples: Tensor) -> list[Points]:
    """Samples [*, n, D] times scale [*], centred about their common mean."""
    given = [t * scale[..., None, None] for t in samples]
    return about_mean(*given)


def about_mean(*samples: Tensor) -> list[Points]:
    total = sum(t.sum(-2, keepdim=True) for t in samples)
    centre = total / sum(t.shape[-2] for t in samples)
    about = [t - centre for t in samples]
    return [Points(t, c, c.square().sum(-1)) for t, c in zip(samples, about, strict=True)]


def squared(a: Points, b: Points, first: int | None = None) -> tuple[Tensor, bool]:
    """|a_i - b_j|^2, [*, rows, N], and whether they were computed from differences; exactly 0 for equal rows. If
    `first` is given, a consists of the rows first, first + 1, ... of b."""
    norms = a.norms[..., None] + b.norms[..., None, :]
    distance = norms - 2 * (a.about @ b.about.mT)
    own = None if first is None else _own(distance, first)
    if not a.given.is_cpu or _any_near(a, b, norms, distance, own):
        exact = torch.cdist(a.given, b.given, compute_mode="donot_use_mm_for_euclid_dist")
        return exact.square_().clamp_(max=FARTHEST), True
    distance = torch.where(distance <= 4 * torch.finfo(distance.dtype).eps * norms, 0, distance)
    return distance if own is None else distance.masked_fill_(own, 0), False


def _own(like: Tensor, first: int) -> Tensor:
    """A mask [rows, N] of the pairs of a row with itself."""
    rows = torch.arange(like.shape[-2], device=like.device)
    own = torch.zeros(like.shape[-2:], dtype=torch.bool, device=like.device)
    own[rows, rows + first] = True
    return own


def _any_near(a: Points, b: Points, norms: Tensor, distance: Tensor, own: Tensor | None) -> bool:
    reach = (a.norms.max() + b.norms.max()).item() if norms.numel() else 0.0
    if reach <= SAFE_NORMS:
        return False
    if not reach <= LARGEST_NORMS:
        return True
    near = (norms > SAFE_NORMS) & (distance < NEAR * norms)
    return bool((near if own is None else near & ~own).any())


def without_own(weight: Tensor, first: int) -> Tensor:
    """Sets weights [*, rows, N] to 0 in place for pairs of a row with itself, where a distant row would leave a
    rounding error."""
    weight.diagonal(first, -2, -1).zero_()
    return weight


def pull(weight: Tensor, a: Points, b: Points, direct: bool) -> Tensor:
    """sum_j weight_ij (a_i - b_j), [*, rows, D]; `direct` is the flag of `squared`. A weight of 0 adds 0 at any
    distance."""
    if not direct:
        return weight.sum(-1, keepdim=True) * a.about - weight @ b.about
    out = torch.empty_like(a.given)
    for d in range(out.shape[-1]):
        step = weight * (a.given[..., d, None] - b.given[..., None, :, d])
        out[..., d] = torch.where(weight == 0, 0, step).sum(-1)
    return out


def apart(a: Tensor, b: Tensor, own: bool = False) -> Tensor:
    """|a_i - b_j|^2, [*, B, N], differentiable any number of times; `own` means that b is a."""
    found: Tensor = Apart.apply(a, b, own)
    return found


def _leading(size: int, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    ]


def _total(*terms: Tensor | None) -> Tensor | None:
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])


class Apart(torch.autograd.Function):
    """(a, b) -> |a_i - b_j|^2."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, own: bool) -> Tensor:
        of_a, of_b = about_mean(a, b)
        return squared(of_a, of_b, 0 if own else None)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.own = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        if ctx.own:
            g = g.masked_fill(_own(g, 0), 0)
        return 2 * Pull.apply(g, a, b), 2 * Pull.apply(g.mT, b, a), None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], a: Tensor, b: Tensor, own: bool) -> tuple[Tensor, int]:
        return Apart.apply(*_leading(info.batch_size, dims[:2], (a, b)), own), 0

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, _: None) -> Tensor | None:
        a, b = ctx.saved_tensors
        of_a = None if da is None else 2 * Along.apply(da, a, b)
        of_b = None if db is None else 2 * Along.apply(db, b, a).mT
        return _total(of_a, of_b)


class Pull(_Bilinear):
    """(weight, a, b) -> sum_j weight_ij (a_i - b_j)."""

    @staticmethod
    def forward(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        of_a, of_b = about_mean(a, b)
        return pull(weight, of_a, of_b, squared(of_a, of_b)[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, a, b = ctx.saved_tensors
        return Along.apply(g, a, b), weight.sum(-1, keepdim=True) * g, -(weight.mT @ g)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return Pull.apply(*_leading(info.batch_size, dims, tensors)), 0

    @staticmethod
    def jvp(ctx: Any, d_weight: Tensor | None, da: Tensor | None, db: Tensor | None) -> Tensor | None:
        weight, a, b = ctx.saved_tensors
        return _total(
            None if d_weight is None else Pull.apply(d_weight, a, b),
            None if da is None else weight.sum(-1, keepdim=True) * da,
            None if db is None else -(weight @ db),
        )


class Along(_Bilinear):
    """(direction, a, b) -> <direction_i, a_i - b_j>. Products with distant rows use fp64."""

    @staticmethod
    def forward(direction: Tensor, a: Tensor, b: Tensor) -> Tensor:
        of_a, of_b = about_mean(a.double(), b.double())
        v = direction.double()
        return ((v * of_a.about).sum(-1, keepdim=True) - v @ of_b.about.mT).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        direction, a, b = ctx.saved_tensors
        return Pull.apply(g, a, b), g.sum(-1, keepdim=True) * direction, -(g.mT @ direction)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return Along.apply(*_leading(info.batch_size, dims, tensors)), 0

    @staticmethod
    def jvp(ctx: Any, dv: Tensor | None, da: Tensor | None, db: Tensor | None) -> Tensor | None:
        direction, a, b = ctx.saved_tensors
        return _total(
            None if dv is None else Along.apply(dv, a, b),
            None if da is None else (direction * da).sum(-1, keepdim=True).expand(*a.shape[:-1], b.shape[-2]),
            None if db is None else -(direction @ db.mT),
        )
