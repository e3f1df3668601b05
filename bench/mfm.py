"""Times a training step of MFM at the sizes of the public code for MOSI: ours and the step-by-step formulation, same
weights.

`python -m bench.mfm [--seconds 20]` prints a table for T = 20 and B = 32 and 128 and writes bench/results/cpu_mfm.json.
The public formulation steps an LSTM cell per modality in encoders, MFN and decoders, evaluates MFN's networks at every
step, and forms all differences [B, B, D] of the MMD. A step is the loss, its backward and Adam. Outputs, loss and
gradients of both are compared before anything is timed. Needs a quiet machine; two minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.batch import Batch, Target
from models.data import Dataset, Modality
from models.mfm import MFM, Settings, build
from models.mfm.model import JOINT

from . import machine, peak, table
from .layer_formulas import cell_states

STEPS, DIMS = 20, {"language": 300, "acoustic": 5, "visual": 20}
# The one configuration that the public code records for MOSI.
SIZES = Settings(
    code=(32, 8, 80), joint_code=32, factor=(88, 8, 8), joint_factor=16, hidden=(88, 64, 48), memory=64, networks=128
)
PUBLIC = "public formulation, step by step"


def problem(rows: int, settings: Settings = SIZES, steps: int = STEPS) -> tuple[MFM, Batch]:
    """A fresh model and a batch of full length."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.arange(rows + 1) * steps
    modalities = tuple(
        Modality(name, torch.randn(rows * steps, dim, generator=generator), ends) for name, dim in DIMS.items()
    )
    labels = torch.randn(rows, generator=generator)
    data = Dataset("bench", modalities, labels, Target.regression(), torch.zeros(rows, dtype=torch.int64))
    torch.manual_seed(0)
    model: Any = build(settings, data)
    return model, data.batch(torch.arange(rows))


def public_codes(model: MFM, x: dict[str, Tensor]) -> dict[str, Tensor]:
    encoders: Any = model.net.encoders
    joint, found = encoders[JOINT], {}
    net, states = joint.fusion, []
    for cell, values in zip(net.lstms, x.values(), strict=True):
        states.append(cell_states(cell, values))
    memory = torch.zeros(len(next(iter(x.values()))), net.config.memory, dtype=states[0][0][0].dtype)
    before = torch.cat([torch.zeros_like(c[0]) for _, c in states], 1)
    for step in range(len(states[0][1])):
        now = torch.cat([c[step] for _, c in states], 1)
        window = torch.cat([before, now], 1)
        attended = net.attention(window).softmax(1) * window
        both = torch.cat([attended, memory], 1)
        memory = net.retain(both).sigmoid() * memory + net.update(both).sigmoid() * net.proposal(attended).tanh()
        before = now
    found[JOINT] = joint.out(torch.cat([*(h[-1] for h, _ in states), memory], 1))
    for name, values in x.items():
        own = encoders[name].encoder
        found[name] = own.out(cell_states(own.lstms[0], values)[0][-1])
    return found


def public_decoded(decoder: Any, code: Tensor, steps: int) -> Tensor:
    h, c, given, states = torch.zeros_like(code), torch.zeros_like(code), code, []
    for _ in range(steps):
        h, c = torch.lstm_cell(given, (h, c), decoder.weight_ih, decoder.weight_hh, decoder.bias_ih, decoder.bias_hh)
        given = h
        states.append(h)
    return decoder.out(torch.stack(states, 1))


def public_mmd(z: Tensor, prior: Tensor) -> Tensor:
    """Squared MMD with all differences [B, B, D] in memory."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        shape = (len(a), len(b), a.shape[1])
        return (-(a[:, None].expand(shape) - b[None].expand(shape)).square().mean(2) / a.shape[1]).exp().mean()

    return kernel(prior, prior) + kernel(z, z) - 2 * kernel(z, prior)


def public_outputs(model: MFM, batch: Batch) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Codes, the head's outputs and the decoded sequences."""
    x = {name: given.values for name, given in batch.inputs.items()}
    net: Any = model.net
    codes = public_codes(model, x)
    factors = {name: net.maps[name](z) for name, z in codes.items()}
    steps = next(iter(x.values())).shape[1]
    decoded = {n: public_decoded(net.decoders[n], torch.cat([factors[JOINT], factors[n]], 1), steps) for n in x}
    return codes, net.out(factors[JOINT]), decoded


