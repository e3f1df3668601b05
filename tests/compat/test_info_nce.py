"""mi_kernels.compat.info_nce against fp64 formulas and, where installed, info-nce-pytorch."""

import math

import pytest
import torch
import torch.nn.functional as F

from mi_kernels.compat import torch_nn
from mi_kernels.compat.info_nce import InfoNCE, info_nce, normalize, transpose
from mi_kernels.losses import negatives as negatives_module
from tests.compat.originals import draw, largest_saved, original, parameters, same


def inputs(negatives):
    shape = {None: None, "unpaired": (7, 5), "paired": (9, 7, 5)}[negatives]
    return draw(9, 5), draw(9, 5, seed=1), None if shape is None else draw(*shape, seed=2)


def formula(query, key, negatives, temperature, reduction, mode):
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    if negatives is None:
        return F.cross_entropy(query @ key.T / temperature, torch.arange(len(query)), reduction=reduction)
    negatives = F.normalize(negatives, dim=-1)
    rest = query @ negatives.T if mode == "unpaired" else torch.einsum("nd,nmd->nm", query, negatives)
    logits = torch.cat([(query * key).sum(1, keepdim=True), rest], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long), reduction=reduction)


def test_signatures():
    assert parameters(info_nce) == [
        "query",
        "positive_key",
        "negative_keys=None",
        "temperature=0.1",
        "reduction='mean'",
        "negative_mode='unpaired'",
    ]
    assert parameters(InfoNCE) == ["temperature=0.1", "reduction='mean'", "negative_mode='unpaired'"]
    assert parameters(InfoNCE.forward) == ["query", "positive_key", "negative_keys=None"]
    assert InfoNCE().state_dict() == {}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_equals(reduction, negatives, oracle):
    query, key, rest = inputs(negatives)
    mode = negatives or "unpaired"
    want_of = formula if oracle == "formula" else original("info_nce").info_nce
    want = want_of(query, key, rest, 0.2, reduction, mode)
    got = InfoNCE(0.2, reduction, mode)(query, key, rest)
    assert got.shape == want.shape
    weights = torch.linspace(1, 2, want.numel(), dtype=torch.float64).reshape(want.shape)
    same((got * weights).sum(), (want * weights).sum(), [t for t in (query, key, rest) if t is not None])


def test_no_scores_are_stored():
    query, key = draw(256, 4), draw(256, 4, seed=1)
    assert largest_saved(lambda: info_nce(query, key)) < 256 * 16


