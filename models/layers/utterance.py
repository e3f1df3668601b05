"""One vector per modality: both directions' ends of every layer of a bidirectional LSTM, or a text encoder's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.data.dataset import Modality
from models.layers.inlet import Inlet
from models.layers.lengths import last_step, sequence, steps_within
from models.layers.sequence import LSTM, check_positive
from models.layers.text import TextConfig, TextEncoder, no_tokens


class BiLSTM(nn.Module):
    """[B, T, D] with lengths to the last states of every layer, forward and backward, [B, 2 layers hidden].

    A layer norm stands between layers. The backward direction starts at each sequence's own end. FLOP per item and
    layer, forward: 16 T H (D + H).
    """

    def __init__(self, dim: int, hidden: int, layers: int = 1):
        super().__init__()
        check_positive(dim=dim, hidden=hidden, layers=layers)
        self.dim, self.out_dim = dim, 2 * layers * hidden
        widths = [dim] + [2 * hidden] * (layers - 1)
        self.forwards = nn.ModuleList([LSTM(width, hidden) for width in widths])
        self.backwards = nn.ModuleList([LSTM(width, hidden) for width in widths])
        self.norms = nn.ModuleList([nn.LayerNorm(2 * hidden) for _ in widths[1:]])

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values, lengths, _ = sequence("x", x, self.dim)
        ends: list[Tensor] = []
        for depth, (ahead, back) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            there, _ = ahead(values, lengths)
            home, _ = back(backwards(values, lengths), lengths)
            ends += [last_step(there, lengths), last_step(home, lengths)]
            if depth < len(self.norms):
                values = cast(nn.LayerNorm, self.norms[depth])(torch.cat([there, backwards(home, lengths)], 2))
                if lengths is not None:
                    values = values * steps_within(lengths, values.shape[1])[..., None]
        return torch.cat(ends, 1)


def backwards(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Every sequence of [B, T, D] in reverse, its padding still on the right."""
    if lengths is None:
        return values.flip(1)
    steps = torch.arange(values.shape[1], device=values.device)
    index = lengths[:, None] - 1 - steps
    index = torch.where(index >= 0, index, steps)
    return values.gather(1, index[..., None].expand_as(values))


class Utterances(nn.Module):
    """Every modality of a batch as one vector [B, dims[m]]: an Inlet and a BiLSTM each.

    text: a text encoder for the first modality of tokens, in place of its LSTM. Raises ValueError where there is none.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        hidden: int,
        layers: int,
        embedding: int,
        stride: int = 1,
        text: TextConfig | None = None,
    ):
        super().__init__()
        self.names, self.text = tuple(m.name for m in modalities), ""
        if text is not None:
            tokens = [modality for modality in modalities if modality.is_tokens]
            if not tokens:
                raise no_tokens("language=bert", self.names)
            self.text, self.encoder = tokens[0].name, TextEncoder(tokens[0], text)
        others = [modality for modality in modalities if modality.name != self.text]
        self.inlet = Inlet(others, embedding, stride)
        self.lstms = nn.ModuleList([BiLSTM(dim, hidden, layers) for dim in self.inlet.dims])
        width = 2 * layers * hidden
        self.dims = tuple(self.encoder.out_dim if name == self.text else width for name in self.names)

    def forward(self, inputs: Mapping[str, Inputs]) -> list[Tensor]:
        found = [lstm(x) for lstm, x in zip(self.lstms, self.inlet(inputs), strict=True)]
        if self.text:
            found.insert(self.names.index(self.text), self.encoder(inputs[self.text]))
        return found
