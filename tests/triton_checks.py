"""Checks the Triton kernels without a GPU: `python -m tests.triton_checks [--update] [--compile]`.

Numerics run in Triton's interpreter, in a subprocess. Every kernel that changed since tests/triton_resources.json was
written (with --all: every kernel) is compiled to a cubin for sm_80 and sm_90 with the settings of a launch. A check
fails if a kernel spills registers, if a headline kernel does not use wgmma on sm_90, or if a kernel differs from the
record (when the record has the installed version of triton). The oldest and the newest supported version are recorded.
pip installs the newest; to check the oldest, run `pip install --no-deps --target FOLDER triton==3.6.0` and
`PYTHONPATH=FOLDER python -m tests.triton_checks --compile`.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from multiprocessing import get_context
from pathlib import Path

RECORD = Path(__file__).with_name("triton_resources.json")
ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
POINTEES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FEATURES = ("p_own", "p_oth", "p_x", "p_y", "p_ds")
CASES = tuple(f"tests.ops.{op}.triton_cases" for op in ("dot_critic", "mlp_critic", "club", "rbf", "cross_attention"))
CASES += ("tests.ops.dot_critic.triton_loss_cases",)
# Modules with jobs(), which returns names of variants, and source(variant[, arch]): the kernel and its compile options.
VARIANTS = tuple(
    f"tests.ops.{op}.triton_variants" for op in ("mlp_critic", "club", "rbf", "dot_critic", "cross_attention")
)

# Kernels that compute most products of a training step; on Hopper they must use its matrix instructions (wgmma).
HEADLINES = (
    "stats/infonce/bfloat16/D512", "both/clip/bfloat16/D512", "dscores/clip/bfloat16/D512", "grad/clip/bfloat16/D128",
    "loss slope/infonce/bfloat16/512", "loss slope/siglip/bfloat16/512", "loss slope/infonce/tf32/512",
    "mlp scores/forward/relu/bfloat16/512", "mlp first/two_layers/relu/bfloat16/512",
    "mlp product/all/relu/bfloat16/512", "rbf mmd/fused/float32/64", "rbf hsic_grad/fused/float32/64",
    *(f"attention {kernel}/softmax dropout/bfloat16/256/256/1" for kernel in ("forward", "query", "key")),
)  # fmt: skip

# The optional inputs that a loss passes, and the constants that it sets. SWAP exchanges rows and columns.
STATS_VARIANTS = {
    "infonce": dict(want=("lse",), PAIRS=0, SOFT_SIGNED=False, SWAP=True, CLIP=None),
    "siglip": dict(want=("soft",), PAIRS=0, SOFT_SIGNED=True, SWAP=False, CLIP=None),
    "smile": dict(want=("lse",), PAIRS=1, SOFT_SIGNED=False, SWAP=False, CLIP=5.0),
    "everything": dict(want=("lse", "soft", "bias"), PAIRS=3, SOFT_SIGNED=True, SWAP=False, CLIP=None),
}
GRAD_VARIANTS = {
    "clip": dict(want=("own_g", "oth_g", "pos_g", "rows"), PAIRS=0, SOFT_SIGNED=False, SWAP=False),
    "siglip": dict(want=("soft_g",), PAIRS=0, SOFT_SIGNED=True, SWAP=True),
    "everything": dict(
        want=("own_g", "oth_g", "soft_g", "pos_g", "rows", "bias"), PAIRS=3, SOFT_SIGNED=True, SWAP=False
    ),
}


BOTH_VARIANTS = {
    "clip": dict(want=(), PAIRS=0, CLIP=None),
    "everything": dict(want=("bias",), PAIRS=3, CLIP=5.0),
}
KINDS = {"stats": STATS_VARIANTS, "grad": GRAD_VARIANTS, "dscores": GRAD_VARIANTS, "both": BOTH_VARIANTS}
DTYPES = (("float32", False), ("float32", True), ("bfloat16", False), ("float16", False), ("float64", False))


# Feature widths of MOSI's and MOSEI's modalities and of BERT; all but the last rule out 16-byte loads.
WIDTHS = (35, 74, 300, 768)


def widths(kind: str, variant: str, dtype: str, tf32: bool) -> tuple[int, ...]:
    """Feature sizes for which a kernel is compiled differently; lighter variants only with the most common sizes."""
    plain = _widths(kind, variant, dtype, tf32)
    own = WIDTHS if (variant, dtype) in [("infonce", d) for d in ("float32", "bfloat16")] else ()
    if (variant, dtype) in [("clip", d) for d in ("float32", "bfloat16")]:
        # Narrow features use the fused kernel, wide features stored slopes.
        own = WIDTHS[:1] if kind == "grad" else WIDTHS[1:] if kind == "dscores" else WIDTHS
    return plain + tuple(w for w in own if not tf32)


def _widths(kind: str, variant: str, dtype: str, tf32: bool) -> tuple[int, ...]:
    full = variant == "everything"
    if dtype == "float16":
        return (512,) if full and kind in ("dscores", "both") else (64,) if full and kind == "grad" else ()
    if dtype == "float64":
        return (32,) if full else ()
    if tf32:
        return (128,) if full else ()
    if kind in ("dscores", "both"):
        return (512,)
    if dtype == "float32":
        return (64,)
    return (128, 512) if kind == "stats" else (64, 128)


def jobs() -> list[tuple]:
    """All jobs: (kind, variant, dtype, tf32, D, arch) of the dot critic, (module, variant, arch) of other operators."""
    others = [(module, what, arch) for module in VARIANTS for what in import_module(module).jobs()
              for arch in ARCHITECTURES]  # fmt: skip
    return others + [
        (kind, variant, dtype, tf32, D, arch)
        for kind, variants in KINDS.items()
        for variant in variants
        for dtype, tf32 in DTYPES
        for D in widths(kind, variant, dtype, tf32)
        for arch in ARCHITECTURES
    ]


def optional(name: str, want: tuple[str, ...]) -> bool:
    """Whether a variant passes a pointer argument."""
    needs = {
        "bias": ("p_own_bias", "p_oth_bias", "p_row_bias", "p_col_bias", "p_row_sum", "p_col_sum"),
        "own_g": ("p_own_lse", "p_own_g", "p_row_lse", "p_row_g"),
        "oth_g": ("p_oth_lse", "p_oth_g", "p_col_lse", "p_col_g"),
        "lse": ("p_lse",),
        "soft": ("p_soft",),
        "soft_g": ("p_soft_g",),
        "pos_g": ("p_pos_g",),
        "rows": ("p_out_scale_rows",),
    }
    return all(need in want for need, names in needs.items() if name in names)


def source(kind: str, variant: str, dtype: str, tf32: bool, D: int, arch: int):
    """The kernel as specialised by a launch with D features, and its compile options."""
    import torch
    from triton.compiler import ASTSource

    from mi_kernels.ops.dot_critic import triton_backward, triton_common, triton_dscores, triton_forward, triton_tiles

    kernel, tiling = {
        "stats": (triton_forward.stats_kernel, triton_forward.tiling),
        "grad": (triton_backward.grad_kernel, triton_backward.tiling),
        "dscores": (triton_dscores.dscores_kernel, triton_dscores.chunk_tiling),
        "both": (triton_tiles.both_sides_kernel, triton_tiles.tiling),
    }[kind]
    chosen = KINDS[kind][variant]
    # The variant "everything" has no registers left for Hopper's larger tiles.
    wide = {"wide": arch >= 90 and variant != "everything"} if kind == "dscores" else {}
    ids = {"ids": chosen["PAIRS"] >= 2} if kind == "stats" else {}
    t = tiling(getattr(torch, dtype), D, tf32, **wide, **ids)
    constants = {k: v for k, v in chosen.items() if k != "want"}
    constants |= {"PRECISION": "tf32" if tf32 else "ieee", "BM": t.BM, "BN": t.BN, "BK": t.BK, "BO": t.BO}
    constants |= {"WHOLE_D": t.BK >= D, "GROUP": triton_common.GROUP, "SHARE": {"own_g", "oth_g"} <= {*chosen["want"]}}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    accumulate = "fp64" if dtype == "float64" else "fp32"
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            ids = name.endswith("_ids")
            if (ids and constants["PAIRS"] < 2) or not optional(name, chosen["want"]):
                signature[name], constants[name] = "constexpr", None
                continue
            pointee = "i64" if ids else POINTEES[dtype] if name in FEATURES else accumulate
            if name.endswith("_lse") or (kind == "both" and name.endswith("_part")):
                pointee = "fp64"
            signature[name] = "*" + pointee
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name == "D" and D % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages, "enable_fp_fusion": True}
    return ASTSource(kernel, signature, constants, attributes), options


def name_of(job: tuple) -> str:
    *what, arch = job
    if what[0] in VARIANTS:
        return f"{what[1]}/sm_{arch}"
    kind, variant, dtype, tf32, D = what
    return f"{kind}/{variant}/{'tf32' if tf32 else dtype}/D{D}/sm_{arch}"


def prepared(job: tuple) -> tuple:
    """A job's name, kernel, compile options and architecture."""
    *what, arch = job
    if what[0] not in VARIANTS:
        return name_of(job), *source(*what, arch), arch
    make = import_module(what[0]).source
    by_architecture = "arch" in signature(make).parameters
    return name_of(job), *make(what[1], **({"arch": arch} if by_architecture else {})), arch


