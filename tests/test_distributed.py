"""mk.distributed and the distributed losses of mi_kernels.compat: gloo processes against one that holds all pairs.

The mean of the ranks' losses equals the single process's loss. Gradients agree in the way DistributedDataParallel
averages them: a rank's feature gradients divided by the number of ranks, and the mean of the ranks' scale gradients.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import mi_kernels as mk
from tests import distributed_worker as worker

WORLD = 2

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The results of the groups of two, three and four ranks: {number of ranks: [results of each rank]}."""
    folder = tmp_path_factory.mktemp("ranks")
    number = max(worker.SHARDS)
    logs = [folder / f"{rank}.log" for rank in range(number)]
    running = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, worker.__file__, str(rank), str(folder)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    end = time.monotonic() + 240
    try:
        # If a rank fails, the others wait for it forever, so the first failure ends all.
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            assert time.monotonic() < end, "the ranks did not end"
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert not any(p.returncode for p in running), "\n".join(log.read_text() for log in logs)
    every = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number)]
    return {world: [found[world] for found in every[:world]] for world in worker.SHARDS}


@pytest.fixture(scope="module")
def ranks(worlds):
    return worlds[WORLD]


def whole(world=WORLD):
    t = worker.everything(world)
    return {name: v.requires_grad_() if v.is_floating_point() else v for name, v in t.items()}


def together(ranks, name, world=WORLD):
    """The ranks' loss, gradients of x, y and views, and gradients of scale and bias, combined to those of one
    process."""
    values = [rank[name] for rank in ranks]
    loss = torch.stack([v[0] for v in values]).mean()
    features = [torch.cat([v[k] for v in values]) / world for k in (1, 2, 3)]
    numbers = [torch.stack([v[k] for v in values]).mean() for k in (4, 5)]
    return [loss, *features, *numbers]


def formulas(t):
    """Formulas for the losses of a single process."""
    x, y, scale, bias = t["x"], t["y"], t["scale"], t["bias"]
    labels = torch.arange(len(x))
    scores = scale * x @ y.T
    twins = t["ids"][:, None] == t["ids"]
    unlike = scores.masked_fill(twins & ~torch.eye(len(x), dtype=torch.bool), -torch.inf)

    def views(a, b, s):
        both = torch.cat([a, b])
        logits = (s * both @ both.T).masked_fill(torch.eye(len(both), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(both)).roll(len(a)))

    clip = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
    return {
        "info_nce": F.cross_entropy(scores, labels),
        "info_nce_symmetric": clip,
        "info_nce_ids": (F.cross_entropy(unlike, labels) + F.cross_entropy(unlike.T, labels)) / 2,
        "clip_loss": clip + bias * 0,
        "siglip_loss": -F.logsigmoid((2 * torch.eye(len(x)) - 1) * (scores + bias)).sum() / len(x),
        "nt_xent": views(x, y, scale),
        "lightly_nt_xent": views(x, y, 5.0),
    }


def gradients(loss, t):
    return worker.with_gradients({"": loss}, t)[""]


# info_nce, nt_xent and lightly's losses normalise features; for unit features their gradient is the tangential part.
def tangential(values, t):
    loss, dx, dy, *rest = values
    return [loss, *(g - (g * f).sum(1, keepdim=True) * f for g, f in ((dx, t["x"]), (dy, t["y"]))), *rest]


EVEN = worker.SHARDS[WORLD][0]


