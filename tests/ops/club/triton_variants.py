"""The CLUB bound's Triton kernels, specialised as launches do; tests/triton_checks.py compiles them.

A variant is "club kernel/case/dtype".
"""

import torch
from triton.compiler import ASTSource

from mi_kernels.ops.club import triton as kernels
from mi_kernels.ops.club.schema import MOMENTS

POINTEES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OF_INPUTS = ("p_mu", "p_logvar", "p_y", "p_dmu", "p_dlogvar", "p_dy")
KERNELS = {
    "moments": kernels.moments_kernel,
    "combine": kernels.combine_kernel,
    "gradient": kernels.gradient_kernel,
}


def jobs() -> list[str]:
    found = [(k, "variances", d) for k in ("moments", "gradient") for d in ("bfloat16", "float32", "float64")]
    found += [("moments", "unit", "bfloat16"), ("gradient", "unit", "bfloat16")]
    found += [("combine", "all", d) for d in ("float32", "float64")]
    found += [(k, "odd width", d) for k in ("moments", "gradient") for d in ("bfloat16", "float32")]
    found.append(("combine", "odd width", "float32"))
    return ["club " + "/".join(job) for job in found]


def source(variant: str):
    name, case, dtype = variant.removeprefix("club ").split("/")
    odd = case == "odd width"
    kernel, t = KERNELS[name], kernels.tiling(getattr(torch, dtype))
    constants = {"MOMENTS": MOMENTS, "BM": t.BM, "BD": t.BF if name == "combine" else t.BD, "BK": t.BK}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    absent = ("p_logvar", "p_dlogvar") if case == "unit" else ()
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in absent:
            signature[argument], constants[argument] = "constexpr", None
        elif argument.startswith("p_"):
            wide = "fp64" if dtype == "float64" else "fp32"
            signature[argument] = "*" + (POINTEES[dtype] if argument in OF_INPUTS else wide)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
            if argument == "D" and not odd:
                attributes[(i,)] = [["tt.divisibility", 16]]
    warps = t.num_warps * (2 if name == "gradient" else 1)
    return ASTSource(kernel, signature, constants, attributes), {"num_warps": warps, "enable_fp_fusion": True}
