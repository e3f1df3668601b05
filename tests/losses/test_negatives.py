"""mk.info_nce with separate negatives: with and without in-batch negatives, and with masks that select negatives."""

import pytest
import torch
import torch.nn.functional as F

import mi_kernels as mk
from mi_kernels.losses import negatives
from tests.compat.originals import draw, same


@pytest.fixture(params=["definition", "panels"])
def route(request, monkeypatch):
    if request.param == "panels":
        monkeypatch.setattr(negatives, "_SMALL", 0)
        monkeypatch.setattr(negatives, "_PANEL", 60)


def formula(query, key, rest, mask, in_batch, temperature=0.2):
    """The losses [B], row by row."""
    query, key, rest = (F.normalize(t, dim=-1) for t in (query, key, rest))
    rows = []
    for i in range(len(query)):
        others = torch.cat([key[:i], key[i + 1 :]]) if in_batch else key[:0]
        own = rest if rest.dim() == 2 else rest[i]
        own = own if mask is None else own[mask[i]]
        candidates = torch.cat([key[i : i + 1], others, own])
        rows.append(-(candidates @ query[i] / temperature).log_softmax(0)[0])
    return torch.stack(rows)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("kind", ["shared", "paired", "padded"])
def test_negatives_replace_the_batchs_own_or_join_them(kind, in_batch, reduction):
    query, key = draw(7, 5), draw(7, 5, seed=1)
    rest = draw(11, 5, seed=2) if kind == "shared" else draw(7, 11, 5, seed=2)
    mask = None
    if kind == "padded":
        mask = torch.arange(11) < torch.tensor([0, 1, 11, 4, 2, 7, 3])[:, None]
    mode = "unpaired" if kind == "shared" else "paired"
    got = mk.info_nce(query, key, rest, 0.2, reduction, mode, in_batch=in_batch, negative_mask=mask)
    want = formula(query, key, rest, mask, in_batch)
    weights = torch.linspace(1, 2, 7, dtype=torch.float64)
    if reduction == "none":
        got, want = (got * weights).sum(), (want * weights).sum()
    else:
        want = getattr(want, reduction)()
    same(got, want, [query, key, rest])


@pytest.mark.usefixtures("route")
def test_groups_with_their_own_temperatures():
    query, key, rest = draw(2, 3, 7, 5), draw(2, 3, 7, 5, seed=1), draw(2, 3, 11, 5, seed=2)
    temperature = (draw(2, 3, seed=3).detach().abs() + 0.1).requires_grad_()
    got = mk.info_nce(query, key, rest, temperature, "sum")
    want = sum(
        formula(query[i, j], key[i, j], rest[i, j], None, False, temperature[i, j]).sum()
        for i in range(2)
        for j in range(3)
    )
    same(got, want, [query, key, rest, temperature])


@pytest.mark.usefixtures("route")
def test_per_sample_gradients():
    query, key, rest = draw(6, 5), draw(6, 5, seed=1), draw(11, 5, seed=2)

    def loss(q, k):
        return mk.info_nce(q[None], k[None], rest, 0.2)

    got = torch.func.vmap(torch.func.grad(loss))(query.detach(), key.detach())
    rows = formula(query, key, rest, None, False)
    torch.testing.assert_close(got, torch.autograd.grad(rows.sum(), query)[0])


def test_what_does_not_fit_is_named():
    query, key, rest, paired = draw(4, 3), draw(4, 3), draw(5, 3), draw(4, 5, 3)
    mask = torch.ones(4, 5, dtype=torch.bool)
    for arguments, options, name in (
        ((rest,), {"negative_mask": mask}, "negative_mask"),
        ((paired,), {"negative_mode": "paired", "negative_mask": mask[:3]}, "negative_mask"),
        ((paired,), {"negative_mode": "paired", "negative_mask": mask.double()}, "negative_mask"),
        ((None,), {"in_batch": True}, "in_batch"),
        ((paired,), {"in_batch": True}, "negative_keys"),
        ((rest.float(),), {}, "negative_keys"),
    ):
        with pytest.raises(ValueError, match=name):
            mk.info_nce(query, key, *arguments, **options)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_dual_numbers_and_batches_of_slopes(reduction):
    query, key, rest = draw(7, 5), draw(7, 5, seed=1), draw(11, 5, seed=2)
    loss = mk.info_nce(query, key, rest, reduction=reduction)
    want = torch.stack([torch.autograd.grad(row, rest, retain_graph=True)[0] for row in loss.reshape(-1)])
    slopes = torch.eye(loss.numel(), dtype=torch.double).reshape(-1, *loss.shape)
    (got,) = torch.autograd.grad(loss, rest, slopes, is_grads_batched=True)
    torch.testing.assert_close(got, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rest.detach(), torch.ones_like(rest))
        found = mk.info_nce(query.detach(), key.detach(), dual, reduction=reduction)
        tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
    torch.testing.assert_close(tangent.reshape(-1), want.sum((1, 2)))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_a_mask_excludes_does_not_reach_value_or_gradients(normalize, in_batch, odd):
    query, key, rest = draw(5, 3), draw(5, 3, seed=1), draw(5, 4, 3, seed=2)
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0] = False

    def run(fill):
        inputs = [t.clone().requires_grad_() for t in (query, key, rest.masked_fill(~mask[..., None], fill))]
        options = {"negative_mode": "paired", "negative_mask": mask, "in_batch": in_batch, "normalize": normalize}
        value = mk.info_nce(*inputs, **options)
        return value, *torch.autograd.grad(value, inputs)

    for found, expected in zip(run(odd), run(1.0), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, expected)
