"""Plain torch implementations of the layers on the same weights, which bench/layers.py compares with ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
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
    TransformerEncoder,
    WordShift,
)
from models.layers.transformer import TransformerStack, sinusoids

FP32 = 16 * torch.finfo(torch.float32).eps  # relative error of a sum in fp32, generously

# queries, keys, values [B, heads, T, E] and where a query may look (None: everywhere), broadcast to the scores
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def materialised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As in fairseq and MulT's public code, without their averaged weights, which are not used."""
    scores = (q / math.sqrt(q.shape[3])) @ k.transpose(2, 3)
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(3)
    weights.mean(1)
    return weights @ v


def lengths_of(x: Inputs) -> Tensor:
    return torch.full((len(x.values),), x.values.shape[1]) if x.lengths is None else x.lengths


def may_look(target: Inputs, source: Inputs, causal: bool) -> Tensor | None:
    """[B or 1, 1, Tq, Tk]; MulT's causal offset of every item. Rows of padding look like the last real one."""
    if not causal and source.lengths is None:
        return None
    own, other = lengths_of(target)[:, None, None], lengths_of(source)[:, None, None]
    i = torch.arange(target.values.shape[1])[:, None]
    j = torch.arange(source.values.shape[1])
    seen = (j < other) & (j - i <= (own - other).abs()) if causal else (j < other).expand(-1, len(i), -1)
    seen = seen if target.lengths is not None or source.lengths is not None else seen[:1]
    return seen[:, None]


def stack(
    module: TransformerStack, target: Inputs, source: Inputs | None, causal: bool, attention: Attention
) -> Tensor:
    mask = may_look(target, target if source is None else source, causal)
    x, fixed = (
        None if s is None else math.sqrt(s.values.shape[2]) * s.values + sinusoids(*s.values.shape[1:], s.values)
        for s in (target, source)
    )
    layer: Any
    for layer in module.layers:
        q = layer.norm_attention(x)
        k = q if fixed is None else layer.norm_attention(fixed)
        weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        heads = [
            F.linear(s, w, b).unflatten(2, (layer.heads, -1)).transpose(1, 2)
            for s, w, b in zip((q, k, k), weights, biases, strict=True)
        ]
        x = x + layer.out_proj(attention(*heads, mask).transpose(1, 2).flatten(2))
        x = x + layer.contract(layer.expand(layer.norm_feedforward(x)).relu())
    return module.norm(x)


def last(states: Tensor, x: Inputs) -> Tensor:
    return states[torch.arange(len(states)), lengths_of(x) - 1]


def mult(model: MulT, *inputs: Inputs, attention: Attention) -> Tensor:
    """One encoder after the other, every step of every layer."""
    features = model.features
    x = [
        Inputs(conv(s.values.transpose(1, 2)).transpose(1, 2), s.lengths)
        for conv, s in zip(features.projections, inputs, strict=True)
    ]
    read: list[list[Tensor]] = [[] for _ in x]
    encoder: Any
    for encoder, (t, s) in zip(features.encoders, features.directions, strict=True):
        read[t].append(stack(encoder, x[t], x[s], True, attention))
    joined = [Inputs(torch.cat(parts, 2), s.lengths) for parts, s in zip(read, x, strict=True)]
    z = [last(stack(memory, s, None, True, attention), s) for memory, s in zip(features.memories, joined, strict=True)]
    h = torch.cat(z, 1)
    return model.out(h + model.residual(model.hidden(h).relu()))


def transformer(model: TransformerEncoder, x: Inputs, attention: Attention = sdpa) -> Tensor:
    target = Inputs(model.project(x.values), x.lengths)
    states = stack(model.stack, target, None, model.causal, attention)
    within = torch.arange(states.shape[1]) < lengths_of(x)[:, None]
    return model.out((states * within[..., None]).sum(1) / lengths_of(x)[:, None])


