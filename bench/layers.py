"""Times layers on a CPU, forward plus backward, with plain torch formulations on the same weights.

`python -m bench.layers [--quick] [--only mult,mfn,...] [--seconds S]` prints a table and writes
bench/results/cpu_layers.json. Every contender is checked, output and gradients of all parameters and inputs, against
the plain formulation in fp64 before it is timed. GRUs are torch's own and have no rival here.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.layers import (
    EFLSTM,
    MFN,
    AdaptationGate,
    LowRankFusion,
    LSTMDecoder,
    LSTMEncoder,
    MulT,
    MulTConfig,
    TransformerEncoder,
    WordShift,
)

from . import layer_formulas as plain
from . import machine, table

Run = Callable[..., Tensor]
SCORES_LIMIT = 3 << 30  # bytes of one layer's weights beyond which the materialised attention is left out


def draw(batch: int, steps: int, dim: int, ragged: bool = False) -> Inputs:
    values = torch.randn(batch, steps, dim)
    if not ragged:
        return Inputs(values.requires_grad_())
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[0] = steps
    within = torch.arange(steps) < lengths[:, None]
    return Inputs((values * within[..., None]).requires_grad_(), lengths)


def _gradients(run: Run, module: nn.Module, inputs: list[Inputs], slope: Tensor | None = None) -> list[Tensor]:
    leaves = [*(x.values for x in inputs), *module.parameters()]
    out = run(module, *inputs)
    out = out if slope is None else out * slope.to(out)
    found = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True))]


def errors(run: Run, module: nn.Module, inputs: list[Inputs], want: list[Tensor], slope: Tensor) -> list[float]:
    """Distances of the output and all gradients from the definition."""
    found = _gradients(run, module, inputs, slope)
    return [(f - w).norm().item() for f, w in zip(found, want, strict=True)]


def check(name: str, found: list[float], base: list[float], want: list[Tensor]) -> None:
    """A contender may err a little, or twice as much as the plain formulation in the same precision."""
    # Some gradients are differences of nearly equal sums.
    largest = max(w.norm().item() for w in want[1:])
    limits = (max(1e-3 * w.norm().item() + 1e-5 * largest, 2 * b) for w, b in zip(want, base, strict=True))
    if not all(f <= limit for f, limit in zip(found, limits, strict=True)):
        raise RuntimeError(f"{name} does not have the output and gradients of the definition; no time is taken")


def measure(
    kind: str,
    size: dict[str, Any],
    module: nn.Module,
    inputs: list[Inputs],
    rivals: dict[str, Run],
    seconds: float,
    counted: Run | None = None,
) -> list[dict[str, Any]]:
    """Rows of one layer; the first rival is the base and, in fp64, the definition. `counted`, called like a rival with
    fp64 inputs, gives factors of 0 or 1 for the outputs: the check leaves those with 0 out."""
    module.eval()
    base = next(iter(rivals))
    wide = [Inputs(x.values.detach().double().requires_grad_(), x.lengths) for x in inputs]
    slope = torch.randn(rivals[base](module, *inputs).shape)
    definition = copy.deepcopy(module).double()
    if counted is not None:
        slope = slope * counted(definition, *wide).to(slope)
    want = _gradients(rivals[base], definition, wide, slope)
    plain_errors = errors(rivals[base], module, inputs, want, slope)

    def step(run: Run) -> None:
        module.zero_grad()
        for x in inputs:
            x.values.grad = None
        run(module, *inputs).sum().backward()

    steps: dict[str, Callable[[], Any]] = {}
    for name, run in {**rivals, "mi_kernels": lambda m, *x: m(*x)}.items():
        try:
            check(name, errors(run, module, inputs, want, slope), plain_errors, want)
        except Exception as error:
            if name == base:
                raise
            table.left_out(kind, size, name, error)
            continue
        steps[name] = partial(step, run)
    return table.rows(kind, size, steps, base, seconds, least=3)


def mult(batch: int, steps: tuple[int, ...], ragged: bool, seconds: float) -> list[dict[str, Any]]:
    """d = 40, ten heads, four layers, MOSI's features."""
    config = MulTConfig(dim=40, heads=10, layers=4).without_dropout()
    dims = (300, 5, 20)
    inputs = [draw(batch, t, d, ragged) for t, d in zip(steps, dims, strict=True)]
    rivals: dict[str, Run] = {"SDPA, encoder by encoder": partial(plain.mult, attention=plain.sdpa)}
    if 4 * batch * 10 * max(steps) ** 2 <= SCORES_LIMIT // 40:
        rivals["softmax of stored scores"] = partial(plain.mult, attention=plain.materialised)
    size = {"B": batch, "T": list(steps), "lengths": "ragged" if ragged else "full"}
    return measure("mult", size, MulT(dims, 1, config), inputs, rivals, seconds)


