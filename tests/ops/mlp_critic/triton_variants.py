"""The MLP critic's Triton kernels, specialised as launches do; tests/triton_checks.py compiles them.

A variant is "mlp kernel/case/activation/dtype/H". Both hidden layers have H units. ReLU and GELU represent the two
kinds of second layer (bits, stored gradients); the other activations are compiled only in kernels that evaluate them.
"""

import torch
import triton.language as tl
from triton.compiler import ASTSource

from mi_kernels.ops.mlp_critic import triton_backward, triton_forward, triton_layers, triton_matmuls
from mi_kernels.ops.mlp_critic.activations import ACTIVATIONS

DTYPES = ("bfloat16", "float32", "tf32", "float64")
POINTEES = {"float64": "fp64", "float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OF_WEIGHTS = ("p_w2", "p_b2", "p_w", "p_b", "p_z", "p_d", "p_h")
STATISTICS = ("p_positive", "p_row_sum", "p_row_lse", "p_row_soft", "p_clipped", "p_col_lse")
OTHERS = tuple(a for a in ACTIVATIONS if a not in ("relu", "gelu"))

# Pointers that a case does not pass, besides those of the other kind of second layer.
CASES = {
    "scores": {
        "forward": (),
        "infonce": ("p_positive", "p_row_soft", "p_clipped", "p_col_lse"),
        "again": STATISTICS,
        "one_layer": ("p_w2", "p_b2", "p_bits", "p_z"),
        "given": ("p_bits", "p_z"),
    },
    "second": {"all": ()},
    "first": {
        "two_layers": ("p_dw", "p_w"),
        "one_layer": ("p_w2", "p_bits", "p_d"),
        "given": ("p_dw", "p_w", "p_bits"),
    },
    "hidden": {"all": ()},
    "score": {"all": ()},
    "product": {"all": ()},
    "gradient": {"all": ()},
}


def jobs() -> list[str]:
    both = ("relu", "gelu")
    found = [
        (kernel, case, act, dtype, 512)
        for kernel, case in (("scores", "forward"), ("first", "two_layers"), ("product", "all"))
        for act in both
        for dtype in DTYPES
        if (act, dtype) != ("relu", "float64")  # GELU needs more registers than ReLU
    ]
    found += [(k, c, a, "bfloat16", 512) for k, c in (("scores", "infonce"), ("first", "two_layers")) for a in OTHERS]
    found += [(k, "one_layer", "gelu", d, 512) for k in ("scores", "first") for d in ("bfloat16", "float32")]
    found += [("scores", "again", a, "bfloat16", 512) for a in both]
    found += [
        ("second", "all", a, d, 512) for a, d in (("relu", "bfloat16"), ("gelu", "bfloat16"), ("gelu", "float64"))
    ]
    found += [(k, c, "relu", "float16", 64) for k, c in (("scores", "forward"), ("first", "two_layers"))]
    found += [("product", "all", "relu", "float16", 64), ("gradient", "all", "gelu", "float32", 512)]
    # Hidden widths, and numbers of columns, that rule out 16-byte loads.
    kernels = (("scores", "forward"), ("first", "two_layers"), ("product", "all"))
    found += [(k, c, "relu", d, 300) for k, c in kernels for d in ("bfloat16", "float32")]
    found += [(k, c, "gelu", "bfloat16", 300) for k, c in kernels] + [("scores", "forward", "relu", "bfloat16", 35)]
    # The schedule that stores layers for torch's matmuls.
    found += [(k, "given", "gelu", d, 512) for k in ("scores", "first") for d in ("bfloat16", "float32")]
    found += [(k, "all", a, d, H) for k in ("hidden", "score") for a, d, H in (
        ("gelu", "bfloat16", 512), ("gelu", "float32", 512), ("relu", "bfloat16", 300), ("relu", "bfloat16", 512),
    )]  # fmt: skip
    return ["mlp " + "/".join(str(part) for part in job) for job in found]


def _kernel(name: str, activation: str, features: torch.dtype, tf32: bool, H: int):
    bits = activation in ("relu", "leaky_relu")
    if name == "scores":
        return triton_forward.scores_kernel, triton_forward.tiling(features, H, tf32, activation)
    if name == "hidden":
        return triton_matmuls.hidden_kernel, triton_matmuls.hidden_blocks(features, H)
    if name == "score":
        return triton_matmuls.score_kernel, triton_matmuls.score_blocks(H)
    if name == "gradient":
        return triton_backward.gradient_kernel, triton_backward.gradient_tiling()
    if name == "second":
        return triton_layers.second_layer_kernel, triton_layers.second_tiling(features)
    if name == "first":
        return triton_layers.first_layer_kernel, triton_layers.first_tiling(features, H, H, tf32)
    return triton_layers.product_kernel, triton_layers.product_tiling(features, H, H, tf32, bits)


def source(variant: str):
    name, case, activation, dtype, H = variant.removeprefix("mlp ").split("/")
    odd = int(H) % 16 != 0  # then the number of columns is odd too
    features = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    kernel, t = _kernel(name, activation, features, dtype == "tf32", int(H))
    constants = {"ACT": activation, "SOFTPLUS": case != "infonce", "OFF_DIAGONAL": True}
    constants |= {"CLIP": 5.0 if case in ("forward", "one_layer", "given") else None}
    constants |= {"LAYERS": {"one_layer": 1, "given": 0}.get(case, 2)}
    constants |= {"PRECISION": "tf32" if dtype == "tf32" else "ieee", "DTYPE": triton_layers.TYPES[features]}
    blocks = t if isinstance(t, dict) else {"BP": t.BJ} | t._asdict()
    constants |= {"ACC": tl.float64 if dtype == "float64" else tl.float32} | blocks
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    absent = CASES[name][case]
    if name not in ("hidden", "score"):
        absent += ("p_z", "p_d", "p_w_part") if activation in ("relu", "leaky_relu") else ("p_bits",)
    if case in ("forward", "infonce") and "p_z" not in absent:
        absent += ("p_z",)
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in absent:
            signature[argument], constants[argument] = "constexpr", None
        elif argument.startswith("p_"):
            accumulate = "fp64" if dtype == "float64" else "fp32"
            pointee = "i32" if argument == "p_bits" else POINTEES[dtype] if argument in OF_WEIGHTS else accumulate
            signature[argument] = "*" + pointee
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
            if (argument == "pitch" and not odd) or (argument in ("H1", "H2") and int(H) % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if not isinstance(t, dict):
        options |= {"num_warps": t.num_warps, "num_stages": t.num_stages}
    return ASTSource(kernel, signature, constants, attributes), options