def torch_transformer(model: TransformerEncoder) -> Callable[..., Tensor]:
    """nn.TransformerEncoder with the same weights."""
    like: Any = model.stack.layers[0]
    width = like.out_proj.weight.shape[0]
    layer = nn.TransformerEncoderLayer(width, like.heads, 4 * width, 0.0, batch_first=True, norm_first=True)
    rival = nn.TransformerEncoder(layer, len(model.stack.layers), model.stack.norm, enable_nested_tensor=False)
    ours: Any
    theirs: Any
    for ours, theirs in zip(model.stack.layers, rival.layers, strict=True):
        theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias = ours.in_proj_weight, ours.in_proj_bias
        theirs.self_attn.out_proj, theirs.linear1, theirs.linear2 = ours.out_proj, ours.expand, ours.contract
        theirs.norm1, theirs.norm2 = ours.norm_attention, ours.norm_feedforward

    def run(_: TransformerEncoder, x: Inputs) -> Tensor:
        values = model.project(x.values)
        values = math.sqrt(width) * values + sinusoids(*values.shape[1:], values)
        within = torch.arange(values.shape[1]) < lengths_of(x)[:, None]
        states = rival(values, src_key_padding_mask=None if x.lengths is None else ~within)
        return model.out((states * within[..., None]).sum(1) / lengths_of(x)[:, None])

    return run