def transformer(batch: int, steps: int, ragged: bool, seconds: float) -> list[dict[str, Any]]:
    model, x = TransformerEncoder(64, 64, 64, heads=8), draw(batch, steps, 64, ragged)
    rivals = {"SDPA": plain.transformer, "nn.TransformerEncoder": plain.torch_transformer(model)}
    size = {"B": batch, "T": steps, "d": 64, "lengths": "ragged" if ragged else "full"}
    return measure("transformer", size, model, [x], rivals, seconds)


def lstm_encoder(batch: int, steps: int, hidden: int, seconds: float) -> list[dict[str, Any]]:
    rivals = {"LSTMCell loop": plain.lstm_encoder, "nn.LSTM": partial(plain.lstm_encoder, library=True)}
    model, x = LSTMEncoder(hidden, hidden, hidden), draw(batch, steps, hidden, True)
    return measure("lstm_encoder", {"B": batch, "T": steps, "H": hidden}, model, [x], rivals, seconds)


def lstm_decoder(batch: int, steps: int, hidden: int, seconds: float) -> list[dict[str, Any]]:
    class Decoder(LSTMDecoder):
        def forward(self, code: Any) -> Tensor:  # type: ignore[override]
            return super().forward(code.values[:, 0], steps)

    rivals = {"LSTMCell loop": partial(plain.lstm_decoder, steps=steps)}
    size = {"B": batch, "T": steps, "H": hidden}
    return measure("lstm_decoder", size, Decoder(hidden, 33), [draw(batch, 1, hidden)], rivals, seconds)


def aligned(batch: int, steps: int, dims: tuple[int, ...]) -> list[Inputs]:
    first = draw(batch, steps, dims[0], True)
    return [first, *(Inputs(draw(batch, steps, dim).values, first.lengths) for dim in dims[1:])]


def ef_lstm(batch: int, steps: int, seconds: float) -> list[dict[str, Any]]:
    rivals = {"LSTMCell loop": plain.ef_lstm, "nn.LSTM": partial(plain.ef_lstm, library=True)}
    dims = (300, 5, 20)
    return measure("ef_lstm", {"B": batch, "T": steps}, EFLSTM(dims), aligned(batch, steps, dims), rivals, seconds)


def mfn(batch: int, steps: int, seconds: float) -> list[dict[str, Any]]:
    dims = (300, 5, 20)
    rivals = {"everything step by step": plain.mfn}
    return measure("mfn", {"B": batch, "T": steps}, MFN(dims), aligned(batch, steps, dims), rivals, seconds)


def gate(batch: int, steps: int, seconds: float) -> list[dict[str, Any]]:
    dims = (768, 47, 74)
    model, inputs = AdaptationGate(768, dims[1:]), aligned(batch, steps, dims)
    rivals = {"plain torch": plain.adaptation_gate}
    return measure("mag", {"B": batch, "T": steps}, model, inputs, rivals, seconds, plain.adaptation_gate_settled)