def public_loss(model: MFM, batch: Batch, priors: dict[str, Tensor] | None = None) -> Tensor:
    codes, outputs, decoded = public_outputs(model, batch)
    settings = model.settings
    draws = priors or {name: torch.randn_like(z) for name, z in codes.items()}
    prior = sum(public_mmd(z, draws[name]) for name, z in codes.items())
    errors = sum((batch.inputs[n].values - y).square().mean() for n, y in decoded.items())
    _, label = model.label_loss(outputs, batch)
    return label + settings.reconstruction * errors + settings.prior_weight * prior


def draws_of(codes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prior samples that the model draws next, in its order: codes of one width in one call."""
    found: dict[str, Tensor] = {}
    for width in dict.fromkeys(z.shape[1] for z in codes.values()):
        names = [name for name, z in codes.items() if z.shape[1] == width]
        stacked = torch.randn_like(torch.stack([codes[name] for name in names]))
        found |= dict(zip(names, stacked.unbind(), strict=True))
    return found


def gaps(model: MFM, batch: Batch) -> dict[str, float]:
    """Largest differences of codes, outputs, decoded sequences, loss and gradients between the formulations, relative
    to the largest value (of outputs, and of gradients); without dropout, with the same prior samples."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.net.encoders[JOINT].fusion.config = without_dropout(model)  # type: ignore[union-attr,assignment]
    model.train()
    sequences = model.inlet(batch.inputs)
    ours = model.net.codes(sequences)
    factors = model.net.factors(ours)
    codes, outputs, decoded = public_outputs(model, batch)
    mine = model.net.decode(factors, sequences[0].values.shape[1])
    found = {f"code {n}": _gap(ours[n], codes[n]) for n in codes} | {f"x' {n}": _gap(mine[n], decoded[n]) for n in mine}
    found["outputs"] = _gap(model.net.head(model.net.read(factors)), outputs)
    torch.manual_seed(1)
    loss = model.loss(batch).total
    torch.manual_seed(1)
    public = public_loss(model, batch, draws_of(ours))
    found["loss"] = _gap(loss, public)
    parameters = [p for p in model.parameters() if p.requires_grad]
    a, b = (torch.autograd.grad(value, parameters) for value in (loss, public))
    scale = max(g.abs().max().item() for g in b)
    found["gradients"] = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) / scale
    return found


def without_dropout(model: MFM) -> Any:
    fusion: Any = model.net.encoders[JOINT]
    rates = {f"{name}_dropout": 0.0 for name in ("attention", "proposal", "retain", "update")}
    return replace(fusion.fusion.config, **rates)


def _gap(found: Tensor, wanted: Tensor) -> float:
    return (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())


def step(model: MFM, loss: Callable[[], Tensor], fused: bool | None = None) -> Callable[[], None]:
    """fused: whether Adam takes all parameters in one call, as in our trainer; the public code does not."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    found = []
    for rows in args.batch:
        largest = max(gaps(*problem(rows)).values())
        if largest > 1e-5:
            raise RuntimeError(f"the formulations differ by {largest:.1e} at B={rows}; no time is taken")
        ours, batch = problem(rows)
        public, _ = problem(rows)
        steps = {
            PUBLIC: step(public, partial(public_loss, public, batch)),
            "mi_kernels": step(ours, lambda model=ours, batch=batch: model.loss(batch).total, fused=True),  # type: ignore[misc]
        }
        flop = peak.products(steps[PUBLIC])
        found += table.rows("MFM step", {"T": STEPS, "B": rows}, steps, PUBLIC, args.seconds, flop=flop)
    print(machine.write("cpu_mfm", found, table.COLUMNS))


if __name__ == "__main__":
    main()