def distinct() -> list[tuple]:
    """The jobs, without those that give the same code as another one: wide kernels take the width as an argument."""
    found: dict[tuple, tuple] = {}
    for job in jobs():
        _, src, options, arch = prepared(job)
        found.setdefault((src.hash(), tuple(sorted(options.items())), arch), job)
    return list(found.values())


def resources(job: tuple) -> tuple[str, dict]:
    import triton
    from triton.backends.compiler import GPUTarget

    name, src, options, arch = prepared(job)
    compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    found = {
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"],
        "spill_bytes": spilled(compiled.asm["ptx"], arch) if used["STACK"] or used["LOCAL"] else 0,
        "shared": compiled.metadata.shared,
    }
    if arch == 90 and name.removesuffix("/sm_90") in HEADLINES:
        found["products"] = products(compiled.asm["ptx"])
    return name, found


def products(ptx: str) -> str:
    """The instructions that multiply tiles: "wgmma" (Hopper), "mma" (Ampere), both, or "none"."""
    kinds = {"wgmma": r"\bwgmma\.mma_async", "mma": r"(?<!wg)\bmma\.sync"}
    return "+".join(kind for kind, pattern in kinds.items() if re.search(pattern, ptx)) or "none"


def spilled(ptx: str, arch: int) -> int:
    """Bytes of register spills that ptxas reports, stores plus loads."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(arch) if signature(get_ptxas).parameters else get_ptxas()  # before Triton 3.6 it had no argument
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "kernel.ptx"
        path.write_text(ptx)
        gpu = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [tool.path, "-v", f"--gpu-name={gpu}", str(path), "-o", f"{path}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stdout + done.stderr))


def fingerprints(jobs: list[tuple]) -> dict[str, str]:
    """Name of a kernel -> a hash of its source, of the functions that it calls, its constants and its compile options.

    Triton's hash includes the line numbers at which functions start. They are set to 0 here, so kernels must be
    compiled in another process."""
    from triton.runtime.jit import JITFunction

    for job in jobs:
        prepared(job)  # imports every kernel
    for found in gc.get_objects():
        if issubclass(type(found), JITFunction):
            found.starting_line_number, found.hash = 0, None
    texts = {name: f"{src.hash()} {sorted(options.items())}" for name, src, options, _ in map(prepared, jobs)}
    return {name: sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def compile_all(known: dict[str, dict]) -> dict[str, dict]:
    """Resources of every kernel. Kernels whose fingerprint is unchanged are taken from `known`, not compiled again."""
    jobs = {name_of(job): job for job in distinct()}
    now = fingerprints(list(jobs.values()))
    rows = {name: known[name] for name in jobs if known.get(name, {}).get("source") == now[name]}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        compiled = dict(pool.map(resources, [job for name, job in jobs.items() if name not in rows]))
    print(f"triton checks: {len(compiled)} kernels compiled, {len(rows)} are those of the record")
    return dict(sorted((rows | {name: row | {"source": now[name]} for name, row in compiled.items()}).items()))


def complaints(rows: dict[str, dict]) -> list[str]:
    found = []
    for name, r in rows.items():
        limit = SHARED_LIMIT[int(name[-2:])]
        if r["spill_bytes"] or r["local"] or r["stack"]:
            found.append(f"{name}: spills {r['spill_bytes']} bytes, stack {r['stack']}, local {r['local']}")
        if r["shared"] > limit:
            found.append(f"{name}: {r['shared']} bytes of shared memory, the limit is {limit}")
        if r.get("products", "wgmma") != "wgmma":
            found.append(f"{name}: multiplies tiles with {r['products']}, not with wgmma")
    return found


def recorded() -> dict[str, dict]:
    """The record: version of triton -> resources of every kernel."""
    return json.loads(RECORD.read_text())


def write(rows: dict[str, dict], version: str) -> None:
    """Replaces the record of the oldest or of the newest supported version, whichever `version` is; keeps the other."""
    from mi_kernels.backends import TRITON_OLDEST

    oldest = lambda v: tuple(map(int, v.split(".")[:2])) == TRITON_OLDEST  # noqa: E731
    kept = {v: r for v, r in recorded().items() if oldest(v) != oldest(version)} | {version: rows}
    text = json.dumps(dict(sorted(kept.items())), indent=1)
    RECORD.write_text(re.sub(r"\n {3}| *\n {2}(?=\})", " ", text) + "\n")


def differences(rows: dict[str, dict], version: str) -> list[str]:
    old = recorded().get(version)
    if old is None:
        return []
    changed = [k for k in sorted(old | rows) if old.get(k) != rows.get(k)]
    return [f"{k}: recorded {old.get(k)}, now {rows.get(k)}" for k in changed]


def interpreted() -> list[subprocess.Popen]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, "-m", module], env=env) for module in CASES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="record the resources")
    parser.add_argument("--compile", action="store_true", help="compile alone, without the interpreter's cases")
    parser.add_argument("--all", action="store_true", help="compile kernels also that did not change since the record")
    args = parser.parse_args()
    if find_spec("triton") is None:
        print("triton checks: skipped, triton is not installed")
        return 0
    import triton

    os.environ.pop("TRITON_INTERPRET", None)
    running = [] if args.compile else interpreted()
    rows = compile_all({} if args.all else recorded().get(triton.__version__, {}))
    for name, r in rows.items():
        print(f"{name:48} registers {r['registers']:3}  shared {r['shared']:6}  spill {r['spill_bytes']}")
    found = complaints(rows)
    if args.update:
        write(rows, triton.__version__)
    else:
        found += differences(rows, triton.__version__)
    found += [f"{' '.join(p.args[1:])} failed" for p in running if p.wait() != 0]
    for line in found:
        print(line)
    print(f"triton checks: {len(rows)} cubins, {len(found)} failures")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
