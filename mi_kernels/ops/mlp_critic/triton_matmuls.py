"""The layers of the MLP critic by torch's matmuls, for chunks of pairs whose layers are stored; Triton fuses the other
steps.

With pairs p = (i, j) of a chunk, flattened, and 16-bit or fp32 weights:

    h1 = act(u_i + v_j)      `hidden_kernel`       z = h1 W2^T + b2           matmul
    S = sum_k w act(z) + b   `score_kernel`        dh1 = D W2, dW2 = D^T h1   matmuls, D in place of z

triton_backward.py has the rest: g, D, and the sums of dh1 act'(u_i + v_j). FLOPs in M = 2 G B N H1 H2: M forward, 3 M
backward, 2 M when the parameters need no gradient. Bytes a pair: 2 (H1 + H2) numbers written or read forward, three
times that backward, which takes about as long as the matmuls on current chips. Fused kernels spare that traffic, at a
far lower rate of products. No GPU has timed either yet.

A chunk takes at most `memory_budget` bytes and about twenty launches. Chunks that fit a level-2 cache would be bound by
these: at B = N = 4096 and H = 512 a budget of 64 MiB means 35 000 launches, where the fused kernels have 700. So this
is for wide layers of which the budget holds LEAST_PAIRS pairs (`suits`). Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.precision import product
from ..common.schedules import named_schedule
from ..common.triton import load_vector
from .triton_common import INTERPRETED, Critic, activate, hidden_tile

NARROWEST = 64  # units of a layer; below it a product of tiles is less than what surrounds it
LEAST_PAIRS = 2**17  # of a chunk; below it launches take longer than what they do
_SPLITS = 8  # of the pairs in dW2 = D^T h1, whose H2 x H1 numbers alone are too few programs


@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def hidden_kernel(p_u, p_v, p_h, n_rows, n_cols, H1, ACT: tl.constexpr, ACC: tl.constexpr, BI: tl.constexpr,
                  BJ: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    """act(u_i + v_j) [G, R, C, H1]."""
    P: tl.constexpr = BI * BJ
    n_row_tiles, n_col_tiles, n_blocks = tl.cdiv(n_rows, BI), tl.cdiv(n_cols, BJ), tl.cdiv(H1, BL)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_row_tiles * n_col_tiles * n_blocks)
    o_l = (pid % n_blocks * BL).to(tl.int32) + tl.arange(0, BL)
    r0 = ((pid // (n_blocks * n_col_tiles)) % n_row_tiles * BI).to(tl.int32)
    c0 = ((pid // n_blocks) % n_col_tiles * BJ).to(tl.int32)
    b_h = hidden_tile(p_u + i_g * n_rows * H1, p_v + i_g * n_cols * H1, r0 + tl.arange(0, BI), c0 + tl.arange(0, BJ),
                      o_l, n_rows, n_cols, H1, ACC, BI, BJ, BL)  # fmt: skip
    o_pi, o_pj = r0 + tl.arange(0, P) // BJ, c0 + tl.arange(0, P) % BJ
    m = ((o_pi < n_rows) & (o_pj < n_cols))[:, None] & (o_l < H1)[None, :]
    p = p_h + ((i_g * n_rows + o_pi) * n_cols + o_pj)[:, None] * H1 + o_l[None, :]
    tl.store(p, activate(b_h, ACT).to(p_h.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n_pairs", "own"])
def score_kernel(p_z, p_w, p_b, p_scores, n_pairs, H2, own, ACT: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr):
    """sum_k w act(z) + b [G, pairs]."""
    ACC: tl.constexpr = p_scores.dtype.element_ty
    n_tiles = tl.cdiv(n_pairs, BP)
    i_g = tl.program_id(0).to(tl.int64) // n_tiles
    o_p = (tl.program_id(0) % n_tiles) * BP + tl.arange(0, BP)
    m_p = o_p < n_pairs
    b_s = tl.zeros([BP], dtype=ACC)
    for i_k in range(0, H2, BK):
        o_k = i_k + tl.arange(0, BK)
        p = p_z + (i_g * n_pairs + o_p)[:, None] * H2 + o_k[None, :]
        b_z = tl.load(p, mask=m_p[:, None] & (o_k < H2)[None, :], other=0.0).to(ACC)  # [BP, BK]
        b_s += tl.sum(activate(b_z, ACT) * load_vector(p_w + i_g * own * H2, o_k, H2, 0.0).to(ACC)[None, :], 1)
    tl.store(p_scores + i_g * n_pairs + o_p, b_s + tl.load(p_b + i_g * own).to(ACC), mask=m_p)


def hidden_blocks(dtype: torch.dtype, H1: int, interpreted: bool = False) -> dict[str, int]:
    """A tile of pairs and units of `hidden_kernel`."""
    if interpreted:
        return {"BI": 4, "BJ": 8, "BL": 16}
    return {"BI": 4, "BJ": 16, "BL": 64 if H1 % 16 == 0 else 32}


def score_blocks(H2: int, interpreted: bool = False) -> dict[str, int]:
    if interpreted:
        return {"BP": 16, "BK": 16}
    return {"BP": 32 if H2 % 16 == 0 else 16, "BK": 128}


def suits(k: Critic, memory_budget: int) -> bool:
    """Whether a critic whose scores and bits are not kept runs through stored chunks: MI_KERNELS_SCHEDULE=fused|stored
    says so, else its size."""
    if k.w2 is None or k.dtype == torch.float64:
        return False
    if named := named_schedule():
        return named == "stored"
    G, B, N = k.sizes
    return min(k.widths) >= NARROWEST and min(G * B * N, memory_budget // pair_bytes(k)) >= LEAST_PAIRS


def pair_bytes(k: Critic) -> int:
    """What a pair of a chunk stores: h1, z, dh1, score and g."""
    H1, H2 = k.widths
    return (2 * H1 + H2) * k.dtype.itemsize + 2 * k.accumulator.itemsize


def layers(k: Critic) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [G, R, C] of a chunk, h1 [G, R C, H1] and z [G, R C, H2]."""
    assert k.w2 is not None and k.b2 is not None
    (G, rows, columns), (H1, H2) = k.sizes, k.widths
    # The interpreter would cut off to bfloat16 instead of rounding.
    short = torch.float32 if INTERPRETED and k.dtype == torch.bfloat16 else k.dtype
    h = torch.empty((G, rows * columns, H1), dtype=short, device=k.u.device)
    t = hidden_blocks(k.dtype, H1, INTERPRETED)
    programs = G * triton.cdiv(rows, t["BI"]) * triton.cdiv(columns, t["BJ"]) * triton.cdiv(H1, t["BL"])
    hidden_kernel[(programs,)](
        k.u, k.v, h, rows, columns, H1, ACT=k.activation, ACC=tl.float32, num_warps=4, enable_fp_fusion=True, **t
    )
    h = h.to(k.dtype)
    if k.own:
        z = torch.baddbmm(k.b2[:, None], h, k.w2.mT)
    else:
        z = torch.addmm(k.b2[0], h.flatten(0, 1), k.w2[0].mT).view(G, rows * columns, H2)
    scores = torch.empty(k.sizes, dtype=k.accumulator, device=k.u.device)
    blocks = score_blocks(H2, INTERPRETED)
    score_kernel[(G * triton.cdiv(rows * columns, blocks["BP"]),)](
        z, k.w, k.b, scores, rows * columns, H2, int(k.own),
        ACT=k.activation, num_warps=4, enable_fp_fusion=True, **blocks,
    )  # fmt: skip
    return scores, h, z


def hidden_gradient(k: Critic, d: Tensor) -> Tensor:
    """dh1 [G, R C, H1] of a chunk from D [G, R C, H2], in the type of the weights as every layer's gradient."""
    assert k.w2 is not None
    return torch.bmm(d, k.w2) if k.own else torch.mm(d.flatten(0, 1), k.w2[0]).view(*d.shape[:2], -1)


def weight_gradient(h: Tensor, d: Tensor) -> Tensor:
    """dW2 [G, H2, H1] of a chunk, summed in the accumulation type."""
    G, pairs, _ = h.shape
    parts = next(n for n in range(_SPLITS, 0, -1) if pairs % n == 0)
    left, right = (t.reshape(G * parts, pairs // parts, -1) for t in (d, h))
    return product(left.mT, right).unflatten(0, (G, parts)).sum(1)
