"""Strategies that draw calls of every public operator: shapes, dtypes, strides and magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import mi_kernels as mk
from mi_kernels.bounds import registry
from mi_kernels.ops.club.api import gaussian_club
from tests.hardening import oracle

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Call(NamedTuple):
    """A drawn call; a failure prints the operator, its settings and its tensors' shapes."""

    name: str
    settings: dict[str, Any]
    function: oracle.Function
    tensors: list[Tensor]
    floor: float = 0.0
    terms_of_gradients: Callable[[], list[float]] | None = None

    def __repr__(self) -> str:
        kinds = ", ".join(f"{t.dtype} {list(t.shape)} strides {t.stride()}" for t in self.tensors)
        return f"{self.name}({self.settings}) of {kinds}"


GROUPS = st.sampled_from([(), (), (1,), (2,), (2, 2), (3, 1, 2)])
BATCH = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 65]))
WIDTH = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 65, 130]))
SIZE = st.sampled_from([1e-3, 0.1, 1.0, 1.0, 1.0, 4.0])


class Tensors:
    """Draws tensors of one dtype. Values come from a drawn seed, so that Hypothesis shrinks only shapes, not values."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.dtype = draw(st.sampled_from(oracle.DTYPES))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        self.made: list[Tensor] = []

    def __call__(self, *shape: int, size: float | None = None) -> Tensor:
        size = self.draw(SIZE) if size is None else size
        values = size * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.draw(st.sampled_from((*oracle.STRIDES, *(oracle.EXPANDED,) * (len(shape) > 2))))
        if kind == oracle.EXPANDED:  # groups or items that share their values
            self.made.append(values[:1].to(self.dtype).expand(shape))
        else:
            self.made.append(oracle.strided(values.to(self.dtype), kind))
        return self.made[-1]

    def lengths(self, batch: int, most: int, least: int = 0) -> Tensor | None:
        if not self.draw(st.booleans()):
            return None
        return torch.randint(least, most + 1, (batch,), generator=self.generator)


@st.composite
def dot_losses(draw: Draw) -> Call:
    make, groups, batch, width = Tensors(draw), draw(GROUPS), draw(BATCH), draw(WIDTH)
    name = draw(st.sampled_from(["info_nce", "clip_loss", "siglip_loss", "nt_xent", "sup_con"]))
    settings: dict[str, Any] = {}
    if name == "info_nce":
        settings = {
            "symmetric": draw(st.booleans()),
            "normalize": draw(st.booleans()),
            "temperature": draw(st.sampled_from([0.1, 1.0])),
            "reduction": draw(st.sampled_from(["mean", "none"])),
        }
        function: oracle.Function = partial(mk.info_nce, **settings)
    elif name == "sup_con":
        groups, batch = (), max(batch, 2)
        labels = torch.randint(0, max(batch // 2, 1), (batch,), generator=make.generator)
        function = lambda x, y: mk.sup_con(torch.stack([x, y], 1), labels, temperature=0.5)  # noqa: E731
    elif name == "nt_xent":
        function = mk.nt_xent
    else:
        extra = (3.0, -1.0) if name == "siglip_loss" else (3.0,)
        function = lambda x, y: getattr(mk, name)(x, y, *extra)  # noqa: E731
    size, normalized = draw(st.sampled_from([0.3, 1.0])), bool(settings.get("normalize")) or name == "nt_xent"
    for _ in range(2):
        make(*groups, batch, width, size=size / (1 if normalized else width**0.5))
    # A loss is a difference of scores, and the reference computes positive scores in a product of their own. If scores
    # cancel exactly, as for a single candidate, the fp64 rounding of a score remains.
    longest = [1.0, 1.0] if normalized else [float(t.double().norm(dim=-1).max()) for t in make.made]
    floor = oracle.unit(torch.float64) * longest[0] * longest[1] * max(3.0, 1 / settings.get("temperature", 1.0))
    if normalized and width == 1:  # a row is normalised to its sign: terms of size 10 / |x| cancel to 0
        floor = oracle.unit(torch.float64 if make.dtype == torch.float64 else torch.float32)
        floor *= 10 / min(float(t.double().abs().min().clamp(min=1e-3)) for t in make.made)
    return Call(name, settings, function, make.made, floor)


@st.composite
def dot_bounds(draw: Draw) -> Call:
    make, batch, width = Tensors(draw), draw(BATCH), draw(WIDTH)
    batch, groups = max(batch, 2), draw(GROUPS)
    name = draw(st.sampled_from(["infonce", "nwj", "tuba", "dv", "js", "smile", "interpolated", "nce_club"]))
    bound = registry.find(name).bound(mk.DotCritic(1.0, normalize=False))
    for _ in range(2):
        make(*groups, batch, width, size=width**-0.25)
    return Call(name, {}, bound, make.made)


@st.composite
def concat_bounds(draw: Draw) -> Call:
    make, batch = Tensors(draw), draw(st.integers(1, 20))
    dims, hidden = (draw(WIDTH), draw(WIDTH)), draw(st.sampled_from([(1,), (8,), (33,), (5, 7), (16, 16), (33, 20)]))
    name = draw(st.sampled_from(["infonce", "nwj", "dv", "nce_club"]))
    bound = registry.find(name).bound(mk.ConcatCritic(*dims, hidden))
    weights = {key: t.detach() for key, t in bound.named_parameters()}
    for dim in dims:
        make(max(batch, 2), dim, size=1.0)
    for t in weights.values():
        make(*t.shape, size=(t.shape[-1] if t.dim() > 1 else 4.0) ** -0.5)

    def function(x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(bound, dict(zip(weights, parameters, strict=True)), (x, y))

    # The last bias's gradient is a difference: the score gradients of positives and of negatives each sum to 1.
    floor = oracle.unit(torch.float64 if make.dtype == torch.float64 else torch.float32)
    terms = partial(_terms_of_pairs, bound, name, list(weights), make.made)
    return Call(name, {"dims": dims, "hidden": hidden}, function, make.made, floor, terms)


def _terms_of_pairs(bound: torch.nn.Module, name: str, names: list[str], tensors: list[Tensor]) -> list[float]:
    def scores(x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        named = {key.removeprefix("critic."): t for key, t in zip(names, parameters, strict=True)}
        found: Tensor = torch.func.functional_call(bound.critic, named, (x, y))
        return found

    return terms_of_pairs(scores, name, tensors)


def terms_of_pairs(scores_of: Callable[..., Tensor], name: str, tensors: list[Tensor]) -> list[float]:
    """t of oracle.py for each gradient of a bound with S = scores_of(*tensors): sum over pairs of |dS_ij| |dS_ij / dt|.

    If all hidden units are active or inactive alike on two pairs, the gradient of an input is a vector times the sum of
    the pairs' dS, which is exactly 0 if the bound ignores shifts. Plain torch rounds dS = q and dS = -q alike, so that
    they cancel; the CPU kernel rounds each up or down by a fixed pattern (docs/ops/mlp-critic.md)."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    with mk.use_backend("reference"):
        scores = scores_of(*leaves)
        given = scores.detach().requires_grad_()
        eye = torch.eye(scores.shape[-1], dtype=torch.float64)
        value = registry.find(name).bound(mk.DotCritic(1.0, normalize=False))(given, eye)
        (slopes,) = torch.autograd.grad(value, given)
    sizes = [0.0] * len(leaves)
    for score, slope in zip(scores.flatten(), slopes.abs().flatten().tolist(), strict=True):
        found = torch.autograd.grad(score, leaves, retain_graph=True, allow_unused=True)
        sizes = [s + (0.0 if g is None else slope * float(g.norm())) for s, g in zip(sizes, found, strict=True)]
    return sizes


