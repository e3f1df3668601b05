"""Strategy that draws calls of the drop-ins of mi_kernels.compat: shapes, dtypes, strides and options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mi_kernels.compat import club, factorcl, info_nce, lightly, open_clip, smile, supcontrast
from mi_kernels.compat._mlp import pair_scores
from mi_kernels.compat.pytorch_metric_learning import losses as metric_learning
from tests.hardening import oracle
from tests.hardening.operators import BATCH, WIDTH, Call, Draw, Tensors, terms_of_pairs

# The function, the settings that a failure prints, and t of oracle.py if needed.
Terms = Callable[[], list[float]]
Made = tuple[oracle.Function, dict[str, Any]] | tuple[oracle.Function, dict[str, Any], Terms]
# At least two features: a row of one feature is normalised to its sign, so that its gradient cancels to 0.
FEATURES = WIDTH.map(lambda width: max(width, 2))
TEMPERATURE = st.sampled_from([0.1, 0.5, 1.0])
SEVERAL = BATCH.map(lambda batch: max(batch, 2))


def _info_nce(draw: Draw, make: Tensors) -> Made:
    batch, width, mode = draw(BATCH), draw(FEATURES), draw(st.sampled_from([None, "unpaired", "paired"]))
    settings = {"temperature": draw(TEMPERATURE), "reduction": draw(st.sampled_from(["mean", "none", "sum"]))}
    for _ in range(2):
        make(batch, width, size=1.0)
    if mode:
        settings["negative_mode"] = mode
        make(*((batch,) if mode == "paired" else ()), draw(st.integers(1, 9)), width, size=1.0)
    return info_nce.InfoNCE(**settings), settings


def _open_clip(draw: Draw, make: Tensors) -> Made:
    batch, width = draw(BATCH), draw(WIDTH)
    name = draw(st.sampled_from(["ClipLoss", "SigLipLoss", "DistillClipLoss", "fused_linear_cross_entropy"]))
    for _ in range(2):
        make(batch, width, size=width**-0.5)
    if name == "fused_linear_cross_entropy":
        target = torch.randint(0, batch, (batch,), generator=make.generator)
        make(batch, size=1.0)
        fused: oracle.Function = lambda h, w, b: open_clip.fused_linear_cross_entropy(h, w, target, b, chunk_size=7)  # noqa: E731
        return fused, {"name": name}
    if name == "DistillClipLoss":
        for _ in range(2):
            make(batch, width, size=width**-0.5)
        learnt = draw(st.booleans())
        distill = open_clip.DistillClipLoss()
        teacher = lambda t: t if learnt else t.detach()  # noqa: E731
        return lambda x, y, u, v: distill(x, y, 3.0, teacher(u), teacher(v), 2.0), {"name": name, "learnt": learnt}
    loss, rest = getattr(open_clip, name)(), (3.0, -1.0) if name == "SigLipLoss" else (3.0,)
    return lambda x, y: loss(x, y, *(torch.tensor(r, dtype=x.dtype) for r in rest)), {"name": name}


def _lightly(draw: Draw, make: Tensors) -> Made:
    name, temperature = draw(st.sampled_from(["NTXentLoss", "DCLLoss", "DCLWLoss"])), draw(TEMPERATURE)
    shape = (draw(SEVERAL), draw(FEATURES))
    for _ in range(2):
        make(*shape, size=1.0)
    return getattr(lightly, name)(temperature), {"name": name, "temperature": temperature}


def _metric_learning(draw: Draw, make: Tensors) -> Made:
    name, temperature = draw(st.sampled_from(["NTXentLoss", "SupConLoss"])), draw(TEMPERATURE)
    batch, width = draw(SEVERAL), draw(FEATURES)
    labelled = lambda n: torch.randint(0, max(2, n // 3), (n,), generator=make.generator)  # noqa: E731
    labels, kind = labelled(batch), draw(st.sampled_from(["labels", "twins", "ref_emb", "triplets"]))
    loss, settings = getattr(metric_learning, name)(temperature), {"name": name, "kind": kind}
    make(batch, width, size=1.0)
    if kind == "twins":
        make(batch, width, size=1.0)
        return lambda x, y: loss(torch.cat([x, y]), torch.arange(batch).repeat(2)), settings
    if kind == "ref_emb":
        others = draw(SEVERAL)
        make(others, width, size=1.0)
        ref_labels = labelled(others)
        return lambda x, y: loss(x, labels, ref_emb=y, ref_labels=ref_labels), settings
    if kind == "triplets":
        anchor, positive = (torch.arange(batch), torch.arange(batch).roll(1))
        listed = (anchor, positive, torch.arange(batch).roll(2)) if batch > 2 else None
        return lambda x: loss(x, labels, indices_tuple=listed), settings
    return lambda x: loss(x, labels), settings


def _supcontrast(draw: Draw, make: Tensors) -> Made:
    batch, views, mode = draw(SEVERAL), draw(st.integers(2, 3)), draw(st.sampled_from(["all", "one"]))
    labels = torch.randint(0, max(1, batch // 2), (batch,), generator=make.generator)
    kind, width = draw(st.sampled_from(["labels", "mask", "plain"])), draw(FEATURES)
    given = {"labels": labels} if kind == "labels" else {"mask": labels[:, None] == labels} if kind == "mask" else {}
    loss = supcontrast.SupConLoss(0.5, mode, 0.5)
    make(batch, views, width, size=width**-0.5)
    return lambda features: loss(features, **given), {"mode": mode, "kind": kind}


def _module(make: Tensors, module: torch.nn.Module, run: Callable[[Any, Tensor, Tensor], Tensor]) -> oracle.Function:
    """Calls run(module, x, y) with weights rounded to the call's dtype and then converted to that of x."""
    module = module.to(make.dtype)

    def function(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(0)  # some modules draw a permutation
        if x.dtype == torch.bfloat16:  # torch's matrix product reads beyond rows of odd length
            x, y = x.contiguous(), y.contiguous()
        return run(copy.deepcopy(module).to(x.dtype), x, y)

    return function


def _club(draw: Draw, make: Tensors) -> Made:
    names = ["CLUB", "CLUBMean", "CLUBSample", "NWJ", "InfoNCE", "L1OutUB", "VarUB", "MINE"]
    name, batch, widths = draw(st.sampled_from(names)), draw(SEVERAL), (draw(WIDTH), draw(WIDTH))
    for width in widths:
        make(batch, width, size=1.0)
    torch.manual_seed(make.generator.initial_seed() % 2**32)
    return _module(make, getattr(club, name)(*widths, 8), lambda m, x, y: m(x, y)), {"name": name}


def _factorcl(draw: Draw, make: Tensors) -> Made:
    name, batch, widths = draw(st.sampled_from(["InfoNCECritic", "CLUBInfoNCECritic"])), draw(SEVERAL), (4, 5)
    for width in widths:
        make(batch, width, size=1.0)
    torch.manual_seed(make.generator.initial_seed() % 2**32)
    layers = draw(st.integers(1, 2))
    critic = getattr(factorcl, name)(*widths, 9, layers, "relu")

    def scores(x: Tensor, y: Tensor) -> Tensor:
        network = copy.deepcopy(critic).double()._f
        if name == "InfoNCECritic":  # every y is compared with all x
            return pair_scores(network, x, y).mT
        return pair_scores(network, y, x)

    bound = {"InfoNCECritic": "infonce", "CLUBInfoNCECritic": "nce_club"}[name]
    terms = partial(terms_of_pairs, scores, bound, make.made)
    return _module(make, critic, lambda m, x, y: m(x, y)), {"name": name, "layers": layers}, terms


def _smile(draw: Draw, make: Tensors) -> Made:
    batch, width = draw(SEVERAL), draw(st.integers(1, 9))
    estimator = draw(st.sampled_from(["infonce", "nwj", "js", "dv", "smile"]))
    for _ in range(2):
        make(batch, width, size=1.0)
    torch.manual_seed(make.generator.initial_seed() % 2**32)
    kind = draw(st.sampled_from(["concat", "separable"]))
    sizes = (width, 9, 2, "relu") if kind == "concat" else (width, 9, 5, 2, "relu")
    critic = {"concat": smile.ConcatCritic, "separable": smile.SeparableCritic}[kind](*sizes)
    estimate = lambda m, x, y: smile.estimate_mutual_information(estimator, x, y, m)  # noqa: E731
    return _module(make, critic, estimate), {"estimator": estimator, "critic": kind}


LIBRARIES: dict[str, Callable[[Draw, Tensors], Made]] = {
    "info_nce": _info_nce,
    "open_clip": _open_clip,
    "lightly": _lightly,
    "pytorch_metric_learning": _metric_learning,
    "supcontrast": _supcontrast,
    "club": _club,
    "factorcl": _factorcl,
    "smile": _smile,
}


@st.composite
def dropins(draw: Draw) -> Call:
    make, library = Tensors(draw), draw(st.sampled_from(list(LIBRARIES)))
    function, settings, *terms = LIBRARIES[library](draw, make)
    # Bounds with networks are differences of means of size log B, even if the result is near 0.
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    # The others are differences of cosines divided by temperatures of at least 0.1. With a single candidate they cancel
    # exactly, but the fp64 reference is off by the rounding of a score.
    floor = oracle.unit(wide) if library in ("club", "factorcl", "smile") else 10 * oracle.unit(torch.float64)
    return Call(library, settings, function, make.made, floor, *terms)
