"""open_clip's GenLIP losses: the cross-entropy of captions from hidden states, without storing the logits of all
tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.common.autograd import differentiable_gradients, needs_formula
from ..ops.common.checks import check_choice, check_floats, check_same_device, check_tensor
from ..ops.common.dtypes import accumulate_dtype
from ..ops.common.precision import autocast_on


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int = 1024,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(hidden @ weight^T + bias, target) in nats, computed for chunk_size tokens at a time.

    hidden: [N, D].
    weight, bias: [V, D] and [V].
    target: integers [N]; tokens with target ignore_index are skipped.
    reduction: "mean" over the tokens that count (0 if there are none) or "sum".

    Gradients are computed together with the value: 6 N V D FLOP, compared with 8 N V D if logits were recomputed.
    Memory is one chunk of logits, chunk_size x V, plus the gradients. Logits have the dtype of hidden (or of autocast)
    and are reduced in fp32, as in the original. Twice differentiable. Raises ValueError or TypeError that names the
    argument.
    """
    _check(hidden, weight, target, bias, chunk_size, reduction)
    device = hidden.device.type
    if autocast_on(device):
        short = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(short), weight.to(short), None if bias is None else bias.to(short)
    counts = target != ignore_index
    number = counts.sum().clamp(min=1) if reduction == "mean" else 1
    if torch.compiler.is_compiling():
        total = _formula(hidden, weight, bias, target, ignore_index)
    else:
        recording = torch.is_grad_enabled()
        total = _LinearCrossEntropy.apply(hidden, weight, bias, target, ignore_index, chunk_size, recording)
    return total / number


def _check(hidden: Any, weight: Tensor, target: Tensor, bias: Tensor | None, chunk_size: int, reduction: str) -> None:
    floats = {"hidden": hidden, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, t in floats.items():
        check_floats(name, t)
    check_tensor("target", target)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden [N, D] and weight [V, D] must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if target.shape != hidden.shape[:1] or target.is_floating_point() or target.is_complex():
        raise ValueError(
            f"target must be integers, one for each row of hidden {tuple(hidden.shape)}, got {target.dtype} "
            f"{tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have one entry for each row of weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    for name, t in {**floats, "target": target}.items():
        check_same_device(name, t, "hidden", hidden)
        if name != "target" and t.dtype != hidden.dtype and not autocast_on(hidden.device.type):
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {t.dtype}")
    if not chunk_size > 0:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    check_choice("reduction", reduction, ("mean", "sum"))


def _formula(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(accumulate_dtype(logits.dtype))
    return F.cross_entropy(logits, target.long(), ignore_index=ignore_index, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Any,
        target: Tensor,
        ignore_index: int,
        chunk_size: int,
        recording: bool,
    ) -> Any:
        ctx.ignore_index, ctx.has_bias = ignore_index, bias is not None
        inputs = (hidden, weight, bias)[: 2 + ctx.has_bias]
        needs = [recording and needed for needed in ctx.needs_input_grad[:3]]  # needs_input_grad ignores no_grad
        wide = accumulate_dtype(hidden.dtype)
        by_hidden = torch.empty_like(hidden) if needs[0] else None
        by_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        by_bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None
        total = hidden.new_zeros((), dtype=wide)
        for first in range(0, hidden.shape[0], chunk_size):
            part = slice(first, first + chunk_size)
            logits = F.linear(hidden[part], weight, bias).to(wide)
            labels, counts = target[part].long(), target[part] != ignore_index
            labels = torch.where(counts, labels, 0)[:, None]
            log_sum = logits.logsumexp(1, keepdim=True)
            total += ((log_sum - logits.gather(1, labels)).squeeze(1) * counts).sum()
            if not any(needs):
                continue
            slopes = logits.sub_(log_sum).exp_()
            slopes.scatter_add_(1, labels, slopes.new_full((1, 1), -1.0).expand_as(labels))
            slopes.mul_(counts[:, None])
            short = slopes.to(hidden.dtype)
            if by_hidden is not None:
                torch.mm(short, weight, out=by_hidden[part])
            if by_weight is not None:
                by_weight += short.mT @ hidden[part]
            if by_bias is not None:
                by_bias += slopes.sum(0)
        ctx.save_for_backward(*inputs, target, by_hidden, by_weight, by_bias)
        return total

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        *inputs, target, by_hidden, by_weight, by_bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(inputs)]
        gradients: Sequence[Tensor | None]
        if needs_formula((g,)):
            formula = lambda h, w, b=None: (_formula(h, w, b, target, ctx.ignore_index),)  # noqa: E731
            gradients = differentiable_gradients(formula, inputs, needs, (g,))
        else:
            kept = (by_hidden, by_weight, by_bias)[: len(inputs)]
            gradients = [None if t is None else (g * t).to(like.dtype) for t, like in zip(kept, inputs, strict=True)]
        return *gradients, *(None,) * (7 - len(gradients))


class GenLipLoss(nn.Module):
    """GenLIP's caption loss: cross-entropy of logits [..., V] and labels [...]; tokens with ignore_index are
    skipped."""

    def __init__(self, ignore_index: int = -100):
        super().__init__()
        self.ignore_index = ignore_index
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=ignore_index)

    def forward(self, logits: Tensor, labels: Tensor, output_dict: bool = False) -> Tensor | dict[str, Tensor]:
        loss = self.caption_loss(logits.flatten(0, -2), labels.flatten())
        return {"caption_loss": loss} if output_dict else loss
