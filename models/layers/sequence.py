"""Sequence encoders and the LSTM decoder: [B, T, D] with lengths to [B, out_dim], and back.

The lengths are honoured everywhere: what lies beyond them reaches neither the output nor a gradient. Public code that
runs on over the padding (MFM, MIRD) is what the same weights do with inputs given without lengths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.batch import Inputs
from models.layers.attention import Visible
from models.layers.dropout import Dropout
from models.layers.lengths import last_step, mean_over_steps, sequence, steps_within
from models.layers.transformer import Dropouts, TransformerStack, check_heads, check_rate, run_together


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


class LSTMWeights(nn.Module):
    """The parameters of `torch.nn.LSTMCell`, under its names and with its initialisation: 4 H (D + H + 2)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        check_positive(dim=dim, hidden=hidden)
        self.hidden = hidden
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, dim))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.empty(4 * hidden)) for _ in range(2))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))


class LSTM(LSTMWeights):
    """All states of one LSTM layer: values [B, T, D] and lengths to h and c, [B, T, H] each, zero beyond the lengths.

    `torch.nn.LSTM` keeps no c but the last; MFN needs all of them. FLOP per item, forward: 8 T H (D + H).
    """

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return mk.lstm(values, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, lengths=lengths)


class LSTMEncoder(nn.Module):
    """h at the last step of a stack of LSTMs, dropout, and a linear layer: [B, T, D] to [B, out_dim].

    The modality encoder of MFM (hidden = out_dim, Tsai et al., ICLR 2019, section 3), of MIRD, and LMF's text network
    (out_dim = hidden / 2). ``out_dim=None`` leaves the linear layer out. Public code reads the state after the padding:
    pass no lengths.
    """

    def __init__(self, dim: int, hidden: int, out_dim: int | None = None, layers: int = 1, dropout: float = 0.0):
        super().__init__()
        check_positive(layers=layers, out_dim=hidden if out_dim is None else out_dim)
        check_rate("dropout", dropout)
        self.dim, self.out_dim = dim, hidden if out_dim is None else out_dim
        self.lstms = nn.ModuleList([LSTM(hidden if layer else dim, hidden) for layer in range(layers)])
        self.dropout = Dropout(dropout)
        self.out = nn.Identity() if out_dim is None else nn.Linear(hidden, out_dim)

    def forward(self, x: Inputs | Tensor) -> Tensor:
        h, lengths, _ = sequence("x", x, self.dim)
        for depth, lstm in enumerate(self.lstms):
            h, _ = lstm(self.dropout(h) if depth else h, lengths)
        return self.out(self.dropout(last_step(h, lengths)))


class LSTMDecoder(LSTMWeights):
    """A code [B, H] unrolled to [B, steps, out_dim]: step 0 reads the code, every later step the h before it.

    Decoder of MFM and MIRD (LSTMCell(H, H) and Linear(H, out_dim)); no data and no length enter. FLOP per item,
    forward: steps (8 H^2 + 2 H out_dim), half of the cell's, since both weights act on one vector after step 0.
    """

    def __init__(self, code_dim: int, out_dim: int):
        super().__init__(code_dim, code_dim)
        check_positive(out_dim=out_dim)
        self.out = nn.Linear(code_dim, out_dim)

    def forward(self, code: Tensor, steps: int) -> Tensor:
        if code.dim() != 2 or code.shape[1] != self.hidden:
            raise ValueError(f"code must have shape [batch, {self.hidden}], got {tuple(code.shape)}")
        check_positive(steps=steps)
        h = mk.lstm_decode(code, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, steps)
        return self.out(h)


class GRUEncoder(nn.Module):
    """A GRU read at the last step ("last") or averaged ("mean"), dropout, linear layer: [B, T, D] to [B, out_dim].

    Bidirectional, "last" is the forward state at the end and the backward state at the start of each sequence.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 64,
        out_dim: int = 128,
        *,
        layers: int = 1,
        bidirectional: bool = False,
        readout: str = "last",
        dropout: float = 0.0,
    ):
        super().__init__()
        check_positive(dim=dim, hidden=hidden, out_dim=out_dim, layers=layers)
        check_choice("readout", readout, ("last", "mean"))
        check_rate("dropout", dropout)
        self.dim, self.out_dim, self.readout = dim, out_dim, readout
        between = dropout if layers > 1 else 0.0
        self.gru = nn.GRU(dim, hidden, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
        self.directions = 1 + bidirectional
        self.out = nn.Sequential(Dropout(dropout), nn.Linear(self.directions * hidden, out_dim))

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values, lengths, _ = sequence("x", x, self.dim)
        if lengths is None:
            states, last = self.gru(values)
        else:
            packed = nn.utils.rnn.pack_padded_sequence(values, lengths.cpu(), batch_first=True, enforce_sorted=False)
            states, last = self.gru(packed)
            states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)  # zero beyond the lengths
        if self.readout == "mean":
            return self.out(mean_over_steps(states, lengths))
        return self.out(last[-self.directions :].transpose(0, 1).flatten(1))


class TransformerEncoder(nn.Module):
    """A linear layer to ``width``, a pre-norm transformer, its mean or last step, and a linear layer to [B, out_dim].

    ``causal`` hides later steps; ``positions=False`` leaves the sinusoids out. MulT's layers (see transformer.py): 24 T
    width^2 + 4 T^2 width FLOP per layer and item, forward.
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        out_dim: int = 128,
        *,
        heads: int = 4,
        layers: int = 2,
        readout: str = "mean",
        causal: bool = False,
        positions: bool = True,
        dropouts: Dropouts | None = None,
    ):
        super().__init__()
        check_positive(dim=dim, out_dim=out_dim)
        check_heads(width, heads)
        check_choice("readout", readout, ("last", "mean"))
        self.dim, self.out_dim, self.readout, self.causal = dim, out_dim, readout, causal
        self.project = nn.Linear(dim, width)
        self.stack = TransformerStack(width, heads, layers, dropouts, "steps" if positions else "none")
        self.out = nn.Linear(width, out_dim)

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values, lengths, _ = sequence("x", x, self.dim)
        target = Inputs(self.project(values), lengths)
        visible = Visible.between(target, target, self.causal)
        last = self.readout == "last"
        states = run_together([self.stack], [target.values], [None], [visible], last_only=last)[0]
        if last:
            return self.out(states.squeeze(1))
        if lengths is not None:
            states = states * steps_within(lengths, states.shape[1])[..., None]
        return self.out(mean_over_steps(states, lengths))
