"""Definition, names and operator schemas of `cross_attention`. Imports only torch.

In a directed pair, a target sequence (queries) attends to a source sequence (keys and values):

    s_ij = scale <q_i, k_j>,  p_i = softmax(s_i) or sparsemax(s_i) over the allowed keys,
    o_i  = sum_j m_ij p_ij v_j,  m_ij = [kept] / (1 - dropout_p)

A pair has query [B, heads, Tq, E], key [B, heads, Tk, E], value [B, heads, Tk, Ev] -> out [B, heads, Tq, Ev] in the
dtype of query. Key j is allowed for query i of item b if j < key_length_b and j - i <= causal_offset. A query with
i >= query_length_b, or without an allowed key, gives a zero row and no gradient. Padded rows of the inputs never affect
a result, even if they contain NaN. Operators take lists: several independent pairs, which may differ in size, in one
call. Per pair:

    query_lengths, key_lengths   [B] int64, or [0] for "all of them"; values are clamped to [0, T]
    causal_offset                int; NO_OFFSET for "no mask"
    scale, dropout_p             float, 0 <= dropout_p < 1; the operators take all of them in one tensor `numbers`
                                 [2, pairs], fp64 on the CPU: a float argument would be a constant of a compiled graph
    seed                         entry of one int64 tensor [pairs]; not used if dropout_p is 0

The forward operator returns the outputs and then the stats, [B, heads, Tq] in the accumulation type (fp64 for fp64,
fp32 otherwise): row_lse_i = log sum_j exp s_ij for softmax, and the threshold tau_i with p_ij = max(s_ij - tau_i, 0)
for sparsemax. The stat of a row without a key is +inf, so that exp(s - stat) and max(s - stat, 0) are 0. If scores are
so large that tau would be rounded up to the highest score, the next smaller number is used and weights are limited to
1, which preserves the support (keys that tie for the highest score then count fully in dv). The backward operator
returns all dq, all dk, all dv, contiguous and in the dtype of the inputs. With delta_i = sum_j p_ij dp_ij and dp_ij =
m_ij <g_i, v_j>,

    softmax:   ds_ij = p_ij (dp_ij - delta_i), where delta_i = <g_i, o_i> too
    sparsemax: ds_ij = [p_ij > 0] (dp_ij - the mean of dp_i where p_i > 0)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i m_ij p_ij g_i

Dropout is a counter hash in 32-bit unsigned arithmetic, the same in every backend. With h = b heads + head,

    mix(x) = x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
    k = mix(mix(mix(seed low word) ^ seed high word) + h);  r1 = mix(k + i);  r2 = mix(k ^ r1)
    x = r1 + 0x9e3779b9 j; x ^= x >> 16; x *= 0x7feb352d; x ^= r2; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
    kept when x >= floor(dropout_p 2^32)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import schema, split
from ..common.dtypes import accumulate_dtype
from .problem import OperatorRule, Pairs, Results

NORMALIZERS = ("softmax", "sparsemax")
NO_OFFSET = 2**31 - 1
# Limits of the CUDA kernels. csrc/cross_attention/schema.h repeats them; tests/ops/common/test_schemas.py compares the
# two.
MOST_FEATURES, MOST_PAIRS = 16, 16

library = torch.library.Library("mi_kernels", "FRAGMENT")
library.define(f"cross_attention_forward({schema(Pairs, OperatorRule)}, str backend) -> Tensor[]")
library.define(
    f"cross_attention_backward(Tensor[] grad_out, {schema(Pairs, Results, OperatorRule)}, str backend) -> Tensor[]"
)


def dropout_threshold(p: float) -> int:
    """Hashes below this 32-bit number are dropped."""
    return int(p * 2.0**32)


@torch.library.register_fake("mi_kernels::cross_attention_forward", lib=library)
def _forward_fake(*arguments: Any) -> list[Tensor]:
    query, _, value = split(arguments, Pairs)[0][:3]
    outs = [q.new_empty((*q.shape[:3], v.shape[3])) for q, v in zip(query, value, strict=True)]
    return outs + [q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype)) for q in query]


@torch.library.register_fake("mi_kernels::cross_attention_backward", lib=library)
def _backward_fake(grad_out: Any, *arguments: Any) -> list[Tensor]:
    query, key, value = split(arguments, Pairs)[0][:3]
    return [t.new_empty(t.shape) for t in (*query, *key, *value)]