@pytest.mark.parametrize("temperature", [0, 0.0, -0.1, float("nan"), float("inf")])
def test_temperature_that_is_not_positive_raises(temperature):
    with pytest.raises(ValueError, match="temperature"):
        info_nce(draw(3, 2), draw(3, 2), temperature=temperature)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"negative_mode": "pairs"}, "negative_mode"),
        ({"reduction": "average"}, "reduction"),
        ({"query": draw(3)}, "query"),
        ({"query": draw(0, 2), "positive_key": draw(0, 2)}, "query"),
        ({"positive_key": draw(3, 2, 1)}, "positive_key"),
        ({"positive_key": draw(4, 2)}, "positive_key"),
        ({"positive_key": draw(3, 3)}, "positive_key"),
        ({"negative_keys": draw(3, 4, 2)}, "negative_keys"),
        ({"negative_keys": draw(4, 3)}, "negative_keys"),
        ({"negative_keys": draw(4, 2), "negative_mode": "paired"}, "negative_keys"),
        ({"negative_keys": draw(4, 4, 2), "negative_mode": "paired"}, "negative_keys"),
    ],
)
def test_bad_input_is_named(change, name):
    with pytest.raises(ValueError, match=name):
        info_nce(**({"query": draw(3, 2), "positive_key": draw(3, 2)} | change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_inputs_give_an_fp32_loss(dtype):
    query, key = draw(64, 8, dtype=dtype), draw(64, 8, seed=1, dtype=dtype)
    loss = info_nce(query, key, temperature=0.05)
    assert loss.dtype == torch.float32
    want = formula(query.double(), key.double(), None, 0.05, "mean", "unpaired")
    torch.testing.assert_close(loss.double(), want, rtol=2e-2, atol=0)


def test_helpers():
    query, key, _ = inputs(None)
    found = normalize(query, None, key)
    assert found[1] is None
    torch.testing.assert_close(found[0], F.normalize(query, dim=-1))
    assert torch.equal(transpose(query), query.mT)


@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
def test_temperature_of_one_element(negatives):
    query, key, rest = inputs(negatives)
    temperature = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    mode = negatives or "unpaired"
    got = info_nce(query, key, rest, temperature, "none", mode)
    want = formula(query, key, rest, temperature, "none", mode)
    assert got.shape == (9,)
    same(got.sum(), want.sum(), [query, key, temperature])
    with pytest.raises(ValueError, match="temperature"):
        info_nce(query, key, rest, torch.ones(9), "none", mode)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("panel", [1 << 22, 1000])
def test_many_negatives(reduction, panel, monkeypatch):
    monkeypatch.setattr(negatives_module, "_SMALL", 0)
    monkeypatch.setattr(negatives_module, "_PANEL", panel)
    query, key, rest = draw(17, 5), draw(17, 5, seed=1), draw(300, 5, seed=2)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(1, 2, 17, dtype=torch.float64) if reduction == "none" else 1.0
    got = (info_nce(query, key, rest, temperature, reduction) * weights).sum()
    want = (formula(query, key, rest, temperature, reduction, "unpaired") * weights).sum()
    same(got, want, [query, key, rest, temperature])
    assert largest_saved(lambda: info_nce(query, key, rest, temperature, reduction)) <= rest.numel()


def test_second_gradients_of_dependent_inputs(monkeypatch):
    monkeypatch.setattr(negatives_module, "_SMALL", 0)
    query = draw(17, 5)

    def gradients(loss):
        key, rest = query.tanh(), torch.cat([query.sin(), query.cos()])
        value = loss(query, key, rest)
        (plain,) = torch.autograd.grad(value, query, retain_graph=True)
        (first,) = torch.autograd.grad(value, query, create_graph=True)
        torch.testing.assert_close(first, plain)
        return first, torch.autograd.grad(first.square().sum(), query)[0]

    got = gradients(lambda *t: info_nce(*t, temperature=0.2))
    want = gradients(lambda *t: formula(*t, 0.2, "mean", "unpaired"))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
def test_rows_of_zeros_are_finite_in_fp16(negatives):
    tensors = [None if t is None else t.detach().half() for t in inputs(negatives)]
    tensors[0][1], tensors[1][2] = 0, 0
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    loss = info_nce(*tensors, negative_mode=negatives or "unpaired")
    loss.backward()
    assert loss.isfinite() and tensors[0].grad[[0, 3]].isfinite().all()


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_losses_near_zero_keep_their_digits(mode, monkeypatch):
    """A logarithm of a sum close to 1 would lose them, and so would softplus with PyTorch's default threshold of 20."""
    monkeypatch.setattr(negatives_module, "_SMALL", 0)
    query = torch.eye(4, dtype=torch.float64)
    rest = -query.expand(4, 4, 4) if mode == "paired" else -query
    got = info_nce(query, query, rest, 1 / 30.0, "none", mode)
    want = torch.log1p(torch.tensor(math.exp(-30.0) * 3 + math.exp(-60.0), dtype=torch.float64))
    torch.testing.assert_close(got, want.expand(4), rtol=1e-12, atol=0)


def test_wrong_types_are_named():
    for arguments, name in ((([1.0], draw(3, 2)), "query"), ((draw(3, 2), draw(3, 2), [1.0]), "negative_keys")):
        with pytest.raises(TypeError, match=name):
            info_nce(*arguments)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("negatives", [None, "unpaired"])
def test_as_pytorchs_proposal_spells_it(reduction, negatives):
    query, key, rest = inputs(negatives)
    want = formula(query, key, rest, 0.07, reduction, "unpaired")
    got = torch_nn.InfoNCELoss(reduction=reduction)(query, key, rest)
    same(got.sum(), want.sum(), [t for t in (query, key, rest) if t is not None])
    assert torch.equal(got, torch_nn.info_nce_loss(query, key, rest, reduction=reduction))
    assert parameters(torch_nn.info_nce_loss)[:3] == ["query", "positive_key", "negative_keys=None"]