@st.composite
def club(draw: Draw) -> Call:
    make, groups, batch, width = Tensors(draw), draw(GROUPS), max(draw(BATCH), 2), draw(WIDTH)
    negatives, variances = draw(st.sampled_from(["all", "others"])), draw(st.booleans())
    make(*groups, batch, width)
    make(*groups, batch, width)
    if variances:
        make(*groups, batch, width, size=0.5)
    function = lambda mu, y, logvar=None: gaussian_club(mu, logvar, y, negatives=negatives)  # noqa: E731
    # The loss multiplies m = mu - mean(y) by c = y - mean(y). As sum_i c_i = 0, what all m_i have in common cancels.
    mu, y, *logvar = (t.double() for t in make.made)
    centre = y.mean(-2, keepdim=True)
    terms = 2 * ((mu - centre) * (y - centre)).abs()
    if logvar:
        squares = (y - centre).square()
        terms = (terms + squares + squares.mean(-2, keepdim=True)) * (-logvar[0]).exp()
    floor = oracle.unit(torch.float64 if make.dtype == torch.float64 else torch.float32)
    floor *= float(terms.sum((-2, -1)).max()) / (2 * max(batch - 1, 1))
    return Call("gaussian_club", {"negatives": negatives}, function, make.made, floor)


@st.composite
def kernels(draw: Draw) -> Call:
    make, groups, batch, width = Tensors(draw), draw(GROUPS), max(draw(BATCH), 2), draw(WIDTH)
    name = draw(st.sampled_from(["mmd", "gaussian_mmd", "hsic"]))
    settings: dict[str, Any] = {"bandwidth": draw(st.sampled_from([0.5, 2.0]))}
    make(*groups, batch, width, size=1.0)
    if name == "mmd":
        settings["estimator"] = draw(st.sampled_from(["biased", "unbiased"]))
        make(*groups, max(draw(BATCH), 2), width, size=1.0)
    elif name == "hsic":
        settings["normalized"] = draw(st.booleans())
        make(*groups, batch, draw(WIDTH), size=1.0)
    # Kernel values are at most 1, their derivatives at most 1 / bandwidth. Sums in fp64 round by its unit; for 16- and
    # 32-bit inputs the promised accuracy is 1e-9: five digits of a value of 1e-4.
    of_kernel = oracle.unit(torch.float64) if make.dtype == torch.float64 else 1e-9
    floor = of_kernel * (1 + 1 / settings["bandwidth"])
    if settings.get("normalized"):
        floor += _of_a_ratio(*make.made, settings["bandwidth"])
    return Call(name, settings, partial(getattr(mk, name), **settings), make.made, floor)