def word_shift(batch: int, frames: tuple[int, int], ragged: bool, seconds: float) -> list[dict[str, Any]]:
    """MIRD's sizes: 50 words, audio of 33 and video of 709 features."""
    inputs = [draw(batch, t, d, ragged) for t, d in zip((50, *frames), (768, 33, 709), strict=True)]
    size = {"B": batch, "T": [50, *frames], "lengths": "ragged" if ragged else "full"}
    rivals = {"stored scores, sparsemax by sorting": plain.word_shift}
    model = WordShift(768, (33, 709))
    return measure("word_shift", size, model, inputs, rivals, seconds, plain.word_shift_settled)


def fusion(batch: int, rank: int, seconds: float) -> list[dict[str, Any]]:
    class Fusion(LowRankFusion):
        def forward(self, *vectors: Any) -> Tensor:
            return super().forward(*(z.values[:, 0] for z in vectors))

    dims = (32, 16, 64)
    inputs = [draw(batch, 1, dim) for dim in dims]
    rivals = {"a batched product per modality": plain.low_rank_fusion}
    return measure("lmf", {"B": batch, "rank": rank, "out": 64}, Fusion(dims, 64, rank), inputs, rivals, seconds)


def cases(quick: bool) -> dict[str, list[Callable[[float], list[dict[str, Any]]]]]:
    """Case names to what is timed under them."""
    modes = (False, True)
    if quick:
        return {
            "mult": [partial(mult, 2, (10, 25, 30), ragged) for ragged in modes],
            "transformer": [partial(transformer, 4, 20, ragged) for ragged in modes],
            "lstm": [partial(lstm_encoder, 4, 10, 16), partial(lstm_decoder, 4, 10, 16)],
            "ef_lstm": [partial(ef_lstm, 4, 8)],
            "mfn": [partial(mfn, 4, 8)],
            "mag": [partial(gate, 2, 8)],
            "word_shift": [partial(word_shift, 2, (30, 20), ragged) for ragged in modes],
            "lmf": [partial(fusion, 8, 4)],
        }
    recurrent = ((32, 20, 64), (32, 400, 64), (128, 50, 128))
    return {
        "mult": [partial(mult, 32, (50, t, s), ragged) for t, s in ((50, 50), (375, 500)) for ragged in modes],
        "transformer": [partial(transformer, 32, t, ragged) for t in (100, 400) for ragged in modes],
        "lstm": [partial(f, *size) for size in recurrent for f in (lstm_encoder, lstm_decoder)],
        "ef_lstm": [partial(ef_lstm, b, 20) for b in (32, 128)],
        "mfn": [partial(mfn, b, 20) for b in (32, 128)],
        "mag": [partial(gate, 48, 50)],
        "word_shift": [partial(word_shift, 16, (400, 55), ragged) for ragged in modes],
        "lmf": [partial(fusion, b, 4) for b in (64, 1024)],
    }


NOTE = (
    "Layers of models/layers without dropout, forward plus backward to inputs and all weights, fp32; the base is the "
    "plain torch formulation on the same weights; ragged: lengths uniform between 1 and T, which rivals honour by "
    f"masks or by reading states at the last step; {table.COLUMNS}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--only", help="names of cases, with commas between them")
    parser.add_argument("--seconds", type=float, default=6.0, help="per size")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    found = []
    every = cases(arguments.quick)
    names = arguments.only.split(",") if arguments.only else list(every)
    if unknown := set(names) - set(every):
        parser.error(f"--only knows {', '.join(every)}, got {', '.join(sorted(unknown))}")
    for name in names:
        for case in every[name]:
            torch.manual_seed(0)
            found += case(0.3 if arguments.quick else arguments.seconds)
    if not arguments.quick and not arguments.only:
        machine.write("cpu_layers", found, NOTE)
    print("bench.layers: done")


if __name__ == "__main__":
    main()
