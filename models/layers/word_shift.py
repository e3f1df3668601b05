"""Word-level sparsemax shift (the WSA of MIRD, arXiv 2409.12408): the adaptation gate on unaligned modalities.

Every word looks for the few frames of modality m that belong to it, e the words [T, E] and x_m the frames [T_m, d_m]:

    S = e (W_m x_m + b_m)^T,   A = sparsemax(S),   x~_m = A x_m,   then mag.py's gate on (e, x~_m)

with no 1 / sqrt(E) and the raw frames as values. S = (e W_m) x_m^T + (e b_m) 1^T and sparsemax (softmax too) ignores
what is added to a row, so the words are brought to d_m features instead of all frames to E, and b_m has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mi_kernels as mk
from models.batch import Inputs
from models.layers.lengths import sequence
from models.layers.mag import AdaptationGate
from models.layers.sequence import check_choice


class WordShift(nn.Module):
    """Words [B, T, E] and frames [B, T_m, d_m] of other modalities, each with lengths of its own, to words [B, T, E].

    normalizer: "sparsemax", or "softmax", MIRD's WA-BERT variant. Words beyond the text's lengths come out zero.
    key_bias: keeps b_m, so that weights of the public module fit: 2,895,360 parameters with E = 768 and d_m = 33 and
        709. Its gradient is zero but for rounding, and it costs a feature in the attention; off by default.
    The public module knows no lengths and lets words look at padding: plain tensors do that.

    FLOP per item, forward: 2 T E d_m + 4 T T_m d_m for every modality, plus the gate's; frames in E features would cost
    2 T_m E d_m + 2 T T_m (E + d_m). Sources: MIRD's released code; Martins and Astudillo 2016 (sparsemax).
    """

    def __init__(
        self,
        text_dim: int,
        dims: Sequence[int],
        beta: float = 1.0,
        dropout: float = 0.5,
        *,
        normalizer: str = "sparsemax",
        key_bias: bool = False,
    ):
        super().__init__()
        check_choice("normalizer", normalizer, ("sparsemax", "softmax"))
        self.text_dim, self.dims, self.normalizer = text_dim, tuple(dims), normalizer
        self.gate = AdaptationGate(text_dim, dims, beta, dropout)
        self.keys = nn.ModuleList([nn.Linear(dim, text_dim, bias=key_bias) for dim in dims])

    def forward(self, text: Inputs | Tensor, *others: Inputs | Tensor) -> Tensor:
        if len(others) != len(self.dims):
            raise ValueError(f"others must be one per modality, {len(self.dims)}, got {len(others)}")
        words, lengths, _ = sequence("text", text, self.text_dim)
        frames = [sequence(f"others[{m}]", x, dim) for m, (x, dim) in enumerate(zip(others, self.dims, strict=True))]
        queries, keys, values = [], [], []
        for linear, (x, _, _) in zip(cast(list[nn.Linear], self.keys), frames, strict=True):
            query, key = words @ linear.weight, x
            if linear.bias is not None:
                query = torch.cat([query, (words @ linear.bias)[..., None]], 2)
                key = F.pad(x, (0, 1), value=1.0)
            queries.append(query[:, None])
            keys.append(key[:, None])
            values.append(x[:, None])
        found = mk.cross_attention_grouped(
            queries,
            keys,
            values,
            query_lengths=[lengths] * len(frames),
            key_lengths=[x.lengths for x in frames],
            normalizer=self.normalizer,
            scale=1.0,
        )
        return self.gate.shifted(words, [x.squeeze(1) for x in found], lengths)