def _of_a_ratio(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """f of oracle.py for h / sqrt(a b), where h, a and b are the HSICs of (x, y), (x, x) and (y, y).

    Value: each HSIC is a difference of fp64 sums of products of e = k - 1, so its relative error is the unit of fp64
    times mean(e^2) B^2 / tr(EHEH). Gradient: the sum of the gradients of the three logarithms, which cancel to 0 if
    there are two rows.
    """
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    accumulated = oracle.unit(torch.float64 if x.dtype == torch.float64 else torch.float32)
    floor = 0.0
    with mk.use_backend("reference"):
        for pair in ((wide[0], wide[1]), (wide[0], wide[0]), (wide[1], wide[1])):
            h = mk.hsic(*pair, bandwidth=bandwidth, normalized=False)
            gradients = torch.autograd.grad(h.log().sum(), list(pair[: 1 + (pair[0] is not pair[1])]))
            floor = max(floor, accumulated * max(float(g.norm()) for g in gradients))
            e = [torch.expm1(torch.cdist(t, t).square() / (-2 * bandwidth**2)) for t in (p.detach() for p in pair)]
            floor = max(floor, oracle.unit(torch.float64) * float(((e[0] * e[1]).mean((-2, -1)) / h.detach()).max()))
    return floor if math.isfinite(floor) else 0.0


@st.composite
def attention(draw: Draw) -> Call:
    make, batch, heads = Tensors(draw), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys, width, out = draw(BATCH), draw(BATCH), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    settings = {
        "normalizer": draw(st.sampled_from(["softmax", "softmax", "sparsemax"])),
        "causal_offset": draw(st.sampled_from([None, 0, 1, 5])),
        "dropout_p": draw(st.sampled_from([0.0, 0.3])),
        "query_lengths": make.lengths(batch, queries),
        "key_lengths": make.lengths(batch, keys),
        "seed": 7,
    }
    for shape in ((queries, width), (keys, width), (keys, out)):
        make(batch, heads, *shape, size=1.0)
    return Call("cross_attention", settings, partial(mk.cross_attention, **settings), make.made)


@st.composite
def lstms(draw: Draw) -> Call:
    make, batch, steps = Tensors(draw), draw(BATCH), draw(st.integers(1, 7))
    hidden, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    lead = draw(st.sampled_from([(), (), (2,)]))
    name = draw(st.sampled_from(["lstm", "lstm_scan", "lstm_decode"]))
    weight = {"size": hidden**-0.5}
    if name == "lstm_decode":
        make(*lead, batch, hidden, size=1.0)
        for _ in range(2):
            make(*lead, 4 * hidden, hidden, **weight)
        make(*lead, 4 * hidden, size=0.3)
        decode: oracle.Function = lambda code, a, b, bias: mk.lstm_decode(code, a, b, bias, None, steps)  # noqa: E731
        return Call(name, {"steps": steps}, decode, make.made)
    lengths = make.lengths(batch, steps) if not lead else None
    if name == "lstm":
        make(*lead, batch, steps, width, size=1.0)
        make(*lead, 4 * hidden, width, size=width**-0.5)
    else:
        make(*lead, batch, steps, 4 * hidden, size=1.0)
    make(*lead, 4 * hidden, hidden, **weight)
    make(*lead, 4 * hidden, size=0.3)
    if name == "lstm":
        make(*lead, 4 * hidden, size=0.3)
    for _ in range(2):
        make(*lead, batch, hidden, size=1.0)
    return Call(name, {"lengths": lengths}, partial(getattr(mk, name), lengths=lengths), make.made)


OPERATORS = {
    "losses": dot_losses(),
    "bounds over inner products": dot_bounds(),
    "bounds over concat critics": concat_bounds(),
    "Gaussian CLUB": club(),
    "MMD and HSIC": kernels(),
    "attention": attention(),
    "LSTM scans": lstms(),
}
