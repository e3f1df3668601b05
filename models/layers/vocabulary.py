"""Cross entropy over a vocabulary, without the logits of all tokens.

    loss = -mean_n log softmax(W h_n + b)[target_n]

The logits of N tokens are [N, V]: 879 MB for 7,200 tokens of BERT's 30,522 words, and as much again for their softmax
and for their gradient. Here a block of tokens at a time is scored, and the block's gradients are taken at once, since
they are the only thing that the logits are needed for: softmax minus one at the target, divided by N. What is kept for
the backward pass is the gradients themselves, N H + V H + V numbers, which it multiplies with the loss's.

FLOP: 2 N V H without gradients, 6 N V H with them, as the plain formulation. Memory beyond the inputs and their
gradients: one block of at most BLOCK logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 22


def vocabulary_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *, block: int = BLOCK) -> Tensor:
    """Mean cross entropy, in nats, of targets [N] under the logits h [N, H] weight [V, H]^T + bias [V].

    Tokens that do not count (padding) must be left out of ``h`` and ``target``. block: the most logits that exist at a
    time. Sums are in single precision at least. Differentiable once. Raises ValueError for other shapes, for no token
    at all, and (on a CPU) for targets outside the vocabulary; TypeError for targets that are no integers.
    """
    _check(h, weight, bias, target, block)
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight, bias = (t.to(dtype) for t in (h, weight, bias))
    if not torch.is_grad_enabled():  # a Function would take the gradients all the same
        return _forward(h, weight, bias, target, block, (False, False, False))[0]
    return _CrossEntropy.apply(h, weight, bias, target, block)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, block: int) -> Tensor:
        loss, gradients = _forward(h, weight, bias, target, block, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else g * gradient.to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None)


def _forward(
    h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, block: int, needs: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients that are needed of it."""
    tokens, rows = len(h), max(1, block // len(weight))
    wide = torch.promote_types(h.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=h.device)
    # Gradients of the weights add up over the blocks: in 16 bits late blocks would be rounded away.
    of_h = torch.empty_like(h) if needs[0] else None
    of_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
    of_bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        logits = F.linear(h[part], weight, bias).to(wide)
        wanted = target[part, None]
        # The exponentials of the log-sum are those of the softmax: one pass over the logits serves both.
        top = logits.amax(1, keepdim=True)
        loss -= (logits.gather(1, wanted) - top).sum()
        slope = logits.sub_(top).exp_()
        total = slope.sum(1, keepdim=True)
        loss += total.log().sum()
        if not any(needs):
            continue
        slope *= 1 / (tokens * total)
        slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1 / tokens))
        narrow = slope.to(h.dtype)
        if of_h is not None:
            torch.mm(narrow, weight, out=of_h[part])
        if of_weight is not None:
            if of_weight.dtype == narrow.dtype:
                of_weight.addmm_(narrow.t(), h[part])
            else:
                of_weight += narrow.t() @ h[part]
        if of_bias is not None:
            of_bias += slope.sum(0)
    gradients = (of_h, of_weight, of_bias)
    found = [None if g is None else g.to(t.dtype) for g, t in zip(gradients, (h, weight, bias), strict=True)]
    return loss / tokens, found


def _check(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, block: int) -> None:
    if h.dim() != 2 or not len(h):
        raise ValueError(f"h must have shape [tokens, features] with a token, got {tuple(h.shape)}")
    if weight.dim() != 2 or weight.shape[1] != h.shape[1]:
        raise ValueError(f"weight must have shape [vocabulary, {h.shape[1]}], got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{len(weight)}], got {tuple(bias.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 token numbers, got {target.dtype}")
    if target.shape != h.shape[:1]:
        raise ValueError(f"target must have one token per row of h, [{len(h)}], got {tuple(target.shape)}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if target.device.type == "cpu" and not 0 <= int(target.min()) <= int(target.max()) < len(weight):
        raise ValueError(
            f"target must lie between 0 and {len(weight) - 1}, got {int(target.min())} to {int(target.max())}"
        )
