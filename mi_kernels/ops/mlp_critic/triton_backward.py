"""Gradients of the MLP critic's statistics in Triton, by chunks of pairs.

With pairs p = (i, j), g[p] = dS[p] (see chunked.py for its terms), h1 = act(u_i + v_j), and D = dz2 the gradient at the
second layer before its activation:

    dh1 = D W2           du_i = sum_j dh1 act'(u_i + v_j)        dv_j = sum_i of the same
    dW2 = D^T h1         db2 = sum_p D                           dw = sum_p g h2            db = sum_p g

ReLU and leaky ReLU: the slope m[p, k] of z2 is a bit, and D[p, k] = g[p] w[k] m[p, k] is never stored. Then

    dh1 = g (m (diag(w) W2))         P = m^T (g h1)     s = m^T g
    dW2 = diag(w) P                  db2 = w s          dw = rowsum(W2 * P) + b2 s

so h2 is not needed again, and m is exact in 16 bits. Other activations: a chunk's z2 is stored, D takes its place.

A chunk runs: scores again with bits or z2 (skipped where the forward kept them), `gradient_kernel` for g,
`second_layer_kernel` for D, db2 and dw (or s), `first_layer_kernel` for du and dv, `product_kernel` for P or dW2. Wide
layers that do not fit the memory budget are stored by chunks and go through torch's matmuls instead, with D for every
activation (triton_matmuls.py). Sums over many tiles are written by parts and added by torch in a fixed order. FLOPs in
M = 2 G B N H1 H2: 2 M with kept bits, else 3 M; 1 M less without parameter gradients. With one hidden layer everything
is elementwise, O(G B N H1).

Bytes a pair, written and read once: scores and g 8, bits H2 / 8 (other activations: z2 and D, 2 to 4 bytes a unit),
parts of du 4 H1 / BJ. A chunk takes at most `memory_budget` bytes (or one tile of pairs); parts of P and dv 32 MiB
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import as_vector, device_guard, sigmoid, softplus
from . import triton_matmuls
from .problem import Slopes
from .triton_common import INTERPRETED, Critic, Tiling, chunks, critic, mode
from .triton_forward import launch_scores
from .triton_layers import first_layer, first_tiling, product, second_layer


@triton.jit(do_not_specialize=["n_rows", "n_cols", "shift"])
def gradient_kernel(
    p_scores, p_g, p_row_lse, p_col_lse, p_g_positive, p_g_row, p_g_col, p_g_sum, p_g_soft,
    n_rows, n_cols, shift, pitch,
    SOFTPLUS: tl.constexpr, OFF_DIAGONAL: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """g [G, R, C] of a chunk from its scores before the output activation."""
    ACC: tl.constexpr = p_scores.dtype.element_ty
    TERMS: tl.constexpr = 17 if ACC == tl.float64 else 8
    n_row_tiles = tl.cdiv(n_rows, BI)
    n_col_tiles = tl.cdiv(n_cols, BJ)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_row_tiles * n_col_tiles)
    o_i = ((pid // n_col_tiles) % n_row_tiles * BI).to(tl.int32) + tl.arange(0, BI)
    o_j = (pid % n_col_tiles * BJ).to(tl.int32) + tl.arange(0, BJ)
    m = (o_i < n_rows)[:, None] & (o_j < n_cols)[None, :]
    m_diagonal = (o_i + shift)[:, None] == o_j[None, :]
    o_row, o_col = i_g * n_rows + o_i, i_g * n_cols + o_j
    b_raw = tl.load(p_scores + o_row[:, None] * pitch + o_j[None, :], mask=m, other=0.0)  # [BI, BJ]
    b_s = softplus(b_raw, TERMS) if SOFTPLUS else b_raw
    b_g = tl.zeros([BI, BJ], dtype=ACC)
    if p_g_sum is not None:
        b_g += tl.load(p_g_sum + o_row, mask=o_i < n_rows, other=0.0)[:, None]
    if p_g_row is not None:
        b_lse = tl.load(p_row_lse + o_row, mask=o_i < n_rows, other=0.0)
        b_g += tl.load(p_g_row + o_row, mask=o_i < n_rows, other=0.0)[:, None] * tl.exp(b_s - b_lse[:, None])
    if p_g_col is not None:
        b_lse = tl.load(p_col_lse + o_col, mask=o_j < n_cols, other=0.0)
        b_g += tl.load(p_g_col + o_col, mask=o_j < n_cols, other=0.0)[None, :] * tl.exp(b_s - b_lse[None, :])
    if p_g_soft is not None:
        b_g += tl.load(p_g_soft + o_row, mask=o_i < n_rows, other=0.0)[:, None] * sigmoid(b_s)
    if OFF_DIAGONAL:
        # Set, not multiplied: over no pair the exponentials above are infinite.
        b_g = tl.where(m_diagonal, 0.0, b_g)
    if p_g_positive is not None:
        b_g += tl.where(m_diagonal, tl.load(p_g_positive + o_row, mask=o_i < n_rows, other=0.0)[:, None], 0.0)
    if SOFTPLUS:
        b_g *= sigmoid(b_raw)
    tl.store(p_g + o_row[:, None] * n_cols + o_j[None, :], b_g, mask=m)


def gradient_tiling(interpreted: bool = False) -> Tiling:
    return Tiling(8, 16, 0, 0, 4, 1) if interpreted else Tiling(8, 128, 0, 0, 4, 1)


def _score_gradient(
    k: Critic, scores: Tensor, lse: Sequence[Tensor | None], grads: Sequence[Tensor | None], shift: int, off: bool
) -> Tensor:
    """g [G, R, C] of a chunk."""
    G, rows, columns = k.sizes
    t = gradient_tiling(INTERPRETED)
    g = torch.empty(k.sizes, dtype=k.accumulator, device=k.u.device)
    gradient_kernel[(G * triton.cdiv(rows, t.BI) * triton.cdiv(columns, t.BJ),)](
        scores, g, *lse, *grads, rows, columns, shift, scores.stride(1),
        SOFTPLUS=k.output == "softplus", OFF_DIAGONAL=off,
        BI=t.BI, BJ=t.BJ, num_warps=t.num_warps, num_stages=t.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return g


def _unit_scale(t: Tensor) -> Tensor:
    """A power of two near the largest size in t: fp16 tiles of t divided by it keep their precision."""
    largest = t.abs().amax()
    return torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest))), 1.0).to(t.dtype)


class _Totals:
    """Gradients added up over chunks, of parameters by name; none of them without `need_parameters`."""

    def __init__(self, k: Critic, need_parameters: bool):
        zeros = lambda t: torch.zeros(t.shape, dtype=k.accumulator, device=t.device)  # noqa: E731
        self.critic = k
        self.u, self.v = zeros(k.u), zeros(k.v)
        self.names = ("w", "b") if k.w2 is None else ("w2", "w", "b2", "b")
        self.of = {n: zeros(getattr(k, n)) for n in self.names} if need_parameters else {}

    def add(self, name: str, part: Tensor, g: slice) -> None:
        """Adds a part [groups of the chunk, ...]."""
        total = self.of.get(name)
        if total is None:
            return
        if self.critic.own:
            total[g] += part.view(part.shape[0], *total.shape[1:])
        else:
            total += part.sum(0).view_as(total)

    def parameters(self) -> list[Tensor]:
        """Of weights, then biases; with bits, P and s become dW2, dw and db2."""
        k, of = self.critic, dict(self.of)
        if of and k.by_bits:
            assert k.w2 is not None and k.b2 is not None
            p, s, wide = of["w2"], of["b2"], k.accumulator
            of["w"] = ((k.w2.to(wide) * p).sum(2) + k.b2.to(wide) * s).unsqueeze(1)
            fold = k.w.to(wide)[:, 0]  # [G, H2]
            of["w2"], of["b2"] = fold[:, :, None] * p, fold * s
        return [of[n] for n in self.names] if of else []


def _add_chunk(total: _Totals, k: Critic, at: tuple[slice, slice, slice], g: Tensor, bits: Tensor | None,
               z: Tensor | None, h: Tensor | None, w2: Tensor | None, w2_scale: Tensor | float) -> None:  # fmt: skip
    """Adds what a chunk with score gradient g gives. `w2` is the right operand of dh1, divided by `w2_scale`; h is h1
    where a chunk's layers are stored."""
    groups, rows, columns = at
    need, two = bool(total.of), k.w2 is not None
    scale: Tensor | float = 1.0
    if need:
        total.add("b", g.sum((1, 2)), groups)
    if k.dtype == torch.float16:
        scale = _unit_scale(g)
        g = g / scale
    if two and (z is not None or need):
        bias, dw = second_layer(k, g, bits, z)
        total.add("b2", bias * scale, groups)
        if dw is not None:
            total.add("w", dw * scale, groups)
    dh = z if h is None or z is None else triton_matmuls.hidden_gradient(k, z)
    du, dv, dw = first_layer(k, g, w2, bits, dh, need and not two)
    total.u[groups, rows] += du * (scale * w2_scale)
    total.v[groups, columns] += dv * (scale * w2_scale)
    if dw is not None:
        total.add("w", dw * scale, groups)
    if need and two:
        of_w2 = product(k, g, bits, z) if h is None or z is None else triton_matmuls.weight_gradient(h, z)
        total.add("w2", of_w2 * scale, groups)