def cell_states(cell: Any, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The loop over nn.LSTMCell's function that the public models have."""
    h = c = values.new_zeros(len(values), cell.hidden)
    states, cells = [], []
    for x in values.unbind(1):
        h, c = torch.lstm_cell(x, (h, c), cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        states.append(h)
        cells.append(c)
    return states, cells


def library_states(cell: Any, x: Inputs) -> Tensor:
    """torch.nn.LSTM's function; h of every step."""
    zeros = x.values.new_zeros(1, len(x.values), cell.hidden)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    return torch.lstm(x.values, (zeros, zeros), weights, True, 1, 0.0, False, False, True)[0]


def lstm_encoder(model: LSTMEncoder, x: Inputs, library: bool = False) -> Tensor:
    cell = model.lstms[0]
    h = library_states(cell, x) if library else torch.stack(cell_states(cell, x.values)[0], 1)
    return model.out(last(h, x))


def ef_lstm(model: EFLSTM, *inputs: Inputs, library: bool = False) -> Tensor:
    joined = Inputs(torch.cat([x.values for x in inputs], 2), inputs[0].lengths)
    return model.out(lstm_encoder(model.encoder, joined, library))


def lstm_decoder(model: LSTMDecoder, code: Inputs, steps: int) -> Tensor:
    x = code.values[:, 0]
    h = c = torch.zeros_like(x)
    states = []
    for _ in range(steps):
        h, c = torch.lstm_cell(x, (h, c), model.weight_ih, model.weight_hh, model.bias_ih, model.bias_hh)
        x = h
        states.append(h)
    return model.out(torch.stack(states, 1))


def mfn(model: MFN, *inputs: Inputs) -> Tensor:
    """Everything step by step, as the public code has it."""
    net: Any = model.features
    states = [cell_states(cell, x.values) for cell, x in zip(net.lstms, inputs, strict=True)]
    memory = inputs[0].values.new_zeros(len(inputs[0].values), net.config.memory)
    found = []
    before = torch.cat([torch.zeros_like(c[0]) for _, c in states], 1)
    for t in range(inputs[0].values.shape[1]):
        now = torch.cat([c[t] for _, c in states], 1)
        window = torch.cat([before, now], 1)
        attended = net.attention(window).softmax(1) * window
        both = torch.cat([attended, memory], 1)
        memory = net.retain(both).sigmoid() * memory + net.update(both).sigmoid() * net.proposal(attended).tanh()
        before = now
        found.append(memory)
    z = [last(torch.stack(h, 1), x) for (h, _), x in zip(states, inputs, strict=True)]
    return model.out(torch.cat([*z, last(torch.stack(found, 1), inputs[0])], 1))


def _shift(model: AdaptationGate, text: Inputs, others: tuple[Inputs, ...]) -> tuple[Tensor, list[Any]]:
    """The shift h [B, T, E]; for each modality its gate, what the gate reads, and its output before the ReLU."""
    h, read = torch.zeros_like(text.values), []
    for gate, shift, x in zip(model.gates, model.shifts, others, strict=True):
        joined = torch.cat([x.values, text.values], 2)
        opened = gate(joined)
        h = h + opened.relu() * shift(x.values)
        read.append((gate, joined, opened))
    return h, read


def adaptation_gate(model: AdaptationGate, text: Inputs, *others: Inputs) -> Tensor:
    e, (h, _) = text.values, _shift(model, text, others)
    size = h.norm(2, dim=2)
    size = torch.where(size == 0, torch.ones_like(size), size)
    alpha = (model.beta * e.norm(2, dim=2) / (size + 1e-6)).clamp(max=1)
    found = model.dropout(model.norm(e + alpha[..., None] * h))
    return found * (torch.arange(found.shape[1]) < lengths_of(text)[:, None])[..., None]


@torch.no_grad()
def adaptation_gate_settled(model: AdaptationGate, text: Inputs, *others: Inputs) -> Tensor:
    """[B, T, 1], given fp64 inputs: 0 for a word at which a ReLU or the clamp is within the error of fp32 of its kink.

    There is no gradient at the kink, and fp32 may be on either side of it.
    """
    e, (h, read) = text.values, _shift(model, text, others)
    settled = torch.ones_like(e[..., 0], dtype=torch.bool)
    for gate, joined, opened in read:
        size = F.linear(joined.abs(), gate.weight.abs(), gate.bias.abs())
        settled &= (opened.abs() > FP32 * size).all(-1)
    ratio = model.beta * e.norm(2, dim=2) / h.norm(2, dim=2).clamp(min=1e-6)
    return (settled & ((ratio - 1).abs() > FP32)).to(e).unsqueeze(-1)


class _Sparsemax(torch.autograd.Function):
    """By sorting every row, as published."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        z = scores - scores.amax(-1, keepdim=True)
        ordered = z.sort(-1, descending=True).values
        total = ordered.cumsum(-1) - 1
        count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
        size = (ordered * count > total).sum(-1, keepdim=True)
        found = (z - total.gather(-1, size - 1) / size).clamp(min=0)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        support = (ctx.saved_tensors[0] > 0).to(grads[0])
        mean = (grads[0] * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return support * (grads[0] - mean)


def _word_shift_scores(model: WordShift, text: Inputs, others: tuple[Inputs, ...]) -> Iterator[tuple[Inputs, Tensor]]:
    for key, x in zip(model.keys, others, strict=True):
        scores = text.values @ key(x.values).transpose(1, 2)
        within = torch.arange(scores.shape[2]) < lengths_of(x)[:, None, None]
        yield x, scores.masked_fill(~within, -1e30)


def word_shift(model: WordShift, text: Inputs, *others: Inputs) -> Tensor:
    """Frames brought to the words' features, scores and weights stored."""
    read = [Inputs(_Sparsemax.apply(s) @ x.values) for x, s in _word_shift_scores(model, text, others)]
    return adaptation_gate(model.gate, text, *read)


@torch.no_grad()
def word_shift_settled(model: WordShift, text: Inputs, *others: Inputs) -> Tensor:
    """`adaptation_gate_settled` of the read frames; 0 too for a word with a score that is within the error of fp32 of
    sparsemax's threshold."""
    near, read = torch.zeros_like(text.values[..., 0], dtype=torch.bool), []
    for x, scores in _word_shift_scores(model, text, others):
        weights = _Sparsemax.apply(scores)
        kept = weights > 0
        threshold = ((scores * kept).sum(-1, keepdim=True) - 1) / kept.sum(-1, keepdim=True)
        largest = scores.abs().masked_fill(scores == -1e30, 0).amax(-1)
        near |= (scores - threshold).abs().amin(-1) <= FP32 * largest
        read.append(Inputs(weights @ x.values))
    return adaptation_gate_settled(model.gate, text, *read) * ~near[..., None]


def low_rank_fusion(model: LowRankFusion, *vectors: Inputs) -> Tensor:
    """One batched product per modality on [1; z], as the public code has it."""
    product: Any = 1
    for z, weight in zip(vectors, model.weights, strict=True):
        ones = torch.ones(len(z.values), 1, dtype=z.values.dtype)
        product = product * (torch.cat([ones, z.values[:, 0]], 1) @ weight)
    return (model.fusion_weight @ product.permute(1, 0, 2)).squeeze(1) + model.fusion_bias
