"""Kernels of the dot critic's losses, specialised as launches do; tests/triton_checks.py compiles them.

A variant is "loss kernel/case/dtype/D".
"""

import torch
import triton.language as tl
from triton.compiler import ASTSource

from mi_kernels.ops.dot_critic import triton_common, triton_rows, triton_stored, triton_tiles

POINTEES = {"float64": "fp64", "float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OF_INPUTS = ("p_x", "p_y", "p_ds", "p_right")  # in the features' dtype; gradients have the accumulation type
WIDTHS = (35, 74, 300, 768)  # of tests/triton_checks.py
FLOATS = ("w_row", "w_col", "w_soft", "w_pos", "share")
KERNELS = {
    "normalize": triton_rows.normalize_kernel,
    "normalize_back": triton_rows.normalize_back_kernel,
    "sum": triton_rows.sum_kernel,
    "slope": triton_stored.slope_kernel,
    "finish": triton_stored.finish_kernel,
    "join": triton_tiles.join_kernel,
}
# Constants of each loss in the chunked schedule; then the pointers that a case does not pass.
STORED = {
    "infonce": dict(SOFT=False, SIGNED=False, OFF_DIAGONAL=False, POSITIVE=True),
    "nt_xent": dict(SOFT=False, SIGNED=False, OFF_DIAGONAL=True, POSITIVE=True),
    "siglip": dict(SOFT=True, SIGNED=True, OFF_DIAGONAL=False, POSITIVE=False),
    "value": dict(SOFT=False, SIGNED=False, OFF_DIAGONAL=False, POSITIVE=True),
}
ABSENT = {
    "infonce": ("p_row_bias", "p_col_bias", "p_col_lse", "p_soft", "p_ds_part"),
    "nt_xent": ("p_row_bias", "p_ds_part"),
    "siglip": ("p_norm", "p_top"),
    "value": ("p_row_bias", "p_ds_part", "p_ds", "p_inverse", "p_ds_sum", "p_right"),
}


def jobs() -> list[str]:
    both = ("normalize", "normalize_back")
    found = [(k, "all", dtype, D) for k in both for dtype in ("bfloat16", "float32", "float64") for D in (128, 512)]
    found += [(k, "all", dtype, D) for k in both for dtype in ("bfloat16", "float32") for D in WIDTHS]
    found += [("sum", "infonce", "float32", D) for D in WIDTHS]
    found += [("sum", case, dtype, 512) for case in ("all", "infonce") for dtype in ("bfloat16", "float32")]
    found += [("sum", "all", "float64", 512), ("sum", "infonce", "bfloat16", 64)]
    found += [(k, c, "bfloat16", 512) for k in ("slope", "finish") for c in STORED if (k, c) != ("finish", "siglip")]
    found += [("finish", "nt_xent", "bfloat16", D + -D % 16) for D in WIDTHS]  # padded; one width is enough for slope
    found += [("slope", "siglip", "float16", 512)]
    found += [("slope", c, d, 512) for c in ("infonce", "siglip") for d in ("float32", "tf32")]
    found += [("finish", "nt_xent", "float32", 512)]
    found += [("join", "all", dtype, 512) for dtype in ("float32", "float64")]
    return ["loss " + "/".join(str(part) for part in job) for job in found]


def source(variant: str, arch: int):
    name, case, dtype, D = variant.removeprefix("loss ").split("/")
    kernel, wide, tf32 = KERNELS[name], dtype == "float64", dtype == "tf32"
    BM, BD = triton_rows.blocks(int(D))
    features = getattr(torch, "float32" if tf32 else dtype)
    t = triton_stored.tiling(features, tf32, case == "siglip", case != "value", arch >= 90)
    constants = {"ACC": tl.float64 if wide else tl.float32, "BM": BM, "BD": BD, "POSITIVE": True}
    if name == "slope":
        constants |= {"BM": t.BM, "BN": t.BN, "BK": t.BK, "GROUP": triton_common.GROUP}
        constants["PRECISION"] = "tf32" if tf32 else "ieee"
    if name == "join":
        constants |= {"ADD": True, **triton_tiles.join_blocks()}
    if name == "finish":
        constants |= triton_stored.finish_blocks(int(D))
    constants |= STORED.get(case, {})
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ABSENT.get(case, ()):
            signature[argument], constants[argument] = "constexpr", None
        elif argument.startswith("p_"):
            unit_rows = name == "normalize" and argument.endswith("_out")
            in_fp64 = wide or name == "join" or (name, argument) == ("sum", "p_part") or argument.endswith("_lse")
            accumulate = "fp64" if in_fp64 else "fp32"
            signature[argument] = "*" + (POINTEES[dtype] if argument in OF_INPUTS or unit_rows else accumulate)
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif argument in FLOATS:
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument == "D" and int(D) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options: dict = {"num_warps": 4, "enable_fp_fusion": True}
    if name == "slope":
        options |= {"num_warps": t.num_warps, "num_stages": t.num_stages}
    return ASTSource(kernel, signature, constants, attributes), options
