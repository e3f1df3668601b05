"""Counts the work that losses cause on a GPU, without a GPU: `python -m tests.gpu_counts [--update]`.

A loss and its gradients run on torch's meta device with the settings of real launches, and every torch operator and
every Triton launch is recorded. These are counts and models, not measurements:

launches  torch operators that start a kernel, plus Triton's launches
bytes     every tensor of a launch counted once, read or written: the traffic if reuse within a launch stays in cache
flop      of matmuls and of Triton's products of pairs, in units of N = 2 B^2 D (M = 2 B^2 H^2 for the concat critic)

bench/results/gpu_counts.json has the table ("now") and the counts before the schedules that it names ("before").
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mi_kernels as mk
import mi_kernels.ops
from mi_kernels.ops.club.api import gaussian_club
from mi_kernels.ops.common import precision
from tests.absent_gpu import tensor

RECORD = Path(__file__).resolve().parent.parent / "bench/results/gpu_counts.json"
BF16 = torch.bfloat16
# Torch operators that launch no kernel.
FREE = ("view", "expand", "slice", "select", "detach", "empty", "alias", "squeeze", "transpose", "permute", "resize_",
        "_local_scalar_dense", "unbind", "split", "t.default", "lift_fresh", "_to_copy_none")  # fmt: skip


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0
        self.flop = 0.0

    def add(self, name: str, tensors: Any, flop: float = 0.0) -> None:
        self.names.append(name)
        self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))
        self.flop += flop

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__
        if not any(free in name for free in FREE):
            flop = 0.0
            if name.startswith(("bmm", "baddbmm", "mm", "addmm")):
                a, b = [t for t in args if isinstance(t, Tensor)][-2:]
                flop = 2.0 * a.numel() * b.shape[-1]
            inplace = name.split(".")[0].endswith("_")
            self.add(name, (args, out if not inplace else args[0]), flop)
        return out

    def launch(self, kernel: Any, args: tuple, kwargs: dict) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        name = kernel.fn.__name__
        read = [t for n, t in given.items() if n not in SPARSE.get(name, ())]
        self.add(f"triton {name}", read, FLOP.get(name, lambda g: 0.0)(given))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """A matmul of 16-bit factors with an fp32 result: one launch on a GPU. Torch has no shape function for it."""
        with torch.utils._python_dispatch._disable_current_modes():
            out = torch.empty((*a.shape[:-1], b.shape[-1]), device=a.device, dtype=torch.float32)
        self.add("bmm", (a, b, out), 2.0 * a.numel() * b.shape[-1])
        return out

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        self.add("baddbmm", (total, a, b, total), 2.0 * a.numel() * b.shape[-1])


def _kernel_modules() -> list:
    names = [m.name for m in pkgutil.walk_packages(mi_kernels.ops.__path__, "mi_kernels.ops.")]
    return [importlib.import_module(n) for n in names if n.rsplit(".", 1)[-1].startswith("triton")]


def _pairs(g: dict, own: str, oth: str) -> float:
    return 2.0 * g[own] * g[oth] * g["D"]


def _layers(g: dict) -> float:
    return 2.0 * g["n_rows"] * g["n_cols"] * g["H1"] * (g["H2"] if g["LAYERS"] == 2 else g["LAYERS"])


def _distances(g: dict, *widths: str) -> float:
    """FLOP of squared distances and, if gradients are fused, of their products; DIRECT counts 0, as it has few
    pairs."""
    if g["DIRECT"]:
        return 0.0
    rows, gradients = g.get("n_own", g["n"]), [g.get(p) for p in ("p_dz", "p_dx", "p_dy")]
    half = 0.5 if "n_x" in g and g["p_slope"] is None and g["p_dz"] is None else 1.0
    once = sum(2.0 * rows * g["n"] * g[w] for w in widths)
    return once * (half + any(t is not None for t in gradients))


# Tensors of which a launch accesses only one element per row.
SPARSE = {"finish_kernel": ("p_ds",)}
# FLOP per group of the launches that compute products of pairs, from their arguments.
FLOP: dict[str, Callable[[dict], float]] = {
    "stats_kernel": lambda g: _pairs(g, "n_own", "n_oth"),
    "pair_kernel": lambda g: _pairs(g, "n_row", "n_col"),
    "grad_kernel": lambda g: 2 * _pairs(g, "n_own", "n_oth"),
    "both_sides_kernel": lambda g: _pairs(g, "n_chunk", "n_col"),
    "dscores_kernel": lambda g: _pairs(g, "n_chunk", "n_col"),
    "slope_kernel": lambda g: _pairs(g, "n_chunk", "n_col"),
    "scores_kernel": lambda g: _layers(g),
    "first_layer_kernel": lambda g: _layers(g),
    "mmd_kernel": lambda g: _distances(g, "D"),
    "hsic_kernel": lambda g: _distances(g, "DX", "DY"),
    "hsic_grad_kernel": lambda g: _distances(g, "DX", "DY"),
    "product_kernel": lambda g: 2.0 * g["n_rows"] * g["n_cols"] * g["H1"] * g["H2"],
}


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts the launches on the meta device, with the settings of launches on a GPU."""
    from triton.runtime.jit import JITFunction

    counter = Counter()
    with contextlib.ExitStack() as stack:
        patch = lambda *a: stack.enter_context(mock.patch.object(*a))  # noqa: E731
        of_counter = {precision.product: counter.product, precision.add_product: counter.add_product}
        for module in _kernel_modules():
            for name in ("check", "_check"):
                if hasattr(module, name):
                    patch(module, name, lambda *a: None)
            for name, value in list(vars(module).items()):
                if callable(value) and value in of_counter:
                    patch(module, name, of_counter[value])
            if module.__name__.endswith("mlp_critic.triton_common"):
                patch(module, "INTERPRETED", True)  # only this module asks for the device
        stack.enter_context(mock.patch("mi_kernels.backends._interpreting", lambda: True))
        patch(JITFunction, "run", lambda self, *args, grid=None, warmup=None, **kw: counter.launch(self, args, kw))
        stack.enter_context(mk.use_backend("triton"))
        with counter:
            yield counter


