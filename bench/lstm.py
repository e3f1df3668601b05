"""Times LSTMs on a CPU, forward plus backward, with the arithmetic floor and common alternatives.

`python -m bench.lstm [--quick] [--only scan|packed|decode]` prints tables and writes bench/results/cpu_lstm.json.
The floor is the time of the matmuls that every schedule needs, with `torch.matmul` in the same run: one of
B x H by H x 4H for every step, one back, and one over all steps for the weight; with an input, its projection and the
two gradients of that. Every contender is checked against LSTMCells in fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

import mi_kernels as mk

from . import machine, table

Run = Callable[[nn.LSTMCell, Tensor, Tensor | None], Tensor]
LOOP_STEPS = 20  # beyond, torch.compile unrolls for minutes


def by_cells(cell: nn.LSTMCell, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """x [B, T, D] -> h [B, T, H], zero from a row's length on; one call a step, as public code has it."""
    h = c = x.new_zeros(x.shape[0], cell.hidden_size)
    states = []
    for t in range(x.shape[1]):
        h, c = cell(x[:, t], (h, c))
        states.append(h)
    found = torch.stack(states, 1)
    if lengths is None:
        return found
    return found * (torch.arange(x.shape[1]) < lengths[:, None]).unsqueeze(-1)


def ours(cell: nn.LSTMCell, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    return mk.lstm(x, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, lengths=lengths)[0]


def module_of(cell: nn.LSTMCell) -> nn.LSTM:
    """An nn.LSTM that shares the cell's parameters."""
    lstm = nn.LSTM(cell.input_size, cell.hidden_size, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(lstm, f"{name}_l0", getattr(cell, name))
    return lstm


def by_module(lstm: nn.LSTM, cell: nn.LSTMCell, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Gradients reach the cell, whose parameters the module has."""
    if lengths is None:
        return lstm(x)[0]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def decode_by_cells(cell: nn.LSTMCell, code: Tensor, steps: int) -> Tensor:
    h, c = torch.zeros_like(code), torch.zeros_like(code)
    states = []
    for t in range(steps):
        h, c = cell(code if t == 0 else h, (h, c))
        states.append(h)
    return torch.stack(states, 1)


def decode(cell: nn.LSTMCell, code: Tensor, steps: int) -> Tensor:
    return mk.lstm_decode(code, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, steps)


def step(run: Callable[[], Tensor], cell: nn.LSTMCell, x: Tensor, slope: Tensor) -> None:
    cell.zero_grad()
    x.grad = None
    run().backward(slope)


Plain = Callable[[nn.LSTMCell, Tensor], Tensor]


def check(name: str, run: Plain, oracle: Plain, cell: nn.LSTMCell, x: Tensor) -> None:
    """Values and gradients against LSTMCells in fp64."""
    x = x.detach().requires_grad_()
    h = run(cell, x)
    found = [h, *torch.autograd.grad(h.square().sum(), [x, *cell.parameters()])]
    wide = nn.LSTMCell(cell.input_size, cell.hidden_size, dtype=torch.float64)
    wide.load_state_dict(cell.state_dict())
    xd = x.detach().double().requires_grad_()
    h = oracle(wide, xd)
    want = [h, *torch.autograd.grad(h.square().sum(), [xd, *wide.parameters()])]
    if any((f - w).norm() > 1e-4 * w.norm() for f, w in zip(found, want, strict=True)):
        raise RuntimeError(f"{name} does not have the values and gradients of LSTMCells; no time is taken")


def floor(batch: int, steps: int, width: int, hidden: int, projected: bool) -> Callable[[], None]:
    h, d = torch.randn(batch, hidden), torch.randn(batch, 4 * hidden)
    weight = torch.randn(4 * hidden, hidden)
    all_h, all_d = torch.randn(batch * steps, hidden), torch.randn(batch * steps, 4 * hidden)
    x, weight_ih = torch.randn(batch * steps, width), torch.randn(4 * hidden, width)

    def run() -> None:
        for _ in range(steps):
            h @ weight.T
        for _ in range(steps):
            d @ weight
        all_d.T @ all_h
        if projected:
            x @ weight_ih.T
            all_d @ weight_ih
            all_d.T @ x

    return run


def scan(batch: int, steps: int, hidden: int, seconds: float, packed: bool = False) -> list[dict[str, Any]]:
    """One layer with an input as wide as its state; with `packed`, lengths from 1 to T."""
    torch.manual_seed(0)
    cell = nn.LSTMCell(hidden, hidden)
    lstm = module_of(cell)
    x = torch.randn(batch, steps, hidden).requires_grad_()
    slope = torch.randn(batch, steps, hidden)
    lengths = torch.randint(1, steps + 1, (batch,)) if packed else None
    contenders: dict[str, Run] = {
        "mi_kernels": ours,
        "nn.LSTM, packed" if packed else "nn.LSTM": partial(by_module, lstm),
        "LSTMCell loop": by_cells,
    }
    if steps <= LOOP_STEPS and not packed:
        torch._dynamo.reset()
        contenders["LSTMCell loop, torch.compile"] = torch.compile(by_cells, dynamic=False)
    size = {"B": batch, "T": steps, "D": hidden, "H": hidden}
    steps_of: dict[str, Callable[[], Any]] = {"matmul": floor(batch, steps, hidden, hidden, True)}
    for name, run in contenders.items():
        bound = lambda c, t, run=run: run(c, t, lengths)  # noqa: E731
        oracle = lambda c, t: by_cells(c, t, lengths)  # noqa: E731
        try:
            check(name, bound, oracle, cell, x)
        except Exception as error:
            table.left_out("lstm", size, name, error)
            continue
        steps_of[name] = partial(step, partial(run, cell, x, lengths), cell, x, slope)
    flop = 48.0 * batch * steps * hidden * hidden
    loss = "lstm, packed" if packed else "lstm"
    return table.rows(loss, size, steps_of, "matmul", seconds, base_name="matmuls", flop=flop, least=3)


def autonomous(batch: int, steps: int, hidden: int, seconds: float) -> list[dict[str, Any]]:
    """A decoder that runs on its own output."""
    torch.manual_seed(0)
    cell = nn.LSTMCell(hidden, hidden)
    code = torch.randn(batch, hidden).requires_grad_()
    slope = torch.randn(batch, steps, hidden)
    size = {"B": batch, "T": steps, "H": hidden}
    steps_of: dict[str, Callable[[], Any]] = {"matmul": floor(batch, steps, hidden, hidden, False)}
    for name, run in (("mi_kernels", decode), ("LSTMCell loop", decode_by_cells)):
        check(name, partial(_with_steps, run, steps), partial(_with_steps, decode_by_cells, steps), cell, code)
        steps_of[name] = partial(step, partial(run, cell, code, steps), cell, code, slope)
    flop = 24.0 * batch * steps * hidden * hidden
    return table.rows("decode", size, steps_of, "matmul", seconds, base_name="matmuls", flop=flop, least=3)


def _with_steps(run: Callable[..., Tensor], steps: int, cell: nn.LSTMCell, code: Tensor) -> Tensor:
    return run(cell, code, steps)


SIZES = [(b, t, h) for t in (20, 100, 400) for h in (32, 64, 128, 256) for b in (32, 128)]
DECODERS = [(32, 20, 128), (32, 50, 128), (32, 400, 128), (128, 50, 256)]
NOTE = (
    "one LSTM layer, fp32, forward plus backward to the input and all parameters; x [B, T, D] with D = H, packed: "
    "lengths drawn from 1 to T; decode: an LSTM that runs on its own output; the base is the matmuls that no schedule "
    f"avoids (packed: of full lengths), and gflops counts them; {table.COLUMNS}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--only", choices=("scan", "packed", "decode"))
    parser.add_argument("--seconds", type=float, default=5.0, help="per size")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    quick, only = arguments.quick, arguments.only
    seconds = 0.5 if quick else arguments.seconds
    sizes = [(32, 20, 32), (32, 20, 128)] if quick else SIZES
    found = [row for size in sizes for row in scan(*size, seconds)] if only in (None, "scan") else []
    if only in (None, "packed"):
        found += [row for size in (sizes[:1] if quick else sizes[8:16]) for row in scan(*size, seconds, packed=True)]
    if only in (None, "decode"):
        found += [row for size in (DECODERS[:1] if quick else DECODERS) for row in autonomous(*size, seconds)]
    if not quick and only is None:
        machine.write("cpu_lstm", found, NOTE)
    print("bench.lstm: done")


if __name__ == "__main__":
    main()
