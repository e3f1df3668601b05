"""Memory Fusion Network (Zadeh et al., AAAI 2018, arXiv 1802.00927) on word-aligned modalities.

One LSTM per modality; with c_t the cells of all modalities side by side (H features), at every step

    c* = [c_{t-1}; c_t],   a = softmax(A_2 Drop(ReLU(A_1 c*))),   d = a * c*         delta-memory attention (eq. 6-8)
    v = tanh(B_2 Drop(ReLU(B_1 d)))                                                  proposal
    g_1 = sigmoid(C_2 Drop(ReLU(C_1 [d; u_{t-1}]))),   g_2 likewise with E_1, E_2    retain and update gates
    u_t = g_1 * u_{t-1} + g_2 * v                                                    memory, u_0 = 0

and the result is [h of every modality; u] at the last step. Only the gates need u_{t-1}, so the LSTMs, the attention,
the proposals and the gates' share of d are each computed for all steps at once; what remains sequential is one matrix
of [B, memory] by [memory, both gates' hidden] and the gates' output layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.dropout import Dropout, mask
from models.layers.gated_memory import GatedMemory, gated_memory
from models.layers.lengths import last_step, same_steps, sequence
from models.layers.sequence import LSTM, check_positive
from models.layers.transformer import check_rate


@dataclass(frozen=True)
class MFNConfig:
    """State sizes of the LSTMs, of the memory, and hidden width and dropout of the four networks of a step.

    The defaults are the widths of MFM's recorded MOSI configuration; its LSTMs are (88, 64, 48).
    """

    hidden: tuple[int, ...] = (88, 64, 48)
    memory: int = 64
    attention: int = 128
    proposal: int = 128
    retain: int = 128
    update: int = 128
    attention_dropout: float = 0.5
    proposal_dropout: float = 0.5
    retain_dropout: float = 0.5
    update_dropout: float = 0.5

    def __post_init__(self) -> None:
        check_positive(hidden=min(self.hidden, default=0))
        for name in ("memory", "attention", "proposal", "retain", "update"):
            check_positive(**{name: getattr(self, name)})
        for name in ("attention", "proposal", "retain", "update"):
            check_rate(f"{name}_dropout", getattr(self, f"{name}_dropout"))


class MemoryFusion(nn.Module):
    """Features z [B, sum of hidden + memory] of aligned sequences [B, T, d_m] that share their lengths.

    Public code knows no lengths and reads the state after whatever padding follows: pass plain tensors for that.
    FLOP per item, forward: T (8 H_m (d_m + H_m) summed over modalities + 8 H attention + 4 H proposal
    + 2 (2 H + memory) (retain + update) + 2 memory (proposal + retain + update)).
    """

    def __init__(self, dims: Sequence[int], config: MFNConfig | None = None):
        super().__init__()
        self.config = config = config or MFNConfig()
        if len(dims) != len(config.hidden):
            raise ValueError(f"dims must be one per LSTM of hidden {config.hidden}, got {tuple(dims)}")
        self.dims, self.out_dim = tuple(dims), sum(config.hidden) + config.memory
        width, memory = 2 * sum(config.hidden), config.memory
        self.lstms = nn.ModuleList([LSTM(dim, hidden) for dim, hidden in zip(dims, config.hidden, strict=True)])
        self.attention = _two_layers(width, config.attention, width, config.attention_dropout)
        self.proposal = _two_layers(width, config.proposal, memory, config.proposal_dropout)
        self.retain = _two_layers(width + memory, config.retain, memory, config.retain_dropout)
        self.update = _two_layers(width + memory, config.update, memory, config.update_dropout)

    def forward(self, *inputs: Inputs | Tensor) -> Tensor:
        if len(inputs) != len(self.dims):
            raise ValueError(f"inputs must be one per modality, {len(self.dims)}, got {len(inputs)}")
        names = tuple(f"inputs[{m}]" for m in range(len(inputs)))
        sequences = [sequence(name, x, dim) for name, x, dim in zip(names, inputs, self.dims, strict=True)]
        lengths = same_steps(names, sequences)
        states = [lstm(x.values, lengths) for lstm, x in zip(self.lstms, sequences, strict=True)]
        cells = torch.cat([c for _, c in states], 2)
        window = torch.cat([F.pad(cells[:, :-1], (0, 0, 1, 0)), cells], 2)
        attended = self.attention(window).softmax(2) * window
        memory = self._memory(attended, self.proposal(attended).tanh(), lengths)
        return torch.cat([*(last_step(h, lengths) for h, _ in states), memory], 1)

    def _memory(self, attended: Tensor, proposals: Tensor, lengths: Tensor | None) -> Tensor:
        """u [B, memory] at each sequence's last step; attended [B, T, 2 H], proposals [B, T, memory]."""
        width, config = attended.shape[2], self.config
        (retain, out_retain), (update, out_update) = (
            (cast(nn.Linear, gate[0]), cast(nn.Linear, gate[3])) for gate in (self.retain, self.update)
        )
        first = torch.cat([retain.weight, update.weight])  # [both hidden, 2 H + memory]
        hidden = (
            F.linear(attended, first[:, :width], torch.cat([retain.bias, update.bias])).transpose(0, 1).contiguous()
        )
        rates = (config.retain_dropout, config.update_dropout)
        kept = self._kept(hidden, rates) if self.training and max(rates) else None
        weights = (out_retain.weight.mT, out_retain.bias, out_update.weight.mT, out_update.bias)
        recurrence = GatedMemory.apply if self._first_derivatives_only(hidden) else gated_memory
        found = recurrence(hidden, proposals.transpose(0, 1), first[:, width:].mT, *weights, kept)
        return found[-1] if lengths is None else last_step(found.transpose(0, 1), lengths)

    def _first_derivatives_only(self, x: Tensor) -> bool:
        """Training wants speed, evaluation may want any derivative. Autocast chooses a dtype per operation, and a
        compiler writes its own backward pass."""
        plain = torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
        return self.training and torch.is_grad_enabled() and not plain

    def _kept(self, hidden: Tensor, rates: tuple[float, float]) -> Tensor:
        """Dropout factors of both gates for all steps, [T, B, both hidden]."""
        parts = hidden.split((self.config.retain, self.config.update), 2)
        return torch.cat([mask(part, rate) for part, rate in zip(parts, rates, strict=True)], 2)


def _two_layers(dim: int, hidden: int, out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, out))


class MFN(nn.Module):
    """MemoryFusion and the public head, Linear, ReLU, dropout, Linear: aligned sequences to predictions [B, out_dim].

    483,985 parameters with the default sizes on MOSI's 300, 5 and 20 features and ``out_hidden`` 64.
    """

    def __init__(
        self,
        dims: Sequence[int],
        out_dim: int = 1,
        config: MFNConfig | None = None,
        out_hidden: int = 64,
        out_dropout: float = 0.5,
    ):
        super().__init__()
        check_positive(out_dim=out_dim, out_hidden=out_hidden)
        check_rate("out_dropout", out_dropout)
        self.features = MemoryFusion(dims, config)
        self.out = _two_layers(self.features.out_dim, out_hidden, out_dim, out_dropout)

    def forward(self, *inputs: Inputs | Tensor) -> Tensor:
        return self.head(self.features(*inputs))

    def head(self, z: Tensor) -> Tensor:
        return self.out(z)

    def parts(self, *inputs: Inputs | Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features z, and of them the last states of the modalities' own LSTMs, [B, hidden_m] each."""
        z, hidden = self.features(*inputs), self.features.config.hidden
        return z, list(z[:, : sum(hidden)].split(list(hidden), 1))