@pytest.mark.parametrize("name", list(formulas(whole())))
def test_equals_the_formula_of_one_process(ranks, name):
    t = whole()
    want = gradients(formulas(t)[name], t)
    if name in ("info_nce", "info_nce_ids", "nt_xent", "lightly_nt_xent"):
        want = tangential(want, t)
    found = name if name.startswith("lightly") else f"{name} gather {EVEN}"
    for got, expected in zip(together(ranks, found), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def one_process(world):
    t = whole(world)
    return worker.with_gradients(worker.ours(t), t)


@pytest.mark.parametrize("schedule", ["gather", "ring"])
@pytest.mark.parametrize("sizes", [s for shards in worker.SHARDS.values() for s in shards], ids=str)
def test_equals_one_process(worlds, schedule, sizes):
    """With even and uneven shards, some of them empty."""
    world = len(sizes)
    for name, want in one_process(world).items():
        got = together(worlds[world], f"{name} {schedule} {sizes}", world)
        for value, expected in zip(got, want, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["lightly_nt_xent", "lightly_dcl"])
def test_lightlys_losses_equal_one_process(ranks, name):
    t = whole()
    for got, expected in zip(together(ranks, name), gradients(worker.gathering(t)[name], t), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_ring_keeps_as_much_however_many_ranks_there_are(worlds):
    ring = {world: {rank["saved ring"] for rank in found} for world, found in worlds.items()}
    assert ring[2] == ring[3] == ring[4] and len(ring[2]) == 1
    gathered = {world: max(rank["saved gather"] for rank in found) for world, found in worlds.items()}
    assert gathered[2] < gathered[3] < gathered[4]


def test_a_ring_takes_16_bit_features(worlds):
    for world, found in worlds.items():
        t = whole(world)
        x, y = (t[name].detach().bfloat16().double().requires_grad_() for name in ("x", "y"))
        want = mk.clip_loss(x, y, 7.0)
        slopes = torch.autograd.grad(want, (x, y))
        got = together(found, "bf16", world)
        torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=0)
        for g, w in zip(got[1:3], slopes, strict=True):
            assert g.dtype == torch.bfloat16
            torch.testing.assert_close(g.double(), w, rtol=2**-7, atol=1e-6)  # rounded twice, once in `together`


@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_a_zero_row_of_half_precision_is_zero_after_normalisation_and_gets_no_gradient(worlds, schedule):
    for world, found in worlds.items():
        t = worker.everything(world)
        x, y = t["x"].half(), t["y"].half()
        first = [sum(worker.SHARDS[world][0][:rank]) for rank in range(world)]
        x[first] = 0
        wide = x.double().requires_grad_()
        scores = F.normalize(wide, dim=1) @ F.normalize(y.double(), dim=1).T / 0.2
        labels = torch.arange(len(x))
        want = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
        slopes = torch.autograd.grad(want, wide)[0].index_fill(0, torch.tensor(first), 0)
        got = [rank[f"zero row {schedule}"] for rank in found]
        torch.testing.assert_close(torch.stack([g[0] for g in got]).mean().double(), want, rtol=1e-3, atol=0)
        gradient = torch.cat([g[1] for g in got]) / world
        assert not gradient[first].any()
        torch.testing.assert_close(gradient.double(), slopes, rtol=5e-3, atol=1e-4)


def test_gather_takes_any_number_of_rows(worlds):
    for world, found in worlds.items():
        want = torch.cat([torch.arange(3.0 * rank).reshape(3, rank) for rank in range(world)], dim=1)
        for rank, values in enumerate(found):
            whole_, again, slope = values["uneven"]
            assert torch.equal(whole_, want) and torch.equal(again, want)
            assert torch.equal(slope, torch.full((3, rank), world * (world + 1) / 2))
            flags = torch.cat([torch.tensor([True, False])[:r] for r in range(world)])
            assert torch.equal(values["flags"], flags)


def test_ranks_that_disagree_all_raise_one_error(ranks):
    first, second = (rank["refusals"] for rank in ranks)
    for name, error, part in (
        ("width", "ValueError", "query"),
        ("dtype", "ValueError", "torch.float64 with 2 rows"),
        ("dims", "ValueError", "rank 1"),
        ("sizes", "ValueError", "sizes"),
        ("complex", "ValueError", "complex64"),
        ("0-d", "ValueError", "0-d"),
        ("1-d", "ValueError", "query"),
        ("integers", "ValueError", "image_features"),
        ("schedule", "ValueError", "schedule"),
        ("scale", "ValueError", "scale"),
    ):
        for said in (first[name], second[name]):
            assert said.startswith(error) and part in said
    for name in ("width", "dtype", "dims"):
        assert first[name] == second[name]


@pytest.mark.parametrize("name", ["clip False True", "clip True True", "siglip bidir", "siglip gather"])
def test_open_clips_exact_flags_equal_one_process(ranks, name):
    t = whole()
    want = formulas(t)["siglip_loss" if "siglip" in name else "info_nce_symmetric"]
    for got, expected in zip(together(ranks, name), gradients(want, t), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("local", [False, True])
def test_open_clip_without_gathered_gradients_has_the_loss_alone(ranks, local):
    t = whole()
    want = gradients(formulas(t)["info_nce_symmetric"], t)
    got = together(ranks, f"clip {local} False")
    torch.testing.assert_close(got[0], want[0])
    assert not torch.allclose(got[1], want[1])


@pytest.mark.parametrize("name", [f"{kind} {a} {b}" for kind in ("clip", "distill") for a, b in worker.FLAGS])
def test_open_clip_equals_the_original_on_every_rank(ranks, name):
    if f"original {name}" not in ranks[0]:
        pytest.skip("open_clip is not installed")
    for rank in ranks:
        for got, want in zip(rank[name], rank[f"original {name}"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["bidir", "shift", "gather", "reduce"])
def test_siglip_equals_the_original_on_every_rank(ranks, impl):
    if f"original siglip {impl}" not in ranks[0]:
        pytest.skip("open_clip is not installed")
    for rank in ranks:
        for got, want in zip(rank[f"siglip {impl}"], rank[f"original siglip {impl}"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


WRAPPED = [
    f"wrapped {name} {kind}"
    for name in ("NTXentLoss", "SupConLoss")
    for kind in ("False", "True", "reference", "efficient reference", "memory")
]


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_equals_the_original_on_every_rank(ranks, name):
    if f"original {name}" not in ranks[0]:
        pytest.skip("pytorch_metric_learning is not installed")
    for rank in ranks:
        for got, want in zip(rank[name], rank[f"original {name}"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_wrapper_equals_one_process(ranks, name):
    t = whole()
    loss = getattr(worker.losses, name)(0.2)
    for kind, reference in (("False", ()), ("reference", (t["y"], t["labels"]))):
        want = gradients(loss(t["x"], t["labels"], None, *reference), t)
        values = [rank[f"wrapped {name} {kind}"] for rank in ranks]
        for rank in values:  # each rank returns the whole loss, times the number of ranks
            torch.testing.assert_close(rank[0], WORLD * want[0])
        for k in (1, 2):
            got = torch.cat([rank[k] for rank in values]) / WORLD
            torch.testing.assert_close(got, want[k], rtol=1e-9, atol=1e-11)


def whole_reference(t):
    return {"ref_emb": t["y"], "ref_labels": t["labels"]}


@pytest.mark.parametrize("sizes", worker.SHARDS[WORLD], ids=str)
@pytest.mark.parametrize("kind", ["", " without labels", " reference", " memory"])
def test_mined_pairs_equal_one_process(ranks, kind, sizes):
    """Mined indices start with the rank's own rows; a memory holds rows in the order of the ranks."""
    t = whole()
    loss = worker.losses.NTXentLoss(0.2)
    both = whole_reference(t) if kind == " reference" else {}
    pairs = worker.hard_pairs(t["x"], t["labels"], **both)
    if kind == " memory":
        memory = worker.losses.CrossBatchMemory(loss, worker.WIDTH, 24)
        want = gradients(memory(t["y"], t["labels"]) + memory(t["x"], t["labels"], pairs), t)
    else:
        want = gradients(loss(t["x"], t["labels"], pairs, **both), t)
    values = [rank[f"mined{kind if kind == ' memory' else ' False' + kind} {sizes}"] for rank in ranks]
    for value in values:
        torch.testing.assert_close(value[0], WORLD * want[0])
    for k in (1, 2):
        torch.testing.assert_close(torch.cat([v[k] for v in values]) / WORLD, want[k], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sizes", worker.SHARDS[WORLD], ids=str)
@pytest.mark.parametrize("kind", ["", " without labels", " reference"])
def test_mined_pairs_of_this_ranks_anchors(ranks, kind, sizes):
    t = whole()
    first = 0
    for rank, rows in zip(ranks, sizes, strict=True):
        mine = torch.arange(first, first + rows)
        order = torch.cat([mine, torch.arange(first), torch.arange(first + rows, sum(sizes))])
        first += rows
        ref, ref_labels = (t["y"] if kind == " reference" else t["x"])[order], t["labels"][order]
        pairs = worker.hard_pairs(t["x"][mine], t["labels"][mine], ref, ref_labels)
        keep = pairs[0] != pairs[1]  # drops the anchor itself, or its row of the reference, as the original does
        pairs = (pairs[0][keep], pairs[1][keep], *pairs[2:])
        want = worker.losses.NTXentLoss(0.2)(t["x"][mine], None, pairs, ref)
        torch.testing.assert_close(rank[f"mined True{kind} {sizes}"][0], WORLD * want)


@pytest.mark.parametrize("sizes", worker.SHARDS[WORLD], ids=str)
def test_every_rank_keeps_one_memory(ranks, sizes):
    t = whole()
    kept = t["labels"] > 1
    rows = torch.cat([t["x"], t["y"], t["x"][kept]]).detach()
    labels = torch.cat([t["labels"], t["labels"] + 10, t["labels"][kept] + 20])
    memory, memory_labels = torch.zeros(16, worker.WIDTH, dtype=torch.float64), torch.zeros(16, dtype=torch.long)
    for k, (row, label) in enumerate(zip(rows, labels, strict=True)):
        memory[k % 16], memory_labels[k % 16] = row, label
    for rank in ranks:
        assert torch.equal(rank[f"memory {sizes}"][0], memory)
        assert torch.equal(rank[f"memory {sizes}"][1], memory_labels)


def test_gathered_rows_have_the_own_ones_first(ranks):
    t = whole()
    for sizes in worker.SHARDS[WORLD]:
        parts, labels = t["x"].detach().split(sizes), t["labels"].split(sizes)
        for rank in range(WORLD):
            rows, classes, others = ranks[rank][f"gathered {sizes}"]
            assert torch.equal(rows, torch.cat([parts[rank], parts[1 - rank]])) and torch.equal(others, parts[1 - rank])
            assert torch.equal(classes, torch.cat([labels[rank], labels[1 - rank]]))


def test_utilities_without_a_process_group():
    t, utilities = whole(), worker.of_losses
    assert not utilities.is_distributed() and utilities.all_gather(t["x"]) is None
    assert utilities.all_gather_embeddings_and_labels(t["x"], t["labels"]) == (None, None)
    all_emb, all_labels, labels = utilities.gather(t["x"], t["labels"])
    assert all_emb is t["x"] and torch.equal(all_labels, labels) and torch.equal(labels, t["labels"])
    assert utilities.gather_emb_and_ref(t["x"], None, t["y"])[2] is t["y"]
    assert utilities.gather_enqueue_mask(None, torch.device("cpu")) is None
    want = worker.hard_pairs(t["x"], t["labels"])
    for got in (
        utilities.DistributedMinerWrapper(worker.hard_pairs)(t["x"], t["labels"]),
        utilities.get_indices_tuple(t["labels"], t["labels"], t["x"], t["x"], worker.hard_pairs),
    ):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    with pytest.raises(TypeError, match="miner"):
        utilities.DistributedMinerWrapper(None)
    with pytest.raises(TypeError, match="loss"):
        worker.DistributedLossWrapper(0.1)


def test_wrapper_without_a_process_group_warns():
    t = whole()
    for efficient in (False, True):
        wrapper = worker.DistributedLossWrapper(worker.losses.SupConLoss(), efficient)
        with pytest.warns(UserWarning, match="process group"):
            loss = wrapper(t["x"], t["labels"])
        torch.testing.assert_close(loss, worker.losses.SupConLoss()(t["x"], t["labels"]))
    memory = worker.losses.CrossBatchMemory(worker.losses.SupConLoss(), worker.WIDTH)
    with pytest.raises(ValueError, match="efficient"):
        worker.DistributedLossWrapper(memory, efficient=True)
    with pytest.raises(ValueError, match="ref_emb"):
        worker.DistributedLossWrapper(memory)(t["x"], t["labels"], ref_emb=t["y"])


def test_memory_bank_takes_the_keys_of_all_ranks(ranks):
    keys = worker.everything(WORLD)["y"]
    for rank in ranks:
        torch.testing.assert_close(rank["bank"][0][:-1], keys)


def test_second_derivatives_cross_the_ranks(ranks):
    t = whole()
    # A rank's first derivative is WORLD times that of the single process, so its square is WORLD^2 times as large.
    first = torch.autograd.grad(mk.info_nce(t["x"], t["y"], temperature=1 / t["scale"]), t["x"], create_graph=True)[0]
    want = torch.autograd.grad((first**2).sum(), t["y"])[0] * WORLD**2
    torch.testing.assert_close(torch.cat([rank["second"][0] for rank in ranks]), want)
    for rank in ranks:
        assert rank["second of a ring"].startswith("RuntimeError: schedule='ring' has no second derivatives")


def test_without_a_process_group_these_are_the_plain_losses():
    t = whole()
    assert mk.distributed.rank_and_size() == (0, 1)
    assert mk.distributed.gather(t["x"]) is t["x"]
    one = mk.distributed.clip_loss(t["x"], t["y"], t["scale"])
    torch.testing.assert_close(one, mk.clip_loss(t["x"], t["y"], t["scale"]))


def test_bad_input_is_named():
    t = whole()
    with pytest.raises(ValueError, match="key_ids"):
        mk.distributed.info_nce(t["x"], t["y"], key_ids=t["ids"])
    with pytest.raises(ValueError, match="temperature"):
        mk.distributed.nt_xent(t["x"], t["y"], 0)
    with pytest.raises(ValueError, match="text_features"):
        mk.distributed.siglip_loss(t["x"], t["y"][:2], 1.0, None)
    with pytest.raises(TypeError, match="t must be"):
        mk.distributed.gather([1.0])
