"""One rank of tests/test_distributed.py: `python distributed_worker.py RANK FOLDER`.

The first two, the first three and all four processes form a group, one after the other: each process starts Python and
torch only once.
"""

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
from mi_kernels.compat.pytorch_metric_learning.utils import distributed as of_losses
from mi_kernels.compat.pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from tests.compat.originals import original

ITEMS, WIDTH = 5, 4
# numbers of rows per rank: even, uneven, and with ranks that have none
SHARDS = {2: [(5, 5), (8, 2)], 3: [(5, 5, 5), (6, 0, 9)], 4: [(5, 5, 5, 5), (7, 1, 12, 0)]}
FLAGS = [(local, grad) for local in (False, True) for grad in (False, True)]


def everything(world: int) -> dict[str, torch.Tensor]:
    """The pairs of all ranks; every rank and the parent process draw the same."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "x": F.normalize(draw(world * ITEMS, WIDTH), dim=1),
        "y": F.normalize(draw(world * ITEMS, WIDTH), dim=1),
        "views": F.normalize(draw(world * ITEMS, 2, WIDTH), dim=-1),
        "scale": torch.tensor(7.0, dtype=torch.float64),
        "bias": torch.tensor(-3.0, dtype=torch.float64),
        "ids": torch.arange(world * ITEMS) % 7,
        "mask": torch.rand(world * ITEMS, world * ITEMS, generator=g).mul(4).floor(),
        "labels": torch.tensor([0, 1, 2, 9, 0, 1, 1, 8, 0, 5, 6, 7, 2, 2, 3, 5, 0, 4, 9, 1])[: world * ITEMS],
    }


def ours(t: dict[str, torch.Tensor], schedule: str = "gather") -> dict[str, torch.Tensor]:
    """The losses of one rank, or of a single process that holds all pairs."""
    x, y, scale, bias = t["x"], t["y"], t["scale"], t["bias"]
    d = mk.distributed
    how = {"schedule": schedule}
    groups = torch.stack([x, y.flip(1)]), torch.stack([y, x * 2])
    scales = scale * torch.tensor([1.0, 0.5], dtype=scale.dtype)
    return {
        "info_nce": d.info_nce(x, y, 1 / scale, **how),
        "info_nce_symmetric": d.info_nce(x, y, 1 / scale, symmetric=True, normalize=False, **how),
        "info_nce_ids": d.info_nce(x, y, 1 / scale, query_ids=t["ids"], symmetric=True, **how),
        "info_nce_two_ids": d.info_nce(x, y, 1 / scale, query_ids=t["ids"], key_ids=t["labels"], **how),
        "info_nce_groups": d.info_nce(*groups, 1 / scales, symmetric=True, **how),
        "clip_loss": d.clip_loss(x, y, scale, bias, **how),
        "siglip_loss": d.siglip_loss(x, y, scale, bias, **how),
        "siglip_groups": d.siglip_loss(*groups, scales, bias * scales, **how),
        "nt_xent": d.nt_xent(x, y, 1 / scale, **how),
        "nt_xent_groups": d.nt_xent(*groups, 1 / scales, **how),
        "sup_con": d.sup_con(t["views"], t["labels"], temperature=1 / scale, **how),
        "sup_con_one": d.sup_con(t["views"], t["labels"], temperature=1 / scale, contrast_mode="one", **how),
        "sup_con_mask": d.sup_con(t["views"], mask=t["mask"], temperature=1 / scale),
        "sim_clr": d.sup_con(t["views"], temperature=1 / scale, **how),
    }


def gathering(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """lightly's losses with gather_distributed."""
    x, y = t["x"], t["y"]
    return {
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
    """Losses in a DistributedLossWrapper; `losses` and `wrapper` are pytorch_metric_learning's or ours."""
    found = {}
    for name in ("NTXentLoss", "SupConLoss"):
        for efficient in (False, True):
            wrap = wrapper(getattr(losses, name)(0.2), efficient)
            found[f"wrapped {name} {efficient}"] = wrap(t["x"], t["labels"])
            # A copy of the labels: if both are the same tensor, the original drops the diagonal.
            both = {"ref_emb": t["y"], "ref_labels": t["labels"].clone()}
            kind = "efficient reference" if efficient else "reference"
            found[f"wrapped {name} {kind}"] = wrap(t["x"], t["labels"], **both)
        # Large enough for two batches of all ranks: the original's memories differ between ranks once they wrap around.
        memory = wrapper(losses.CrossBatchMemory(getattr(losses, name)(0.2), WIDTH, 24))
        found[f"wrapped {name} memory"] = memory(t["x"], t["labels"]) + memory(t["y"], t["labels"])
    return found


def hard_pairs(emb, labels, ref_emb=None, ref_labels=None) -> tuple[torch.Tensor, ...]:
    """A miner of hard pairs: positives with a similarity below 0.9, negatives with one above -0.3."""
    own = ref_emb is None
    ref_emb, ref_labels = (emb, labels) if own else (ref_emb, ref_labels)
    scores = F.normalize(emb.detach(), dim=1) @ F.normalize(ref_emb.detach(), dim=1).T
    same = labels[:, None] == ref_labels
    positive = same & (scores < 0.9)
    if own:
        positive.fill_diagonal_(False)
    return *torch.where(positive), *torch.where(~same & (scores > -0.3))


def mined_losses(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses over the pairs that a miner finds among the rows of all ranks."""
    found = {}
    both = {"ref_emb": t["y"], "ref_labels": t["labels"].clone()}
    for efficient in (False, True):
        miner = DistributedMinerWrapper(hard_pairs, efficient)
        loss = DistributedLossWrapper(losses.NTXentLoss(0.2), efficient)
        found[f"mined {efficient}"] = loss(t["x"], t["labels"], miner(t["x"], t["labels"]))
        found[f"mined {efficient} without labels"] = loss(t["x"], None, miner(t["x"], t["labels"]))
        found[f"mined {efficient} reference"] = loss(t["x"], t["labels"], miner(t["x"], t["labels"], **both), **both)
    memory = DistributedLossWrapper(losses.CrossBatchMemory(losses.NTXentLoss(0.2), WIDTH, 24))
    pairs = DistributedMinerWrapper(hard_pairs)(t["x"], t["labels"])
    found["mined memory"] = memory(t["y"], t["labels"]) + memory(t["x"], t["labels"], pairs)
    return found


def kept_memory(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The contents of a memory that wraps around, after two whole batches and one with an enqueue_mask."""
    memory = losses.CrossBatchMemory(losses.SupConLoss(0.2), WIDTH, 16)
    wrapped = DistributedLossWrapper(memory)
    wrapped(t["x"], t["labels"])
    wrapped(t["y"], t["labels"] + 10)
    wrapped(t["x"], t["labels"] + 20, enqueue_mask=t["labels"] > 1)
    return [memory.embedding_memory, memory.label_memory]


def with_gradients(losses, t: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    inputs = [t[name] for name in ("x", "y", "views", "scale", "bias")]
    kwargs = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return {name: [loss.detach(), *torch.autograd.grad(loss, inputs, **kwargs)] for name, loss in losses.items()}


def shard(t: dict[str, torch.Tensor], rank: int, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    own = {name: (v[rows] if v.dim() else v).clone() for name, v in t.items()}
    return {name: v.requires_grad_() if v.is_floating_point() else v for name, v in own.items()}


def message(function, *arguments, **kwargs) -> str:
    """The type and message of the error that a call raises."""
    try:
        function(*arguments, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def saved(loss) -> int:
    """How many numbers autograd saves for the backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss()
    return sum(sizes)


def installed() -> contextlib.AbstractContextManager[None]:
    """Skips the rest of a `with` block if an original library is not installed."""
    return contextlib.suppress(pytest.skip.Exception)


def every_world(rank: int, world: int) -> dict[str, object]:
    """Results of the cases that run in groups of two, three and four ranks."""
    found: dict[str, object] = {}
    t = everything(world)
    for sizes in SHARDS[world]:
        own = shard(t, rank, sizes)
        for schedule in ("gather", "ring"):
            values = with_gradients(ours(own, schedule), own)
            found |= {f"{name} {schedule} {sizes}": value for name, value in values.items()}
    own = shard(t, rank, SHARDS[world][0])
    for schedule in ("gather", "ring"):
        found[f"saved {schedule}"] = saved(
            lambda s=schedule: mk.distributed.clip_loss(own["x"], own["y"], 2.0, schedule=s)
        )
    short = {name: v.detach().bfloat16() if v.is_floating_point() else v for name, v in own.items()}
    short = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in short.items()}
    found["bf16"] = with_gradients({"": mk.distributed.clip_loss(short["x"], short["y"], 7.0, schedule="ring")}, short)[
        ""
    ]
    null = {name: own[name].detach().half() for name in "xy"}
    null["x"][0] = 0
    for schedule in ("gather", "ring"):
        x = null["x"].clone().requires_grad_()
        value = mk.distributed.info_nce(x, null["y"], 0.2, symmetric=True, schedule=schedule)
        found[f"zero row {schedule}"] = [value.detach(), *torch.autograd.grad(value, x)]
    uneven = torch.arange(3.0 * rank).reshape(3, rank).requires_grad_()
    whole = mk.distributed.gather(uneven, dim=1)
    again = mk.distributed.gather(uneven, dim=1, sizes=range(world))
    (whole * (rank + 1.0)).sum().backward()
    found["uneven"] = [whole.detach(), again.detach(), uneven.grad]
    found["flags"] = mk.distributed.gather(torch.tensor([True, False])[:rank])
    return found


def refusals(rank: int) -> dict[str, str]:
    """Error messages of calls whose arguments differ between two ranks or are wrong on both."""
    x, d = torch.randn(3, 4 + rank), mk.distributed
    return {
        "width": message(d.info_nce, x, x),
        "dtype": message(d.gather, torch.zeros(2, dtype=torch.float32 if rank else torch.float64)),
        "dims": message(d.gather, torch.zeros(2, *[1] * rank)),
        "sizes": message(d.gather, torch.zeros(2), sizes=[2, 3])
        if rank
        else message(d.gather, torch.zeros(2), sizes=[1]),
        "complex": message(d.gather, torch.zeros(2, dtype=torch.complex64)),
        "0-d": message(d.gather, torch.zeros(())),
        "1-d": message(d.info_nce, torch.zeros(3), torch.zeros(3)),
        "integers": message(d.clip_loss, torch.ones(3, 2).long(), torch.ones(3, 2).long(), 1.0),
        "schedule": message(d.siglip_loss, x, x, 1.0, None, schedule="star"),
        "scale": message(d.clip_loss, x[:, :4], x[:, :4], torch.ones(2), schedule="ring"),
    }


def second(t: dict[str, torch.Tensor], schedule: str) -> list[torch.Tensor]:
    first = torch.autograd.grad(ours(t, schedule)["info_nce"], t["x"], create_graph=True)[0]
    return [torch.autograd.grad((first**2).sum(), t["y"])[0]]


def two_ranks(rank: int) -> dict[str, object]:
    """Results of the drop-ins and, where installed, of the originals, in a group of two."""
    world = 2
    t = shard(everything(world), rank, SHARDS[world][0])
    found: dict[str, object] = dict(
        with_gradients(gathering(t), t) | with_gradients(compat_losses(open_clip, t, rank, world), t)
    )
    found |= with_gradients(wrapped_losses(losses, DistributedLossWrapper, t), t)
    bank = lightly.NTXentLoss(0.2, (world * ITEMS + 1, WIDTH), gather_distributed=True).double()
    bank(t["x"], t["y"])
    for sizes in SHARDS[world]:
        own = shard(everything(world), rank, sizes)
        found |= {f"{name} {sizes}": value for name, value in with_gradients(mined_losses(own), own).items()}
        found[f"memory {sizes}"] = kept_memory(own)
        all_emb, all_labels, _ = of_losses.gather(own["x"], own["labels"])
        found[f"gathered {sizes}"] = [all_emb.detach(), all_labels, of_losses.all_gather(own["x"])]
    found["bank"] = [bank.memory_bank.bank]
    found["second"] = second(t, "gather")
    found["second of a ring"] = message(second, t, "ring")
    found["refusals"] = refusals(rank)
    with installed():
        theirs = original("open_clip.loss", "open_clip")
        values = with_gradients(compat_losses(theirs, t, rank, world), t)
        found |= {f"original {name}": v for name, v in values.items()}
    with installed():
        theirs = original("pytorch_metric_learning.losses")
        wrapper = original("pytorch_metric_learning.utils.distributed").DistributedLossWrapper
        values = with_gradients(wrapped_losses(theirs, wrapper, t), t)
        found |= {f"original {name}": v for name, v in values.items()}
    return found


def main(rank: int, folder: Path) -> None:
    found = {}
    for world in SHARDS:
        if rank < world:
            store = f"file://{folder / f'store{world}'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            found[world] = every_world(rank, world) | (two_ranks(rank) if world == 2 else {})
            dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