def _right_operand(k: Critic) -> tuple[Tensor | None, Tensor | float]:
    """What D or its bits multiply for dh1, and what it was divided by."""
    if k.w2 is None or not k.by_bits:
        return k.w2, 1.0
    w2 = k.w2.to(k.accumulator) * k.w.to(k.accumulator).mT
    scale = _unit_scale(w2) if k.w2.dtype == torch.float16 else 1.0
    return (w2 / scale).to(k.w2.dtype), scale


def _pair_bytes(k: Critic, kept: bool) -> int:
    """Bytes a pair of a chunk takes: scores and g, bits or z, parts of du."""
    H1, H2 = k.widths
    t = first_tiling(k.dtype, H1, H2, mode(k.dtype) == "tf32", INTERPRETED)
    of_layer = 4 * k.words if k.by_bits else H2 * k.u.element_size()
    wide = k.accumulator.itemsize
    if k.stored:
        return triton_matmuls.pair_bytes(k) + -(-wide * H1 // t.BJ)
    return wide + (0 if kept else wide + of_layer) + -(-wide * H1 // t.BJ)


def backward(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    output: str,
    off_diagonal: bool,
    row_lse: Tensor | None,
    col_lse: Tensor | None,
    slopes: Slopes,
    kept_scores: Tensor,
    kept_bits: Tensor,
    need_parameters: bool,
    memory_budget: int,
) -> list[Tensor]:
    """[du, dv], followed by the gradients of all weights and then all biases when they are needed.

    Costs as the module says. `kept_scores` and `kept_bits` are the forward's, or empty. Raises as
    `triton_common.critic` does.
    """
    k = critic(u, v, weights, biases, activation, output)
    acc, kept = k.accumulator, kept_scores.dim() == 3
    k = replace(k, stored=not kept and triton_matmuls.suits(k, memory_budget))
    row_lse, col_lse, *grads = (as_vector(t, acc) for t in (row_lse, col_lse, *slopes))
    w2, w2_scale = _right_operand(k)
    total = _Totals(k, need_parameters)
    new = lambda *shape, dtype=acc: torch.empty(shape, dtype=dtype, device=u.device)  # noqa: E731
    first = first_tiling(k.dtype, *k.widths, mode(k.dtype) == "tf32", INTERPRETED)
    with device_guard(u):
        for at in chunks(k.sizes, _pair_bytes(k, kept), memory_budget, 8, first.BJ):
            g, r, c = at
            part = k.chunk(g, r, c)
            (G, rows, columns), bits, z, h = part.sizes, None, None, None
            if kept:
                scores, bits = kept_scores[g, r, c], kept_bits[g, r, :, c]
            elif k.stored:
                scores, h, z = triton_matmuls.layers(part)
            else:
                scores = new(G, rows, columns)
                if k.by_bits:
                    bits = new(G, rows, k.words, columns, dtype=torch.int32)
                elif k.w2 is not None:
                    z = new(G, rows, columns, k.w2.shape[1], dtype=k.dtype)
                launch_scores(part, 0, off_diagonal, None, scores=scores, bits=bits, z=z)
            of = lambda t, side, g=g: None if t is None else t[g, side]  # noqa: E731
            sides = (r, r, c, r, r)
            arriving = [of(t, side) for t, side in zip(grads, sides, strict=True)]
            lse = of(row_lse, r), of(col_lse, c)
            ds = _score_gradient(part, scores, lse, arriving, r.start - c.start, off_diagonal)
            w2_here = w2 if w2 is None or not k.own else w2[g]
            _add_chunk(total, part, at, ds, bits, z, h, w2_here, w2_scale)
    found = [total.u, total.v, *total.parameters()]
    inputs = (u, v, *weights, *biases)
    # Parameters that groups share beside others that they do not were spread over the groups.
    found = [d if d.shape == t.shape else d.sum(0, keepdim=True) for d, t in zip(found, inputs, strict=False)]
    return [d.to(t.dtype) for d, t in zip(found, inputs, strict=False)]
