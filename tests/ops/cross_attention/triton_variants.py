"""Attention's Triton kernels, specialised as launches do; tests/triton_checks.py compiles them.

A variant is "attention kernel/normalizer/dtype/E/EV/pairs"; "dropout" may follow the normalizer.
"""

import torch
from triton.compiler import ASTSource

from mi_kernels.ops.cross_attention import triton_backward, triton_forward
from mi_kernels.ops.cross_attention.triton_common import MOST_REGISTERS

POINTEES = {"float64": "fp64", "float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OF_INPUTS = ("p_query", "p_key", "p_value", "p_grad", "p_out", "p_dquery", "p_dkey", "p_dvalue")
KERNELS = {
    "forward": (triton_forward.forward_kernel, triton_forward.tiling, 17),
    "query": (triton_backward.query_kernel, triton_backward.query_tiling, 20),
    "key": (triton_backward.key_kernel, triton_backward.key_tiling, 20),
}
# The choices of a launch that need most registers: MulT's six pairs, heads whose features stay in registers, and wider
# heads that are processed in blocks.
CASES = (
    "softmax dropout/bfloat16/8/8/6",
    "softmax/bfloat16/64/64/1",
    "sparsemax dropout/bfloat16/128/128/1",
    "softmax dropout/bfloat16/256/256/1",
    "sparsemax dropout/float32/10/10/6",
    "sparsemax dropout/float32/768/709/1",
    "sparsemax dropout/tf32/64/64/1",
    "softmax dropout/tf32/256/256/1",
    "sparsemax dropout/float64/64/64/1",
)


def jobs() -> list[str]:
    return [f"attention {kernel}/{case}" for kernel in KERNELS for case in CASES]


def source(variant: str):
    name, normalizer, dtype, *numbers = variant.removeprefix("attention ").split("/")
    E, EV, pairs = (int(n) for n in numbers)
    kernel, tiling, columns = KERNELS[name]
    t = tiling(torch.float32 if dtype == "tf32" else getattr(torch, dtype), E, EV, dtype == "tf32")
    constants = {"SPARSE": normalizer.startswith("sparsemax"), "DROPS": normalizer.endswith("dropout"), "N": pairs}
    constants["ALIGN"] = 16 if E % 16 == 0 and EV % 16 == 0 else 1
    constants["PRECISION"] = "tf32" if dtype == "tf32" else "ieee"
    constants |= {"BM": t.BM, "BN": t.BN, "BE": t.BE, "BV": t.BV}
    constants["WHOLE"] = t.whole(E, 0 if name == "forward" else EV)
    signature: dict = {}
    attributes = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "sizes":
            signature[argument] = ("i32",) * (columns * pairs)
        elif argument == "numbers":
            signature[argument] = ("fp32",) * (4 * pairs)
        elif argument in ("E", "EV"):
            signature[argument] = "i32"
            if (E if argument == "E" else EV) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif argument == "p_seed":
            signature[argument] = "*i64"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            accumulate = "fp64" if dtype == "float64" else "fp32"
            pointee = POINTEES[dtype] if argument in OF_INPUTS else accumulate
            signature[argument] = ("*i64" if argument.endswith("_lengths") else "*" + pointee,) * pairs
            attributes |= {(i, n): [["tt.divisibility", 16]] for n in range(pairs)}
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages, "enable_fp_fusion": True}
    options["maxnreg"] = MOST_REGISTERS
    return ASTSource(kernel, signature, constants, attributes), options
