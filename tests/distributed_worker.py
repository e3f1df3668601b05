"""One rank of tests/test_distributed.py: `python distributed_worker.py RANK WORLD STORE OUT`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import mi_kernels as mk
from mi_kernels.compat import lightly, open_clip
from mi_kernels.compat.pytorch_metric_learning import losses
from mi_kernels.compat.pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from tests.compat.originals import original

ITEMS, WIDTH = 5, 4
FLAGS = [(local, grad) for local in (False, True) for grad in (False, True)]


def everything(world: int) -> dict[str, torch.Tensor]:
    """The pairs of all ranks; every rank and the parent draw the same."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "x": F.normalize(draw(world * ITEMS, WIDTH), dim=1),
        "y": F.normalize(draw(world * ITEMS, WIDTH), dim=1),
        "views": F.normalize(draw(world * ITEMS, 2, WIDTH), dim=-1),
        "scale": torch.tensor(7.0, dtype=torch.float64),
        "bias": torch.tensor(-3.0, dtype=torch.float64),
        "ids": torch.arange(world * ITEMS) % 7,
        "labels": torch.tensor([0, 1, 2, 9, 0, 1, 1, 8, 0, 5, 6, 7, 2, 2, 3])[: world * ITEMS],
    }


def ours(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The losses of one rank, or of a single process that holds all pairs."""
    x, y, scale, bias = t["x"], t["y"], t["scale"], t["bias"]
    d = mk.distributed
    return {
        "info_nce": d.info_nce(x, y, 1 / scale),
        "info_nce_symmetric": d.info_nce(x, y, 1 / scale, symmetric=True, normalize=False),
        "info_nce_ids": d.info_nce(x, y, 1 / scale, query_ids=t["ids"], symmetric=True),
        "clip_loss": d.clip_loss(x, y, scale, bias),
        "siglip_loss": d.siglip_loss(x, y, scale, bias),
        "nt_xent": d.nt_xent(x, y, 1 / scale),
        "sup_con": d.sup_con(t["views"], t["labels"], temperature=1 / scale),
        "sup_con_one": d.sup_con(t["views"], t["labels"], temperature=1 / scale, contrast_mode="one"),
        "sim_clr": d.sup_con(t["views"], temperature=1 / scale),
        "lightly_nt_xent": lightly.NTXentLoss(0.2, gather_distributed=True)(x, y),
        "lightly_dcl": lightly.DCLLoss(0.2, gather_distributed=True)(x, y),
    }


def compat_losses(module, t: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    x, y, scale, bias = t["x"], t["y"], t["scale"], t["bias"]
    found = {}
    for local, grad in FLAGS:
        kwargs = {"local_loss": local, "gather_with_grad": grad, "rank": rank, "world_size": world}
        found[f"clip {local} {grad}"] = module.ClipLoss(**kwargs)(x, y, scale)
        contrastive, distill = module.DistillClipLoss(**kwargs)(x, y, scale, y.detach(), x.detach(), 5.0)
        found[f"distill {local} {grad}"] = contrastive + distill
    for impl in ("bidir", "shift", "reduce", "gather"):
        found[f"siglip {impl}"] = module.SigLipLoss(rank=rank, world_size=world, dist_impl=impl)(x, y, scale, bias)
    return found


def wrapped_losses(losses, wrapper, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """pytorch_metric_learning's DistributedLossWrapper, its own or ours, over its own losses or ours."""
    found = {}
    for name in ("NTXentLoss", "SupConLoss"):
        for efficient in (False, True):
            wrap = wrapper(getattr(losses, name)(0.2), efficient)
            found[f"wrapped {name} {efficient}"] = wrap(t["x"], t["labels"])
            # Labels of their own: the original drops the diagonal where both are one tensor.
            if not efficient:
                both = {"ref_emb": t["y"], "ref_labels": t["labels"].clone()}
                found[f"wrapped {name} reference"] = wrap(t["x"], t["labels"], **both)
        memory = wrapper(losses.CrossBatchMemory(getattr(losses, name)(0.2), WIDTH, 16))
        found[f"wrapped {name} memory"] = memory(t["x"], t["labels"]) + memory(t["y"], t["labels"])
    return found


def with_gradients(losses, t: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    inputs = [t[name] for name in ("x", "y", "views", "scale", "bias")]
    kwargs = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return {name: [loss.detach(), *torch.autograd.grad(loss, inputs, **kwargs)] for name, loss in losses.items()}


def shard(t: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    rows = slice(rank * ITEMS, (rank + 1) * ITEMS)
    own = {name: (v[rows] if v.dim() else v).clone() for name, v in t.items()}
    return {name: v.requires_grad_() if v.is_floating_point() else v for name, v in own.items()}


def installed() -> contextlib.AbstractContextManager[None]:
    """Leaves out what follows where an original is missing."""
    return contextlib.suppress(pytest.skip.Exception)


def main(rank: int, world: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    t = shard(everything(world), rank)
    found = with_gradients(ours(t), t) | with_gradients(compat_losses(open_clip, t, rank, world), t)
    found |= with_gradients(wrapped_losses(losses, DistributedLossWrapper, t), t)
    bank = lightly.NTXentLoss(0.2, (world * ITEMS + 1, WIDTH), gather_distributed=True).double()
    bank(t["x"], t["y"])
    found["bank"] = [bank.memory_bank.bank]
    first = torch.autograd.grad(ours(t)["info_nce"], t["x"], create_graph=True)[0]
    found["second"] = [torch.autograd.grad((first**2).sum(), t["y"])[0]]
    with installed():
        theirs = original("open_clip.loss", "open_clip")
        values = with_gradients(compat_losses(theirs, t, rank, world), t)
        found |= {f"original {name}": v for name, v in values.items()}
    with installed():
        theirs = original("pytorch_metric_learning.losses")
        wrapper = original("pytorch_metric_learning.utils.distributed").DistributedLossWrapper
        values = with_gradients(wrapped_losses(theirs, wrapper, t), t)
        found |= {f"original {name}": v for name, v in values.items()}
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
