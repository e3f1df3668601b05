"""The cases for `python -m bench compare` and pytest-benchmark: every operator, loss, bound, layer and training step.

A case has a name, `kind/what`, and a function that prepares the data and returns one step: forward, backward and, for
training steps, the optimiser. Cases use only public names of mi_kernels and models, so that they also run on the code
of other checkouts. Sizes are those of typical batches; a step takes a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mi_kernels as mk

Step = Callable[[], Any]
BATCH, WIDTH = 256, 128
# Settings of the four systems (and MulT, which two of them compare with) at the size of a small published run.
SYSTEMS: dict[str, dict[str, Any]] = {
    "factorcl-sup": {"encoder": {"hidden": 128, "out_dim": 64}, "critic_hidden": 128},
    "factorcl-ssl": {"encoder": {"hidden": 128, "out_dim": 64}, "critic_hidden": 128},
    "mfm": {},
    "mird": {"agnostic": "transformer", "language": "lstm"},
    "mdm": {"base": {"name": "mfn"}},
    "mult": {},
}


def _leaves(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _backward(function: Callable[..., Any], leaves: Sequence[Tensor], module: nn.Module | None = None) -> Step:
    """One forward and backward pass; gradients of the leaves and of the module's parameters."""
    wanted = [*leaves, *(module.parameters() if module is not None else ())]

    def step() -> None:
        found = function(*leaves)
        first = found if isinstance(found, Tensor) else found[0]
        torch.autograd.grad(first.sum(), wanted, allow_unused=True)

    return step


def _loss(name: str, batch: int = BATCH, width: int = WIDTH) -> Step:
    x, y = _leaves((batch, width), (batch, width))
    labels = torch.arange(batch) % 20
    bank = mk.MemoryBank(4 * batch, width)
    bank.enqueue(torch.randn(4 * batch, width))
    return _backward({
        "info_nce": mk.info_nce,
        "info_nce symmetric": partial(mk.info_nce, symmetric=True),
        "info_nce rows": partial(mk.info_nce, reduction="none"),
        "info_nce MemoryBank": lambda a, b: mk.info_nce(a, b, negative_keys=bank.negatives()),
        "clip_loss": lambda a, b: mk.clip_loss(a, b, 0.1),
        "siglip_loss": lambda a, b: mk.siglip_loss(a, b, 0.1, -1.0),
        "nt_xent": mk.nt_xent,
        "sup_con": lambda a, b: mk.sup_con(torch.stack([a, b], 1), labels),
        "mmd": mk.mmd,
        "gaussian_mmd": lambda a, b: mk.gaussian_mmd(a),
        "hsic": mk.hsic,
    }[name], [x, y])  # fmt: skip


LOSSES = ("info_nce", "info_nce symmetric", "info_nce rows", "info_nce MemoryBank", "clip_loss", "siglip_loss",
          "nt_xent", "sup_con", "mmd", "gaussian_mmd", "hsic")  # fmt: skip


def _bound(name: str, critic: str) -> Step:
    torch.manual_seed(0)
    x, y = _leaves((128, 64), (128, 64))
    critics: dict[str, Callable[[], nn.Module]] = {
        "dot": lambda: mk.DotCritic(1.0),
        "bilinear": lambda: mk.BilinearCritic(64, 64),
        "concat": lambda: mk.ConcatCritic(64, 64, (128, 128)),
        "separable": lambda: mk.SeparableCritic(64, 64, (128,), 32),
        "joint": lambda: mk.JointCritic(128, (128, 128)),
    }
    if name == "CLUBCategorical":
        classes = mk.CLUBCategorical(64, 20, 128)
        return _backward(lambda a: classes(a, torch.arange(len(a)) % 20), [x], classes)
    bound = getattr(mk, name)(critics[critic]()) if critic else getattr(mk, name)(64, 64, 128)
    return _backward(bound, [x, y], bound)


WITH_A_CRITIC = ("InfoNCE", "NWJ", "TUBA", "DonskerVaradhan", "MINE", "JensenShannon", "SMILE", "InterpolatedBound",
                 "NCECLUB", "WassersteinDependency")  # fmt: skip
OF_A_DENSITY = ("CLUB", "CLUBSample", "CLUBMean", "CLUBCategorical", "LeaveOneOut", "VariationalUpperBound",
                "BarberAgakov")  # fmt: skip
BOUNDS = (
    *((name, "dot") for name in WITH_A_CRITIC),
    ("InfoNCE", "bilinear"),
    ("InfoNCE", "concat"),
    ("NWJ", "concat"),
    ("InfoNCE", "separable"),
    ("TotalCorrelation", "joint"),
    *((name, "") for name in OF_A_DENSITY),
)


def _attention(normalizer: str, steps: int = 64) -> Step:
    q, k, v = _leaves(*((16, 8, steps, 8),) * 3)
    return _backward(partial(mk.cross_attention, normalizer=normalizer), [q, k, v])


def _attention_grouped() -> Step:
    """Two pairs of sequences of unlike lengths in one call: each attends to the other."""
    queries = _leaves(*((16, 8, steps, 8) for steps in (20, 64)))
    keys, values = (_leaves(*((16, 8, steps, 8) for steps in (64, 20)), seed=seed) for seed in (1, 2))
    grouped = lambda *t: mk.cross_attention_grouped(t[:2], t[2:4], t[4:])  # noqa: E731
    return _backward(grouped, [*queries, *keys, *values])