def _info_nce(symmetric: bool, dtype: torch.dtype) -> Callable:
    return lambda b, d: mk.info_nce(tensor(b, d, dtype=dtype), tensor(b, d, dtype=dtype), symmetric=symmetric)


def _siglip(b: int, d: int) -> Tensor:
    return mk.siglip_loss(tensor(b, d, dtype=BF16), tensor(b, d, dtype=BF16), tensor(), tensor())


def _concat(b: int, hidden: int, **options: Any) -> Tensor:
    critic = mk.ConcatCritic(128, 128, hidden_dims=(hidden, hidden), **options).to("meta", BF16)
    return mk.InfoNCE(critic)(tensor(b, 128, dtype=BF16), tensor(b, 128, dtype=BF16))


def _roomy_concat(b: int, hidden: int) -> Tensor:
    return _concat(b, hidden, memory_budget=2**29)


CASES: dict[str, tuple[Callable[[int, int], Tensor], tuple[tuple[int, int], ...]]] = {
    "InfoNCE one-sided, bfloat16": (_info_nce(False, BF16), ((1024, 512), (32768, 512), (262144, 512))),
    "InfoNCE symmetric, bfloat16": (_info_nce(True, BF16), ((1024, 512), (32768, 512))),
    "InfoNCE one-sided, float16": (_info_nce(False, torch.float16), ((32768, 512),)),
    "InfoNCE one-sided, float32": (_info_nce(False, torch.float32), ((4096, 128), (4096, 300))),
    "SigLIP, bfloat16": (_siglip, ((1024, 768), (65536, 768))),
    "CLUB, bfloat16": (lambda b, d: gaussian_club(*(tensor(b, d, dtype=BF16) for _ in range(3))), ((65536, 512),)),
    "MMD, float32": (lambda b, d: mk.mmd(tensor(b, d), tensor(b, d), bandwidth=2.0), ((4096, 64), (8192, 256))),
    "HSIC, float32": (lambda b, d: mk.hsic(tensor(b, d), tensor(b, d), bandwidth=2.0), ((4096, 64),)),
    "concat critic InfoNCE, bfloat16": (_concat, ((4096, 512),)),
    "concat critic InfoNCE, bfloat16, 512 MiB": (_roomy_concat, ((4096, 512),)),
}


def count(loss: Callable[[int, int], Tensor], batch: int, width: int) -> dict[str, float]:
    with counted() as counter:
        loss(batch, width).sum().backward()
    unit = 2.0 * batch**2 * width * (width if loss in (_concat, _roomy_concat) else 1)
    return {
        "launches": len(counter.names),
        "of triton": sum(n.startswith("triton ") for n in counter.names),
        "mib": round(counter.bytes / 2**20, 1),
        "flop": round(counter.flop / unit, 3),
    }


def table() -> dict[str, dict[str, float]]:
    return {f"{name}, {b} x {d}": count(loss, b, d) for name, (loss, sizes) in CASES.items() for b, d in sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.name}; what stands before stays")
    arguments = parser.parse_args()
    now = table()
    for name, row in now.items():
        print(f"{name:60s} {row}")
    if arguments.update:
        found = json.loads(RECORD.read_text())
        RECORD.write_text(json.dumps({**found, "now": now}, indent=1) + "\n")


if __name__ == "__main__":
    main()
