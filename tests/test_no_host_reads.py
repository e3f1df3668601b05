"""On a GPU, losses, bounds and their gradients neither read tensors on the host nor use atomic additions.

Runs without a GPU (tests/absent_gpu.py); tests/gpu/test_stream.py tests the same on a real one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mi_kernels as mk
from mi_kernels.distributed import ring, supcon
from mi_kernels.distributed.exchange import Ranks
from mi_kernels.ops.club.api import gaussian_club
from mi_kernels.ops.dot_critic import dispatch
from mi_kernels.ops.dot_critic.problem import Problem, Slopes
from mi_kernels.ops.dot_critic.schema import COL_LSE, ROW_LSE, SIGNED, SOFTPLUS

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels are interpreted here", allow_module_level=True)

from tests.absent_gpu import DEVICE, absent_gpu, tensor

Make = Callable[..., torch.Tensor]
READS = (RuntimeError, NotImplementedError)

LOSSES: dict[str, Callable[[Make], torch.Tensor]] = {
    "one-sided": lambda t: mk.info_nce(t(2, 40, 9), t(2, 40, 9)),
    "symmetric": lambda t: mk.info_nce(t(40, 9), t(40, 9), symmetric=True, temperature=t()),
    "rows": lambda t: mk.info_nce(t(40, 9), t(40, 9), temperature=t(), reduction="none"),
    "ids": lambda t: mk.info_nce(t(40, 9), t(40, 9), query_ids=t(40, dtype=torch.int64)),
    "negatives": lambda t: mk.info_nce(t(40, 9), t(40, 9), t(7, 9), temperature=t()),
    "paired negatives": lambda t: mk.info_nce(t(40, 9), t(40, 9), t(40, 7, 9), negative_mode="paired"),
    "16 bit, many features": lambda t: mk.info_nce(*(t(4096, 512, dtype=torch.bfloat16) for _ in range(2))),
    "clip": lambda t: mk.clip_loss(t(40, 9), t(40, 9), t()),
    "siglip": lambda t: mk.siglip_loss(t(40, 9), t(40, 9), t(), t()),
    "nt_xent": lambda t: mk.nt_xent(t(40, 9), t(40, 9), t()),
    "sup_con": lambda t: mk.sup_con(t(40, 2, 9), t(40, dtype=torch.int64), temperature=t()),
    "club": lambda t: gaussian_club(t(40, 9), t(40, 9), t(40, 9)),
    "mmd": lambda t: mk.mmd(t(40, 9), t(30, 9)),
    "mmd, learned bandwidth": lambda t: mk.mmd(t(40, 9), t(30, 9), bandwidth=(t(), 2.0)),
    "gaussian_mmd": lambda t: mk.gaussian_mmd(t(40, 9)),
    "hsic": lambda t: mk.hsic(t(40, 9), t(40, 3)),
    "hsic, bandwidths": lambda t: mk.hsic(t(40, 9), t(40, 3), bandwidth=(t(), 2.0), normalized=False),
}
# Losses that launch no Triton kernel here: "rows" calls an operator of torch.ops, which runs its fake implementation
# for meta tensors; "paired negatives" is a product of rows in plain torch.
BY_OPERATOR = ("rows", "paired negatives")
# On a GPU these operators add in an arbitrary order (index_put sorts first).
BY_ATOMICS = ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "embedding_dense_backward")
BOUNDS = (
    mk.InfoNCE, mk.NCECLUB, mk.NWJ, mk.TUBA, mk.DonskerVaradhan, mk.MINE, mk.JensenShannon, mk.SMILE,
    mk.InterpolatedBound,
)  # fmt: skip




class _Atomics(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.__name__.startswith(BY_ATOMICS), function
        return function(*args, **(kwargs or {}))


def gradients(value: torch.Tensor) -> None:
    with _Atomics():
        value.sum().backward()


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradients_read_nothing(name, backend):
    leaves = []

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        leaves.append(tensor(*shape, dtype=dtype))
        return leaves[-1]

    with absent_gpu() as launched, mk.use_backend(backend):
        with _Atomics():
            value = LOSSES[name](leaf)
        assert value.device == DEVICE
        gradients(value)
    assert bool(launched) == (backend == "triton" and name not in BY_OPERATOR)
    for t in leaves:
        if t.requires_grad:
            assert t.grad is not None and t.grad.shape == t.shape and t.grad.dtype == t.dtype


@pytest.mark.parametrize("schedule", ["fused", "stored"])
@pytest.mark.parametrize("depth", [9, 300])
def test_both_schedules_of_16_bits_read_nothing(monkeypatch, schedule, depth):
    monkeypatch.setenv("MI_KERNELS_SCHEDULE", schedule)
    with absent_gpu() as launched, mk.use_backend("triton"):
        for dtype in (torch.bfloat16, torch.float16):
            x, y = (tensor(40, depth, dtype=dtype) for _ in range(2))
            gradients(mk.info_nce(x, y) + mk.siglip_loss(x, y, tensor(), tensor()))
            assert x.grad.shape == x.shape
    assert ("slope_kernel" in launched) == (schedule == "stored")


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda b: b.__name__)
def test_a_bound_reads_nothing(bound, backend):
    critics = {
        "temperature": lambda: mk.DotCritic(temperature=torch.ones(())),
        "cosine": lambda: mk.DotCritic(normalize=True),
        "separable": lambda: mk.SeparableCritic(9, 9, hidden_dims=(8,), embed_dim=6),
        "concat": lambda: mk.ConcatCritic(9, 9, hidden_dims=(8, 8)),
    }
    with absent_gpu(), mk.use_backend(backend):
        for make in critics.values():
            module = bound(make()).to(DEVICE)
            for shape in ((40, 9), (2, 40, 9)):
                x = tensor(*shape)
                gradients(module(x, tensor(*shape)).sum() + module.learning_loss(x, tensor(*shape)).sum())
                assert x.grad.device == DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [9, 300])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_statistics_and_their_gradients_read_nothing(backend, depth, dtype):
    with absent_gpu() as launched, torch.no_grad():
        x, y = tensor(2, 40, depth, dtype=dtype), tensor(2, 30, depth, dtype=dtype)
        problem = Problem(x, y, tensor(2), *(None,) * 4, 0, 0)
        row, col, soft = dispatch.run_stats(problem, ROW_LSE | COL_LSE | SOFTPLUS | SIGNED, math.inf, backend)
        assert (row.shape, col.shape, soft.shape) == ((2, 40), (2, 30), (2, 40))
        found = dispatch.run_grad(problem, Slopes(row, col, row, col, soft, soft, True), 31, backend)
        assert [g.shape for g in found[:3]] == [(2, 40, depth), (2, 30, depth), (2,)]
    assert bool(launched) == (backend == "triton")


@pytest.mark.parametrize("read", [lambda t: t.sum().item(), lambda t: bool((t > 0).all()), lambda t: t.nonzero()])
def test_a_read_would_be_seen(read):
    with absent_gpu(), pytest.raises(READS):
        read(tensor(4, 3))


@pytest.mark.parametrize("shape", [(40,), (2, 40)], ids=str)
def test_estimates_within_labels_read_the_labels_alone(shape):
    """As documented, only the labels are read on the host, because the number and sizes of groups depend on them."""
    bound = mk.InfoNCE(mk.DotCritic(), condition="group")
    with absent_gpu():
        x = tensor(*shape, 9)
        gradients(bound(x, tensor(*shape, 9), torch.arange(math.prod(shape)).reshape(shape) // 3))
        assert x.grad.shape == x.shape
        with pytest.raises(READS):
            bound(x, tensor(*shape, 9), tensor(*shape, dtype=torch.int64))


class _Copies(TorchDispatchMode):
    """Counts copies from the host to the absent device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__.startswith("_to_copy") and args[0].device != out.device:
            self.count += 1
        return out


def test_estimates_within_labels_copy_positions_once_however_many_sizes_the_groups_have():
    bound = mk.InfoNCE(mk.DotCritic(), condition="group")
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])  # groups of four sizes
    with absent_gpu(), _Copies() as copies:
        bound(tensor(10, 9), tensor(10, 9), labels)
    assert copies.count == 1


def test_sup_con_around_a_ring_reads_no_labels(monkeypatch):
    class Arrived:
        def __init__(self, tensors):
            self.tensors = tensors

        def received(self):
            return self.tensors

    monkeypatch.setattr(ring._Neighbours, "pass_on", lambda self, tensors, owner, tag: Arrived(tensors))
    columns = ring.Columns(Ranks(0, (80, 80)), None, ring.ROW_LSE, True, "chunked", torch.float32)
    with absent_gpu():
        features, labels = tensor(40, 2, 9), tensor(40, dtype=torch.int64)
        with _Atomics():
            rows, _ = supcon._sup_con_ring(features, labels, 2, 3.0, columns)
        gradients(rows)
        assert features.grad.shape == features.shape
