"""MulT: cross-modal transformers on unaligned sequences (Tsai et al., ACL 2019, arXiv 1906.00295).

For M modalities, each projected to d features by a convolution over time, M (M - 1) directed encoders let every target
read every source (eq. 3-4); what a target has read is concatenated and remembered by a self-attention encoder of width
(M - 1) d, whose last step stands for the modality:

    z_m = Memory_m([CM_{s -> m}(x_m, x_s) for s != m])[last],   h = [z_1 .. z_M],   y = W_3 (h + W_2 Drop(ReLU(W_1 h)))

All directed encoders run side by side, one attention call per layer; so do the memories, whose last layer computes
the last step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.attention import Visible
from models.layers.dropout import dropout
from models.layers.lengths import mean_over_steps, sequence, steps_within
from models.layers.transformer import Dropouts, TransformerStack, check_heads, check_rate, run_together


@dataclass(frozen=True)
class MulTConfig:
    """Sizes (the public code's by default), and what its code does about padding.

    padding: "lengths" (default): positions, keys, the causal offset |Lk - Lq| and the last step follow each sequence's
        own length, so that neither the contents nor the amount of padding matters. "public": the public code, which has
        no lengths. A step is padding when its first projected feature is exactly zero, and loses its position only;
        zero frames take part in every attention; the offset is |Tk - Tq|; the last step read is T - 1. It expects
        sequences padded on the left, and sees right-padded ones as MMSA's MulT does.
    dim, heads, layers: width, attention heads and layers of the cross-modal transformers.
    positions: False leaves them out, as MMSA's copy does.
    causal: the mask j <= i + offset, in cross-modal attention too (the public default).
    kernels: width of each modality's convolution, without padding: a sequence loses kernel - 1 steps, and one shorter
        than that is taken as filled up with zeros to a single step. A modality that has d features and kernel 1 is not
        projected at all.
    memory_layers: max(layers, 3) for None.
    input_dropout: of each modality's raw features; the public code drops the text's (the first) by its embed_dropout.
    attention_dropout: by source modality, the first one's for the memories.
    relu_dropout, residual_dropout: in the layers, as in the public code. output_dropout: in the head.
    """

    dim: int = 30
    heads: int = 5
    layers: int = 5
    memory_layers: int | None = None
    kernels: int | tuple[int, ...] = 1
    causal: bool = True
    positions: bool = True
    padding: str = "lengths"
    input_dropout: tuple[float, ...] = (0.25,)
    attention_dropout: tuple[float, ...] = (0.1,)
    relu_dropout: float = 0.1
    embed_dropout: float = 0.25
    residual_dropout: float = 0.1
    output_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        if self.padding not in ("lengths", "public"):
            raise ValueError(f"padding must be lengths or public, got {self.padding!r}")
        for name in ("layers", "memory_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min(self.kernels if isinstance(self.kernels, tuple) else (self.kernels,)) < 1:
            raise ValueError(f"kernels must be at least 1, got {self.kernels}")
        for name in ("input_dropout", "attention_dropout"):
            for rate in getattr(self, name):
                check_rate(name, rate)
        for name in ("relu_dropout", "embed_dropout", "residual_dropout", "output_dropout"):
            check_rate(name, getattr(self, name))

    def public(self) -> MulTConfig:
        """What the public code does about padding."""
        return replace(self, padding="public")

    def without_dropout(self) -> MulTConfig:
        return replace(
            self,
            input_dropout=(),
            attention_dropout=(),
            relu_dropout=0.0,
            embed_dropout=0.0,
            residual_dropout=0.0,
            output_dropout=0.0,
        )

    def of(self, name: str, modality: int) -> float:
        """A rate given by modality; those beyond the end have none."""
        rates = getattr(self, name)
        return rates[modality] if modality < len(rates) else 0.0

    def kernel(self, modality: int) -> int:
        return self.kernels[modality] if isinstance(self.kernels, tuple) else self.kernels

    def stack(self, width: int, layers: int, source: int) -> TransformerStack:
        rates = Dropouts(
            self.embed_dropout, self.of("attention_dropout", source), self.relu_dropout, self.residual_dropout
        )
        positions = "none" if not self.positions else "steps" if self.padding == "lengths" else "nonzero"
        return TransformerStack(width, self.heads, layers, rates, positions)


class CrossModal(nn.Module):
    """Features z [B, M (M - 1) d] of M >= 2 sequences of any lengths, the modalities' last steps side by side.

    ``dims``: features per step of each modality. Modality m's part is columns m (M - 1) d to (m + 1) (M - 1) d.
    FLOP per item, forward: 4 Tm Ts d + (20 Tm + 4 Ts) d^2 per layer of every directed pair, with w = (M - 1) d
    4 Tm^2 w + 24 Tm w^2 per memory layer of every target, less the attention that the mask and the lengths hide.
    """

    def __init__(self, dims: Sequence[int], config: MulTConfig | None = None):
        super().__init__()
        self.config = config = config or MulTConfig()
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"dims must be two or more positive widths, got {tuple(dims)}")
        if isinstance(config.kernels, tuple) and len(config.kernels) != len(dims):
            raise ValueError(f"kernels must be one per modality, {len(dims)}, got {config.kernels}")
        count, width = len(dims), (len(dims) - 1) * config.dim
        self.dims, self.out_dim = tuple(dims), count * width
        self.directions = [(target, source) for target in range(count) for source in range(count) if source != target]
        self.projections = nn.ModuleList([self._projection(m, dim) for m, dim in enumerate(dims)])
        self.encoders = nn.ModuleList([config.stack(config.dim, config.layers, s) for _, s in self.directions])
        depth = max(config.layers, 3) if config.memory_layers is None else config.memory_layers
        self.memories = nn.ModuleList([config.stack(width, depth, 0) for _ in dims])

    def _projection(self, modality: int, dim: int) -> nn.Module:
        kernel = self.config.kernel(modality)
        if dim == self.config.dim and kernel == 1:
            return nn.Identity()
        return nn.Conv1d(dim, self.config.dim, kernel, bias=False)

    def forward(self, *inputs: Inputs | Tensor) -> Tensor:
        return self.crossed(self.projected(*inputs))

    def projected(self, *inputs: Inputs | Tensor) -> list[Inputs]:
        """Every modality's sequence after its convolution, before it has met another."""
        if len(inputs) != len(self.dims):
            raise ValueError(f"inputs must be one per modality, {len(self.dims)}, got {len(inputs)}")
        return [self._projected(m, x) for m, x in enumerate(inputs)]

    def crossed(self, projected: Sequence[Inputs]) -> Tensor:
        """z of projected sequences."""
        pairs = [(projected[target], projected[source]) for target, source in self.directions]
        read = run_together(
            self.encoders,
            [target.values for target, _ in pairs],
            [source.values for _, source in pairs],
            [Visible.between(target, source, self.config.causal) for target, source in pairs],
        )
        others = len(self.dims) - 1
        targets = [
            Inputs(torch.cat(read[m * others : (m + 1) * others], 2), x.lengths) for m, x in enumerate(projected)
        ]
        remembered = run_together(
            self.memories,
            [x.values for x in targets],
            [None for _ in targets],
            [Visible.between(x, x, self.config.causal) for x in targets],
            last_only=True,
        )
        return torch.cat([z.squeeze(1) for z in remembered], 1)

    def _projected(self, modality: int, x: Inputs | Tensor) -> Inputs:
        """[B, T - kernel + 1, d], zero beyond what the convolution saw of each sequence, and the lengths left."""
        if self.config.padding == "public":
            x = Inputs(x.values if isinstance(x, Inputs) else x)
        values, lengths, _ = sequence(f"inputs[{modality}]", x, self.dims[modality])
        values = dropout(values, self.config.of("input_dropout", modality), self.training)
        projection, kernel = self.projections[modality], self.config.kernel(modality)
        if isinstance(projection, nn.Identity):
            return Inputs(values, lengths)
        values = F.pad(values, (0, 0, 0, max(0, kernel - values.shape[1])))
        values = projection(values.transpose(1, 2)).transpose(1, 2)
        if lengths is None:
            return Inputs(values)
        lengths = (lengths - kernel + 1).clamp(min=1)
        return Inputs(values * steps_within(lengths, values.shape[1])[..., None], lengths)


class MulT(nn.Module):
    """CrossModal with the public residual head: M >= 2 sequences to predictions [B, out_dim].

    With text, audio and vision of 300, 5 and 20 features (MOSI) and the default sizes 1,071,211 parameters, with 300,
    74 and 35 (MOSEI) 1,073,731. Differences from the public code: lengths, which ``MulTConfig().public()`` gives up;
    one attention call for all directions and no wasted steps in the last memory layer, which change no result.
    """

    def __init__(self, dims: Sequence[int], out_dim: int = 1, config: MulTConfig | None = None):
        super().__init__()
        self.features = CrossModal(dims, config)
        width = self.features.out_dim
        self.hidden, self.residual = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, out_dim)

    def forward(self, *inputs: Inputs | Tensor) -> Tensor:
        return self.head(self.features(*inputs))

    def parts(self, *inputs: Inputs | Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features, and the mean of every modality's projected sequence [B, d], which no other modality has touched."""
        projected = self.features.projected(*inputs)
        means = [mean_over_steps(x.values, None if x.lengths is None else x.lengths.clamp(min=1)) for x in projected]
        return self.features.crossed(projected), means

    def head(self, h: Tensor) -> Tensor:
        """Features [B, M (M - 1) d] to predictions."""
        hidden = dropout(self.hidden(h).relu(), self.features.config.output_dropout, self.training)
        return self.out(h + self.residual(hidden))
