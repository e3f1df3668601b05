"""The Gaussian kernel sums' Triton kernels, specialised as launches do; tests/triton_checks.py compiles them.

A variant is "rbf kernel/case/dtype/D". Cases: "fused" computes gradients, "stored" stores slopes, "value" computes the
value alone, and "direct" is the second launch (pairs that are computed from differences), with gradients.
"""

import torch
from triton.compiler import ASTSource

from mi_kernels.ops.rbf import triton_common, triton_hsic, triton_mmd

KERNELS = {
    "mmd": triton_mmd.mmd_kernel,
    "hsic": triton_hsic.hsic_kernel,
    "hsic_grad": triton_hsic.hsic_grad_kernel,
}
ABSENT = {
    "value": ("p_slope", "p_slope_sum", "p_dz", "p_dwidth"),
    "fused": ("p_slope", "p_slope_sum", "p_slope_x", "p_slope_y"),
    "stored": ("p_dz", "p_dx", "p_dy"),
    "direct": ("p_slope", "p_slope_sum", "p_slope_x", "p_slope_y"),
}
IN_FP64 = ("p_sums", "p_dwidth")
FLOATS = ("xx", "xx_low", "yy", "yy_low", "xy", "xy_low")


def jobs() -> list[str]:
    found = [("mmd", case, dtype, 64) for case in ("value", "fused", "stored") for dtype in ("float32", "float64")]
    found += [("mmd", "fused", "float32", 16)]
    found += [(kernel, "direct", dtype, 64) for kernel in KERNELS for dtype in ("float32", "float64")]
    found += [("hsic", "value", dtype, 64) for dtype in ("float32", "float64")]
    found += [("hsic_grad", case, dtype, 64) for case in ("fused", "stored") for dtype in ("float32", "float64")]
    found += [("hsic_grad", "fused", "float32", 16)]
    # Widths that rule out 16-byte loads. 768 gives the same code as 64, and 300 the same as 74 where slopes are stored.
    found += [("mmd", "fused", "float32", 35), ("hsic_grad", "fused", "float32", 35)]
    found += [(k, c, "float32", 74) for k, c in (("mmd", "stored"), ("mmd", "value"), ("hsic_grad", "stored"))]
    found += [("hsic", "value", "float32", 74), ("hsic", "value", "float32", 35)]
    return ["rbf " + "/".join(str(part) for part in job) for job in found]


def source(variant: str, arch: int):
    name, case, dtype, D = variant.removeprefix("rbf ").split("/")
    kernel, features = KERNELS[name], getattr(torch, dtype)
    sides = 1 if name == "mmd" else 2
    t = triton_common.tiling(features, int(D), False, case != "value", sides, arch >= 90)
    marked = t.BM
    if case == "direct":
        t = triton_common.direct_tiling(t)
    constants = {**t._asdict(), **triton_common.constants(features), "KP": 4}
    constants |= {"MARKED": marked, "DIRECT": case == "direct"}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature, attributes = {}, {}
    wide = "fp64" if dtype == "float64" else "fp32"
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ABSENT[case]:
            signature[argument], constants[argument] = "constexpr", None
        elif argument.startswith("p_"):
            signature[argument] = "*" + ("i8" if argument == "p_near" else "fp64" if argument in IN_FP64 else wide)
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif argument in FLOATS:
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument in ("D", "DX", "DY") and int(D) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages, "enable_fp_fusion": True}
    return ASTSource(kernel, signature, constants, attributes), options
