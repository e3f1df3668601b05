"""XLNet as a text encoder, with a place to change the hidden states that enter its second layer.

MAG-XLNet (Rahman et al., ACL 2020) puts its gate there (layer index 1), and reads words as tokens, SEP, CLS with
segment 0 for the first two, 2 for CLS and 3 for padding. The features are those of a sequence summary: tanh of a linear
layer on the state of CLS.

The public code pads on the left, so that CLS stands last. Here padding stays on the right and the state of CLS is
picked by its length: XLNet knows relative positions only and padding is masked, so both give the same features (a test
compares). The summary and the head above it start from random weights, as in the public code: XLNet's checkpoints,
language models, have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.data.dataset import Modality
from models.data.tokenizer import require_transformers
from models.layers.lengths import steps_within
from models.layers.text import Shift, TextConfig, TextEncoder

ENTERED = 1  # index of the layer whose input is shifted
SEGMENTS = {"word": 0, "cls": 2, "padding": 3}


class XLNetEncoder(TextEncoder):
    """Tokens to features [B, out_dim]; ``shift`` may change the states between the first layer and the second.

    With a checkpoint, SEP and CLS are those of its tokenizer; a fresh XLNet appends two tokens of its own to the data's
    words. Readouts: "pooler", the summary, or "mean", of all states within the length. There is no limit of positions.
    FLOP per token and layer, forward: 12 H^2 + 4 H I of products, 8 T H of attention (2 T relative positions).
    """

    kind = "xlnet"

    def __init__(self, modality: Modality, config: TextConfig | None = None):
        super().__init__(modality, config)
        sizes = self.backbone.config
        if self.config.readout == "first":
            raise ValueError("text.readout must be pooler or mean for XLNet, whose CLS is the last token; got first")
        if sizes.n_layer <= ENTERED:
            raise ValueError(f"text.layers must be at least {ENTERED + 1} for XLNet, got 1: the gate follows the first")
        self.marks = () if self.config.name else (modality.vocabulary, modality.vocabulary + 1)
        self.backbone.mask_emb.requires_grad_(False)  # for pretraining; it would never see a gradient
        self.summary = nn.Linear(self.hidden, self.hidden) if self.config.readout == "pooler" else None
        if self.summary is not None:
            nn.init.normal_(self.summary.weight, std=sizes.initializer_range)
            nn.init.zeros_(self.summary.bias)

    def states(self, x: Inputs, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The last layer's states [B, T, H], the summary [B, H], and the lengths, with SEP and CLS in T."""
        ids, given = self._checked(x)
        rows, steps = torch.arange(len(ids), device=ids.device), ids.shape[1]
        lengths = torch.full_like(rows, steps) if given is None else given
        if self.marks:
            if x.lengths is not None:
                lengths = x.lengths.to(ids.device)  # a missing text is SEP and CLS alone
            ids = torch.cat([ids, ids.new_full((len(ids), len(self.marks)), self.pad)], 1)
            for place, mark in enumerate(self.marks):
                ids = ids.index_put((rows, lengths + place), ids.new_tensor(mark))
            lengths = lengths + len(self.marks)
        within = steps_within(lengths, ids.shape[1])
        segments = torch.full_like(ids, SEGMENTS["word"]).masked_fill(~within, SEGMENTS["padding"])
        segments = segments.index_put((rows, lengths - 1), segments.new_tensor(SEGMENTS["cls"]))
        with _entering(self.backbone.layer[ENTERED], shift, lengths):
            found = self.backbone(
                input_ids=ids.masked_fill(~within, self.pad),
                attention_mask=within.to(self.backbone.dtype),
                token_type_ids=segments,
                use_mems=False,
            )
        states = found.last_hidden_state
        pooled = states[rows, lengths - 1]
        return states, pooled if self.summary is None else self.summary(pooled).tanh(), lengths

    def _fresh(self, modality: Modality, rates: dict[str, float]) -> Any:
        transformers, config = require_transformers(), self.config
        sizes = transformers.XLNetConfig(
            vocab_size=modality.vocabulary + 2,
            d_model=config.hidden,
            n_layer=config.layers,
            n_head=config.heads,
            d_inner=config.intermediate,
            pad_token_id=0,
            **rates,
        )
        return transformers.XLNetModel(sizes)


@contextmanager
def _entering(layer: Any, shift: Shift | None, lengths: Tensor) -> Iterator[None]:
    """Passes the states [T, B, H] that enter ``layer`` through ``shift``, which sees [B, T, H]."""
    if shift is None:
        yield
        return

    def shifted(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        states = cast(Tensor, given[0]).transpose(0, 1)
        return (shift(Inputs(states, lengths)).transpose(0, 1), *given[1:])

    handle = layer.register_forward_pre_hook(shifted)
    try:
        yield
    finally:
        handle.remove()