def _lstm(name: str, batch: int = 32, steps: int = 50, hidden: int = 64) -> Step:
    gates, x, w_ih, w_hh, code = _leaves(
        (batch, steps, 4 * hidden), (batch, steps, hidden), (4 * hidden, hidden), (4 * hidden, hidden), (batch, hidden)
    )
    if name == "lstm":
        return _backward(mk.lstm, [x, w_ih.detach().mul(0.1).requires_grad_(), w_hh])
    if name == "lstm_scan":
        return _backward(mk.lstm_scan, [gates, w_hh])
    return _backward(lambda c, a, b: mk.lstm_decode(c, a, b, None, None, steps), [code, w_ih, w_hh])


def _layer(name: str) -> Step:
    from models import layers
    from models.batch import Inputs

    torch.manual_seed(0)
    dims, batch, steps = (300, 5, 20), 16, 20
    series = _leaves(*((batch, steps, dim) for dim in dims))
    if name == "lmf":
        vectors, model = _leaves((256, 32), (256, 16), (256, 64)), layers.LowRankFusion((32, 16, 64), 64, 4)
        return _backward(model, vectors, model)
    if name == "lstm decoder":
        code, decoder = _leaves((batch, 64)), layers.LSTMDecoder(64, 33)
        return _backward(lambda c: decoder(c, steps), code, decoder)
    alone = {
        "lstm encoder": lambda: layers.LSTMEncoder(300, 64, 64),
        "transformer": lambda: layers.TransformerEncoder(300, 64, 64, heads=8),
    }
    together = {
        "mult": lambda: layers.MulT(dims, 1),
        "mfn": lambda: layers.MFN(dims),
        "ef-lstm": lambda: layers.EFLSTM(dims),
        "mag": lambda: layers.AdaptationGate(300, dims[1:]),
        "word shift": lambda: layers.WordShift(300, dims[1:]),
    }
    layer = (alone | together)[name]().eval()
    leaves = series[:1] if name in alone else series
    return _backward(lambda *t: layer(*(Inputs(values) for values in t)), leaves, layer)


LAYERS = ("mult", "mfn", "ef-lstm", "lstm encoder", "lstm decoder", "transformer", "lmf", "mag", "word shift")


def data_for(system: str, rows: int = 64) -> Any:
    """Random rows in the shapes of MOSI's aligned features; two views of vectors with classes for FactorCL."""
    from models.batch import Target
    from models.data import Dataset, Modality

    generator = torch.Generator().manual_seed(0)
    split = torch.arange(rows) % 5 // 3
    if system.startswith("factorcl"):
        views = (Modality(name, torch.randn(rows, 100, generator=generator)) for name in ("x1", "x2"))
        return Dataset("bench", tuple(views), torch.arange(rows) % 2, Target.classes(2), split)
    steps = 20
    ends = torch.arange(rows + 1) * steps
    series = (
        Modality(name, torch.randn(rows * steps, dim, generator=generator), ends)
        for name, dim in (("text", 300), ("audio", 5), ("visual", 20))
    )
    return Dataset("bench", tuple(series), torch.randn(rows, generator=generator), Target.regression(), split)


def training(system: str, rows: int = 64) -> tuple[Any, Step]:
    """A model and one step of its training: every phase with its optimiser, as models/training runs them."""
    from models import registry
    from models.settings import from_dict
    from models.training.phases import Training, frozen

    data = data_for(system, rows)
    tree = {"model": {"name": system} | SYSTEMS[system], "data": {"name": "synthetic"}, "training": {}}
    config = from_dict(tree)
    model = registry.build(system, config.model, data, seed=0)
    model.train()
    trainer = Training(model, data, config.training)
    batch = data.batch(torch.arange(rows))
    if model.views:
        batch = batch._replace(views=tuple(batch.inputs for _ in range(model.views)))
    phases = list(zip(trainer.phases, trainer.configure_optimizers(), strict=True))

    def step() -> None:
        for phase, optimizer in phases:
            mine = {id(parameter) for parameter in phase.parameters}
            with frozen(p for p in model.parameters() if id(p) not in mine):
                source = trainer.source(phase, batch)
                for _ in range(phase.steps):
                    optimizer.zero_grad()
                    phase.loss(source).total.backward()
                    optimizer.step()

    return model, step


def _training(system: str) -> Step:
    return training(system)[1]


def cases() -> dict[str, Callable[[], Step]]:
    """Name to what prepares the case."""
    found: dict[str, Callable[[], Step]] = {f"loss/{name}": partial(_loss, name) for name in LOSSES}
    found |= {f"bound/{name}{' ' + critic if critic else ''}": partial(_bound, name, critic) for name, critic in BOUNDS}
    found |= {f"op/attention {name}": partial(_attention, name) for name in ("softmax", "sparsemax")}
    found["op/attention grouped"] = _attention_grouped
    found |= {f"op/{name}": partial(_lstm, name) for name in ("lstm", "lstm_scan", "lstm_decode")}
    found |= {f"layer/{name}": partial(_layer, name) for name in LAYERS}
    return found | {f"step/{name}": partial(_training, name) for name in SYSTEMS}


def chosen(patterns: Sequence[str]) -> list[str]:
    """Names that hold any of the patterns, all without one. Raises ValueError for a pattern that no name holds."""
    names = list(cases())
    if unknown := [p for p in patterns if not any(p in name for name in names)]:
        raise ValueError(f"no case has {', '.join(map(repr, unknown))} in its name: {', '.join(names)}")
    return [name for name in names if not patterns or any(p in name for p in patterns)]
